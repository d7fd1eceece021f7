"""The text monitor on its own: sockets, terminals and pipes; beside QEMU's; with clients that mean harm."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import trio

from tests.kit.fake_endpoint import FakeEndpoint
from tests.kit.qmp_wire import client as qmp_client
from tests.kit.qmp_wire import ours as qmp_ours
from tests.kit.terminal_wire import Terminal, client, ours, qemu
from tests.kit.until import until
from tests.qemu.test_qemu_monitor import LINES
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import VhostpcError
from vhostpc.migration.phase import Event
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Unix
from vhostpc.qmp import MigrationInfo, RamInfo, TextMonitor
from vhostpc.qmp.line import Line
from vhostpc.qmp.listening import CLIENTS
from vhostpc.qmp.sizes import TooLarge, size
from vhostpc.qmp.terminal import MAX_LINE, Lines

ALL = tuple(DIALECTS)
NOTHING = "VM status: paused (prelaunch)\r\n"
TOO_LONG = "Error: a line has at most 4095 bytes: this one was not run\r\n"


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


# --- beside QEMU's


@pytest.mark.qemu
@pytest.mark.parametrize("compat", ALL)
async def test_it_says_what_qemus_says(compat: Compat, tmp_path: Path) -> None:
    odd: list[str | bytes] = [
        b"abc\xff\xfe",
        "bögus".encode(),
        b"a\x00b",
        b"stop;info status",
        b"#x",
        b"info migrate",
    ]
    async with qemu(compat, tmp_path) as theirs, ours(FakeEndpoint(compat), tmp_path):
        own = Terminal(tmp_path / "text")
        with own.sock:
            assert await own.text() == await theirs.text()  # the greeting
            for line in [*odd, *LINES]:
                assert await own.ask(line) == await theirs.ask(line), line
            assert await own.ask("quit") == await theirs.ask("quit") == ""
            assert await own.sock.recv(1) == b""


@pytest.mark.qemu
@pytest.mark.parametrize("compat", ALL)
async def test_a_synchronous_migration_says_what_qemus_says(compat: Compat, tmp_path: Path) -> None:
    endpoint = FakeEndpoint(compat)
    line = 'migrate "exec:cat >/dev/null"'
    async with qemu(compat, tmp_path) as theirs, ours(endpoint, tmp_path), client(tmp_path) as own:
        await theirs.text()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(complete, endpoint)
            assert await own.ask(line) == await theirs.ask(line) == ""
        mine, real = await own.ask("info migrate"), await theirs.ask("info migrate")
        status = "Migration status: completed\r\ntotal time: "
        if DIALECTS[compat].grouped_info:
            status = "Status: \t\tcompleted\r\n"
        assert mine.partition(status)[:2] == real.partition(status)[:2]
        assert await own.ask("migrate -d bogus") != ""


@pytest.mark.qemu
@pytest.mark.parametrize("compat", ALL)
async def test_a_failed_migration_looks_as_with_qemu(compat: Compat, tmp_path: Path) -> None:
    endpoint = FakeEndpoint(compat)
    async with qemu(compat, tmp_path) as theirs, ours(endpoint, tmp_path), client(tmp_path) as own:
        await theirs.text()
        for terminal in (own, theirs):
            assert await terminal.ask("migrate -d unix:/nowhere/x") == ""
        endpoint.extra = MigrationInfo(
            total_time=0, error_desc="Failed to connect to '/nowhere/x': No such file or directory"
        )
        endpoint.move(Event.FAIL)
        with trio.fail_after(30):
            while "failed" not in (real := await theirs.ask("info migrate")):
                pass
        assert await own.ask("info migrate") == real


def test_numbers_that_are_none_are_not_shown(tmp_path: Path) -> None:
    """As in QEMU's text; these lines need a real guest to be seen there."""

    async def main() -> str:
        endpoint = FakeEndpoint()
        ram = RamInfo(total=1 << 20, dirty_pages_rate=7, postcopy_requests=3, postcopy_bytes=4096)
        endpoint.extra = MigrationInfo(ram=ram)
        async with ours(endpoint, tmp_path), client(tmp_path) as own:
            return await own.ask("info migrate")

    found = trio.run(main)
    tail = ["dirty pages rate: 7 pages", "postcopy request count: 3", "postcopy ram: 4 kbytes"]
    assert found.split("\r\n")[-4:-1] == tail
    assert "precopy ram" not in found


