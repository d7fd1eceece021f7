"""Memory that is given up where there is nothing to put in its place: a session ends, and nobody else notices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio

from tests.kit.absent_guest import AbsentGuest, prepare
from tests.kit.backend_child import Echo
from tests.kit.hostile import open_fds
from tests.kit.liar import SECOND, SHRANK, TEXT, absent, errors, far_end, faults, told, working
from tests.kit.raw_front_end import connected
from tests.kit.rig import BackendChild, backend_child
from tests.kit.until import until
from vhostpc.backend import session
from vhostpc.memory.mapping import Supply


@pytest.fixture
def guest() -> Iterator[AbsentGuest]:
    guest = AbsentGuest()
    yield guest
    guest.close()


async def test_no_private_memory_for_a_page(tmp_path: Path) -> None:
    """As RLIMIT_DATA has it: then shared memory that nobody else has does as well."""
    async with backend_child(tmp_path, device="echo") as b, working(b) as other, working(b) as liar:
        await b.ask("deny private")
        liar.put(b"gone")
        liar.offer_on(TEXT)
        assert await liar.raw.ended()
        await told(b, f"{SHRANK}memory")
        await other.work()


async def test_no_mapping_more_for_a_page(tmp_path: Path) -> None:
    """A page of its own in a mapping makes three of it; where there may be no more, all of the mapping is replaced."""
    async with (
        backend_child(tmp_path, device="echo") as b,
        working(b) as other,
        AsyncExitStack() as stack,
    ):
        await other.work()
        liars = [await stack.enter_async_context(working(b)) for _ in range(2)]
        for front in liars:
            await front.work()
        for n, front in enumerate(liars, 2):
            await b.ask("map all")  # the room that the last one left behind, too
            front.put(b"gone")
            front.offer_on(TEXT)
            assert await front.raw.ended()
            ended = f"front-end {n}: session ended: {SHRANK}memory"
            await until(lambda ended=ended: ended in b.log())  # type: ignore[misc]
            await other.work()


@pytest.mark.ufd
@pytest.mark.parametrize("device", ["echo", "unordered", "bridge"])
@pytest.mark.parametrize("denied", ["private", "all"])
async def test_memory_that_cannot_be_given_up(
    tmp_path: Path, guest: AbsentGuest, device: str, denied: str
) -> None:
    """Its waiters sleep on, with all that they use; the session ends, others go on and the process can end.

    That thread makes no page and sends nothing, also when its page comes after all.
    """
    prepare(guest, 1)
    with far_end() as sock:
        far = sock if device == "bridge" else None
        spec = {"device": device, "far": [sock.getsockname()], "give_up_tries": 1}
        b = BackendChild(tmp_path, spec)
        try:
            await b.answer()
            async with working(b, far=far) as other:
                await other.work()
                async with absent(b, guest):
                    await faults(guest, SECOND)
                    holes = guest.holes()
                    await b.ask(f"deny {denied}")
                await until(lambda: "front-end 2: disconnected" in b.log())
                lost, *more = errors(b)
                assert "lost in postcopy" in lost
                assert len(more) == (denied == "all")
                # The page of one chain is waited for, those of the others are asked for, while threads can be started.
                left = [
                    int(m) for m in re.findall(r"\(Cannot allocate memory\): (\d+) of its threads", str(more))
                ]
                assert guest.holes() == holes
                await other.work()
                async with working(b, far=far) as third:
                    await third.work()
                assert len(waiting(b)) == sum(left)
                if device != "echo":  # else the thread sleeps to the end
                    guest.place_rest()
                    await until(lambda: not waiting(b))
                await other.work()
            assert "Traceback" not in b.log()
            await b.control.aclose()
            await until(lambda: b.process.poll() is not None)
            assert b.process.returncode == 0
        except BaseException:
            print(b.log())
            raise
        finally:
            b.end()
            await trio.aclose_forcefully(b.control)


def waiting(b: BackendChild) -> list[str]:
    """Threads of the back-end that wait for a page."""
    found = []
    for task in Path(f"/proc/{b.process.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if "userfault" in (task / "wchan").read_text():
                found.append(task.name)
    return found


@pytest.mark.ufd
async def test_giving_up_is_tried_again(guest: AbsentGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortage that is over soon leaves nothing behind."""
    prepare(guest, 0)
    fail, calls = Supply.fail, []

    def short_at_first(supply: Supply) -> str | None:
        calls.append(supply.asleep)
        return fail(supply) if len(calls) > 2 else "Cannot allocate memory"

    monkeypatch.setattr(Supply, "fail", short_at_first)
    monkeypatch.setattr(session, "GIVE_UP_AGAIN", 0.01)
    before = open_fds()
    async with connected(Echo()) as front:
        await front.negotiate()
        await guest.advise(front)
        await guest.listen(front)
        await guest.share_table(front)
        await guest.rings[0].send_setup(front)
        await guest.next_fault()
    guest.clients.pop()[0].close()
    assert len(calls) == 3
    assert all(calls)
    assert open_fds() == before
