"""A destination that makes itself ready at the first discard: before the package, for nothing if there is none."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.kit.migration_ends import Received
from tests.kit.scripted_source import CLOCK
from tests.kit.until import until
from tests.migration.test_migration_incoming_postcopy import A, Machine, receiving
from vhostpc.errors import PostcopyRefused
from vhostpc.migration.phase import Event
from vhostpc.wire.migration.elements import Ping
from vhostpc.wire.migration.return_path import Pong, Shut

pytestmark = pytest.mark.ufd


class Slow(Machine):
    """Its back-ends answer LISTEN when ``go`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = trio.Event()

    async def listen(self) -> None:
        await super().listen()
        await self.go.wait()


async def test_back_ends_listen_from_the_first_discard_on() -> None:
    """A PING behind it is answered once they do; the discards between are done meanwhile."""
    machine = Slow()
    async with receiving(wanted=machine) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", *((page, A) for page in range(8)))
        await setup.source.discard("ram", 3, 1)
        await setup.source.send(Ping(5).encode())
        await until(lambda: "listen" in machine.told)
        await until(lambda: setup.machine.ram["ram"].holes() == [(3 * 4096, 4096)])
        await trio.testing.wait_all_tasks_blocked()
        assert Pong(5) not in setup.source.said
        assert not setup.incoming.service.armed
        machine.go.set()
        await setup.source.heard(Pong(5))
        await setup.source.package()
        await setup.source.heard(Pong(3))
        assert setup.incoming.service.armed
        await setup.source.pages("ram", (3, A), last=True)
        await setup.source.end()
        await setup.ended.wait()
        assert setup.raised is None
        assert machine.told.count("listen") == 1


async def test_a_package_waits_for_them() -> None:
    machine = Slow()
    received = Received()
    async with receiving(received, wanted=machine) as setup:
        await setup.source.switch()
        await until(lambda: "listen" in machine.told)
        await trio.testing.wait_all_tasks_blocked()
        assert received.events == []
        machine.go.set()
        await setup.source.heard(Pong(3))
        await setup.source.pages("ram", *((page, A) for page in range(8)), last=True)
        await setup.source.end()
        await setup.ended.wait()
        assert setup.raised is None


@pytest.mark.parametrize("how", ["it breaks", "it closes"])
async def test_no_package_comes(how: str) -> None:
    """Back-ends that listen are told END, and nothing waits in them."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", *((page, A) for page in range(8)))
        await setup.source.discard("ram", 3, 1)
        await setup.source.send(Ping(5).encode())
        await setup.source.heard(Pong(5))
        if how == "it breaks":
            await setup.source.send(b"\xff" * 8)
            await setup.source.heard(Shut(1))
        await setup.source.stream.aclose()
        await setup.ended.wait()
        assert setup.raised is not None
        assert setup.machine.told[-2:] == ["listen", "end"]
        assert not setup.machine.ram.lost
    assert received.events == [Event.FAIL]


async def test_a_back_end_that_refuses() -> None:
    """Before the package: the source's machine was not stopped, and it is told why there is no answer."""

    class Refuses(Machine):
        async def listen(self) -> None:
            await super().listen()
            raise PostcopyRefused("postcopy refused by net0: it has memory")

    received = Received()
    async with receiving(received, wanted=Refuses()) as setup:
        await setup.source.begin()
        await setup.source.discard("ram", 3, 1)
        await setup.source.send(Ping(5).encode())
        await setup.source.heard(Shut(1))
        await setup.source.stream.aclose()
        await setup.ended.wait()
        assert isinstance(setup.raised, PostcopyRefused)
        assert Pong(5) not in setup.source.said
        assert setup.machine.told[-1] == "end"
    assert received.events == [Event.FAIL]


async def test_a_precopy_that_ends_behind_discards() -> None:
    """No source does it. What was discarded has to come, and it comes: END is told all the same."""
    received = Received()
    async with receiving(received) as setup:
        await setup.source.begin()
        await setup.source.pages("ram", *((page, A) for page in range(8)))
        await setup.source.discard("ram", 3, 1)
        await setup.source.pages("ram", (3, A), last=True)
        await setup.source.end([CLOCK])
        await setup.ended.wait()
        assert setup.raised is None
        assert setup.machine.told[-1] == "end"
        assert "listen" in setup.machine.told
        assert not setup.incoming.service.armed
    assert received.events == [Event.FINISH]
