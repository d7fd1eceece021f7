"""One end of a migration behind a monitor: a QEMU without a guest, or our endpoint. Both tell what happened."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.kit.until import until
from tests.qemu import peers
from tests.qemu.proc import Child, child, unwrapped
from tests.qemu.qmp import Qmp
from vhostpc.dialect import Compat

MIB = 1 << 20
FILLED = 24 * MIB  # bytes of RAM that are not zero
STARTING = MIB  # where those begin: above what the BIOS begins in
FINAL = ("completed", "failed", "cancelled", "postcopy-paused")


@dataclass(frozen=True)
class Told:
    """``events``: statuses, STOP, RESUME, passes, and looks between them; ``answers``: to a scenario's commands.

    The two are apart since an answer and an event of another thread come in any order.
    """

    events: tuple[str, ...]
    answers: tuple[str, ...]


class Node:
    """``qmp``: its monitor; ``process``: the child that it is. ``over``: it ended, and is looked at no more."""

    def __init__(self, name: str, process: Child, qmp: Qmp) -> None:
        self.name = name
        self.process = process
        self.qmp = qmp
        self.over = False
        self.fields: dict[str, set[tuple[str, ...]]] = {}
        """The names in query-migrate by its status, as the looks saw them."""
        self.errors: list[str] = []
        """What stood in error-desc."""
        self._since = self._at = 0
        self._looks: list[tuple[int, str]] = []
        self._answers: list[str] = []

    def begin(self) -> None:
        """What happened before is not told."""
        self._since = self._at = len(self.qmp.events)

    async def statuses(self) -> tuple[str, dict[str, Any]]:
        """The run state, and query-migrate."""
        run = (await self.qmp.command("query-status"))["status"]
        return str(run), dict(await self.qmp.command("query-migrate"))

    async def look(self) -> None:
        """Tell the run state, the migration's status, and whether there is an error-desc."""
        if self.over:
            return
        run, info = await self._settled()
        status = info.get("status", "")
        # QEMU 7.2 shows for a moment more where a machine that has come was listened for.
        unsaid = {"completed": {"socket-address"}, "cancelled": {"error-desc"}}.get(status, set())
        names = sorted(info.keys() - unsaid)
        self.fields.setdefault(status, set()).add(tuple(names))
        if "error-desc" in info:
            self.errors.append(info["error-desc"])
        # 10.0 has one after a cancel, too, but only where there is a return path: of no use to anybody.
        error = " error-desc" if "error-desc" in info and status != "cancelled" else ""
        self._looks.append((len(self.qmp.events), f"[{run}/{status}{error}]"))

    async def _settled(self) -> tuple[str, dict[str, Any]]:
        """The run state follows the status that ends a migration a moment later."""
        with trio.fail_after(30):
            while True:
                run, info = await self.statuses()
                if run != "finish-migrate" or info["status"] not in ("completed", "failed", "cancelled"):
                    return run, info
                await trio.sleep(0.01)

    async def take(self, name: str, **arguments: Any) -> bool:
        """Try a command and tell its answer. Whether it was taken."""
        reply = await self.qmp.reply(name, **arguments)
        error = reply.get("error")
        self._answers.append(f"{name}: {error['class']}: {error['desc']}" if error else f"{name}: taken")
        return not error

    async def until_status(self, *wanted: str, limit: float = 60) -> str:
        """Wait for the next event MIGRATION with one of these statuses, behind the one of the last such wait."""
        with trio.fail_after(limit):
            while True:
                event = await self.qmp.event("MIGRATION", self._at, limit)
                self._at = self.qmp.events.index(event, self._at) + 1
                if event["data"]["status"] in wanted:
                    return str(event["data"]["status"])

    async def ended(self) -> None:
        """Wait for the process's end and tell its exit code."""
        self.over = True
        self._answers.append(f"exit code {await self.process.wait()}")

    def told(self) -> Told:
        events: list[str] = []
        looks = list(self._looks)
        for number, event in enumerate(self.qmp.events[self._since :], self._since):
            while looks and looks[0][0] <= number:
                events.append(looks.pop(0)[1])
            events.append(_word(event))
        return Told(tuple(events + [text for _, text in looks]), tuple(self._answers))


def _word(event: dict[str, Any]) -> str:
    data = event.get("data", {})
    if event["event"] == "MIGRATION":
        return str(data["status"])
    return f"PASS {data['pass']}" if event["event"] == "MIGRATION_PASS" else str(event["event"])