def test_numbers_in_groups(tmp_path: Path) -> None:
    """What a QEMU 11.1.3 said of these numbers."""

    async def main() -> str:
        endpoint = FakeEndpoint("11.1")
        for event in (Event.START, Event.CONNECT):
            endpoint.move(event)
        ram = RamInfo(
            total=67641344,
            transferred=1972443,
            remaining=64770048,
            duplicate=225,
            normal=480,
            dirty_pages_rate=3,
            mbps=10.50768,
            pages_per_second=320,
            dirty_sync_count=16,
            precopy_bytes=1972069,
        )
        endpoint.extra = MigrationInfo(
            ram=ram, remaining=64901120, setup_time=1, total_time=1504, expected_downtime=49412
        )
        async with ours(endpoint, tmp_path), client(tmp_path) as own:
            return await own.ask("info migrate")

    assert trio.run(main).splitlines() == [
        "Status: \t\tactive",
        "Time (ms): \t\ttotal=1504, setup=1, exp_down=49412",
        "Remaining: \t\t61.9 MiB",
        "RAM info:",
        "  Throughput (Mbps): \t10.51",
        "  Sizes: \t\tpagesize=4 KiB, total=64.5 MiB",
        "  Transfers: \t\ttransferred=1.88 MiB, remain=61.8 MiB",
        "    Channels: \t\tprecopy=1.88 MiB, multifd=0 B, postcopy=0 B",
        "    Page Types: \tnormal=480, zero=225",
        "  Page Rates (pps): \ttransfer=320, dirty=3",
        "  Others: \t\tdirty_syncs=16",
    ]


# --- what a person does


async def complete(endpoint: FakeEndpoint) -> None:
    await until(lambda: endpoint.course.status is Status.SETUP)
    for event in (Event.CONNECT, Event.STOP, Event.SENT, Event.FINISH):
        endpoint.move(event)


async def test_migrate_waits_and_the_others_go_on(tmp_path: Path) -> None:
    """Until the end or a pause; -d does not wait, and QMP's human-monitor-command cannot."""
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path), client(tmp_path) as one, client(tmp_path) as two:
        for ends, said in (
            ((Event.CONNECT, Event.STOP, Event.SENT, Event.FINISH), ""),
            ((Event.CONNECT, Event.FAIL), "Error: why\r\n"),
            ((Event.CONNECT, Event.CANCEL, Event.FAIL), ""),
            ((Event.CONNECT, Event.SWITCH, Event.STOP, Event.PACKAGE, Event.LOSE), ""),
        ):
            endpoint.extra = MigrationInfo(error_desc="why" if said else None)
            await one.send(b"migrate unix:/x\ninfo status\n")
            await until(lambda: endpoint.course.status is Status.SETUP)
            for event in ends:
                await trio.testing.wait_all_tasks_blocked()
                assert await two.ask("info status") == NOTHING
                with pytest.raises(BlockingIOError):
                    os.read(one.sock.fileno(), 1)
                endpoint.move(event)
            assert await one.text() == said
            assert await one.text() == NOTHING
        assert endpoint.course.status is Status.POSTCOPY_PAUSED
        endpoint.forget()
        assert await one.ask("migrate -d unix:/x") == ""
        assert endpoint.info().status is Status.SETUP
        async with qmp_ours(endpoint, tmp_path), qmp_client(tmp_path) as qmp:
            await qmp.ready()
            endpoint.forget()
            assert "does not allow synchronous" in await qmp.hmp("migrate unix:/x")
    assert endpoint.calls == [("migrate", Unix("/x"), False)] * 6


