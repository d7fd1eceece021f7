"""A page source in a process of its own: ``python -m vhostpc.frontend.source FD``.

FD is a unix socket for control, inherited from the parent process; when it closes, the process ends. Its first
message is one JSON line (``{"rate": bytes a second, "blocks": [{"name", "length", "page_size"}, ...]}``) that
carries the socket for pages and then one memfd for each block; a block with a ``"seed"`` has no memfd and is
made and filled here. Every page is dirty: it is sent once. Commands follow, each a JSON line with an ``id``;
answers have the same ``id``.

:func:`start_source` does all of this for a front-end. :class:`CallableSource` is for tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any

import trio

from vhostpc.errors import ChannelLost, StreamError
from vhostpc.pages.pagesource import PageSource, SourceNumbers
from vhostpc.pages.ramblock import Bits, RamBlock, RamSet
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import RamEncoder
from vhostpc.wire.migration.return_path import PageRequest, ReturnPathDecoder, Shut

#: A small send buffer: requested pages must not wait behind many of the background.
SEND_BUFFER = 32 << 10
MAX_BLOCKS = 16


class SourceProcess:
    """A running source. ``sock`` is our end of the page socket, ``pid`` the process's number."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: trio.SocketStream, sock: socket.socket
    ) -> None:
        self.sock = sock
        self.pid = process.pid
        self._process = process
        self._control = control
        self._answers: dict[int, trio.Event] = {}
        self._values: dict[int, Any] = {}
        self._next = 0
        self._gone = False

    async def read(self) -> None:
        """Read answers: run by :func:`start_source`."""
        buffer = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self._control.receive_some(65536):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
                    self._values[answer["id"]] = answer
                    if (event := self._answers.pop(answer["id"], None)) is not None:
                        event.set()
        self._gone = True
        for event in self._answers.values():
            event.set()

    async def _ask(self, do: str, **more: Any) -> Any:
        self._next += 1
        number, event = self._next, trio.Event()
        if self._gone:
            raise ChannelLost("the page source is gone")
        self._answers[number] = event
        try:
            await self._control.send_all(json.dumps({"id": number, "do": do, **more}).encode() + b"\n")
        except trio.BrokenResourceError:
            raise ChannelLost("the page source is gone") from None
        await event.wait()
        answer = self._values.pop(number, None)
        if answer is None:
            raise ChannelLost("the page source is gone")
        if "error" in answer:
            raise StreamError(answer["error"])
        return answer.get("value")

    async def withhold(self, block: str, first: int = 0, count: int | None = None) -> None:
        """Withhold host pages until :meth:`release`."""
        await self._ask("withhold", block=block, first=first, count=count)

    async def release(self, block: str, first: int = 0, count: int | None = None) -> None:
        await self._ask("release", block=block, first=first, count=count)

    async def withhold_all(self, on: bool = True) -> None:
        """Withhold every page requested from now on, and the background."""
        await self._ask("withhold_all", on=on)

    async def set_rate(self, background_rate: int) -> None:
        await self._ask("rate", rate=background_rate)

    async def numbers(self) -> SourceNumbers:
        return SourceNumbers(**await self._ask("numbers"))

    async def wait_withheld(self, count: int = 1) -> SourceNumbers:
        """Wait until at least ``count`` host pages are requested and withheld."""
        return SourceNumbers(**await self._ask("wait_withheld", count=count))

    def kill(self) -> None:
        """SIGKILL: simulates a crash of the source's machine."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Close everything; the process then ends."""
        self.sock.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


