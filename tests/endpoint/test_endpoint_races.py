"""Commands that come while others are under way: the machine runs at one end only, nothing is left half-way."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.migration_ends import incoming_of
from tests.kit.scripted_destination import channels
from tests.kit.streams import Encoded
from tests.kit.until import until
from tests.migration.test_migration_interleavings import Here, There, Told, World
from vhostpc.endpoint import Endpoint
from vhostpc.errors import MigrationRefused, StreamError
from vhostpc.migration.held import HeldMachine
from vhostpc.migration.machine import Machine, nobody
from vhostpc.migration.options import Options
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Exec, Fd, Unix
from vhostpc.wire.migration.elements import BlockInfo, Configuration, Footer, Header, RamBlocks, SectionStart


@asynccontextmanager
async def serving(machine: Machine, *, incoming: bool = False) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(machine, Options("10.0", on={"return-path"}), Told(), incoming=incoming)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.serve)
            yield endpoint
            nursery.cancel_scope.cancel()


class Slow(Here):
    """Its stop takes until it is let go."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.stopping, self.go = trio.Event(), trio.Event()

    async def stop(self) -> None:
        self.stopping.set()
        await self.go.wait()
        await super().stop()


async def test_stop_and_cont_during_the_switch(tmp_path: Path) -> None:
    """Neither takes the machine out of the migration's hands."""
    world = World()
    here, there = Slow(world), There(world)
    with here, there:
        async with serving(here) as source, serving(there, incoming=True) as destination:
            await destination.incoming(Unix(str(tmp_path / "m")), exit_on_error=False)
            await source.migrate(Unix(str(tmp_path / "m")), resume=False)
            await here.stopping.wait()
            await source.stop()
            with pytest.raises(MigrationRefused, match="not finalized"):
                await source.cont()
            here.go.set()
            await until(lambda: source.status is Status.COMPLETED)
            assert source.run_state == "postmigrate"
            await until(lambda: destination.status is Status.COMPLETED)
    assert world.running == {"destination"}
    assert not world.both


async def test_a_stop_that_fails() -> None:
    """It runs on, and its run state says so: otherwise a migration that fails would leave it standing."""

    class Stuck(Here):
        async def stop(self) -> None:
            if self.world.fell_short:
                await super().stop()
            else:
                self.world.fell_short = "stop"
                raise RuntimeError("can't start new thread")

    world = World()
    with Stuck(world) as here:
        async with serving(here) as source:
            with pytest.raises(RuntimeError):
                await source.stop()
            assert world.running == {"source"}
            assert source.run_state == "running"
            await source.stop()
            assert world.running == set()
            assert source.run_state == "paused"


async def test_completed_and_its_command_still_runs(tmp_path: Path) -> None:
    """The command that took the stream goes on for a while: the machine stays where it went."""
    world = World()
    with Here(world) as here:
        endpoint = Endpoint(here, Options("10.0"), Told())
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(endpoint.serve)
                wait = tmp_path / "wait"
                os.mkfifo(wait)
                await endpoint.migrate(Exec(("/bin/sh", "-c", f"cat >/dev/null; cat {wait}")), resume=False)
                await until(lambda: endpoint.status is Status.COMPLETED)
                assert endpoint.run_state == "postmigrate"
                with pytest.raises(MigrationRefused):
                    await endpoint.cont()
                await trio.to_thread.run_sync(wait.write_bytes, b"")  # which waits for its reader
                await endpoint._sent.wait()
                assert endpoint.run_state == "postmigrate"
                assert world.running == set()
                nursery.cancel_scope.cancel()


