"""The monitor with clients of all sorts: QEMU's own library, its shell, and those that mean harm."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from qemu.qmp import ExecuteError, QMPClient

from tests.kit.fake_endpoint import FakeEndpoint
from tests.kit.qmp_wire import Wire, client, ours
from tests.kit.until import until
from tests.qemu.proc import child
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import Shortage
from vhostpc.migration.phase import Event
from vhostpc.migration.uri import Fd, Unix
from vhostpc.qmp import MigrationInfo, RamInfo, TextMonitor
from vhostpc.qmp.listening import CLIENTS
from vhostpc.qmp.unsent import EVENTS
from vhostpc.wire.qmp import MAX_BYTES

ALL = tuple(DIALECTS)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def library(path: Path, heard: list[str]) -> dict[str, Any]:
    """A migration driven by the client of ``qemu.qmp`` (it runs on asyncio)."""
    qmp = QMPClient("test")
    told: dict[str, Any] = {}
    await qmp.connect(str(path))
    with qmp.listener(("MIGRATION", "STOP", "RESUME")) as listener:
        await qmp.execute("cont")
        on = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]
        await qmp.execute("migrate-set-capabilities", {"capabilities": on})
        try:
            await qmp.execute("migrate", {"uri": "bogus"})
        except ExecuteError as exc:
            told["refusal"] = (exc.error_class, str(exc))
        await qmp.execute("migrate", {"uri": "unix:/x"})
        await qmp.execute("migrate-start-postcopy")
        told["info"] = await qmp.execute("query-migrate")
        await qmp.execute("migrate_cancel")
        await qmp.execute("stop")
        async for event in listener:
            heard.append(str(event.get("data", {}).get("status", event["event"])))  # type: ignore[attr-defined]
            if event["event"] == "STOP":
                break
    await qmp.disconnect()
    return told


async def test_the_library_of_qemu_drives_it(tmp_path: Path) -> None:
    import asyncio

    endpoint = FakeEndpoint()
    heard: list[str] = []
    async with ours(endpoint, tmp_path) as monitor:
        told = await trio.to_thread.run_sync(lambda: asyncio.run(library(tmp_path / "qmp", heard)))
        await until(lambda: monitor.clients == 0)
    assert told == {
        "refusal": ("GenericError", "unknown migration protocol: bogus"),
        "info": {"status": "setup"},
    }
    assert heard == ["RESUME", "setup", "cancelling", "cancelled", "STOP"]
    assert endpoint.calls == [("migrate", Unix("/x"), False), "start-postcopy"]


async def test_qmp_shell_drives_it(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    shell = [str(Path(sys.executable).parent / "qmp-shell"), str(tmp_path / "qmp")]
    async with ours(endpoint, tmp_path):
        async with child("qmp-shell", shell, env={"HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}) as process:
            for line, answer in (
                ("query-version", '"major": 10'),
                ("migrate uri=unix:/x", '"return": {}'),
                ("query-migrate", '"status": "setup"'),
            ):
                at = len(process.out)
                await process.send(line + "\n")
                await process.out.find(answer, at)
            await process.close_stdin()
            assert await process.wait() == 0
    assert endpoint.calls == [("migrate", Unix("/x"), False)]


@pytest.mark.parametrize("compat", ALL)
async def test_query_migrate_tells_what_the_endpoint_knows(compat: Compat, tmp_path: Path) -> None:
    endpoint = FakeEndpoint(compat)
    ram = RamInfo(total=8192, transferred=5000, normal=1, duplicate=1, dirty_sync_count=2)
    endpoint.extra = MigrationInfo(ram=ram, total_time=7, error_desc="why")
    endpoint.move(Event.START)
    endpoint.move(Event.FAIL)
    async with ours(endpoint, tmp_path), client(tmp_path) as wire:
        await wire.ready()
        told = (await wire.command("query-migrate"))["return"]
    assert told["status"] == "failed"
    assert (told["error-desc"], told["total-time"]) == ("why", 7)
    assert told["ram"]["normal-bytes"] == 4096
    assert ("skipped" in told["ram"]) == (compat == "7.2")


async def test_events_go_to_all_that_have_agreed(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path), client(tmp_path) as one, client(tmp_path) as two:
        await one.ready()
        await two.reply()
        endpoint.events.stop()
        endpoint.options.set_capabilities([("events", True)], busy=False)
        endpoint.move(Event.START)
        found = [await one.message(), await one.message()]
        assert [m and (m["event"], m.get("data")) for m in found] == [
            ("STOP", None),
            ("MIGRATION", {"status": "setup"}),
        ]
        assert (await two.command("qmp_capabilities")) == {"return": {}}
        assert two.events == []


async def test_descriptors_are_taken_over_or_closed(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    getfd = b'{"execute":"getfd","arguments":{"fdname":"%s"}}'
    async with ours(endpoint, tmp_path) as monitor:
        before = open_fds()
        async with client(tmp_path) as wire:
            await wire.ready()
            here, there = socket.socketpair()
            await wire.send(getfd % b"x", [there.fileno()])
            assert await wire.reply() == {"return": {}}
            for name in (b"y", b"5", b"z"):
                await wire.send(getfd % name, [there.fileno(), there.fileno()])
                reply = await wire.reply()
                assert ("error" in reply) == (name == b"5")
            assert await wire.command("closefd", fdname="z") == {"return": {}}
            assert "error" in await wire.command("closefd", fdname="z")
            assert await wire.command("migrate", uri="fd:x") == {"return": {}}
            [(_, address, _)] = endpoint.calls
            assert isinstance(address, Fd)
            os.write(address.fd, b"it is it")
            assert here.recv(100) == b"it is it"
            os.close(address.fd)
            there.close()
        await until(lambda: monitor.clients == 0)
        assert here.recv(100) == b"", "y was not closed with its client"
        here.close()
        assert open_fds() == before


async def test_a_number_is_a_descriptor_of_the_process_where_a_machine_comes_in(tmp_path: Path) -> None:
    endpoint = FakeEndpoint(incoming=True)
    async with ours(endpoint, tmp_path), client(tmp_path) as wire:
        await wire.ready()
        assert "error" in await wire.command("migrate-incoming", uri="fd:x")
        assert await wire.command("migrate-incoming", uri="fd:7") == {"return": {}}
    assert endpoint.calls == [("incoming", Fd("7"), True)]


async def test_quit_ends_the_program_after_its_reply(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path), client(tmp_path) as wire:
        await wire.ready()
        await wire.send(b'{"execute":"quit"}{"execute":"query-status"}' * 20)
        found = [await wire.message() for _ in range(3)]
        assert found[0] is not None
        assert found[0]["event"] == "SHUTDOWN"
        assert found[1:] == [{"return": {}}, None]
        with trio.fail_after(30):
            await endpoint.ended.wait()


HOSTILE = [
    b'{"execute":"query-st',
    b'{"execute":"' + b"x" * (2 * MAX_BYTES),
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\x00\xff" * 1000,
    b"'" * 999,
    b"]}" * 1000,
    b'{"execute":"query-status","id":' + b"9" * 100_000 + b"}",
]


@pytest.mark.parametrize("data", HOSTILE, ids=[repr(data[:12]) for data in HOSTILE])
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "vanishes"])
async def test_a_hostile_client_hurts_nobody_else(data: bytes, reads: bool, tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path) as monitor, client(tmp_path) as good:
        await good.ready()
        before = open_fds()
        async with client(tmp_path) as bad:
            await bad.ready()
            async with trio.open_nursery() as nursery:
                if reads:

                    async def drain() -> None:
                        while await bad.message() is not None:
                            pass

                    nursery.start_soon(drain)
                await bad.send(data)
                assert (await good.command("query-status"))["return"]["status"] == "prelaunch"
                bad.sock.shutdown(socket.SHUT_WR)
        await until(lambda: monitor.clients == 1)
        assert open_fds() == before
        assert "return" in await good.command("query-status")


async def test_a_flood_waits_for_its_reader(tmp_path: Path) -> None:
    """A client that asks and does not read is made to wait; one that leaves events unread is cut off."""
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path) as monitor, client(tmp_path) as good, client(tmp_path) as bad:
        await good.ready()
        await bad.ready()
        flood = b'{"execute":"query-qmp-schema"}' * 20000
        with trio.move_on_after(0.5):
            await bad.send(flood)
            raise AssertionError("20 000 answers were queued")
        assert "return" in await good.command("query-status")
        for _ in range(EVENTS + 1):
            endpoint.events.stop()
            await good.message()
        await until(lambda: monitor.clients == 1)
        assert "return" in await good.command("query-status")


async def taken(wire: Wire, message: bytes, most: int) -> int:
    """Bytes that a monitor takes of a message said again and again, until it takes no more; ``most``: too many."""
    count, rest = 0, b""
    while count < most:
        rest = rest or message
        try:
            sent = os.write(wire.sock.fileno(), rest)
        except BlockingIOError:
            await trio.testing.wait_all_tasks_blocked()
            try:
                sent = os.write(wire.sock.fileno(), rest)
            except BlockingIOError:
                break
        count, rest = count + sent, rest[sent:]
    return count


@pytest.mark.parametrize("command", ["query-status", "bogus", "qmp_capabilities"])
@pytest.mark.parametrize("oob", [False, True])
async def test_long_answers_that_nobody_reads(command: str, oob: bool, tmp_path: Path) -> None:
    """Bounded in bytes: an answer is as long as its command's id."""
    async with ours(FakeEndpoint(), tmp_path) as monitor, client(tmp_path) as good:
        await good.ready()
        async with client(tmp_path) as bad:
            await bad.ready(oob=oob)
            word = "exec-oob" if oob else "execute"
            message = json.dumps({word: command, "id": "x" * (MAX_BYTES - 200)}).encode()
            assert await taken(bad, message, 64 << 20) < 8 << 20
            assert "return" in await good.command("query-status")
        await until(lambda: monitor.clients == 1)


