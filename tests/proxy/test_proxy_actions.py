"""What a proxy does at a point: each action, in one direction and in both, on one connection and on all."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import pytest
import trio

from tests.kit.proxied import Got, give, play, stage, take
from tests.kit.streams import POSTCOPY, RECOVERY, h
from tests.proxy.test_proxy_points import BACK, RECOVERY_BACK
from vhostpc.proxy import Proxy, open_proxy

RUN = 4372
BOTH = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


def names(proxy: Proxy) -> list[str]:
    return [event.name for event in proxy.events]


@BOTH
async def test_nothing_is_changed(tcp: bool, tmp_path: Path) -> None:
    async with stage(tmp_path, tcp=tcp) as here:
        there, returned = await play(here, POSTCOPY, BACK)
        assert (there.data, there.how) == (POSTCOPY, "eof")
        assert (returned.data, returned.how) == (BACK, "eof")
        end = await here.proxy.wait("end")
        assert end.details == {"how": "closed", "forward": len(POSTCOPY), "back": len(BACK)}
        assert here.proxy.connections == 0


@BOTH
async def test_a_timeline(tcp: bool, tmp_path: Path) -> None:
    async with stage(tmp_path, tcp=tcp) as here:
        await play(here, POSTCOPY, BACK)
        events = here.proxy.events
        assert [event.name for event in events if event.way == "forward" and event.offset >= 0] == [
            *("head", "configuration", "open-return-path", "ping", "advise", "start", "blocks", "round"),
            *("discard", "discard", "ping", "package", "listen", "section", "ping", "run", "ping"),
            *("round", "round", "eof"),
        ]
        back = [event.name for event in events if event.way == "back" and event.offset >= 0]
        assert back == "pong pong pong request pong request shut".split()
        assert [event.name for event in events if event.way == ""] == "listening connect kind end".split()
        assert [event.time for event in events] == sorted(event.time for event in events)
        rounds = [event.details for event in events if event.name == "round"]
        assert rounds == [
            {"number": 1, "pages": {"data": 1, "zero": 1}, "last": False},
            {"number": 2, "pages": {"data": 1}, "last": False},
            {"number": 3, "pages": {"data": 1, "zero": 1}, "last": True},
        ]
        asked = await here.proxy.wait("request", number=2)
        assert asked.details == {"number": 2, "block": "ram0", "start": 0x1000, "length": 0x1000}
        assert asked.as_json().keys() >= {"time", "event", "connection", "way", "offset", "block"}


async def test_a_recovery_is_read(tmp_path: Path) -> None:
    async with stage(tmp_path) as here:
        await play(here, RECOVERY, RECOVERY_BACK)
        forward = [e.name for e in here.proxy.events if e.way == "forward" and e.offset >= 0]
        assert forward == "recv-bitmap recv-bitmap resume round round eof".split()
        back = [e.name for e in here.proxy.events if e.way == "back" and e.offset >= 0]
        assert back == "bitmap bitmap resume-ack shut".split()
        told = await here.proxy.wait("bitmap", number=1)
        assert told.details == {"number": 1, "block": "ram0", "received": 2}


@BOTH
async def test_fin(tcp: bool, tmp_path: Path) -> None:
    """Both ends read the end in order; what they go on to send is lost."""
    async with stage(tmp_path, ["fin@run"], tcp=tcp) as here:
        there, returned = await play(here, POSTCOPY, BACK)
        assert (there.data, there.how) == (POSTCOPY[:RUN], "eof")
        assert returned.how == "eof"
        assert (await here.proxy.wait("end")).details["how"] == "closed"


@BOTH
async def test_cut_one_direction(tcp: bool, tmp_path: Path) -> None:
    """The other one lives on."""
    async with stage(tmp_path, ["cut@run,way=forward", "cut@shut,at=before"], tcp=tcp) as here:
        there, returned = await play(here, POSTCOPY, BACK)
        assert (there.data, there.how) == (POSTCOPY[:RUN], "eof")
        assert returned.data == BACK[:-8]
    folder = tmp_path / "back"
    folder.mkdir()
    async with stage(folder, ["cut@pong=3,way=back"], tcp=tcp) as here:
        there, returned = await play(here, POSTCOPY, BACK)
        assert (there.data, there.how) == (POSTCOPY, "eof")
        assert (returned.data, returned.how) == (BACK[:53], "eof")


@BOTH
async def test_drop(tcp: bool, tmp_path: Path) -> None:
    """Neither bytes nor ends come through, in one direction or in both, until the proxy ends."""
    there, returned = Got(), Got()
    async with stage(tmp_path, ["drop@run"], tcp=tcp) as here:
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(take, far, there)
            nursery.start_soon(take, near, returned)
            await give(near, POSTCOPY)
            await give(far, BACK)
            await here.proxy.wait("fault")
            await near.send_eof()
            await here.proxy.wait("closed", way="forward")
            assert there.data == POSTCOPY[:RUN]
            assert (there.how, returned.how) == ("", "")
            assert here.proxy.connections == 1
            nursery.cancel_scope.cancel()


async def test_drop_one_direction(tmp_path: Path) -> None:
    async with stage(tmp_path, ["drop@pong=3,way=back"]) as here:
        returned, there = Got(), Got()
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(take, near, returned)
            nursery.start_soon(take, far, there)
            await give(near, POSTCOPY[:RUN])
            await here.proxy.wait("run")
            await give(far, BACK)
            await here.proxy.wait("fault")
            await give(near, POSTCOPY[RUN:])
            await near.send_eof()
            await here.proxy.wait("eof")
            await here.proxy.wait("shut")
            await here.proxy.wait("closed", way="forward")
            await far.send_eof()
            await here.proxy.wait("end", forward=len(POSTCOPY), back=53)
        assert (returned.data, there.data) == (BACK[:53], POSTCOPY)


async def test_hold(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Nothing passes in either direction for that time, then all does."""
    async with stage(tmp_path, ["hold=20@run,at=before"]) as here:
        there, returned = Got(), Got()
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            begin = trio.current_time()
            nursery.start_soon(take, near, returned)
            nursery.start_soon(take, far, there)
            await give(near, POSTCOPY)
            await here.proxy.wait("fault")
            await give(far, BACK)
            await here.proxy.wait("shut")
            await trio.sleep(0.5)
            while there.data != POSTCOPY or returned.data != BACK:
                held = (bytes(there.data), bytes(returned.data)) == (POSTCOPY[:4367], b"")
                assert held == (trio.current_time() < begin + 20)
                await trio.sleep(1)
            nursery.cancel_scope.cancel()


