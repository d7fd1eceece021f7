"""The two ends of a migration joined, without QEMU: what one sends the other has."""

from __future__ import annotations

import pytest
import trio

from tests.kit.migration_ends import incoming_of
from tests.kit.scripted_destination import LivelyMachine, Watched, channels, content, options
from vhostpc.errors import ChannelLost
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.status import Status

LIMIT = 60


async def test_a_source_that_nobody_watches() -> None:
    """Without options and a watcher the machine is stopped all the same, and the call tells the outcome."""
    there, here = channels()
    with LivelyMachine(ram0=300) as machine, HeldMachine() as copy, trio.fail_after(LIMIT):
        await machine.write("ram0", 5, b"five")
        async with there, here, trio.open_nursery() as nursery:
            incoming = Incoming(here, copy, postcopy=False)
            nursery.start_soon(incoming.receive)
            outgoing = Outgoing(there, machine)
            await outgoing.send()
            await there.aclose()
        assert machine.stopped
        assert not machine.tracked
        assert await content(copy.ram) == await content(machine.ram)
        outgoing.close()
        incoming.close()


async def test_a_source_that_nobody_watches_and_that_fails() -> None:
    there, here = channels()
    with LivelyMachine(ram0=300) as machine, trio.fail_after(LIMIT):
        async with there:
            await here.aclose()
            outgoing = Outgoing(there, machine)
            with pytest.raises(ChannelLost):
                await outgoing.send()
        assert not machine.tracked
        outgoing.close()


@pytest.mark.parametrize("how", ["precopy", "return path", "postcopy", "postcopy in the middle"])
async def test_sent_on_it_is_the_same(how: str) -> None:
    on = [] if how == "precopy" else ["return-path" if how == "return path" else "postcopy-ram"]
    chosen = options(*on, max_bandwidth=16 << 20) if how == "postcopy in the middle" else options(*on)
    postcopy = "postcopy-ram" in chosen
    there, here = channels()
    with LivelyMachine(ram0=3000, rom0=1) as machine, HeldMachine() as copy, trio.fail_after(LIMIT):
        machine.description = b'{"devices": []}'
        for page in range(0, 3000, 3):
            await machine.write("ram0", page, f"page {page}".encode())

        async def write_more() -> None:
            for page in range(1, 300, 2):
                await machine.write("ram0", page, f"page {page} again".encode())
            machine.on_sync = None

        machine.on_sync = write_more
        watched = Watched(on_stop=machine.stop)
        async with there, here:
            outgoing = Outgoing(there, machine, watched.course, watched, options=chosen)
            incoming = incoming_of(here, copy, postcopy=postcopy)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                if how == "postcopy":
                    outgoing.start_postcopy()
                if how == "postcopy in the middle":

                    async def switch() -> None:
                        while outgoing.numbers().data_pages < 100:
                            await trio.sleep(0.005)
                        outgoing.start_postcopy()

                    nursery.start_soon(switch)
                await outgoing.send()
            incoming.close()
            outgoing.close()
        assert watched.status is Status.COMPLETED
        assert ("postcopy-active" in watched.told) == how.startswith("postcopy")
        assert await content(copy.ram) == await content(machine.ram)
        assert copy.configuration == machine.configuration
        assert copy.devices == machine.devices
        assert copy.description == (b"" if how.startswith("postcopy") else machine.description)


async def move(machine: LivelyMachine, copy: HeldMachine, *capabilities: str) -> None:
    there, here = channels()
    watched = Watched(on_stop=machine.stop)
    async with there, here:
        outgoing = Outgoing(there, machine, watched.course, watched, options=options(*capabilities))
        incoming = incoming_of(here, copy, postcopy="postcopy-ram" in capabilities)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                await outgoing.send()
        incoming.close()
        outgoing.close()
    assert watched.status is Status.COMPLETED


async def test_what_nobody_wrote_costs_no_memory() -> None:
    """Neither is it made by looking at it where it is sent, nor where it comes by precopy."""
    with LivelyMachine(ram0=4000) as machine, HeldMachine() as copy:
        for page in (0, 700, 3999):
            await machine.write("ram0", page, b"data")
        before = machine.ram["ram0"].holes()
        await move(machine, copy)
        assert machine.ram["ram0"].holes() == before == copy.ram["ram0"].holes()
        assert len(before) == 2
        assert await content(copy.ram) == await content(machine.ram)


async def test_zeros_where_data_was() -> None:
    """A page that came with data, and then is zero."""
    with LivelyMachine(ram0=100) as machine, HeldMachine() as copy:
        for page in range(100):
            await machine.write("ram0", page, b"data")

        async def clear() -> None:
            for page in (0, 5, 6, 99):
                await machine.write("ram0", page, b"")
            machine.on_sync = None

        machine.on_sync = clear
        await move(machine, copy)
        assert machine.on_sync is None
        assert await content(copy.ram) == await content(machine.ram)


async def test_where_postcopy_may_follow_zeros_are_there() -> None:
    """A hole would be a page that is missing, and nobody sends it again."""
    with LivelyMachine(ram0=100) as machine, HeldMachine() as copy:
        await machine.write("ram0", 50, b"data")
        await move(machine, copy, "postcopy-ram")
        assert copy.ram["ram0"].holes() == []
