"""Endpoints whose link is lost in postcopy: by command, and by themselves. A relay of the test breaks it."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.relay import Relay
from tests.kit.scripted_destination import LivelyMachine, content
from tests.kit.until import until
from tests.migration.test_migration_interleavings import Here, There, Told, World
from vhostpc.dialect import Compat
from vhostpc.endpoint import Endpoint, Links
from vhostpc.errors import MigrationRefused, StreamError
from vhostpc.migration.options import Options
from vhostpc.migration.phase import Phase
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Unix
from vhostpc.wire.migration.elements import DeviceSection

pytestmark = pytest.mark.ufd


class Pair:
    """Two endpoints of this process; the source goes by way of ``relay``."""

    def __init__(self, folder: Path, links: Links, compat: Compat, also: tuple[Sequence[str], ...]) -> None:
        self.world = World()
        self.here, self.there = Here(self.world), There(self.world)
        self.tells = Told(), Told()
        chosen = [Options(compat, on={"events", "postcopy-ram", *more}) for more in also]
        chosen[0].set_parameters({"max-postcopy-bandwidth": 4096})
        self.source = Endpoint(self.here, chosen[0], self.tells[0], links=links)
        self.destination = Endpoint(self.there, chosen[1], self.tells[1], incoming=True, links=links)
        self.relay = Relay(folder / "relay", folder / "in")
        self.address, self.listens = Unix(str(folder / "relay")), Unix(str(folder / "in"))

    async def to_postcopy(self) -> None:
        await self.destination.incoming(self.listens, exit_on_error=False)
        await self.source.migrate(self.address, resume=False)
        await self.source.start_postcopy()
        await self.both(Status.POSTCOPY_ACTIVE)
        await until(lambda: self.world.running == {"destination"})

    async def both(self, status: Status) -> None:
        await until(
            lambda: self.source.status is status and self.destination.status is status,
            what=f"{status}: {self.source.status}, {self.destination.status}",
        )

    async def recover(self) -> None:
        await self.destination.recover(self.listens)
        await self.source.migrate(self.address, resume=True)

    async def finish(self) -> None:
        self.source.options.set_parameters({"max-postcopy-bandwidth": 0})
        self.source.parameters_changed()
        await self.both(Status.COMPLETED)
        assert self.world.running == {"destination"}
        assert not self.world.both
        assert await content(self.there.ram) == await content(self.here.ram)


@contextlib.asynccontextmanager
async def pair(
    folder: Path,
    links: Links | None = None,
    *,
    compat: Compat = "10.0",
    also: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> AsyncIterator[Pair]:
    """``also``: capabilities of the source, and of the destination."""
    made = Pair(folder, links or Links(), compat, also)
    with trio.fail_after(60), made.here, made.there:
        async with trio.open_nursery() as nursery:
            for page in range(0, 400, 2):
                await LivelyMachine.write(made.here, "ram0", page, b"page %d" % page)
            await nursery.start(made.source.serve)
            await nursery.start(made.destination.serve)
            await nursery.start(made.relay.run)
            yield made
            nursery.cancel_scope.cancel()


async def test_by_command(tmp_path: Path) -> None:
    """In QEMU's order of events; what is refused when is refused in its words."""
    async with pair(tmp_path) as ends:
        for wrong in (ends.source.pause, ends.destination.pause):
            with pytest.raises(MigrationRefused, match="only supported during postcopy"):
                await wrong()
        await ends.to_postcopy()
        with pytest.raises(MigrationRefused, match="Migrate recover can only be run when postcopy is paused"):
            await ends.destination.recover(ends.listens)
        with pytest.raises(MigrationRefused, match="Cannot resume if there is no paused migration"):
            await ends.source.migrate(ends.address, resume=True)
        ends.relay.cut()
        await ends.both(Status.POSTCOPY_PAUSED)
        with pytest.raises(MigrationRefused, match="Migrate recover can only be run"):
            await ends.source.recover(ends.listens)
        with pytest.raises(MigrationRefused, match="may be running at the destination"):
            await ends.source.cont()
        await ends.source.migrate(ends.address, resume=True)  # nobody listens yet
        await ends.both(Status.POSTCOPY_PAUSED)
        await ends.recover()
        await ends.both(Status.POSTCOPY_ACTIVE)
        await ends.finish()
        assert [e for e in ends.tells[1].events if e.startswith("postcopy") or e == "completed"] == [
            *("postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-active", "completed")
        ]


