"""A migration over several links: what was lost in postcopy is agreed on anew, and nothing is lost or comes twice."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import trio

from tests.kit.migration_ends import Received, incoming_of
from tests.kit.scripted_destination import LivelyMachine, Watched, channels, content, options
from tests.kit.until import until
from vhostpc.errors import ChannelLost
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.phase import Event, Phase
from vhostpc.migration.status import Status
from vhostpc.pages.ramblock import Bits

pytestmark = pytest.mark.ufd
LIMIT = 60
PAGES = 2000


class Carried:
    """Both ends, and the wire between them, which a test breaks."""

    def __init__(self, nursery: trio.Nursery, machine: LivelyMachine, copy: HeldMachine) -> None:
        self.nursery = nursery
        self.machine = machine
        self.copy = copy
        self.watched = Watched(on_stop=machine.stop)
        self.received = Received()
        self.there, self.here = channels()
        chosen = options("postcopy-ram", max_postcopy_bandwidth=4096)
        self.outgoing = Outgoing(self.there, machine, self.watched.course, self.watched, options=chosen)
        self.incoming: Incoming = incoming_of(self.here, copy, postcopy=True, report=self.received.report)
        self.came = trio.Event()
        self.outgoing.start_postcopy()
        nursery.start_soon(self._carry, self.outgoing.send)
        nursery.start_soon(self._receive)

    async def _carry(self, what: object) -> None:
        with suppress(ChannelLost):
            await what()  # type: ignore[operator]

    async def _receive(self) -> None:
        await self.incoming.receive()
        self.came.set()

    @property
    def phases(self) -> tuple[Phase, Phase]:
        return self.outgoing.course.phase, self.incoming.course.phase

    async def paused(self) -> None:
        await until(lambda: self.phases == (Phase.PAUSED, Phase.PAUSED), what=f"a pause: {self.phases}")

    async def cut(self) -> None:
        """Break the link in both directions; both ends notice."""
        self.here.shut_down()
        await self.paused()
        await self.there.aclose()
        await self.here.aclose()

    def begin(self) -> tuple[Channel, Channel]:
        """Another pair of channels, and both ends on them."""
        self.there, self.here = channels()
        self.outgoing.course.move(Event.RECOVER)
        self.incoming.attach(self.here)
        self.nursery.start_soon(self._carry, lambda: self.outgoing.resume(self.there))
        return self.there, self.here

    async def resumed(self) -> None:
        await until(lambda: self.phases == (Phase.POSTCOPY, Phase.POSTCOPY), what=f"pages: {self.phases}")

    def let_go(self) -> None:
        """The rest goes as fast as it can."""
        self.outgoing.options.set_parameters({"max-postcopy-bandwidth": 0})
        self.outgoing.limits_changed()

    async def finish(self) -> None:
        self.let_go()
        await self.came.wait()
        await until(lambda: self.watched.status is Status.COMPLETED)
        self.outgoing.close()
        self.incoming.close()
        await self.there.aclose()
        await self.here.aclose()
        assert await content(self.copy.ram) == await content(self.machine.ram)


async def fill(machine: LivelyMachine) -> None:
    for page in range(0, PAGES, 3):
        await machine.write("ram0", page, f"page {page}".encode())


async def test_a_lost_link_is_recovered() -> None:
    """What somebody waits for is asked for again; each page comes once."""
    with LivelyMachine(ram0=PAGES, rom0=1) as machine, HeldMachine() as copy, trio.fail_after(LIMIT):
        await fill(machine)
        async with trio.open_nursery() as nursery:
            ends = Carried(nursery, machine, copy)
            await until(lambda: ends.phases[1] is Phase.POSTCOPY)
            got: list[bytes] = []

            async def touch(page: int) -> None:
                got.append(await copy.ram["ram0"].read(page * 4096, 9))

            await touch(900)
            ends.outgoing.source.withhold("ram0", 1500, 1)  # in flight when the link is lost
            nursery.start_soon(touch, 1500)
            await until(lambda: ends.outgoing.numbers().withheld == 1)
            await ends.cut()
            nursery.start_soon(touch, 1800)  # asked for while there is no link
            await until(lambda: ends.incoming.service.numbers().waiting_now == 2)
            machine.ram["ram0"].set_bits(Bits.WITHHELD, 1500, 1, value=False)
            ends.begin()
            await until(lambda: len(got) == 3, what="both pages")
            assert sorted(got) == [b"page 1500", b"page 1800", b"page 900\0"]
            await ends.finish()
            assert ends.incoming.loads()[1].already == 0
        assert [str(s) for s in ends.watched.course.history][-6:] == [
            *("postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"),
            *("postcopy-active", "completed"),
        ]
        assert ends.received.events == [Event.PACKAGE, Event.LOSE, Event.FINISH]
        assert [str(s) for s in ends.incoming.course.history][-4:] == [
            *("postcopy-paused", "postcopy-recover", "postcopy-active", "completed"),
        ]


async def test_a_link_that_is_lost_again_and_again() -> None:
    """Also while a recovery is under way, at any byte of it in either direction."""
    rng = random.Random(1)
    with LivelyMachine(ram0=PAGES) as machine, HeldMachine() as copy, trio.fail_after(LIMIT):
        await fill(machine)
        async with trio.open_nursery() as nursery:
            ends = Carried(nursery, machine, copy)
            await until(lambda: ends.phases[1] is Phase.POSTCOPY)
            await ends.cut()
            for _ in range(30):
                ends.begin()
                for _ in range(rng.randrange(12)):
                    await trio.lowlevel.checkpoint()
                await ends.cut()
            ends.begin()
            await ends.resumed()
            await ends.finish()
            assert ends.incoming.loads()[1].already == 0