async def test_delay(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Each byte by itself, a second after the one before; then it is over."""
    async with stage(tmp_path, ["delay=1@byte=10,for=15"]) as here:
        there = Got()
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(take, far, there)
            await give(near, POSTCOPY)
            sizes = set[int]()
            while there.data != POSTCOPY:
                sizes.add(len(there.data))
                await trio.sleep(0.5)
            assert {*range(10, 24)} <= sizes
            nursery.cancel_scope.cancel()


async def test_lag(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """The return path comes five seconds late, the other direction at once; the cut behind it waits for its bytes."""
    faults = ["lag=5@back-byte=8", "cut@shut"]
    async with stage(tmp_path, faults) as here:
        there, returned = Got(), Got()
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(take, far, there)
            nursery.start_soon(take, near, returned)
            begin = trio.current_time()
            await give(near, POSTCOPY)
            await here.proxy.wait("eof")
            await give(far, BACK)
            while not returned.how:
                assert (returned.data == BACK) <= (trio.current_time() >= begin + 5)
                await trio.sleep(0.5)
            assert (there.data, returned.data) == (POSTCOPY, BACK)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("piece", [1 << 20, 7])
@pytest.mark.parametrize(
    ("fault", "at", "old", "new"),
    [
        ("corrupt@head", 7, "03", "02"),
        ("corrupt=magic@head", 3, "4d", "4c"),
        ("corrupt@ping=3", 4366, "03", "02"),
        ("corrupt@page", 4230, "aa", "ab"),
        ("corrupt=offset@postcopy-page", 4392, "20", "30"),
        ("corrupt=flags@postcopy-page", 4393, "08", "88"),
        ("corrupt=block@page", 134, "30", "31"),
        ("corrupt=footer@round=2", 8507, "07", "06"),
        ("corrupt=block,to=rom0@discard", 4260, "72616d30", "726f6d30"),
        ("corrupt=size@discard,to=0x3000", 4273, "0000000000002000", "0000000000003000"),
        ("corrupt@section=clk", 4352, "ef", "ee"),
        ("corrupt@section=clk,at=0", 4349, "de", "df"),
        ("corrupt@package,to=44", 4323, "0000002d", "0000002c"),
        ("corrupt=command@run", 4369, "05", "04"),
        ("corrupt@eof", 12644, "00", "40"),
        ("corrupt@byte=2", 2, "56", "57"),
        ("corrupt@byte=2,to=0", 2, "56", "00"),
        ("corrupt@postcopy-byte=1", 4319, "00", "01"),
    ],
)
async def test_corrupt(fault: str, at: int, old: str, new: str, piece: int, tmp_path: Path) -> None:
    action, _, where = fault.partition("@")
    action, comma, option = action.partition(",")
    text = f"{action}@{where}" + (comma + option)
    expected = bytearray(POSTCOPY)
    assert expected[at : at + len(h(old))] == h(old)
    expected[at : at + len(h(old))] = h(new)
    async with stage(tmp_path, [text]) as here:
        there, _ = await play(here, POSTCOPY, b"", piece)
        assert there.data == expected
        done = await here.proxy.wait("fault")
        assert done.details["changed"] == at


@pytest.mark.parametrize(
    ("fault", "at", "old", "new"),
    [
        ("corrupt=size@bitmap,to=16", 9, "0000000000000008", "0000000000000010"),
        ("corrupt=mark@bitmap=2", 65, "ef", "ee"),
        ("corrupt@bitmap,to=7", 17, "0500000000000000", "0000000000000007"),
        ("corrupt=block@bitmap=2", 41, "30", "31"),
        ("corrupt@resume-ack,to=2", 70, "00000001", "00000002"),
        ("corrupt@shut,to=1", 78, "00000000", "00000001"),
    ],
)
async def test_corrupt_the_answers_of_a_recovery(
    fault: str, at: int, old: str, new: str, tmp_path: Path
) -> None:
    expected = bytearray(RECOVERY_BACK)
    assert expected[at : at + len(h(old))] == h(old)
    expected[at : at + len(h(old))] = h(new)
    async with stage(tmp_path, [fault]) as here:
        _, returned = await play(here, RECOVERY, RECOVERY_BACK)
        assert returned.data == expected


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("corrupt=block@page=2", "it has no block"),
        ("corrupt=block@page,to=x", "its block has 4 bytes, 'x' has 1"),
        ("corrupt@section=clk,at=4", "it has no body with a byte 4"),
    ],
)
async def test_a_field_that_is_not_there(fault: str, why: str, tmp_path: Path) -> None:
    """Nothing is changed, and the event says why."""
    async with stage(tmp_path, [fault]) as here:
        there, _ = await play(here, POSTCOPY, b"")
        assert there.data == POSTCOPY
        assert (await here.proxy.wait("fault")).details["failed"] == why


async def test_one_after_the_other(tmp_path: Path) -> None:
    """A fault waits until the one before it was done, and counts on its own connection."""
    faults = ["cut@ping=4", "cut@postcopy-page=1,on=2", "cut@bitmap,on=recovery-1", "cut@eof,at=before"]
    async with stage(tmp_path, faults) as here:
        for data, back, expected in (
            (POSTCOPY, b"", POSTCOPY[:4381]),
            (POSTCOPY, b"", POSTCOPY[:8495]),
            (RECOVERY[:20], RECOVERY_BACK, RECOVERY[:20]),
            (RECOVERY, b"", RECOVERY[:-1]),
            (RECOVERY, RECOVERY_BACK, RECOVERY),
        ):
            there, _ = await play(here, data, back)
            assert there.data == expected
        done = [event.details["fault"] for event in here.proxy.events if event.name == "fault"]
        assert done == [
            "cut@ping=4",
            "cut@postcopy-page=1,on=2",
            "cut@bitmap=1,on=recovery-1",
            "cut@eof,at=before",
        ]
        assert here.proxy.pending == []


async def test_several_times(tmp_path: Path) -> None:
    async with stage(tmp_path, ["cut@byte=5,times=2", "cut@byte=6,times=always"]) as here:
        for expected in (5, 5, 6, 6, 6):
            there, _ = await play(here, POSTCOPY, b"")
            assert there.data == POSTCOPY[:expected]
        assert here.proxy.pending == []


@BOTH
async def test_at_a_time(tcp: bool, tmp_path: Path) -> None:
    """A connection that says nothing is cut, too; added while it is open, it is done at once."""
    async with stage(tmp_path, tcp=tcp) as here:
        got = Got()
        async with here.connection() as (_, far), trio.open_nursery() as nursery:
            nursery.start_soon(take, far, got)
            await here.proxy.wait("connect")
            here.proxy.add("cut@time=0")
            await here.proxy.wait("end", how="cut", forward=0)
        assert not got.data


async def test_bytes_that_nobody_can_read(tmp_path: Path) -> None:
    """TLS, multifd, and a stream that is no stream: carried, and cut at a byte."""
    for number, (data, kind) in enumerate(
        [
            (b"\x16\x03\x01" + bytes(5000), "tls"),
            (h("11223344 00000001") + bytes(1000), "multifd"),
            (b"hello" * 100, "unknown"),
            (POSTCOPY[:53] + b"\xff" * 100, "main"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with stage(folder, ["cut@byte=150,on=2"]) as here:
            there, returned = await play(here, data, b"anything")
            assert (there.data, returned.data) == (data, b"anything")
            await here.proxy.wait("kind", kind=kind)
            assert ("unreadable" in names(here.proxy)) is (kind == "main")
            there, _ = await play(here, data, b"")
            assert there.data == data[:150]


async def test_half_an_element_is_passed_in_time(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """An element that waits for its rest, since a fault is due in it, does not wait for ever."""
    async with stage(tmp_path, ["cut@run,at=before"]) as here:
        async with here.connection() as (near, far):
            await near.send_all(POSTCOPY[:4])
            assert await far.receive_some() == POSTCOPY[:4]
            await near.send_all(POSTCOPY[4:8])
            assert await far.receive_some() == POSTCOPY[4:8]


async def test_an_end_that_is_reset(tmp_path: Path) -> None:
    """The other one hears it, and gets all that was sent before."""
    async with stage(tmp_path, tcp=True) as here:
        got = Got()
        async with here.connection() as (near, far), trio.open_nursery() as nursery:
            await give(near, POSTCOPY)
            await here.proxy.wait("eof")
            near.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
            await near.aclose()
            nursery.start_soon(take, far, got)
            await here.proxy.wait("end", how="reset")
        assert (got.data, got.how) == (POSTCOPY, "reset")


async def test_nobody_listens_there(tmp_path: Path) -> None:
    async with open_proxy(f"unix:{tmp_path}/near", f"unix:{tmp_path}/nothing") as proxy:
        async with await trio.open_unix_socket(tmp_path / "near") as near:
            refused = await proxy.wait("refused", connection=1)
            assert "No such file" in refused.details["reason"]
            with contextlib.suppress(trio.BrokenResourceError):
                assert await near.receive_some() == b""
        assert proxy.connections == 0


async def test_lost_bytes_are_told_and_break_nothing(tmp_path: Path) -> None:
    """What passes no more is still read; it is marked, and no fault is due in it."""
    async with stage(tmp_path, ["cut@ping=2,way=forward", "cut@run"]) as here:
        there, _ = await play(here, POSTCOPY, BACK)
        assert there.data == POSTCOPY[:4318]
        told = {event.name: event.details.get("lost", False) for event in here.proxy.events}
        assert (told["discard"], told["package"], told["run"], told["shut"]) == (False, True, True, False)
        assert list(map(str, here.proxy.pending)) == ["cut@run"]


@BOTH
async def test_nothing_is_left(tcp: bool, tmp_path: Path) -> None:
    """Neither descriptors nor tasks, of connections that ended in each way, and of a proxy that ended before them."""
    actions = ["cut", "fin", "drop", "hold=0", "lag=0", "delay=0", "corrupt", "cut"]
    points = ["run", "request=2", "postcopy-page", "byte=100", "eof,at=before"]
    faults = [
        f"{action}@{point}"
        for action in actions
        for point in points
        if action != "corrupt" or "=" not in point
    ]
    gc.collect()

    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living

    before = left()
    async with contextlib.AsyncExitStack() as later, stage(tmp_path, faults, tcp=tcp) as here:
        events = here.proxy.events
        count = 0
        while here.proxy.pending:
            fault = here.proxy.pending[0]
            if fault.action == "drop":
                since = len(events)
                async with here.connection() as (near, far):
                    await give(near, POSTCOPY[:100])
                    await here.proxy.wait("kind", since)
                    await give(far, BACK)
                    await give(near, POSTCOPY[100:])
                    await here.proxy.wait("fault", since)
            else:
                await play(here, POSTCOPY, BACK)
            count += 1
            await here.proxy.wait("end", connection=count)
        await later.enter_async_context(here.connection())
        near, _ = await later.enter_async_context(here.connection())
        await give(near, POSTCOPY)
        await here.proxy.wait("eof", connection=count + 2)
        assert here.proxy.connections == 2
    assert [event.details["how"] for event in events if event.name == "end"][-2:] == ["left"] * 2
    assert left() == before


async def test_drop_while_nobody_reads(tmp_path: Path) -> None:
    """A sender goes on although its receiver takes nothing: all is lost."""
    async with stage(tmp_path) as here:
        async with here.connection() as (near, _), trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, b"x" * (4 << 20))
            await here.proxy.wait("kind")
            await trio.testing.wait_all_tasks_blocked(0.05)
            here.proxy.add("drop@time=0")
            await here.proxy.wait("fault")
        # Left when all of it was sent.


async def test_an_end_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut does not wait for ever for it, and says so."""
    monkeypatch.setattr("vhostpc.proxy.side.PATIENCE", 0.05)
    async with stage(tmp_path, tcp=True) as here:
        async with here.connection() as (near, _), trio.open_nursery() as nursery:
            nursery.start_soon(give, near, b"x" * (64 << 20))
            await here.proxy.wait("kind")
            await trio.testing.wait_all_tasks_blocked(0.05)
            here.proxy.add("cut@time=0")
            await here.proxy.wait("end", how="cut", undelivered=True)


async def test_a_fault_that_comes_late(tmp_path: Path) -> None:
    """Added when a part of its element had passed: done where it can be, and it says so."""
    async with stage(tmp_path) as here:
        async with here.connection() as (near, far):
            await near.send_all(POSTCOPY[:4340])
            got = b""
            while len(got) < 4340:
                got += await far.receive_some()
            here.proxy.add("cut@section=clk,at=before")
            await near.send_all(POSTCOPY[4340:RUN])
            await here.proxy.wait("fault", late=True, byte=4340)
            await here.proxy.wait("end", how="cut", forward=4340)


async def test_a_stream_that_ends_early(tmp_path: Path) -> None:
    async with stage(tmp_path) as here:
        there, _ = await play(here, POSTCOPY[:4340], b"")
        assert there.data == POSTCOPY[:4340]
        told = await here.proxy.wait("truncated")
        assert told.details["reason"].endswith("the stream ends inside the package at byte 4318")