async def test_a_whole_story(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path), client(tmp_path) as person:
        assert await person.ask("migrate_set_capability postcopy-ram on") == ""
        assert await person.ask("migrate -d unix:/x") == ""
        assert await person.ask("migrate_start_postcopy") == ""
        assert "Migration status: setup\r\n" in await person.ask("info migrate")
        assert "postcopy-ram: on\r\n" in await person.ask("info migrate_capabilities")
    assert endpoint.calls == [("migrate", Unix("/x"), False), "start-postcopy"]


async def test_quit_ends_the_program(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    heard: list[str] = []
    endpoint.events.listen(lambda message: heard.append(message["event"]))
    async with ours(endpoint, tmp_path), client(tmp_path) as one, client(tmp_path) as two:
        await one.send(b"q\ninfo status\n")
        assert await one.text() == ""
        with trio.fail_after(30):
            await endpoint.ended.wait()
        assert await two.ask("info status") == NOTHING
    assert heard == ["SHUTDOWN"]


async def test_quit_by_one_that_does_not_listen_any_more(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path):
        async with client(tmp_path) as rude:
            await rude.send(b"quit\n")
        with trio.fail_after(30):
            await endpoint.ended.wait()


async def test_one_that_says_all_at_once_and_hears_the_answers(tmp_path: Path) -> None:
    """As ``printf ... | nc -N -U`` does: the end of its input is not the end of it."""
    async with ours(FakeEndpoint(), tmp_path):
        pipe = Terminal(tmp_path / "text")
        with pipe.sock:
            await pipe.send(b"info status\nhelp stop\nquit")
            pipe.sock.shutdown(socket.SHUT_WR)
            told = [await pipe.text() for _ in range(4)]
    greeting = "QEMU 10.0.2 monitor - type 'help' for more information\r\n"
    assert told == [greeting, NOTHING, "stop|s  -- stop emulation\r\n", ""]


# --- lines


def every(*pieces: bytes) -> list[str | None]:
    lines = Lines()
    return [line for piece in pieces for line in lines.feed(piece)]


def test_lines_end_in_any_way() -> None:
    assert every(b"a\nb\rc\r\nd\r", b"\ne\r", b"f\n\n", b"half") == ["a", "b", "c", "d", "e", "f", ""]
    assert every(*(bytes([n]) for n in b"one\r\ntwo\n")) == ["one", "two"]
    assert every(b"a\x00b\x1b\x7fc\td\n") == ["abc\td"]
    assert every(b"\xff\xc3\n") == ["\udcff\udcc3"]


def test_a_long_line_is_dropped_whole() -> None:
    assert every(b"x" * MAX_LINE + b"\n") == ["x" * MAX_LINE]
    assert every(b"x" * (MAX_LINE + 1) + b"\nok\n") == [None, "ok"]
    assert every(*[b"x" * 1000] * 100, b"quit\nok\n") == [None, "ok"]
    lines = Lines()
    for _ in range(1000):
        assert list(lines.feed(b"x" * 4096)) == []
    assert len(lines._rest) <= MAX_LINE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r'a "b c" "\n\r\\\'\"" ""', ["a", "b c", "\n\r\\'\"", ""]),
        ("'a b' c\"d", ["'a", "b'", 'c"d']),
        ('"a"b', ["a", "b"]),
        (" \t\v\f", []),
        (r'"\t"', None),
        ('a "b', None),
        ('"\\', None),
        ('"', None),
    ],
)
def test_words_of_a_line(text: str, words: list[str] | None) -> None:
    assert Line(text).strings() == words


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        *(("7", "b", 7), ("7", "m", 7 << 20), ("1.5k", "b", 1536), (".5k", "b", 512), ("1.", "b", 1)),
        *(("15.99e", "b", 15 * 2**60 + int(0.99 * 2**60)), ("0x1E", "m", 30 << 20), ("0b", "m", 0)),
        *((str(2**64 - 1), "b", 2**64 - 1), (str(2**64), "b", TooLarge), ("16e", "b", TooLarge)),
        *((f"{2**44}", "m", TooLarge), ("-1", "b", TooLarge), ("9" * 1000, "b", ValueError)),
        *(
            ("1.5", "b", ValueError),
            (".", "b", ValueError),
            ("0x1k", "b", ValueError),
            ("١", "b", ValueError),
        ),
    ],
)
def test_sizes(text: str, unit: str, number: int | type[ValueError]) -> None:
    if isinstance(number, int):
        assert size(text, unit) == number
    else:
        with pytest.raises(number):
            size(text, unit)