@asynccontextmanager
async def start_source(
    blocks: Sequence[RamBlock], *, background_rate: int = 0, seed: int | None = None
) -> AsyncIterator[SourceProcess]:
    """A source process with the content of ``blocks`` (their memfds), all of it dirty.

    With ``seed`` it makes blocks of the same names and sizes itself and fills them (``RamBlock.fill``).
    ``background_rate``: bytes a second besides requested pages. The process ends with the context.
    """
    ours, theirs = socket.socketpair()
    pages, their_pages = socket.socketpair()
    with theirs, their_pages:
        process = subprocess.Popen(  # noqa: ASYNC220  waited for at the end only
            [sys.executable, "-m", "vhostpc.frontend.source", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        spec: dict[str, Any] = {"rate": background_rate, "blocks": []}
        fds = [their_pages.fileno()]
        for b in blocks:
            row: dict[str, Any] = {"name": b.name, "length": b.length, "page_size": b.page_size}
            if seed is None:
                row["offset"] = b.fd_offset
                fds.append(b.fd)
            else:
                row["seed"] = seed
            spec["blocks"].append(row)
        # A few hundred bytes into an empty socket: this does not wait.
        socket.send_fds(ours, [json.dumps(spec).encode() + b"\n"], fds)
    control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    source = SourceProcess(process, control, pages)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.read)
            try:
                yield source
            finally:
                nursery.cancel_scope.cancel()
    finally:
        source.end()
        await trio.aclose_forcefully(control)


class CallableSource:
    """A source of pages whose content comes from a Python function. Slow: for tests only.

    ``page(block, offset)`` gives the 4096 bytes of a target page. Every fault served by it needs a turn of
    the trio loop and the GIL.
    """

    def __init__(self, page: Callable[[str, int], bytes]) -> None:
        self._page = page
        self._encoder = RamEncoder()
        self._sent: set[tuple[str, int]] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer requests on ``stream``, each page once, until the peer closes or says SHUT."""
        decoder = ReturnPathDecoder()
        async for data in stream:
            for message in decoder.feed(data):
                if isinstance(message, Shut):
                    return
                if isinstance(message, PageRequest):
                    await stream.send_all(self._records(message))

    def end(self) -> bytes:
        """The end of the section, to be sent after the last page."""
        return self._encoder.end()

    def _records(self, request: PageRequest) -> bytes:
        out = b""
        for offset in range(request.start, request.start + request.length, TARGET_PAGE):
            if (request.block, offset) not in self._sent:
                self._sent.add((request.block, offset))
                out += self._encoder.page(request.block, offset, self._page(request.block, offset))
        return out


# --- the process ------------------------------------------------------------------------------------


class _Server:
    def __init__(self, source: PageSource, control: trio.SocketStream) -> None:
        self._source = source
        self._control = control
        self._sending = trio.Lock()
        self._changed = trio.Event()

    async def watch(self) -> None:
        """Wake the tasks that wait for withheld requests."""
        while True:
            await self._source.changed()
            self._changed.set()
            self._changed = trio.Event()

    async def commands(self, nursery: trio.Nursery, rest: bytes) -> None:
        buffer = rest
        while True:
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                nursery.start_soon(self._answer, json.loads(line))
            data = await self._control.receive_some(65536)
            if not data:
                nursery.cancel_scope.cancel()
                return
            buffer += data

    async def _answer(self, command: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": command["id"]}
        try:
            answer["value"] = await self._do(command)
        except (KeyError, OSError, ValueError) as e:
            answer["error"] = f"{command.get('do')}: {e}"
        async with self._sending:
            with suppress(trio.BrokenResourceError):
                await self._control.send_all(json.dumps(answer).encode() + b"\n")

    async def _do(self, command: dict[str, Any]) -> Any:
        source, do = self._source, command["do"]
        if do == "withhold":
            source.withhold(command["block"], command["first"], command["count"])
        elif do == "release":
            source.release(command["block"], command["first"], command["count"])
        elif do == "withhold_all":
            source.withhold_all(command["on"])
        elif do == "rate":
            source.set_rate(command["rate"])
        elif do == "wait_withheld":
            while source.numbers().withheld < command["count"]:
                # Take the event before looking once more: it may be set in between.
                changed = self._changed
                if source.numbers().withheld < command["count"]:
                    await changed.wait()
        elif do != "numbers":
            raise ValueError("no such command")
        return asdict(source.numbers())


async def _serve(control: trio.SocketStream, rest: bytes, spec: dict[str, Any], fds: list[int]) -> None:
    with RamSet() as ram:
        pages, *memfds = fds
        for row in spec["blocks"]:
            if "seed" in row:
                block = ram.create(row["name"], row["length"], row["page_size"])
                await block.fill(row["seed"])
            else:
                fd = memfds.pop(0)
                block = ram.add(row["name"], fd, row["length"], row["page_size"], row.get("offset", 0))
                os.close(fd)
            block.set_bits(Bits.DIRTY)
        with socket.socket(fileno=pages) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            with PageSource(ram, sock.fileno(), background_rate=spec["rate"]) as source:
                server = _Server(source, control)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.watch)
                    nursery.start_soon(server.commands, nursery, rest)
                    await source.serve()
                    # The peer is done, or is gone; stay for the last requests for numbers.


def main() -> None:
    """See the module's docstring."""
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        data, fds, _, _ = socket.recv_fds(sock, 65536, 1 + MAX_BLOCKS)
        while b"\n" not in data:
            more = sock.recv(65536)
            if not more:
                return
            data += more
        line, rest = data.split(b"\n", 1)
        sock.setblocking(False)

        async def run() -> None:
            control = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await _serve(control, rest, json.loads(line), fds)

        with suppress(KeyboardInterrupt):
            trio.run(run)


if __name__ == "__main__":
    main()
