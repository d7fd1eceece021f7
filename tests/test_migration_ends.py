"""Source without QEMU: it feeds our own destination, and meets destinations that misbehave."""

from __future__ import annotations

import pytest
import trio

from tests.migration_ends import LIMIT, content, pair, receive
from tests.streams import PRECOPY, h
from vhostpc.errors import ChannelLost, StreamError
from vhostpc.migration.channel import Channel
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.incoming import Incoming
from vhostpc.migration.outgoing import Outgoing
from vhostpc.migration.state import Status
from vhostpc.wire.return_path import Shut


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_sent_on_it_is_the_same(postcopy: bool) -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        outgoing = Outgoing(machine, there)
        with HeldMachine() as copy:
            async with there, Channel(here) as channel, trio.open_nursery() as nursery:
                incoming = Incoming(channel, copy, postcopy=postcopy)
                nursery.start_soon(incoming.receive)
                await outgoing.send(postcopy=postcopy)
            incoming.close()
            assert outgoing.status is Status.COMPLETED
            assert await content(copy) == await content(machine)
            assert copy.configuration == machine.configuration
            assert copy.devices == machine.devices
            assert copy.description == (b"" if postcopy else machine.description)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_destination_that_is_gone(postcopy: bool) -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        async with there:
            outgoing = Outgoing(machine, there)
            async with trio.open_nursery() as nursery:

                async def leave() -> None:
                    seen = b""
                    while h("03 00000001 0a") not in seen and len(seen) < 4000:
                        seen += bytes(await here.receive_some(512))
                    await here.aclose()

                nursery.start_soon(leave)
                with pytest.raises(ChannelLost, match="closed the connection"):
                    await outgoing.send(postcopy=postcopy)
        wanted = Status.POSTCOPY_PAUSED if postcopy else Status.FAILED
        assert outgoing.status is wanted


async def test_destination_that_talks_nonsense() -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        async with there, here:
            await here.send_all(b"\x00\x09\x00\x00" * 4)
            with pytest.raises(StreamError, match="return path"):
                await Outgoing(machine, there).send()


async def test_destination_that_is_done_too_early() -> None:
    machine, _ = await receive(PRECOPY)
    there, here = pair()
    with machine, trio.fail_after(LIMIT):
        async with there, here:
            await here.send_all(Shut(0).encode())
            with pytest.raises(StreamError, match="were not sent"):
                await Outgoing(machine, there).send(rate=0)
