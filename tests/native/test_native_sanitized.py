"""The C alone, under the sanitizers: rings that change while they are read, files that shrink meanwhile, the fault
service with many threads, vCPUs whose writes are tracked, the state of a queue with wrong bytes in it, and a device
that dies at any instruction."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native import AHEAD, FAULTS, FLIP, GUARD, LOADS, MAPS, RESTART, STATE, VCPUS, run
from tests.native.twins import check_loads


@pytest.fixture(scope="module")
def flip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FLIP.build(tmp_path_factory.mktemp("flip"))


@pytest.mark.parametrize(("mode", "count"), [("pop", 1_000_000), ("out", 100_000), ("in", 100_000)])
def test_descriptors_flip_while_they_are_read(flip: Path, mode: str, count: int) -> None:
    """Chains were moved and rings broke, both many times, and no byte outside of guest memory was touched."""
    numbers = run(flip, mode, count, 7)
    assert numbers["moved"] >= count
    assert numbers["broken"] > count // 100
    assert numbers["bytes"] > count


def test_files_shrink_while_they_are_read(tmp_path: Path) -> None:
    """A session that is not lost has read its own bytes; a lost one was shrunk; an earlier handler goes on working."""
    numbers = run(GUARD.build(tmp_path), 50)
    assert numbers["lost"] == 50
    assert min(numbers.values()) >= 50


def test_a_page_goes_where_no_mapping_is_left(tmp_path: Path) -> None:
    assert run(MAPS.build(tmp_path))["taken"] > 100


def test_threads_that_wait_ahead_without_a_race(tmp_path: Path) -> None:
    """Requests, threads that cannot be started, closing and opening: each accepted one is served once, or dropped."""
    numbers = run(AHEAD.build(tmp_path), 20)
    assert numbers["rounds"] == 20
    assert min(numbers.values()) > 0


@pytest.mark.ufd
def test_fault_service_without_a_race(tmp_path: Path) -> None:
    """Faults, placing, waking, looking on, changing clients, and the end: no two threads at one word."""
    assert run(FAULTS.build(tmp_path), 10) == {"rounds": 10, "pages": 5120}


@pytest.mark.ufd
def test_loader_and_its_twin_agree(tmp_path: Path) -> None:
    """On random and broken streams, armed and calm: the same verdict at the same byte, the same pages."""
    assert check_loads(LOADS.build(tmp_path), range(2000)) == 2000


@pytest.mark.ufd
def test_vcpus_and_dirty_tracking_without_a_race(tmp_path: Path) -> None:
    """Writers, the loop that lets them, syncs, looking on, and the end: no two threads at one word, no write lost."""
    numbers = run(VCPUS.build(tmp_path), 25)
    assert numbers["rounds"] == 25
    assert numbers["steps"] > 25 * 200


def test_a_state_with_wrong_bytes(tmp_path: Path) -> None:
    """Refused or taken: what is taken saves to the same bytes, and nothing out of bounds is touched."""
    numbers = run(STATE.build(tmp_path), 20_000, 3)
    assert numbers["rounds"] == 20_000
    assert 1000 < numbers["taken"] < 19_000


def test_killed_between_any_two_instructions(tmp_path: Path) -> None:
    """Take, push and give back leave a ring and an inflight region from which the next one goes on, at each step."""
    numbers = run(RESTART.build(tmp_path), 8, 5)
    assert numbers["kills"] == 8
    assert numbers["states"] > 100