async def test_long_answers_go_to_one_that_reads(tmp_path: Path) -> None:
    """In their order, events among them."""
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path), client(tmp_path) as wire, trio.open_nursery() as nursery:
        await wire.ready()
        ids = [str(number) * 500_000 for number in range(10)]

        async def ask() -> None:
            for text in ids:
                await wire.send(json.dumps({"execute": "stop", "id": text}).encode())
                endpoint.events.stop()

        nursery.start_soon(ask)
        for text in ids:
            assert (await wire.reply())["id"] == text
        assert [event["event"] for event in wire.events] == ["STOP"] * len(wire.events)


@pytest.mark.parametrize("which", ["its own", "another's", "the text monitor's"])
async def test_a_client_that_gives_away_the_end_of_a_connection_to_here(which: str, tmp_path: Path) -> None:
    """It is not kept: the client's end would be seen by nobody, and its place be taken for good."""
    endpoint = FakeEndpoint()
    text = TextMonitor(endpoint, endpoint.events)
    async with ours(endpoint, tmp_path) as monitor, text.listening(tmp_path / "text"):
        before = open_fds()
        async with client(tmp_path) as one, client(tmp_path) as two:
            await one.ready()
            with socket.socket(socket.AF_UNIX) as third:
                third.connect(str(tmp_path / "text"))
                await until(lambda: text.clients)
                fds = {
                    "its own": one.sock.fileno(),
                    "another's": two.sock.fileno(),
                    "the text monitor's": third.fileno(),
                }
                fd = fds[which]
                await one.send(b'{"execute":"getfd","arguments":{"fdname":"x"}}', [fd])
                told = (await one.reply())["error"]["desc"]
                assert told == "The file descriptor is a connection to this program itself"
            await one.send(b'{"execute":"query-status"}', [fd := two.sock.fileno()])  # that nobody asks for
            await one.reply()
            two.sock.close()
            await until(lambda: (monitor.clients, text.clients) == (1, 0))
            await one.send(b'{"execute":"query-status"}', [one.sock.fileno()])
            await one.reply()
        await until(lambda: monitor.clients == 0)
        assert open_fds() == before