def _fill(pid: int) -> None:
    """Put data that nothing shortens into a QEMU's guest memory."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memory-backend-memfd" in os.readlink(fd):
                with fd.open("r+b", buffering=0) as memory:
                    memory.seek(STARTING)
                    memory.write(random.Random(1).randbytes(FILLED))
                return
    raise AssertionError(f"process {pid} has no guest memory")


@contextlib.asynccontextmanager
async def _monitored(name: str, process: Child, stream: trio.abc.Stream) -> AsyncIterator[Node]:
    qmp = Qmp(stream, name)
    with unwrapped():
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(qmp.run)
            await qmp.handshake()
            yield Node(name, process, qmp)
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def qemu_node(
    version: Compat,
    name: str,
    *,
    size: int = 64,
    incoming: bool = False,
    stopped: bool = False,
    more: Sequence[str] = (),
    board: Sequence[str] = (),
) -> AsyncIterator[Node]:
    """A QEMU whose BIOS finds nothing to start. ``size`` in MiB; ``stopped``: begun with ``-S``.

    ``more``: further arguments; ``board``: those in place of the machine's and its memory's, which is left as it is.
    """
    program = peers.qemu(version)
    ours, theirs = socket.socketpair()
    argv = [*program.argv, "-name", name, "-nodefaults", "-no-user-config", "-display", "none"]
    usual = ["-M", "pc,memory-backend=mem", "-m", f"{size}M"]
    usual += ["-object", f"memory-backend-memfd,id=mem,size={size}M,share=on"]
    argv += ["-accel", "tcg", *(board or usual)]
    argv += ["-chardev", f"socket,id=q,fd={theirs.fileno()}", "-qmp", "chardev:q"]
    argv += [*(["-incoming", "defer"] if incoming else []), *(["-S"] if stopped else []), *more]
    async with child(name, argv, env=program.env, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        async with _monitored(name, process, stream) as node:
            if not incoming and not board:
                _fill(process.pid)
            yield node


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.asynccontextmanager
async def _endpoint(compat: Compat, name: str, folder: Path, *more: str) -> AsyncIterator[Node]:
    path = folder / f"{name}.qmp"
    argv = [sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{path}", "--compat", compat, *more]
    async with child(name, argv) as process:
        await until(lambda: _listens(path) or not process.alive, what=f"{name} listens")
        async with _monitored(name, process, await trio.open_unix_socket(path)) as node:
            yield node


def endpoint_node(
    compat: Compat, name: str, folder: Path, *, ram: str | None = None, more: Sequence[str] = ()
) -> contextlib.AbstractAsyncContextManager[Node]:
    """Our endpoint, waiting for a machine to hold; ``ram``: the block that it takes, as ``--ram`` says it."""
    return _endpoint(compat, name, folder, "--incoming", "defer", *(["--ram", ram] if ram else []), *more)


def replacing_node(
    compat: Compat, name: str, folder: Path, more: Sequence[str]
) -> contextlib.AbstractAsyncContextManager[Node]:
    """Our endpoint, in the place of one that was killed: ``more`` says where its memory is."""
    return _endpoint(compat, name, folder, *more)


def own_node(
    compat: Compat,
    name: str,
    folder: Path,
    *,
    size: int = 64,
    incoming: bool = False,
    stopped: bool = False,
    more: Sequence[str] = (),
) -> contextlib.AbstractAsyncContextManager[Node]:
    """Our endpoint with a machine of its own; all as of :func:`qemu_node`."""
    argv = ["--ram", f"mem={size}M", "--vcpus", "1"]
    argv += [*(["--incoming", "defer"] if incoming else []), *(["-S"] if stopped else []), *more]
    return _endpoint(compat, name, folder, *argv)


async def take_a_machine(node: Node, compat: Compat, folder: Path) -> None:
    """Let a node that waits for one have a paused machine, by precopy; its tale begins after that."""
    events = [{"capability": "events", "state": True}]
    uri = f"unix:{folder}/{node.name}.in"
    async with qemu_node(compat, "first") as first:
        await first.qmp.command("stop")
        for each in (node, first):
            await each.qmp.command("migrate-set-capabilities", capabilities=events)
        await first.qmp.command("migrate-set-parameters", max_bandwidth=1 << 30)
        await node.qmp.command("migrate-incoming", uri=uri)
        await first.qmp.command("migrate", uri=uri)
        for each in (first, node):
            assert await each.until_status(*FINAL) == "completed"
    node.begin()
