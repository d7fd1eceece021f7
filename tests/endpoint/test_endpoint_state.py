"""The state of our own machine's parts: the saved state is restored, what is hostile is refused whole."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostpc.errors import StreamError
from vhostpc.frontend import Driver, GuestRegion, RingLayout, SharedLog
from vhostpc.guest import sections
from vhostpc.guest.own_machine import MOST_STATE, Block, Spec, open_machine
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.wire.migration.elements import BlockInfo, Configuration, DeviceSection, RamBlocks
from vhostpc.wire.migration.vmdesc import parse, split_by

MIB = 1 << 20
RING = RingLayout.contiguous_at(0, 64)
HEAD = struct.Struct(">II3H12QII")


@contextmanager
def drivers(count: int = 1) -> Iterator[list[Driver]]:
    with RamSet() as ram:
        region = GuestRegion(0, MIB, ram.create("ram", MIB))
        made = [Driver(ram, [region], RING, receive=True) for _ in range(count)]
        try:
            yield made
        finally:
            for driver in made:
                driver.close()


# --- a queue


async def test_a_queue_goes_on_elsewhere() -> None:
    with drivers(2) as (one, two):
        await one.reset()
        assert await one.post(40) == 40
        state = one.save()
        two.load(state)
        assert two.save() == state
        assert two.numbers() == one.numbers()
        assert await two.post(40) == 24  # the slots that are still free, and no other
        assert (await two.look(), two.numbers().avail_index) == (0, 64)


def head(
    *,
    num: int = 64,
    slots: int = 64,
    indices: tuple[int, int, int] = (0, 0, 0),
    frames: int = 0,
    next_: int = 0,
    free: list[int] | None = None,
    holes: list[int] | None = None,
) -> bytes:
    free = list(range(64)) if free is None else free
    holes = holes or []
    numbers = [0, 0, 0, 0, 0, 0, frames, 0, 0, 0, 0, next_]
    return HEAD.pack(num, slots, *indices, *numbers, len(free), len(holes)) + b"".join(
        n.to_bytes(4, "big") for n in free + holes
    )


def test_the_book_of_frames_goes_with_it() -> None:
    with drivers() as (driver,):
        driver.load(head(frames=97, next_=100, holes=[3, 64, 99]))
        assert driver.unseen(0, 100) == 3
        assert [driver.unseen(n, n + 1) for n in (2, 3, 64, 65, 99, 100)] == [0, 1, 1, 0, 1, 1]
        assert driver.unseen(4, 64) == 0
        assert driver.save() == head(frames=97, next_=100, holes=[3, 64, 99])


async def test_its_state_is_no_longer_than_it_says() -> None:
    """The source relies on it while the machine runs. So many lost frames are listed, at most."""
    with drivers() as (driver,):
        driver.load(head(next_=65_536, holes=list(range(65_536))))
        longest = len(driver.save())
        assert longest > 4 * 65_536
    assert 2 * longest + 4096 < MOST_STATE
    async with open_machine(Spec([Block("pc.ram", 8 << 20)], vcpus=3)) as machine:
        found, _ = await machine.save()
        for section in found:
            assert len(section.encode()) < MOST_STATE
        assert sum(len(section.encode()) for section in found) < machine.state_size()


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (b"", "state are malformed"),
        (head()[:-1], "state are malformed"),
        (head() + b"\0", "state are malformed"),
        (head(num=128), "another ring"),
        (head(slots=32), "another ring"),
        (head(free=[0, 0]), "state are malformed"),
        (head(free=[64]), "state are malformed"),
        (head(free=[1 << 31]), "state are malformed"),
        (head(free=list(range(65))), "state are malformed"),
        (head(indices=(1, 1, 0)), "state are malformed"),  # a chain available, and all slots free
        (head(indices=(65, 0, 0), free=[]), "state are malformed"),
        (head(indices=(200, 200, 0), free=[]), "state are malformed"),
        (head(frames=1), "state are malformed"),
        (head(frames=9, next_=10, holes=[2, 3]), "state are malformed"),
        (head(frames=8, next_=10, holes=[3, 2]), "state are malformed"),
        (head(frames=8, next_=10, holes=[3, 3]), "state are malformed"),
        (head(frames=8, next_=10, holes=[3, 10]), "state are malformed"),
        (head(next_=1 << 40), "state are malformed"),
    ],
)
def test_a_state_that_cannot_be_changes_nothing(state: bytes, why: str) -> None:
    with drivers() as (driver,):
        before = driver.save()
        with pytest.raises(StreamError, match=why):
            driver.load(state)
        assert driver.save() == before


@given(st.data())
def test_any_bytes_as_a_state(data: st.DataObject) -> None:
    state = bytearray(head(indices=(4, 4, 0), free=list(range(4, 64)), frames=70, next_=72, holes=[5, 71]))
    for at in data.draw(st.lists(st.integers(0, len(state) - 1), max_size=4)):
        state[at] = data.draw(st.integers(0, 255))
    with drivers() as (driver,):
        try:
            driver.load(bytes(state))
        except StreamError:
            return
        numbers = driver.numbers()
        assert numbers.in_flight <= 64
        assert numbers.received.frames <= numbers.received.next
        driver.load(driver.save())


async def test_a_ring_that_says_more_than_was_available() -> None:
    with RamSet() as ram:
        block = ram.create("ram", MIB)
        with Driver(ram, [GuestRegion(0, MIB, block)], RING, receive=True) as driver:
            await driver.reset()
            await driver.post(5)
            await block.write(RING.used + 2, (5).to_bytes(2, "little"))
            assert await driver.look() == 5
            await block.write(RING.used + 2, (6).to_bytes(2, "little"))
            with pytest.raises(OSError, match="Bad message"):
                await driver.look()


# --- the back-ends' log


@pytest.mark.parametrize("page", [4096, 2 * MIB])
def test_the_log_marks_blocks(page: int, request: pytest.FixtureRequest) -> None:
    if page > 4096:
        request.getfixturevalue("huge_pages")
    with RamSet() as ram:
        low, high = (
            ram.create("low", 8 * MIB, page),
            ram.create("high", 4 * MIB + (page if page > 4096 else 4096), page),
        )
        regions = [GuestRegion(0, low.length, low), GuestRegion(1 << 30, high.length, high)]
        log = SharedLog(regions)
        try:
            assert log.merge(regions) == 0
            last = (1 << 30) + high.length - 4096
            for at in (0, 4096 * 9, low.length - 4096, 1 << 30, last):
                number = at // 4096
                os.pwrite(log.fd, bytes([1 << number % 8]), number // 8)
            expected = {
                ("low", 0),
                ("low", 4096 * 9 // page),
                ("low", low.pages - 1),
                ("high", 0),
                ("high", high.pages - 1),
            }
            assert log.merge(regions) == len(expected)
            found = {(b.name, p) for b in (low, high) for p in range(b.pages) if b.test_bit(Bits.DIRTY, p)}
            assert found == expected
            assert log.dirty_pages() == set()
            assert log.merge(regions) == 0
            with pytest.raises(PermissionError):
                os.ftruncate(log.fd, 4096)  # sealed: a back-end cannot make our look at it fatal
        finally:
            log.close()


def test_a_log_that_does_not_hold_the_block() -> None:
    with RamSet() as ram:
        block = ram.create("ram", MIB)
        log = SharedLog([GuestRegion(0, MIB, block)])
        try:
            with pytest.raises(OSError, match="range"):
                block.merge_log(log.fd, log.size, 1 << 30)
            with pytest.raises(OSError, match="Invalid"):
                block.merge_log(log.fd, log.size, 4096)
        finally:
            log.close()


# --- sections


def made() -> list[DeviceSection]:
    net = {
        "features": 1 << 32,
        "rx_base": 1,
        "tx_base": 2,
        "lost_at_switch": 3,
        "flying_first": 4,
        "flying_end": 5,
        "rx_driver": b"receiving",
        "tx_driver": b"sending",
    }
    return [
        sections.MACHINE.pack(2, 0, {"vcpus": 1, "net_devices": 1, "stopped_ns": 7}),
        sections.NET.pack(3, 0, net),
        sections.VCPU.pack(4, 0, {"state": b"state"}),
        sections.globalstate(5, "running"),
    ]


def test_a_description_says_where_sections_end() -> None:
    """By the rules that hold for QEMU's own streams."""
    text = sections.description(Configuration("vhostpc-1"), made())
    data = b"".join(section.encode() for section in made())
    assert split_by(parse(text), data, 0) == made()
    for device, section in zip(json.loads(text)["devices"], made(), strict=True):
        assert sum(f["size"] for f in device["fields"]) == len(section.body)


