"""The point of no return, up to which a machine may run on at its source: the package's last byte."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.endpoint.test_endpoint_races import serving
from tests.kit.scripted_destination import Destination, LivelyMachine, Watched, channels, options, send
from tests.kit.until import until
from tests.migration.test_migration_interleavings import Here, There, Told, World
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.endpoint import Endpoint
from vhostpc.errors import ChannelLost, MigrationRefused
from vhostpc.migration import outgoing_elements
from vhostpc.migration.channel import Channel
from vhostpc.migration.link import IncomingLink
from vhostpc.migration.options import Options
from vhostpc.migration.outgoing import NeverRan, Outgoing
from vhostpc.migration.phase import Phase
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Fd, Unix
from vhostpc.pages.pagesource import PageSource
from vhostpc.pages.ramblock import RamBlock
from vhostpc.wire.migration.elements import DeviceSection, EndOfStream, Package, StreamEvent, VmDescription
from vhostpc.wire.migration.return_path import Shut

ALL = tuple(DIALECTS)
LARGE = 8 << 20
"""Bytes of device state that no socket takes at once."""


def large(machine: LivelyMachine, size: int = LARGE) -> LivelyMachine:
    machine.devices = [DeviceSection(9, "clk", 0, 1, bytes(size))]
    return machine


# --- the source, against a destination that reads so far and no further


async def part_of_a_package(
    compat: Compat, then: Callable[[Destination], Awaitable[None]]
) -> tuple[Watched, Outgoing, BaseException]:
    """Send a machine whose package is large; when half of it has been read, ``then`` happens at the destination."""
    there, here = channels()
    with large(LivelyMachine(ram0=50)) as machine:
        watched = Watched(compat, on_stop=machine.stop)
        outgoing = Outgoing(
            there, machine, watched.course, watched, options=options("postcopy-ram", compat=compat)
        )
        outgoing.start_postcopy()
        caught: list[BaseException] = []

        async def read() -> None:
            left = LARGE // 2
            while left > 0:
                left -= len(await here.receive_some(65536))
            await then(Destination(here))

        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                nursery.start_soon(read)
                try:
                    await outgoing.send()
                except Exception as error:
                    caught.append(error)
        outgoing.close()
    return watched, outgoing, caught[0]


@pytest.mark.parametrize("compat", ALL)
async def test_a_link_that_dies_in_the_package(compat: Compat) -> None:
    """The last byte was not written, so nothing can run there: the machine may go on."""

    async def close(destination: Destination) -> None:
        await destination.channel.aclose()

    watched, outgoing, error = await part_of_a_package(compat, close)
    assert isinstance(error, ChannelLost)
    assert watched.status is Status.FAILED
    assert watched.course.phase is Phase.FAILED


@pytest.mark.parametrize("compat", ALL)
async def test_the_destination_fails_while_the_package_is_on_its_way(compat: Compat) -> None:
    async def say_so(destination: Destination) -> None:
        await destination.channel.send_all(Shut(1).encode())
        await destination.channel.aclose()

    watched, outgoing, _ = await part_of_a_package(compat, say_so)
    assert watched.status is Status.FAILED
    assert watched.course.phase is Phase.FAILED


class After(Channel):
    """A channel on which something happens behind a message that the test looks for, before it counts as sent."""

    def __init__(self, channel: Channel, wanted: bytes, then: Callable[[], Awaitable[None]]) -> None:
        self.__dict__ = channel.__dict__
        self.wanted, self.then = wanted, then

    async def send_all(self, data: bytes) -> None:
        await super().send_all(data)
        if self.wanted in data:
            await self.then()


PACKAGED = b"\x08\x00\x07\x00\x04"


class Broken(Channel):
    """A channel that breaks at the message that the test looks for, and takes nothing of it."""

    def __init__(self, channel: Channel, wanted: bytes) -> None:
        self.__dict__ = channel.__dict__
        self.wanted = wanted

    async def send_all(self, data: bytes) -> None:
        if data == self.wanted:
            raise ChannelLost("it broke")
        await super().send_all(data)


@pytest.mark.parametrize("compat", ALL)
async def test_the_byte_that_ends_a_precopy_is_not_written(compat: Compat) -> None:
    """The destination cannot run it: the machine runs on here."""
    there, here = channels()
    with LivelyMachine(ram0=50) as machine:
        watched = Watched(compat, on_stop=machine.stop)
        sender = Broken(there, EndOfStream().encode())
        outgoing = Outgoing(
            sender, machine, watched.course, watched, options=options("return-path", compat=compat)
        )
        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                nursery.start_soon(Destination(here).read)
                with pytest.raises(ChannelLost, match="it broke"):
                    await outgoing.send()
        outgoing.close()
    assert watched.course.phase is Phase.FAILED
    assert watched.course.may_run


@pytest.mark.parametrize("word", [Shut(1), None], ids=["it says that it never ran", "it says nothing"])
async def test_a_write_that_fails_behind_the_border(word: Shut | None) -> None:
    """What the destination said before its end is read: only its word lets the machine run on."""
    there, here = channels()
    gone = trio.Event()
    with LivelyMachine(ram0=50) as machine:
        await machine.write("ram0", 7, b"seven")
        watched = Watched(on_stop=machine.stop)
        sender = After(there, PACKAGED, gone.wait)
        outgoing = Outgoing(sender, machine, watched.course, watched, options=options("postcopy-ram"))
        outgoing.start_postcopy()
        destination = Destination(here)

        async def act(event: StreamEvent) -> None:
            if isinstance(event, Package):
                if word is not None:
                    await here.send_all(word.encode())
                await here.aclose()
                gone.set()

        destination.on_event = act
        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                nursery.start_soon(destination.read)
                with pytest.raises(NeverRan if word else ChannelLost):
                    await outgoing.send()
        outgoing.close()
    assert watched.course.phase is (Phase.FAILED if word else Phase.PAUSED)
    assert "postcopy-active" in watched.told


async def test_the_last_word_comes_although_the_description_does_not_arrive() -> None:
    """A destination that has all and has said so is believed, whatever it did not read."""
    there, here = channels()
    gone = trio.Event()
    with LivelyMachine(ram0=50) as machine:
        watched = Watched(on_stop=machine.stop)
        sender = After(there, b"\x00", gone.wait)
        sender.wanted = b"\x00"
        outgoing = Outgoing(sender, machine, watched.course, watched, options=options("return-path"))

        async def ended() -> None:
            if watched.course.phase is Phase.SENT:  # the byte that ends the stream has gone
                await here.send_all(Shut(0).encode())
                await here.aclose()

        sender.then = ended
        destination = Destination(here)
        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                nursery.start_soon(destination.read)
                await outgoing.send()
        outgoing.close()
    assert watched.status is Status.COMPLETED


async def test_a_package_that_is_too_long_is_refused_while_the_machine_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outgoing_elements, "MAX_PACKAGE", 1000)
    with large(LivelyMachine(ram0=50), 2000) as machine:
        sent = await send(machine, options("postcopy-ram"), postcopy=True)
    assert isinstance(sent.error, MigrationRefused)
    assert "device state" in str(sent.error)
    assert sent.watched.status is Status.FAILED
    assert "stop" not in sent.watched.told


# --- both ends


class Large(Here):
    """Its package is large."""

    def state_size(self) -> int:
        return LARGE

    async def save(self) -> tuple[list[DeviceSection], bytes]:
        return [DeviceSection(9, "clk", 0, 1, bytes(LARGE))], b"{}"


async def test_a_long_package_arrives(tmp_path: Path) -> None:
    """Longer than what was once the limit at the destination alone."""

    class Longer(Large):
        async def save(self) -> tuple[list[DeviceSection], bytes]:
            return [DeviceSection(9, "clk", 0, 1, bytes(65 << 20))], b"{}"

    world = World()
    with Longer(world) as here, There(world) as there:
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.COMPLETED)
            await until(lambda: destination.status is Status.COMPLETED)
            assert len(there.devices[0].body) == 65 << 20
    assert world.running == {"destination"}


@asynccontextmanager
async def joined(
    here: Here, there: There, path: Path, *capabilities: str
) -> AsyncIterator[tuple[Endpoint, Endpoint]]:
    """Two endpoints, and a migration between them: a postcopy from its start, unless told otherwise."""
    chosen = capabilities or ("postcopy-ram",)
    await here.write("ram0", 3, b"three")
    async with serving(here) as source, serving(there, incoming=True) as destination:
        for endpoint in (source, destination):
            endpoint.options.on.clear()
            endpoint.options.on.update(chosen)
        await destination.incoming(Unix(str(path / "m")), exit_on_error=False)
        await source.migrate(Unix(str(path / "m")), resume=False)
        if "postcopy-ram" in chosen:
            await source.start_postcopy()
        yield source, destination


@pytest.mark.parametrize("early", [True, False], ids=["before-the-stop", "with-the-package"])
async def test_a_discard_fails_while_the_package_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """The destination says so and reads on, so that its word is heard; the machine runs on at its source."""
    world = World()
    with Large(world) as here, There(world) as there:

        def fail(block: RamBlock, ranges: Sequence[tuple[int, int]]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        async def nothing(outgoing: Outgoing) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(RamBlock, "discard_for", fail)
        if not early:
            monkeypatch.setattr(Outgoing, "_discard_early", nothing)
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.FAILED)
            await until(lambda: destination.status is Status.FAILED)
            await until(lambda: source.run_state == "running")
    assert world.running == {"source"}


@pytest.mark.parametrize("compat", ALL)
async def test_silence_in_the_package_can_be_cancelled(compat: Compat) -> None:
    """Nobody reads it any more: the machine stands, and a cancel lets it run on."""
    there, here = channels()
    world = World()
    with Large(world) as machine:
        await machine.write("ram0", 3, b"three")
        source = Endpoint(machine, Options(compat, on={"postcopy-ram"}), Told())
        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                await nursery.start(source.serve)
                await source.migrate(Fd("out", os.dup(there.out_fd)), resume=False)
                await source.start_postcopy()
                await until(
                    lambda: source._outgoing is not None and source._outgoing._package_going is not None
                )
                assert world.running == set()
                await source.cancel()
                ended = Status.FAILED if compat == "7.2" else Status.CANCELLED
                await until(lambda: source.status is ended)
                await until(lambda: source.run_state == "running")
                nursery.cancel_scope.cancel()
    assert world.running == {"source"}


async def test_a_cancel_that_comes_too_late() -> None:
    """The last byte has gone, and nobody knows it yet: the migration goes on, and says so."""
    there, here = channels()
    with LivelyMachine(ram0=50) as machine:
        watched = Watched(on_stop=machine.stop)

        async def cancel() -> None:
            outgoing.cancel()

        outgoing = Outgoing(
            After(there, PACKAGED, cancel), machine, watched.course, watched, options=options("postcopy-ram")
        )
        outgoing.start_postcopy()
        destination = Destination(here)
        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                nursery.start_soon(destination.read)
                await outgoing.send()
        outgoing.close()
    assert watched.told[-2:] == ["postcopy-active", "completed"]


async def test_silence_at_the_end_of_a_precopy_can_be_cancelled() -> None:
    """All was sent, and the destination says nothing and stays: a person takes the decision."""
    there, here = channels()
    world = World()
    with Here(world) as machine:
        source = Endpoint(machine, Options("10.0", on={"return-path"}), Told())
        destination = Destination(here)
        arrived = trio.Event()

        async def act(event: StreamEvent) -> None:
            if isinstance(event, VmDescription):
                arrived.set()

        destination.on_event = act
        with trio.fail_after(30):
            async with there, here, trio.open_nursery() as nursery:
                await nursery.start(source.serve)
                nursery.start_soon(lambda: destination.read(answer=None))
                await source.migrate(Fd("out", os.dup(there.out_fd)), resume=False)
                await arrived.wait()
                with pytest.raises(MigrationRefused, match="not finalized"):
                    await source.cont()
                await source.cancel()
                await until(lambda: source.run_state == "paused")
                assert source.status is Status.FAILED
                assert "may be running there" in str(source.info().error_desc)
                assert world.running == set()
                await source.cont()
                assert world.running == {"source"}
                nursery.cancel_scope.cancel()


async def test_cont_at_the_source_of_a_completed_precopy(tmp_path: Path) -> None:
    """As with QEMU: a person knows what they do. It can be sent again from there."""
    world = World()
    with Here(world) as here, There(world) as there:
        async with joined(here, there, tmp_path, "return-path") as (source, destination):
            await until(lambda: source.status is Status.COMPLETED and source._sent.is_set())
            await destination.stop()
            await source.cont()
            assert source.run_state == "running"
            assert world.running == {"source"}


async def test_cont_at_the_source_of_a_completed_postcopy_is_refused(tmp_path: Path) -> None:
    world = World()
    with Here(world) as here, There(world) as there:
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.COMPLETED and source._sent.is_set())
            with pytest.raises(MigrationRefused):
                await source.cont()
    assert world.running == {"destination"}


# --- whatever goes wrong in this process


WRONG = [
    MemoryError("dirty tracking"),
    RuntimeError("can't start new thread"),
    TypeError("a bug"),
    OSError(24, ""),
]


@pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("capability", ["postcopy-ram", "return-path"])
@pytest.mark.parametrize(
    "where", ["start_tracking", "sync_dirty", "stop", "save", "state_size", "stop_tracking"]
)
async def test_the_source_fails_and_its_machine_runs_on(
    where: str, capability: str, error: Exception, tmp_path: Path
) -> None:
    world = World()
    with Here(world) as here, There(world) as there:
        calls = 0

        def fail(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            raise error

        if where == "state_size" and capability == "return-path":
            return  # not asked for
        setattr(here, where, fail)
        async with joined(here, there, tmp_path, capability) as (source, destination):
            if where == "stop_tracking":  # it changes nothing about where the machine is
                await until(lambda: source.status is Status.COMPLETED)
                assert world.running == {"destination"}
            else:
                await until(lambda: source.status is Status.FAILED)
                await until(lambda: source._sent.is_set())
                assert source.run_state == "running"
                assert world.running == {"source"}
                assert source.info().error_desc
        assert calls


@pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["accept", "advise", "accept_blocks", "listen", "load", "loaded", "cont"])
async def test_the_destination_fails_before_it_runs(where: str, error: Exception, tmp_path: Path) -> None:
    world = World()
    with Here(world) as here, There(world) as there:

        def fail(*args: Any, **more: Any) -> Any:
            raise error

        setattr(there, where, fail)
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.FAILED and source._sent.is_set())
            await until(lambda: destination.status is Status.FAILED)
            assert source.run_state == "running"
            assert world.running == {"source"}


@pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)
async def test_the_destination_is_whole_whatever_fails_at_the_end(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    with Here(world) as here, There(world) as there:

        async def fail() -> None:
            raise error

        there.end = fail  # type: ignore[method-assign]
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.COMPLETED)
            await until(lambda: destination.status is Status.COMPLETED)
    assert world.running == {"destination"}
    assert any("all pages have arrived, but" in r.message for r in caplog.records)


@pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)
async def test_the_destination_pauses_whatever_fails_behind_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs; threads that wait for a page go on waiting, and nobody lets it run at the source."""
    world = World()
    with Here(world) as here, There(world) as there:
        left = [error]

        async def fail(self: IncomingLink) -> Any:
            if "destination" in world.running and left:
                raise left.pop()
            return await read(self)

        read = IncomingLink.next
        monkeypatch.setattr(IncomingLink, "next", fail)
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: destination.status is Status.POSTCOPY_PAUSED)
            await until(lambda: source.status is Status.POSTCOPY_PAUSED)
            assert not there.ram.lost
            assert world.running == {"destination"}