class Failing(FakeEndpoint):
    """Its memory cannot be checked, for what nobody has thought of."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def verify(self) -> dict[str, Any]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(24, "memory file: Too many open files"), "memory file: Too many open files"),
        (Shortage("no thread for vCPU 0"), "no thread for vCPU 0"),
        (KeyError("pc.ram"), "internal error: KeyError: 'pc.ram'"),
    ],
)
async def test_an_error_ends_its_command_alone(error: Exception, told: str, tmp_path: Path) -> None:
    async with ours(Failing(error), tmp_path), client(tmp_path) as one, client(tmp_path) as two:
        for wire in (one, two):
            await wire.ready()
            assert (await wire.command("x-vhostpc-verify"))["error"] == {
                "class": "GenericError",
                "desc": told,
            }
            assert "return" in await wire.command("query-status")


async def test_clients_are_counted(tmp_path: Path) -> None:
    endpoint = FakeEndpoint()
    async with ours(endpoint, tmp_path) as monitor:
        before = open_fds()
        socks = []
        for _ in range(CLIENTS):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(tmp_path / "qmp"))
            socks.append(sock)
        await until(lambda: monitor.clients == CLIENTS)
        async with client(tmp_path) as late:
            assert await late.message() is None
        for sock in socks:
            assert json.loads(await trio.to_thread.run_sync(sock.recv, 4096))["QMP"]
            sock.close()
        await until(lambda: monitor.clients == 0)
        assert open_fds() == before
        async with client(tmp_path) as wire:
            await wire.ready()
    assert not (tmp_path / "qmp").exists()
