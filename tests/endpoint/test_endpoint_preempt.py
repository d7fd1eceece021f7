"""Requested pages on a connection of their own (postcopy-preempt), between two endpoints."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.endpoint.test_endpoint_recovery import Pair, pair
from tests.kit.hostile import open_fds
from tests.kit.until import until
from vhostpc.dialect import Compat
from vhostpc.endpoint import Links
from vhostpc.errors import MigrationRefused
from vhostpc.migration.phase import Phase
from vhostpc.migration.status import Status
from vhostpc.migration.uri import Fd, File

pytestmark = pytest.mark.ufd
BOTH = (("postcopy-preempt",), ("postcopy-preempt",))
COMPATS: list[Compat] = ["7.2", "10.0", "11.1"]


async def touch(ends: Pair, page: int) -> bytes:
    """A page of the machine that came."""
    return await ends.there.ram["ram0"].read(page * 4096, 9)


def urgent_bytes(ends: Pair) -> int:
    assert ends.source._outgoing is not None
    return ends.source._outgoing.numbers().urgent_bytes


@pytest.mark.parametrize("compat", COMPATS)
async def test_what_is_asked_for_comes_beside_the_rest(compat: Compat, tmp_path: Path) -> None:
    """And it does not wait for the limit of the rest."""
    async with pair(tmp_path, compat=compat, also=BOTH) as ends:
        ends.source.options.set_parameters({"max-postcopy-bandwidth": 1})
        await ends.to_postcopy()
        assert ends.relay.count == 2
        for page in range(0, 300, 6):
            assert await touch(ends, page) == (b"page %d" % page).ljust(9, b"\0")
        assert urgent_bytes(ends) > 50 * 4096
        await ends.finish()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["main", "urgent", "both"])
@pytest.mark.parametrize("compat", COMPATS)
async def test_a_cut(compat: Compat, which: int, tmp_path: Path) -> None:
    """Either of the two is the link: both ends pause, and recover with two again."""
    async with pair(tmp_path, compat=compat, also=BOTH) as ends:
        await ends.to_postcopy()
        await touch(ends, 12)
        for page in (30, 60, 90):
            if which == 2:
                ends.relay.cut()
            else:
                ends.relay.cut_one(which)
            await ends.both(Status.POSTCOPY_PAUSED)
            await until(lambda: not ends.relay.count)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(touch, ends, page)  # asked for again
                await ends.recover()
                await ends.both(Status.POSTCOPY_ACTIVE)
            before = urgent_bytes(ends)
            await touch(ends, page + 2)
            await until(lambda b=before: urgent_bytes(ends) > b)  # type: ignore[misc]
        await ends.finish()


async def test_it_recovers_automatically(tmp_path: Path) -> None:
    async with pair(tmp_path, Links(recover_for=60), also=BOTH) as ends:
        await ends.to_postcopy()
        for number in range(4):
            ends.relay.cut_one(number % 2)
            await until(lambda n=number: ends.tells[0].events.count("postcopy-active") == n + 2)  # type: ignore[misc]
            await ends.both(Status.POSTCOPY_ACTIVE)
            await touch(ends, 20 * number)
        await ends.finish()


@pytest.mark.parametrize("compat", COMPATS)
async def test_precopy_needs_no_second_connection(compat: Compat, tmp_path: Path) -> None:
    async with pair(tmp_path, compat=compat, also=BOTH) as ends:
        await ends.destination.incoming(ends.listens, exit_on_error=False)
        await ends.source.migrate(ends.address, resume=False)
        await ends.both(Status.COMPLETED)
        assert urgent_bytes(ends) == 0


@pytest.mark.parametrize("compat", COMPATS)
async def test_only_the_source_has_it(compat: Compat, tmp_path: Path) -> None:
    """The machine runs on."""
    async with pair(tmp_path, compat=compat, also=(BOTH[0], ())) as ends:
        await ends.destination.incoming(ends.listens, exit_on_error=False)
        await ends.source.migrate(ends.address, resume=False)
        await ends.source.start_postcopy()
        await ends.both(Status.FAILED)
        await until(lambda: ends.world.running == {"source"})
        error = ends.source.info().error_desc or ""
        assert "is postcopy-preempt on there?" in error or "no connection for requested pages" in error


@pytest.mark.parametrize("compat", COMPATS)
async def test_only_the_destination_has_it(
    compat: Compat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhostpc.migration.incoming.SECOND_LIMIT", 0.3)
    async with pair(tmp_path, compat=compat, also=((), BOTH[1])) as ends:
        await ends.destination.incoming(ends.listens, exit_on_error=False)
        await ends.source.migrate(ends.address, resume=False)
        await ends.source.start_postcopy()
        await ends.both(Status.FAILED)
        await until(lambda: ends.world.running == {"source"})


async def test_addresses_of_one_connection(tmp_path: Path) -> None:
    async with pair(tmp_path, also=BOTH) as ends:
        for address in (File(str(tmp_path / "file"), 0), Fd("-1")):
            with pytest.raises(MigrationRefused, match="Migration requires multi-channel URIs"):
                await ends.source.migrate(address, resume=False)
            with pytest.raises(MigrationRefused, match="Migration requires multi-channel URIs"):
                await ends.destination.incoming(address, exit_on_error=False)
        await ends.to_postcopy()
        await ends.finish()


async def test_who_says_nothing_at_the_recovery_port(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, or two: they do not hold it."""
    monkeypatch.setattr("vhostpc.endpoint.recovery.PATIENCE", 0.4)
    async with pair(tmp_path, Links(timeout=0), also=BOTH) as ends:
        await ends.to_postcopy()
        ends.relay.cut()
        await ends.both(Status.POSTCOPY_PAUSED)
        for count in (1, 2):
            caplog.clear()
            await ends.destination.recover(ends.listens)
            strangers = [await trio.open_unix_socket(ends.listens.path) for _ in range(count)]
            await until(lambda: "has said nothing within 0.4 s" in caplog.text)
            for stranger in strangers:
                await stranger.aclose()
        monkeypatch.undo()
        await ends.recover()
        await ends.both(Status.POSTCOPY_ACTIVE)
        await ends.finish()


