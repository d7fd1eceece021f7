"""Sources of pages: the process, and the Python function that tests may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio

from tests.kit.until import until
from vhostpc.errors import ChannelLost, StreamError
from vhostpc.frontend.source import CallableSource, start_source
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.return_path import Shut

pytestmark = pytest.mark.ufd
PAGES = 64
SEED = 5


@pytest.fixture
def ram() -> Iterator[RamSet]:
    with RamSet() as ram:
        ram.create("ram0", PAGES * TARGET_PAGE)
        yield ram


async def test_python_function_as_source(ram: RamSet) -> None:
    """Slow, and only for tests: each fault needs the GIL. The touch itself waits without it."""

    def page(block: str, offset: int) -> bytes:
        assert block == "ram0"
        return (offset // TARGET_PAGE).to_bytes(2, "little") * (TARGET_PAGE // 2)

    source = CallableSource(page)
    ours, theirs = trio.socket.socketpair()
    with trio.fail_after(30), ours, theirs, FaultService(ram) as service:
        service.arm()
        service.set_return_path(ours.fileno())
        async with trio.open_nursery() as nursery:
            stream = trio.SocketStream(theirs)
            nursery.start_soon(service.run)
            nursery.start_soon(source.serve, stream)
            loading = trio.Event()

            async def load() -> None:
                await service.load(ours.fileno())
                loading.set()

            nursery.start_soon(load)
            for i in (7, 3, 7, 60):
                assert await ram["ram0"].read(i * TARGET_PAGE, 4) == i.to_bytes(2, "little") * 2
            assert ram["ram0"].count_bits(Bits.RECEIVED) == 3
            assert service.own.numbers().distinct == 3
            await stream.send_all(source.end())
            await loading.wait()
            service.send(Shut(0).encode())
            nursery.cancel_scope.cancel()


async def test_source_that_makes_its_own_content(ram: RamSet) -> None:
    with trio.fail_after(30), FaultService(ram) as service:
        service.arm()
        async with start_source(ram.blocks, seed=SEED, background_rate=1 << 40) as source:
            service.set_return_path(source.sock.fileno())
            numbers = await service.load(source.sock.fileno())
            assert numbers.placed == PAGES
            said = await source.numbers()
            assert (said.dirty_left, said.eos_sent, said.data_pages) == (0, True, PAGES)
        assert await ram["ram0"].verify(SEED) == (0, None)


async def test_commands_of_a_source(ram: RamSet) -> None:
    with trio.fail_after(30), FaultService(ram) as service:
        service.arm()
        async with start_source(ram.blocks, seed=SEED) as source, trio.open_nursery() as nursery:
            service.set_return_path(source.sock.fileno())
            nursery.start_soon(service.run)
            nursery.start_soon(lose, service, source.sock.fileno())
            await source.withhold("ram0", 10, 2)
            nursery.start_soon(ram["ram0"].read, 10 * TARGET_PAGE, 8)
            assert (await source.wait_withheld()).withheld == 1
            await source.release("ram0", 10, 1)
            await until(lambda: ram["ram0"].test_bit(Bits.RECEIVED, 10))
            await source.withhold_all()
            nursery.start_soon(ram["ram0"].read, 20 * TARGET_PAGE, 8)
            assert (await source.wait_withheld()).withheld == 1
            await source.withhold_all(False)
            await until(lambda: ram["ram0"].test_bit(Bits.RECEIVED, 20))
            with pytest.raises(StreamError, match="no such"):
                await source.withhold("no such block")
            assert (await source.numbers()).requested_pages == 2
            source.kill()
            with pytest.raises(ChannelLost):
                await source.numbers()
            nursery.cancel_scope.cancel()


async def lose(service: FaultService, fd: int) -> None:
    with pytest.raises(ChannelLost):
        await service.load(fd)


async def test_a_source_ends_with_its_context(ram: RamSet) -> None:
    with trio.fail_after(30):
        before = len(os.listdir("/proc/self/fd"))
        async with start_source(ram.blocks, seed=SEED) as source:
            pid = source.pid
            await source.numbers()
        assert not os.path.exists(f"/proc/{pid}")
        assert len(os.listdir("/proc/self/fd")) == before
