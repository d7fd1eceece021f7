"""Sizes: what may be typed for one, and that they are told in the units in which people give them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from vhostpc.cli.endpoint_command import size
from vhostpc.migration.held import HeldMachine
from vhostpc.units import in_units, page_sizes, sizes_differ
from vhostpc.wire.migration.elements import BlockInfo, RamBlocks

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *[("256M", 256 * MIB), ("256m", 256 * MIB), ("256MB", 256 * MIB), ("268435456", 256 * MIB)],
        *[("0x10000000", 256 * MIB), ("0X10000000", 256 * MIB), ("1.5G", 1536 * MIB), ("4096B", 4096)],
        *[("0x1b", 27), ("2T", 2 << 40), ("7E", 7 << 60)],
    ],
)
def test_sizes_are_typed_as_qemu_takes_them(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *[("256X", "is not a size such as 256M"), ("", "is not a size"), ("-4096", "is not a size")],
        *[("1.5", "is not a size"), ("M", "is not a size"), ("BB", "is not a size")],
        *[("0x10M", "a hexadecimal number is whole bytes, without a unit"), ("0x", "a hexadecimal number")],
        *[("8E", "more than the largest file size"), ("16E", "more than the largest file size")],
    ],
)
def test_what_is_no_size_is_refused_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(click.BadParameter, match=why):
        size(text)


def endpoint(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", "unix:/nowhere/q", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    return done.stderr


def test_a_machine_of_a_hexadecimal_size() -> None:
    """It is made; only the monitor cannot be."""
    assert "cannot listen on /nowhere/q" in endpoint("--ram", "mem=0x400000,page=0x1000")


@pytest.mark.parametrize(
    ("ram", "told"),
    [
        ("mem=0x500000,page=2M", "5 MiB is not a whole number of pages of 2 MiB"),
        (
            "mem=4M,page=3K",
            "page=3K: the size of a host page must be a power of two, at least 4 KiB, not 3 KiB",
        ),
        ("mem=1000G", "a machine of 1000 GiB does not fit: this computer has "),
        # More than any address space has.
        ("mem=1048576T", "RAM block 'mem', 1048576 TiB in pages of 4 KiB, cannot be created"),
    ],
)
def test_what_was_typed_comes_back_in_its_units(ram: str, told: str) -> None:
    assert told in endpoint("--ram", ram, "--incoming", "defer", "--vcpus", "1")  # nothing is filled


def test_a_block_of_another_size() -> None:
    with (
        HeldMachine(lengths={"mem": 256 * MIB}) as machine,
        pytest.raises(Exception, match="Size") as refused,
    ):
        machine.accept_blocks(RamBlocks((BlockInfo("mem", 512 * MIB),)), postcopy=False)
    told = "Size mismatch: mem: 0x20000000 != 0x10000000 (512 MiB at the source, 256 MiB here)"
    assert str(refused.value) == told == sizes_differ("mem", 512 * MIB, 256 * MIB)


def test_pages_of_another_size() -> None:
    with (
        HeldMachine(page_sizes={"mem": 2 * MIB}) as machine,
        pytest.raises(Exception, match="pages") as refused,
    ):
        machine.accept_blocks(RamBlocks((BlockInfo("mem", 4 * MIB),)), postcopy=True)
    assert str(refused.value) == "RAM block 'mem' has pages of 4 KiB at the source, not of 2 MiB"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        *[(0, "0 bytes"), (1, "1 byte"), (4095, "4095 bytes"), (4096, "4 KiB"), (1536 * MIB, "1536 MiB")],
        *[(1 << 30, "1 GiB"), (5 << 40, "5 TiB"), ((1 << 40) + 1, "1099511627777 bytes")],
    ],
)
def test_units_lose_nothing(count: int, words: str) -> None:
    assert in_units(count) == words


def test_a_word_of_page_sizes() -> None:
    assert page_sizes(0x201000) == "4 KiB and 2 MiB"
    assert page_sizes(0) == page_sizes(None) == "no size"