class Quick(Told):
    """One who hears a status and says something at once, as a monitor's client does."""

    def __init__(self, nursery: trio.Nursery, at: Status, say: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.nursery, self.at, self.say = nursery, at, say
        self.said = trio.Event()

    def migration(self, status: Status) -> None:
        super().migration(status)
        if status is self.at:
            self.nursery.start_soon(self.speak)

    async def speak(self) -> None:
        await self.say()
        self.said.set()


class NotThere(There):
    """It cannot be loaded."""

    async def loaded(self, description: bytes) -> None:
        raise StreamError("it is no machine")


Play = tuple[Endpoint, Quick]


@asynccontextmanager
async def said_at_once(here: Here, there: There, path: Path, at: Status, word: str) -> AsyncIterator[Play]:
    """A precopy of which the last status is answered by ``stop`` or ``cont``."""
    async with serving(there, incoming=True) as destination, trio.open_nursery() as nursery:
        told = Quick(nursery, at, lambda: getattr(source, word)())
        source = Endpoint(here, Options("10.0", on={"return-path"}), told)
        await nursery.start(source.serve)
        await destination.incoming(Unix(str(path)), exit_on_error=False)
        await source.migrate(Unix(str(path)), resume=False)
        await told.said.wait()
        yield source, told
        source.quit()


async def test_a_held_machine_is_taken_back_as_soon_as_it_was_sent(tmp_path: Path) -> None:
    world = World()
    with Here(world) as here, There(world) as there, There(world) as other:
        here.runnable = False
        await here.stop()
        async with said_at_once(here, there, tmp_path / "m", Status.COMPLETED, "stop") as (source, _):
            assert source.run_state == "paused"
            async with serving(other, incoming=True) as second:
                await second.incoming(Unix(str(tmp_path / "n")), exit_on_error=False)
                await source.migrate(Unix(str(tmp_path / "n")), resume=False)
                await until(lambda: second.status is Status.COMPLETED)


async def test_a_machine_that_was_sent_runs_here_again_at_once(tmp_path: Path) -> None:
    """By a person's word, as with QEMU."""
    world = World()
    with Here(world) as here, There(world) as there:
        async with said_at_once(here, there, tmp_path / "m", Status.COMPLETED, "cont") as (source, told):
            assert source.run_state == "running"
            assert here.running
            assert told.events[-2:] == ["completed", "RESUME"]


@pytest.mark.parametrize("word", ["stop", "cont"])
async def test_the_word_right_behind_a_failure_counts(word: str, tmp_path: Path) -> None:
    """While the machine is about to be started again."""
    world = World()
    with Here(world) as here, NotThere(world) as there:
        async with said_at_once(here, there, tmp_path / "m", Status.FAILED, word) as (source, _):
            await source._sent.wait()
            assert source.run_state == ("paused" if word == "stop" else "running")
            assert here.running == (word == "cont")


async def test_a_stop_while_a_failure_starts_the_machine_again(tmp_path: Path) -> None:
    world = World()

    class SlowStart(Here):
        starting, go = trio.Event(), trio.Event()

        async def cont(self, runs: Callable[[], None] = nobody) -> None:
            self.starting.set()
            await self.go.wait()
            await super().cont(runs)

    with SlowStart(world) as here, NotThere(world) as there:

        async def stop() -> None:
            await here.starting.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.stop)
                await trio.testing.wait_all_tasks_blocked()
                here.go.set()

        async with serving(there, incoming=True) as destination, trio.open_nursery() as nursery:
            source = Endpoint(here, Options("10.0", on={"return-path"}), Told())
            await nursery.start(source.serve)
            await destination.incoming(Unix(str(tmp_path / "m")), exit_on_error=False)
            await source.migrate(Unix(str(tmp_path / "m")), resume=False)
            await stop()
            assert (source.run_state, here.running) == ("paused", False)
            source.quit()


async def test_a_cont_while_the_machine_is_being_stopped() -> None:
    """It runs in the end, and the events say so."""
    world = World()

    class OneByOne(Slow):
        lock: trio.Lock

        async def stop(self) -> None:
            async with self.lock:
                await super().stop()

        async def cont(self, runs: Callable[[], None] = nobody) -> None:
            async with self.lock:
                await super().cont(runs)

    with OneByOne(world) as here:
        here.lock = trio.Lock()
        told = Told()
        endpoint = Endpoint(here, Options("10.0"), told)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(endpoint.stop)
                await here.stopping.wait()
                nursery.start_soon(endpoint.cont)
                await trio.testing.wait_all_tasks_blocked()
                here.go.set()
        assert (endpoint.run_state, here.running) == ("running", True)
        assert told.events == ["STOP", "RESUME"]