async def test_a_stranger_comes_first(tmp_path: Path) -> None:
    """It is taken for the second connection: that link is lost, and the next one carries the rest."""
    async with pair(tmp_path, also=BOTH) as ends:
        await ends.to_postcopy()
        ends.relay.cut()
        await ends.both(Status.POSTCOPY_PAUSED)
        await ends.destination.recover(ends.listens)
        async with await trio.open_unix_socket(ends.listens.path), trio.open_nursery() as nursery:
            await ends.source.migrate(ends.address, resume=True)
            nursery.start_soon(touch, ends, 12)
            await until(lambda: ends.tells[1].events.count("postcopy-paused") == 2)
            await ends.both(Status.POSTCOPY_PAUSED)
            await ends.recover()
        await ends.finish()


@pytest.mark.parametrize("compat", COMPATS)
async def test_a_lost_last_word_is_said_again(
    compat: Compat, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The source recovers with two connections, whenever it makes the second, and no page is left for that one."""
    caplog.set_level(logging.INFO)
    async with pair(tmp_path, compat=compat, also=BOTH) as ends:
        await ends.to_postcopy()
        await touch(ends, 12)
        ends.relay.hold_back()
        ends.source.options.set_parameters({"max-postcopy-bandwidth": 0})
        ends.source.parameters_changed()
        await until(lambda: ends.destination.status is Status.COMPLETED)
        ends.relay.cut()
        await until(lambda: ends.source.status is Status.POSTCOPY_PAUSED)
        await ends.recover()
        await ends.finish()
        assert ends.source._course.phase is Phase.MOVED
        assert "told once more" in caplog.text
        assert ends.tells[0].events.count("postcopy-paused") == 1


async def cancelled(compat: Compat, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    making = trio.Event()

    async def never(_: Any) -> None:
        making.set()
        await trio.sleep_forever()

    async with pair(folder, compat=compat, also=BOTH) as ends:
        with monkeypatch.context() as patch:
            patch.setattr("vhostpc.endpoint.connections.connect", never)
            await ends.destination.incoming(ends.listens, exit_on_error=False)
            await ends.source.migrate(ends.address, resume=False)
            await ends.source.start_postcopy()
            await making.wait()
            await until(lambda: ends.relay.count == 1)
            await ends.source.cancel()
            await until(lambda: ends.source.status is Status.CANCELLED)
            await ends.source._sent.wait()
        assert ends.world.running == {"source"}
        assert not ends.world.both
        await until(lambda: not ends.relay.count)
        await until(lambda: ends.destination.status is Status.FAILED)
    Path(ends.address.path).unlink()


@pytest.mark.parametrize("compat", COMPATS)
async def test_a_cancel_while_the_second_one_is_made(
    compat: Compat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, or at the switch: the machine runs on, and nothing is left."""
    await cancelled(compat, tmp_path, monkeypatch)
    fds = len(open_fds())
    await cancelled(compat, tmp_path, monkeypatch)
    await until(lambda: len(open_fds()) <= fds, what="descriptors")


@pytest.mark.parametrize("compat", COMPATS)
async def test_a_third_one_is_refused(compat: Compat, tmp_path: Path) -> None:
    """A destination that has two listens no longer, also behind a recovery."""
    async with pair(tmp_path, compat=compat, also=BOTH) as ends:
        await ends.to_postcopy()
        for page in (12, 14):
            await touch(ends, page)  # over the second one, which has been taken
            with pytest.raises(OSError, match=r"No such file|refused"):
                await trio.open_unix_socket(ends.listens.path)
            await ends.both(Status.POSTCOPY_ACTIVE)
            if page == 12:
                ends.relay.cut()
                await ends.both(Status.POSTCOPY_PAUSED)
                await ends.recover()
                await ends.both(Status.POSTCOPY_ACTIVE)
        await ends.finish()
        assert ends.tells[1].events.count("postcopy-paused") == 1


async def test_a_third_one_waits_in_vain(tmp_path: Path) -> None:
    """It came while the second one had not been taken yet: it is closed unheard, and nothing else happens."""
    async with pair(tmp_path, compat="7.2", also=BOTH) as ends:
        ends.source.options.set_parameters({"max-bandwidth": 4096})
        await ends.destination.incoming(ends.listens, exit_on_error=False)
        await ends.source.migrate(ends.address, resume=False)
        await ends.both(Status.ACTIVE)
        await until(lambda: ends.relay.count == 2)
        await trio.testing.wait_all_tasks_blocked()
        async with await trio.open_unix_socket(ends.listens.path) as third:
            await third.send_all(b"GET / HTTP/1.0\r\n\r\n")
            await ends.source.start_postcopy()
            await ends.both(Status.POSTCOPY_ACTIVE)
            for page in range(0, 60, 6):
                assert await touch(ends, page) == (b"page %d" % page).ljust(9, b"\0")
            with contextlib.suppress(trio.BrokenResourceError):
                assert await third.receive_some(1) == b""
            await ends.finish()
        assert "postcopy-paused" not in ends.tells[0].events + ends.tells[1].events
