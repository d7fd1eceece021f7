"""A destination that reads a whole stream, notes the order of things, and says what the test tells it to."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from vhostpc.dialect import DIALECTS, Compat
from vhostpc.errors import ChannelLost
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.options import Options
from vhostpc.migration.outgoing import After, Outgoing
from vhostpc.migration.phase import Course, Event, Told
from vhostpc.migration.status import Status
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.wire.migration.elements import Configuration, DeviceSection, Package, Ping, StreamEvent
from vhostpc.wire.migration.ramrec import RamPage
from vhostpc.wire.migration.return_path import Shut
from vhostpc.wire.migration.split import read_package
from vhostpc.wire.migration.stream import RamMode, StreamReader

PAGE = 4096


def channels() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return tuple(Channel(trio.SocketStream(trio.socket.from_stdlib_socket(s))) for s in (ours, theirs))  # type: ignore[return-value]


@dataclass
class Watched:
    """A watcher that notes everything; ``status`` moves by the tables."""

    compat: Compat = "10.0"
    told: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    on_stop: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.course = Course("source", DIALECTS[self.compat], self._moved)
        self.course.move(Event.START)
        self.told.clear()

    @property
    def status(self) -> Status:
        return self.course.status

    def _moved(self, told: Told) -> None:
        self.told.append(str(told.status))
        if told.error is not None and told.status is not Status.FAILING:
            self.errors.append(told.error)

    def passed(self, number: int) -> None:
        self.told.append(f"pass {number}")

    async def let_run(self, postcopy: bool) -> None:
        raise AssertionError("a source lets nothing run")

    async def stop_to_send(self) -> None:
        self.told.append("stop")
        if self.on_stop:
            await self.on_stop()


class LivelyMachine(HeldMachine):
    """A machine whose writes the test makes: ``write`` is seen by the next ``sync_dirty`` while it is tracked.

    ``on_sync`` runs before each look at what was written, until it is stopped: what the guest did in the pass.
    """

    def __init__(self, **blocks: int) -> None:
        super().__init__(Configuration("toyvm"))
        for name, pages in blocks.items():
            self.ram.create(name, pages * PAGE)
        self.devices = [DeviceSection(9, "clk", 0, 1, b"\xde\xad\xbe\xef")]
        self.tracked = False
        self.on_sync: Callable[[], Awaitable[None]] | None = None
        self.stopped = False
        self._written: set[tuple[str, int]] = set()

    async def write(self, block: str, page: int, content: bytes) -> None:
        await self.ram[block].write(page * PAGE, content.ljust(PAGE, b"\0"))
        if self.tracked:
            self._written.add((block, page))

    async def start_tracking(self) -> None:
        self.tracked = True

    async def stop_tracking(self) -> None:
        self.tracked = False

    async def stop(self) -> None:
        self.stopped = True

    async def sync_dirty(self) -> int:
        if self.on_sync and not self.stopped:
            await self.on_sync()
        for block, page in self._written:
            self.ram[block].set_bits(Bits.DIRTY, page, 1)
        count = len(self._written)
        self._written.clear()
        return count


class Destination:
    """Reads all that comes on ``channel``; ``events`` is everything, also what is inside a package."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.reader = StreamReader(RamMode.PAGES)
        self.events: list[StreamEvent] = []
        self.content: dict[tuple[str, int], bytes] = {}
        self.pages: list[tuple[str, int]] = []
        self.on_event: Callable[[StreamEvent], Awaitable[None]] | None = None

    async def read(self, *, answer: int | None = 0) -> None:
        """To the end of the stream; then SHUT with that value (None: nothing)."""
        with suppress(ChannelLost):
            while not self.reader.ended:
                data = await self.channel.receive_some(65536)
                if not data:
                    return
                for event in self.reader.feed(data):
                    await self._take(event)
            if answer is not None:
                await self.channel.send_all(Shut(answer).encode())

    async def _take(self, event: StreamEvent) -> None:
        self.events.append(event)
        if isinstance(event, RamPage):
            self.content[event.block, event.offset // PAGE] = event.content
            self.pages.append((event.block, event.offset // PAGE))
        if isinstance(event, Package):
            self.events += read_package(event)
        if self.on_event:
            await self.on_event(event)

    def order(self) -> list[str]:
        """Names of the elements received; runs of pages collapse."""
        names: list[str] = []
        for event in self.events:
            name = type(event).__name__
            if isinstance(event, Ping):
                name = f"Ping {event.value}"
            if name != "RamPage" or names[-1:] != ["RamPage"]:
                names.append(name)
        return names


def options(*capabilities: str, compat: Compat = "10.0", **parameters: int) -> Options:
    made = Options(compat)
    made.set_capabilities([(name, True) for name in capabilities], busy=False)
    made.set_parameters({name.replace("_", "-"): value for name, value in parameters.items()})
    return made


@dataclass
class Sent:
    destination: Destination
    watched: Watched
    outgoing: Outgoing
    error: BaseException | None = None


Hook = Callable[[StreamEvent, Sent], Awaitable[None]]


async def send(
    machine: HeldMachine,
    chosen: Options,
    *,
    after: After | None = None,
    answer: int | None = 0,
    on_event: Hook | None = None,
    postcopy: bool = False,
) -> Sent:
    """Send the machine to a scripted destination, to the end. ``answer``: as in :meth:`Destination.read`; with none
    the destination closes behind the last byte. ``postcopy``: from the start."""
    there, here = channels()
    watched = Watched(chosen.compat, on_stop=machine.stop)
    async with there, here:
        outgoing = Outgoing(there, machine, watched.course, watched, options=chosen, after=after)
        destination = Destination(here)
        sent = Sent(destination, watched, outgoing)
        if on_event is not None:
            destination.on_event = lambda event: on_event(event, sent)
        if postcopy:
            outgoing.start_postcopy()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    await destination.read(answer=answer)
                    if answer is None:
                        await here.aclose()

                nursery.start_soon(read)
                try:
                    await outgoing.send()
                except Exception as error:
                    sent.error = error
        outgoing.close()
    return sent


async def content(ram: RamSet) -> dict[tuple[str, int], bytes]:
    return {
        (block.name, page): await block.read(page * PAGE, PAGE)
        for block in ram.blocks
        for page in range(block.length // PAGE)
    }