# --- harm

HOSTILE = [
    b"info stat",
    b"x" * 200_000,
    b"\x00\xff\x1b[A" * 1000 + b"\n",
    b"\n" * 5000,
    b"migrate_set_parameter downtime-limit " + b"9" * 400 + b".5\n",
    b'migrate "unix:\n',
    b"help " * 500 + b"\n",
]


@pytest.mark.parametrize("data", HOSTILE, ids=[repr(data[:12]) for data in HOSTILE])
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "vanishes"])
async def test_a_hostile_client_hurts_nobody_else(data: bytes, reads: bool, tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path) as monitor, client(tmp_path) as good:
        async with client(tmp_path) as bad:
            async with trio.open_nursery() as nursery:
                if reads:

                    async def drain() -> None:
                        while await bad.sock.recv(65536):
                            pass

                    nursery.start_soon(drain)
                await bad.send(data)
                assert await good.ask("info status") == NOTHING
                bad.sock.shutdown(socket.SHUT_WR)
        await until(lambda: monitor.clients == 1)
        assert await good.ask("info status") == NOTHING
    assert endpoint.calls == []


async def test_one_that_does_not_read_is_made_to_wait(tmp_path: Path) -> None:
    async with ours(FakeEndpoint(), tmp_path) as monitor, client(tmp_path) as good:
        async with client(tmp_path) as bad:
            with trio.move_on_after(0.5):
                await bad.send(b"info migrate_parameters\n" * 100_000)
                raise AssertionError("100 000 answers were kept")
            assert await good.ask("info status") == NOTHING
        await until(lambda: monitor.clients == 1)


async def test_too_long_is_said_and_not_run(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path), client(tmp_path) as person:
        assert await person.ask("quit " + " " * MAX_LINE) == TOO_LONG
        assert await person.ask("info status") == NOTHING
    assert not endpoint.ended.is_set()


async def test_clients_are_counted(tmp_path: Path) -> None:
    async with ours(FakeEndpoint(), tmp_path) as monitor:
        async with AsyncExitStack() as stack:
            for _ in range(CLIENTS):
                await stack.enter_async_context(client(tmp_path))
            late = Terminal(tmp_path / "text")
            with late.sock:
                assert await late.text() == ""
        await until(lambda: monitor.clients == 0)
    assert not (tmp_path / "text").exists()


# --- standard input and output


