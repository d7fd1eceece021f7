"""Each named point of a migration: bytes up to it are delivered, and none behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.kit.proxied import play, stage
from tests.kit.streams import POSTCOPY, PRECOPY, RECOVERY, h
from vhostpc.proxy import parse_fault
from vhostpc.proxy.points import POINTS

# The return path of the same migration, and of its recovery.
BACK = (
    h("0002 0004 00000001  0002 0004 00000002  0002 0004 00000004")  # PONG 1, 2, 4
    + h("0003 0011 0000000000002000 00001000 04 72616d30")  # REQ_PAGES_ID ram0+0x2000
    + h("0002 0004 00000003")  # PONG 3
    + h("0004 000c 0000000000001000 00001000")  # REQ_PAGES +0x1000
    + h("0001 0004 00000000")  # SHUT
)
RECOVERY_BACK = (
    h("0005 0005 04 72616d30 0000000000000008 0500000000000000 0123456789abcdef")
    + h("0005 0005 04 726f6d30 0000000000000008 0000000000000000 0123456789abcdef")
    + h("0006 0004 00000001  0001 0004 00000000")  # RESUME_ACK, SHUT
)

FORWARD_CUTS = {
    "head": 8,
    "configuration": 18,
    "configuration,at=before": 8,
    "ping=1": 32,
    "advise": 53,
    "advise,at=3": 35,
    "blocks": 112,
    "blocks,at=before": 70,
    "page": 4231,
    "page=2": 4240,
    "page=3,at=before": 4386,
    "round": 4253,
    "round=2,at=before": 8495,
    "discard": 4281,
    "discard=2": 4309,
    "discard=2,at=middle": 4295,
    "ping=2": 4318,
    "package": 4372,
    "package,at=before": 4318,
    "package,at=7": 4334,
    "package,at=0x1000": 4372,
    "listen": 4332,
    "section=clk": 4358,
    "section=clk,at=before": 4332,
    "section=clk,at=middle": 4345,
    "ping=3": 4367,
    "run": 4372,
    "run,at=before": 4367,
    "ping=4": 4381,
    "postcopy-page": 8495,
    "postcopy-page=2,at=before": 8513,
    "postcopy-page=2,at=9": 8522,
    "postcopy-page=3": 12631,
    "eof": 12645,
    "eof,at=before": 12644,
    "byte=0": 0,
    "byte=100": 100,
    "byte=4372": 4372,
    "postcopy-byte=0": 4318,
    "postcopy-byte=0x10": 4334,
}
RECOVERY_CUTS = {
    "recv-bitmap": 10,
    "recv-bitmap=2": 20,
    "recv-bitmap=2,at=1": 11,
    "resume,at=before": 20,
    "resume": 25,
    "postcopy-page": 4139,
    "postcopy-page,at=before": 30,
    "page=2": 4171,
    "round=2": 4184,
    "postcopy-byte=7": 7,
    "eof,at=before": 4184,
}
BACK_CUTS = {
    "pong=1": 8,
    "pong=4,at=before": 16,
    "request": 45,
    "request,at=before": 24,
    "pong=3": 53,
    "request=2": 69,
    "request=2,at=middle": 61,
    "shut,at=before": 69,
    "shut": 77,
    "back-byte=30": 30,
}
RECOVERY_BACK_CUTS = {
    "bitmap": 33,
    "bitmap,at=middle": 16,
    "bitmap=2,at=before": 33,
    "bitmap=2": 66,
    "resume-ack,at=before": 66,
    "resume-ack": 74,
    "shut": 82,
}
PIECES = [1 << 20, 1000, 7]


@pytest.mark.parametrize(("piece", "tcp"), [*((piece, False) for piece in PIECES), (1000, True)])
@pytest.mark.parametrize(
    ("recovery", "point", "byte"),
    [(False, *row) for row in FORWARD_CUTS.items()] + [(True, *row) for row in RECOVERY_CUTS.items()],
)
async def test_cut_forward(
    recovery: bool, point: str, byte: int, piece: int, tcp: bool, tmp_path: Path
) -> None:
    data = RECOVERY if recovery else POSTCOPY
    async with stage(tmp_path, [f"cut@{point}"], tcp=tcp) as here:
        there, returned = await play(here, data, b"", piece)
        end = await here.proxy.wait("end")
        assert there.data == data[:byte]
        assert end.details["forward"] == byte
        assert end.details["how"] == "cut"
        assert "undelivered" not in end.details
        assert here.proxy.pending == []
        await here.proxy.wait("fault", way="forward", byte=byte, fault=str(parse_fault(f"cut@{point}")))
        if tcp:  # the source may have been told by its write
            assert (there.how, returned.data) == ("reset", b"")


@pytest.mark.parametrize(("piece", "tcp"), [*((piece, False) for piece in PIECES), (1000, True)])
@pytest.mark.parametrize(
    ("recovery", "point", "byte"),
    [(False, *row) for row in BACK_CUTS.items()] + [(True, *row) for row in RECOVERY_BACK_CUTS.items()],
)
async def test_cut_back(recovery: bool, point: str, byte: int, piece: int, tcp: bool, tmp_path: Path) -> None:
    forward, back = (RECOVERY, RECOVERY_BACK) if recovery else (POSTCOPY, BACK)
    async with stage(tmp_path, [f"cut@{point}"], tcp=tcp) as here:
        _, returned = await play(here, forward[:100], back, piece)
        assert returned.data == back[:byte]
        await here.proxy.wait("end", back=byte, how="cut")


def test_each_point_is_cut_at() -> None:
    tables = (FORWARD_CUTS, RECOVERY_CUTS, BACK_CUTS, RECOVERY_BACK_CUTS)
    tried = {key.partition("=")[0].partition(",")[0] for table in tables for key in table}
    assert set(POINTS) - tried == {"switchover", "random", "time"}


async def test_switchover(tmp_path: Path) -> None:
    """Of QEMU 10.0: before the last part of RAM."""
    at = PRECOPY.index(h("03 00000007"))
    data = PRECOPY[:at] + h("08 000b 0000") + PRECOPY[at:]
    async with stage(tmp_path, ["cut@switchover"]) as here:
        there, _ = await play(here, data, b"")
        assert there.data == data[: at + 5]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("point", ["eof", "eof,at=before"])
async def test_eof_of_a_precopy(point: str, piece: int, tmp_path: Path) -> None:
    """It is told from the bytes of a device by the description behind it."""
    async with stage(tmp_path, [f"cut@{point}"]) as here:
        there, _ = await play(here, PRECOPY, b"", piece)
        assert there.data == PRECOPY[: 8381 if point == "eof" else 8380]


@pytest.mark.parametrize("piece", PIECES)
async def test_a_recovery_of_a_stream_that_passed_before(piece: int, tmp_path: Path) -> None:
    """The second connection has no head; its blocks are those of the first."""
    faults = ["cut@postcopy-page=1,on=main", "cut@postcopy-page,on=recovery", "cut@run"]
    async with stage(tmp_path, faults) as here:
        there, _ = await play(here, POSTCOPY, b"", piece)
        assert there.data == POSTCOPY[:8495]
        there, _ = await play(here, RECOVERY, b"", piece)
        assert there.data == RECOVERY[:4139]
        kinds = [event.details for event in here.proxy.events if event.name == "kind"]
        assert kinds == [{"kind": "main"}, {"kind": "recovery", "recovery": 1}]
        there, _ = await play(here, RECOVERY, RECOVERY_BACK, piece)
        assert there.data == RECOVERY
        assert list(map(str, here.proxy.pending)) == ["cut@run"]
        assert not [event for event in here.proxy.events if event.name == "unreadable"]


async def test_a_preempt_channel(tmp_path: Path) -> None:
    """Pages alone, of the blocks of the main connection, which is open meanwhile."""
    urgent = (
        h("0000000000002008 04 72616d30") + b"\xbb" * 4096 + h("0000000000001022 00") + h("0000000000000010")
    )
    async with stage(tmp_path, ["hold=0@page=2,on=preempt", "cut@round,on=preempt,alone"]) as here:
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, POSTCOPY[:4372])
            await here.proxy.wait("run")
            there, _ = await play(here, urgent, b"")
            assert there.data == urgent
            held = await here.proxy.wait("fault", action="hold")
            assert held.details["byte"] == len(urgent) - 8
            await here.proxy.wait("round", connection=2, pages={"data": 1, "zero": 1})
            await here.proxy.wait("end", connection=2, how="cut")
            await near.send_all(POSTCOPY[4372:])
            await near.send_eof()
            got = b""
            async for data in far:
                got += data
            assert got == POSTCOPY
            await far.send_eof()


async def test_a_lost_link_takes_all_connections(tmp_path: Path) -> None:
    async with stage(tmp_path, ["cut@page=1,on=preempt"]) as here:
        async with here.connection() as (near, far):
            await near.send_all(POSTCOPY[:4372])
            await here.proxy.wait("run")
            async with here.connection() as (urgent, _):
                await urgent.send_all(h("0000000000000002 04 72616d30 00") + h("0000000000001022 00"))
                for number in (1, 2):
                    await here.proxy.wait("end", connection=number, how="cut")
            got = b""
            async for data in far:
                got += data
            assert got == POSTCOPY[:4372]