async def test_two_migrates_at_once(tmp_path: Path) -> None:
    """One is taken; the other is refused, and leaves nothing behind."""
    world = World()
    with Here(world) as here:
        async with serving(here) as source:
            command = Exec(("/bin/sh", "-c", f"cat >/dev/null; sleep 100 & echo $! > {tmp_path}/pid; wait"))
            answers: list[str] = []

            async def migrate() -> None:
                try:
                    await source.migrate(command, resume=False)
                    answers.append("taken")
                except MigrationRefused as error:
                    answers.append(str(error))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(migrate)
                nursery.start_soon(migrate)
            assert sorted(answers) == ["There's a migration process in progress", "taken"]
            await source.cancel()
            await source._sent.wait()
            assert world.running == {"source"}


async def test_two_machines_awaited_at_once(tmp_path: Path) -> None:
    with There(World()) as there:
        async with serving(there, incoming=True) as destination:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: destination.incoming(Unix(str(tmp_path / "a")), exit_on_error=False)
                )
                await until(lambda: destination.has_listened)
            assert destination.status is Status.SETUP


async def test_refused_it_may_be_awaited_again(tmp_path: Path) -> None:
    with There(World()) as there:
        async with serving(there, incoming=True) as destination:
            with pytest.raises(MigrationRefused):
                await destination.incoming(Unix(str(tmp_path / "no" / "folder")), exit_on_error=False)
            assert not destination.has_listened
            await destination.incoming(Unix(str(tmp_path / "a")), exit_on_error=False)
            assert destination.status is Status.SETUP


async def test_cancelled_while_a_pipe_is_full() -> None:
    """Nobody reads it, and nobody closes it."""
    world = World()
    reader, writer = os.pipe()
    with Here(world) as here:
        for page in range(here.ram["ram0"].pages):
            await here.write("ram0", page, b"%d" % page)
        endpoint = Endpoint(here, Options("10.0"), Told())
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(endpoint.serve)
                await endpoint.migrate(Fd("pipe", writer), resume=False)
                await until(lambda: endpoint.status is Status.ACTIVE)
                await endpoint.cancel()
                await until(lambda: endpoint.status is Status.CANCELLED)
                assert world.running == {"source"}
                nursery.cancel_scope.cancel()
    os.close(reader)


async def test_a_refused_migrate_closes_the_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with ours, Here(World()) as here:
        async with serving(here) as source:
            with pytest.raises(MigrationRefused):
                await source.migrate(Fd("in", theirs.detach()), resume=True)
            assert ours.recv(1) == b""


async def test_a_failure_and_another_one_at_once(tmp_path: Path) -> None:
    """The second waits until the first has put everything back."""

    class Tracked(Here):
        overlaps = False

        async def start_tracking(self) -> None:
            self.overlaps |= self.tracked
            await super().start_tracking()

        async def stop_tracking(self) -> None:
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            await super().stop_tracking()

    world = World()
    with Tracked(world) as here, There(world) as there:
        async with serving(here) as source, serving(there, incoming=True) as destination:
            ours, theirs = socket.socketpair()
            for page in range(here.ram["ram0"].pages):  # more than the socket holds
                await here.write("ram0", page, b"%d" % page)
            await source.migrate(Fd("out", theirs.detach()), resume=False)
            await until(lambda: source.status is Status.ACTIVE)
            ours.close()
            await until(lambda: source.status is Status.FAILED)
            await destination.incoming(Unix(str(tmp_path / "m")), exit_on_error=False)
            await source.migrate(Unix(str(tmp_path / "m")), resume=False)
            await until(lambda: source.status is Status.COMPLETED)
            await until(lambda: destination.status is Status.COMPLETED)
        assert not here.overlaps
    assert world.running == {"destination"}


@pytest.mark.parametrize("length", [1 << 63, 1 << 45])
async def test_more_memory_than_there_can_be(length: int) -> None:
    there, here = channels()
    blocks = RamBlocks((BlockInfo("ram", length),))
    data: list[Encoded] = [Header(), Configuration("toyvm"), SectionStart(1), blocks, Footer(1)]
    with HeldMachine() as machine, trio.fail_after(30):
        async with there, here:
            await there.send_all(b"".join(element.encode() for element in data))
            incoming = incoming_of(here, machine, postcopy=False)
            with pytest.raises(StreamError, match="more than can be held"):
                await incoming.receive()
            incoming.close()