async def test_what_comes_to_the_recovery_port(tmp_path: Path) -> None:
    """Strangers: silent, talkative, with a stream of their own. The paused machine outlives them all."""
    async with pair(tmp_path, Links(timeout=0.4)) as ends:
        await ends.to_postcopy()
        ends.relay.cut()
        await ends.both(Status.POSTCOPY_PAUSED)
        for pauses, said in enumerate(
            (b"", b"GET / HTTP/1.0\r\n\r\n", b"QEVM\0\0\0\3", b"\x08\x00\x09\x00\x00"), 2
        ):
            await ends.destination.recover(ends.listens)
            async with await trio.open_unix_socket(ends.listens.path) as stranger:
                await stranger.send_all(said)
                await until(lambda n=pauses: ends.tells[1].events.count("postcopy-paused") == n)  # type: ignore[misc]
        await ends.destination.recover(Unix(str(tmp_path / "elsewhere")))  # gives way to the next
        await ends.recover()
        await ends.both(Status.POSTCOPY_ACTIVE)
        await ends.finish()


async def loading(ends: Pair, load: Callable[[DeviceSection], Awaitable[None]]) -> None:
    """The package has arrived and is being loaded, and the link is lost."""
    ends.there.load = load  # type: ignore[method-assign, assignment]
    await ends.destination.incoming(ends.listens, exit_on_error=False)
    await ends.source.migrate(ends.address, resume=False)
    await ends.source.start_postcopy()
    await ends.both(Status.POSTCOPY_ACTIVE)
    ends.relay.cut()
    await ends.both(Status.POSTCOPY_PAUSED)


async def test_a_load_that_waits_when_the_link_is_lost(tmp_path: Path) -> None:
    """The machine has not run yet. Strangers change nothing; then it is recovered, loaded, and runs."""
    async with pair(tmp_path, Links(timeout=0.4)) as ends:
        go = trio.Event()
        load = ends.there.load

        async def slow(section: DeviceSection) -> None:
            await go.wait()
            await load(section)

        await loading(ends, slow)
        for pauses, said in enumerate((b"", b"GET / HTTP/1.0", b"QEVM\0\0\0\3", b"\x08\x00\x09\x00\x00"), 2):
            await ends.destination.recover(ends.listens)
            async with await trio.open_unix_socket(ends.listens.path) as stranger:
                await stranger.send_all(said)
                await until(lambda n=pauses: ends.tells[1].events.count("postcopy-paused") == n)  # type: ignore[misc]
        assert not ends.world.running
        await ends.recover()
        await ends.both(Status.POSTCOPY_ACTIVE)
        go.set()
        await ends.finish()


async def test_a_load_that_fails_while_there_is_no_link(tmp_path: Path) -> None:
    """The source hears of it with the recovery, and its machine runs on."""
    async with pair(tmp_path) as ends:
        go = trio.Event()

        async def fail(section: DeviceSection) -> None:
            await go.wait()
            raise StreamError("no such device")

        await loading(ends, fail)
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        await ends.both(Status.POSTCOPY_PAUSED)
        await ends.recover()
        await ends.both(Status.FAILED)
        await until(lambda: ends.world.running == {"source"})


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
async def test_a_second_attempt_is_refused_while_one_is_under_way(compat: Compat, tmp_path: Path) -> None:
    """And one that finds nobody is told, in a log line where the version shows no status of it."""
    async with pair(tmp_path, compat=compat) as ends:
        await ends.to_postcopy()
        ends.relay.cut()
        await ends.both(Status.POSTCOPY_PAUSED)
        await ends.source.migrate(Unix(str(tmp_path / "nobody")), resume=True)
        with pytest.raises(MigrationRefused, match="Cannot resume if there is no paused migration"):
            await ends.source.migrate(ends.address, resume=True)
        await until(lambda: ends.source._course.phase is Phase.PAUSED)
        assert "No such file" in (ends.source._error_desc or "")
        await ends.recover()
        await ends.finish()


async def stranger_at(path: str) -> trio.SocketStream:
    """Connected as soon as somebody listens."""
    while True:
        try:
            return await trio.open_unix_socket(path)
        except OSError:
            await trio.sleep(0.01)


async def test_strangers_do_not_lengthen_the_time(tmp_path: Path) -> None:
    """However many attempts fail: then the port is closed, and a person can recover."""
    async with pair(tmp_path, Links(recover_for=0.5)) as ends:
        await ends.to_postcopy()
        ends.relay.refuse()
        strangers = 0
        (await stranger_at(ends.listens.path)).socket.close()
        while ends.destination._recovery is not None or strangers == 0:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_unix_socket(ends.listens.path) as stranger:
                    await stranger.send_all(b"GET / HTTP/1.0")
                    strangers += 1
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert ends.destination._recovery is None
        assert not Path(ends.listens.path).exists()
        await until(lambda: ends.source._course.phase is Phase.PAUSED)
        ends.relay.cut()
        await ends.recover()
        await ends.finish()