async def test_on_pipes(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    monitor = TextMonitor(endpoint, endpoint.events)
    (in_r, in_w), (out_r, out_w) = os.pipe(), os.pipe()
    try:
        os.write(in_w, b"info status\nhalf a line")
        os.close(in_w)
        with trio.fail_after(30):
            await monitor.serve_stdio(in_r, out_w)  # ends with its input
        assert not endpoint.ended.is_set()
        told = os.read(out_r, 10_000).decode()
        assert told.partition("\r\n")[2] == f"(qemu) {NOTHING}(qemu) "
        assert os.get_blocking(in_r)
        assert os.get_blocking(out_w)
    finally:
        for fd in (in_r, out_r, out_w):
            os.close(fd)


async def test_on_files_and_a_reader_that_is_gone(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    monitor = TextMonitor(endpoint, endpoint.events)
    (tmp_path / "in").write_text("info status\nquit\nnever\n")
    with (tmp_path / "in").open() as into, (tmp_path / "out").open("w") as out, trio.fail_after(30):
        await monitor.serve_stdio(into.fileno(), out.fileno())
    assert endpoint.ended.is_set()
    assert (tmp_path / "out").read_bytes().decode().endswith(f"(qemu) {NOTHING}(qemu) ")
    read, write = os.pipe()
    os.close(read)
    with (tmp_path / "in").open() as into, trio.fail_after(30):
        await monitor.serve_stdio(into.fileno(), write)
    os.close(write)
    with pytest.raises(VhostpcError, match="no standard input or output"):
        await monitor.serve_stdio(write, write)


def pair(kind: str) -> tuple[int, int]:
    """What is read here, what is written to there."""
    if kind == "pipe":
        return os.pipe()
    if kind == "terminal":
        return pty.openpty()
    here, there = socket.socketpair()
    return here.detach(), there.detach()


@pytest.mark.parametrize(
    ("kind", "anew"),
    [("socket", True), ("pipe", True), ("terminal", True), ("pipe", False)],
    ids=["socket", "pipe", "terminal", "pipe that cannot be opened anew"],
)
async def test_output_that_nobody_reads(kind: str, anew: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own task waits, and the mode that others share stays."""
    endpoint = FakeEndpoint()
    (in_r, in_w), (out_r, out_w) = os.pipe(), pair(kind)
    os.set_blocking(in_w, False)
    try:
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patch:
                if not anew:
                    patch.setattr("vhostpc.qmp.terminal.os.open", Mock(side_effect=PermissionError))
                nursery.start_soon(TextMonitor(endpoint, endpoint.events).serve_stdio, in_r, out_w)
                await trio.testing.wait_all_tasks_blocked()
            if kind == "pipe":  # room for less than one answer
                os.read(out_r, MAX_LINE)
                fcntl.fcntl(out_w, fcntl.F_SETPIPE_SZ, 4096)
            with suppress(BlockingIOError):
                while True:  # until nobody takes more
                    os.write(in_w, b"x" * MAX_LINE + b"\n")
                    await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            assert os.get_blocking(in_r)
            assert os.get_blocking(out_w)
            nursery.cancel_scope.cancel()
    finally:
        for fd in (in_r, in_w, out_r, out_w):
            os.close(fd)


async def test_a_terminal_that_hangs_up_ends_it() -> None:
    """What is read from it then looks like its key for the end of a file."""
    endpoint = FakeEndpoint()
    window, terminal = pty.openpty()
    null = os.open(os.devnull, os.O_WRONLY)  # so that no prompt tells that it has hung up
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(TextMonitor(endpoint, endpoint.events).serve_stdio, terminal, null)
                await trio.testing.wait_all_tasks_blocked()
                os.close(window)
    finally:
        os.close(terminal)
        os.close(null)
    assert not endpoint.ended.is_set()


PROGRAM = """
import sys, trio
from tests.kit.fake_endpoint import FakeEndpoint
from vhostpc.qmp import TextMonitor
async def main():
    endpoint = FakeEndpoint()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(TextMonitor(endpoint, endpoint.events).serve_stdio)
        await endpoint.ended.wait()
        nursery.cancel_scope.cancel()
    print("ended")
trio.run(main)
"""


def test_on_a_terminal() -> None:
    """The terminal edits and echoes; its end-of-file key ends nothing; its modes stay."""
    ours_, theirs = pty.openpty()
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    ) as process:
        seen = b""

        def until_seen(text: bytes) -> bytes:
            nonlocal seen
            while text not in seen:
                data = os.read(ours_, 4096)
                assert data, seen
                seen += data
            found, _, seen = seen.partition(text)
            return found

        try:
            until_seen(b"(qemu) ")
            os.write(ours_, b"bogusX\x7f\n")  # one character taken back
            assert b"unknown command: 'bogus'\r\n" in until_seen(b"(qemu) ")
            os.write(ours_, b"\x04")
            until_seen(b"(qemu) ")
            os.write(ours_, b"info status\n")
            assert until_seen(b"(qemu) ") == b"info status\r\n" + NOTHING.encode()
            assert os.get_blocking(theirs)
            os.write(ours_, b"quit\n")
            assert process.wait(30) == 0
            until_seen(b"ended\r\n")
        finally:
            process.kill()
            os.close(ours_)
            os.close(theirs)