@pytest.mark.parametrize("error", WRONG, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    ("kind", "where"),
    [(PageSource, "switch"), (PageSource, "serve"), (Channel, "keep_unsent_small")],
    ids=["switch", "serve", "channel"],
)
async def test_the_source_pauses_whatever_fails_behind_the_package(
    kind: type, where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine may be running over there, so it does not run here, no matter which client asks."""
    world = World()
    with Here(world) as here, There(world) as there:

        def fail(*args: Any) -> Any:
            raise error

        monkeypatch.setattr(kind, where, fail)
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.POSTCOPY_PAUSED and source._sent.is_set())
            await until(lambda: destination.status is Status.POSTCOPY_PAUSED)
            await until(lambda: world.running == {"destination"})
            assert source.info().error_desc
            with pytest.raises(MigrationRefused, match="may be running at the destination"):
                await source.cont()
            assert not there.ram.lost
    assert world.running == {"destination"}


class Deaf(Told):
    """A listener whose every method fails."""

    error = MemoryError()

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        raise self.error

    def migration(self, status: Status) -> None:
        raise self.error

    def migration_pass(self, number: int) -> None:
        raise self.error

    def stop(self) -> None:
        raise self.error

    def resume(self) -> None:
        raise self.error


@pytest.mark.parametrize("compat", ALL)
@pytest.mark.parametrize("capability", ["return-path", "postcopy-ram"])
async def test_telling_of_it_fails(capability: str, compat: Compat, caplog: pytest.LogCaptureFixture) -> None:
    """Events and lines of the log change nothing about where the machine runs."""
    ours, theirs = socket.socketpair()
    world = World()
    with Here(world) as here, There(world) as there, trio.fail_after(30):
        options = [Options(compat, on={capability, "events"}) for _ in range(2)]
        source = Endpoint(here, options[0], Deaf())
        destination = Endpoint(there, options[1], Deaf(), incoming=True)
        async with trio.open_nursery() as nursery:
            for endpoint in (source, destination):
                await nursery.start(endpoint.serve)
            await destination.incoming(Fd("in", theirs.detach()), exit_on_error=False)
            await source.migrate(Fd("out", ours.detach()), resume=False)
            if capability == "postcopy-ram":
                await source.start_postcopy()
            await until(lambda: source.status is Status.COMPLETED)
            await until(lambda: destination.status is Status.COMPLETED)
            assert destination.run_state == "running"
            nursery.cancel_scope.cancel()
    assert world.running == {"destination"}
    assert not world.both
    assert any("an event cannot be told" in message for message in caplog.messages)


async def test_telling_who_is_waited_for_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Outgoing) -> Any:
        raise MemoryError

    monkeypatch.setattr(Outgoing, "progress", fail)
    world = World()
    with Here(world) as here, There(world) as there:
        async with joined(here, there, tmp_path) as (source, destination):
            await until(lambda: source.status is Status.COMPLETED)
            await until(lambda: destination.status is Status.COMPLETED)
    assert world.running == {"destination"}
    assert any("no longer reported" in message for message in caplog.messages)


async def test_an_error_of_the_program_leaves_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is to be found; what the system refused is one line."""
    caplog.set_level(logging.INFO)
    for error, traced in ((TypeError("a bug"), True), (OSError(24, "Too many open files"), False)):
        caplog.clear()
        world = World()
        with Here(world) as here, There(world) as there:

            def fail(error: Exception = error) -> Any:
                raise error

            here.save = fail  # type: ignore[method-assign]
            folder = tmp_path / type(error).__name__
            folder.mkdir()
            async with joined(here, there, folder) as (source, _):
                await until(lambda: source.status is Status.FAILED and source._sent.is_set())
        assert any(r.exc_info for r in caplog.records) is traced