def test_globalstate_is_qemus() -> None:
    body = sections.globalstate(5, "running").body
    assert body == (8).to_bytes(4, "big") + b"running".ljust(100, b"\0")
    assert sections.run_state_of(sections.globalstate(5, "paused")) == "paused"
    with pytest.raises(StreamError, match="run state"):
        sections.run_state_of(
            DeviceSection(5, "globalstate", 0, 1, (7).to_bytes(4, "big") + b"running".ljust(100, b"\0"))
        )


@pytest.mark.parametrize("section", made(), ids=lambda s: s.idstr)
def test_other_sections_are_refused(section: DeviceSection) -> None:
    layout = sections.LAYOUTS[section.idstr]
    layout.unpack(section)
    parts = (section.section_id, section.idstr, section.instance)
    for at in range(len(section.body)):
        with pytest.raises(StreamError, match=f"ends after {at} bytes, inside"):
            layout.unpack(DeviceSection(*parts, 1, section.body[:at]))
    with pytest.raises(StreamError, match="1 bytes behind its last field"):
        layout.unpack(DeviceSection(*parts, 1, section.body + b"x"))
    with pytest.raises(StreamError, match="version 2, which is newer than the one known here, 1"):
        layout.unpack(DeviceSection(*parts, 2, section.body))


async def test_what_memory_held_is_gone_before_a_machine_comes() -> None:
    """Also what nobody marks as come: the machine that was here before it left."""
    async with open_machine(Spec([Block("ram", MIB), Block("rom", 64 << 10)]), empty=True) as machine:
        for block in machine.ram.blocks:
            await block.write(block.length // 2, b"old")
        listed = tuple(BlockInfo(block.name, block.length) for block in machine.ram.blocks)
        machine.accept_blocks(RamBlocks(listed), postcopy=True)
        assert [block.holes() for block in machine.ram.blocks] == [[(0, MIB)], [(0, 64 << 10)]]