async def test_a_person_stops_the_automatic_recovery(tmp_path: Path) -> None:
    """migrate-pause at the destination, while a stranger has its port; then by command."""
    async with pair(tmp_path, Links(recover_for=30)) as ends:
        await ends.to_postcopy()
        ends.relay.refuse()
        async with await stranger_at(ends.listens.path):
            await until(lambda: ends.destination.status is Status.POSTCOPY_RECOVER)
            await ends.destination.pause()
            await until(lambda: ends.destination.status is Status.POSTCOPY_PAUSED)
        await until(lambda: not Path(ends.listens.path).exists())
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not Path(ends.listens.path).exists()
        ends.relay.cut()
        await ends.destination.recover(ends.listens)
        await ends.both(Status.POSTCOPY_ACTIVE)
        await ends.finish()


async def test_a_person_frees_the_port(tmp_path: Path) -> None:
    """migrate-pause, while a silent stranger has it, and while nobody answers where we connect to."""
    async with pair(tmp_path) as ends:
        await ends.to_postcopy()
        await ends.destination.pause()
        await ends.both(Status.POSTCOPY_PAUSED)
        await ends.destination.recover(ends.listens)
        async with await trio.open_unix_socket(ends.listens.path):
            await until(lambda: ends.destination.status is Status.POSTCOPY_RECOVER)
            await ends.destination.pause()
            await ends.both(Status.POSTCOPY_PAUSED)
        ends.relay.swallow()
        await ends.recover()
        await until(lambda: ends.source.status is Status.POSTCOPY_RECOVER)
        await ends.source.pause()
        await until(lambda: ends.source.status is Status.POSTCOPY_PAUSED)
        ends.relay.cut()
        await ends.both(Status.POSTCOPY_PAUSED)
        await ends.recover()
        await ends.finish()


@pytest.mark.parametrize("seed", range(3))
async def test_by_themselves(seed: int, tmp_path: Path) -> None:
    """A link that breaks again and again, at any byte, is made again without anybody's doing."""
    rng = random.Random(seed)
    async with pair(tmp_path, Links(recover_for=20)) as ends:
        ends.source.options.set_parameters({"max-postcopy-bandwidth": 64 << 10})
        await ends.to_postcopy()
        for _ in range(8):
            ends.relay.cut_after(rng.randrange(9000))
            before = ends.relay.cuts
            await until(lambda before=before: ends.relay.cuts > before)  # type: ignore[misc]
        await ends.finish()


async def test_a_lost_last_word_is_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The destination has completed, and the source does not know: it recovers, and hears it."""
    caplog.set_level(logging.INFO)
    async with pair(tmp_path) as ends:
        await ends.to_postcopy()
        ends.relay.hold_back()  # nothing returns from the destination any more
        ends.source.options.set_parameters({"max-postcopy-bandwidth": 0})
        ends.source.parameters_changed()
        await until(lambda: ends.destination.status is Status.COMPLETED)
        ends.relay.cut()
        await until(lambda: ends.source.status is Status.POSTCOPY_PAUSED)
        await ends.recover()
        await ends.finish()
        assert ends.destination._course.phase is Phase.MOVED
    assert "told once more" in caplog.text


async def test_silence_is_a_pause(tmp_path: Path) -> None:
    """Both ends notice that nothing comes any more, and the recovery works; a slow link is no silent one."""
    async with pair(tmp_path, Links(timeout=0.5)) as ends:
        await ends.to_postcopy()
        ends.source.options.set_parameters({"max-postcopy-bandwidth": 0})
        ends.relay.swallow()
        async with trio.open_nursery() as nursery:
            got: list[bytes] = []

            async def touch() -> None:
                got.append(await ends.there.ram["ram0"].read(398 * 4096, 8))

            nursery.start_soon(touch)
            await ends.both(Status.POSTCOPY_PAUSED)
            assert got == []
            await ends.recover()
            await ends.both(Status.POSTCOPY_ACTIVE)
            await until(lambda: got == [b"page 398"])
        await ends.finish()


async def test_silence_before_the_point_of_no_return_is_a_failure(tmp_path: Path) -> None:
    async with pair(tmp_path, Links(timeout=0.5)) as ends:
        await ends.destination.incoming(ends.listens, exit_on_error=False)
        ends.relay.stop_reading()
        await ends.source.migrate(ends.address, resume=False)
        await until(lambda: ends.source.status is Status.FAILED)
        assert ends.world.running == {"source"}
