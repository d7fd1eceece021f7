"""The two ends of a migration joined, without QEMU: what one sends the other has."""

from __future__ import annotations

import pytest
import trio

from tests.scripted_destination import LivelyMachine, Watched, channels, content, options
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.state import Status

LIMIT = 60


@pytest.mark.parametrize("how", ["precopy", "return path", "postcopy", "postcopy in the middle"])
async def test_sent_on_it_is_the_same(how: str) -> None:
    chosen = options(
        *([] if how == "precopy" else ["return-path" if how == "return path" else "postcopy-ram"]),
        **({"max_bandwidth": 16 << 20} if how == "postcopy in the middle" else {}),
    )
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
            outgoing = Outgoing(machine, there, chosen, watched)
            incoming = Incoming(here, copy, postcopy=postcopy)
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
