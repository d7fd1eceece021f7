"""Two nodes that migrate, as a scenario handles them, and links on which a migration waits."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.kit.until import until
from tests.qemu.proc import unwrapped
from tests.sequences.nodes import FINAL, MIB, Node

SLOW = 4 * MIB  # bytes a second: the 24 MiB of a node's memory last seconds
FAST = 1 << 30


@dataclass
class Stage:
    """Two nodes, neither with a migration so far. ``folder`` has room for sockets."""

    src: Node
    dst: Node
    folder: Path

    @property
    def path(self) -> Path:
        """Where the destination listens."""
        return self.folder / "in"

    @property
    def uri(self) -> str:
        return f"unix:{self.path}"

    async def prepare(self, *capabilities: str) -> None:
        """Capabilities on both sides, a slow link."""
        wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
        for node in (self.dst, self.src):
            await node.qmp.command("migrate-set-capabilities", capabilities=wanted)
        await self._speed(SLOW)

    async def listen(self) -> None:
        await self.dst.qmp.command("migrate-incoming", uri=self.uri)

    async def start(self, *capabilities: str, uri: str | None = None) -> None:
        """The destination listens, the migration is under way, slowly."""
        await self.prepare(*capabilities)
        await self.listen()
        await self.src.qmp.command("migrate", uri=uri or self.uri)

    async def flowing(self, *capabilities: str) -> None:
        """As :meth:`start`; and RAM has begun to go over."""
        await self.start(*capabilities)
        await self.moving()

    async def moving(self) -> None:
        """Wait until the migration is active and more of RAM has gone over."""
        await self.src.until_status("active")
        await self.more()
        await self.dst.until_status("active")

    async def more(self) -> None:
        """Wait until a further MiB has gone over."""

        async def gone() -> int:
            return int((await self.src.statuses())[1]["ram"]["transferred"])

        before = await gone()
        with trio.fail_after(60):
            while await gone() < before + MIB:
                await trio.sleep(0.02)

    async def switch(self) -> None:
        """Go over to postcopy; more of RAM has gone over since."""
        assert await self.take("migrate-start-postcopy")
        await self.switched()

    async def switched(self) -> None:
        for node in (self.src, self.dst):
            await node.until_status("postcopy-active")
        await self.more()

    async def fast(self) -> None:
        """From now on nothing holds the migration up."""
        await self._speed(FAST)

    async def _speed(self, speed: int) -> None:
        await self.src.qmp.command(
            "migrate-set-parameters", max_bandwidth=speed, max_postcopy_bandwidth=speed
        )

    async def ended(self, *nodes: Node) -> None:
        """Wait for the end of the migration at each node, or those named; look at both."""
        for node in nodes or (self.src, self.dst):
            await node.until_status(*FINAL)
        await self.look()

    async def look(self) -> None:
        for node in (self.src, self.dst):
            await node.look()

    async def take(self, name: str, node: Node | None = None, **arguments: Any) -> bool:
        """Try a command (at the source); the node's answers tell how it went. Whether it was taken."""
        return await (node or self.src).take(name, **arguments)

    async def given_up(self) -> None:
        """The destination has failed and its process has ended for that."""
        await self.dst.until_status("failed")
        await self.dst.ended()

    async def kill(self, node: Node) -> None:
        node.over = True
        node.process.popen.kill()
        await node.process.wait()
        await until(lambda: node.qmp.closed)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[tuple[str, socket.socket]]:
    """An address with a listener that does nothing by itself."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield f"unix:{path}", listener


@contextlib.contextmanager
def deaf(folder: Path, family: str) -> Iterator[tuple[str, socket.socket]]:
    """An address at which nobody is let in: connecting there waits. And the listener, which has one client."""
    listener = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
    with listener, socket.socket(listener.family) as first:
        listener.bind(f"{folder}/deaf" if family == "unix" else ("127.0.0.1", 0))
        listener.listen(0)
        name = listener.getsockname()
        first.connect(name)
        yield f"unix:{name}" if family == "unix" else f"tcp:127.0.0.1:{name[1]}", listener


async def _pump(here: trio.SocketStream, there: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await here.receive_some(65536):
            await there.send_all(data)
        await there.send_eof()


async def _relay(listener: socket.socket, target: Path, back: trio.Event) -> None:
    listener.setblocking(False)
    stream, _ = await trio.socket.from_stdlib_socket(listener).accept()
    async with trio.SocketStream(stream) as source, await trio.open_unix_socket(target) as there:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump, source, there)
            await back.wait()
            nursery.start_soon(_pump, there, source)


@contextlib.asynccontextmanager
async def relayed(
    listener: socket.socket, target: Path, *, back: trio.Event | None = None
) -> AsyncIterator[None]:
    """Lead the next client of ``listener`` to ``target``. Before ``back`` nothing comes back, not even the end."""
    if back is None:
        back = trio.Event()
        back.set()
    with unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_relay, listener, target, back)
            yield
            nursery.cancel_scope.cancel()
