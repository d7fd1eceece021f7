"""``vhostpc demo --cut``: the link is lost in postcopy and recovered; pauses are told, and the books still balance."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import trio
import trio.testing

from tests.cli.test_cli_demo import (
    MACHINE,
    SVG,
    check_lanes,
    check_numbers,
    good,
    of_the_demo,
    run,
    short_path,
)
from vhostpc.cli.demo.books import MOST_IN_HAND, Pause, judge
from vhostpc.cli.demo.relay import open_relay
from vhostpc.units import TARGET_PAGE

__all__ = ["short_path"]
pytestmark = pytest.mark.ufd


@pytest.fixture(scope="module")
def with_cuts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The numbers of a run whose link is lost twice, and its report."""
    page = tmp_path_factory.mktemp("cut") / "run.html"
    done = run("--json", "--size", "64M", "--cut", "2", "--report", str(page))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "pauses: the link is lost and recovered   100%" in done.stderr
    return check_numbers(done.stdout, 64), page.read_text()


def test_pauses_are_counted(with_cuts: tuple[dict[str, Any], str]) -> None:
    numbers, _ = with_cuts
    pauses = numbers["pauses"]
    assert len(pauses) == 2
    (postcopy,) = [p for p in numbers["phases"] if p["name"] == "postcopy"]
    marks = [at for pause in pauses for at in (pause["begin"], pause["end"])]
    assert marks == sorted(marks)
    assert marks[-1] <= postcopy["end"]
    assert 0 < pauses[0]["share"] < pauses[1]["share"] < 1
    for pause in pauses:
        assert pause["attempts"] >= 1
        assert 0 <= pause["sent_twice"] * TARGET_PAGE <= pause["in_flight"] + MOST_IN_HAND + TARGET_PAGE
        waiting = {w["name"]: w for w in pause["waiting"]}
        assert {"vCPU 0", "vCPU 1"} <= set(waiting) <= {w["name"] for w in numbers["waits"]}
        assert all(waiting[name]["threads"] == 1 for name in ("vCPU 0", "vCPU 1"))
        assert all(w["longest_ns"] > 0 for w in waiting.values())
        assert pause["asked_again"] >= 1
    pages, twice = numbers["pages"], sum(pause["sent_twice"] for pause in pauses)
    assert pages["background"] + pages["requested"] == pages["placed"] + twice
    assert pages["twice"] == 0  # sent twice, but none came twice


def test_statuses_are_told_in_their_order(with_cuts: tuple[dict[str, Any], str]) -> None:
    numbers, _ = with_cuts
    for end in ("source", "destination"):
        told = [step["status"] for step in numbers["steps"] if step["end"] == end]
        assert told[0] == "postcopy-paused"
        assert told[-1] == "completed"
        assert told.count("postcopy-active") == 2
        assert all(
            before == "postcopy-recover" for before, status in pairwise(told) if status == "postcopy-active"
        )
    assert [step["at"] for step in numbers["steps"]] == sorted(step["at"] for step in numbers["steps"])


def test_report_of_pauses(with_cuts: tuple[dict[str, Any], str]) -> None:
    numbers, page = with_cuts
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    *_, statuses = pictures = list(tree.iter(f"{SVG}svg"))
    assert statuses.findtext(f"{SVG}title") == "The statuses of both ends from the first pause on"
    for picture in (*pictures[:3], statuses):
        assert len([e for e in picture.iter(f"{SVG}rect") if e.get("class") == "lost"]) == 2
    check_lanes(numbers, pictures[2])  # a pause is time in which its threads wait
    (key,) = [e for e in tree.iter("ul") if e.get("class") == "key"]
    assert [row[0].get("class") for row in key] == ["gap", "alarm", "lost"]
    cells_told = ["".join(cell.itertext()) for cell in tree.iter("td")]
    for pause in numbers["pauses"]:
        assert str(pause["sent_twice"]) in cells_told
        for w in pause["waiting"]:
            assert f"{w['threads']}: {w['longest_ns'] / 1e6:.2f} ms" in cells_told
    assert {"paused", "recover-setup", "recover", "active", "completed"} <= set(cells_told)


def test_a_link_that_is_not_recovered(short_path: Path) -> None:
    """It ends with what both ends say, and leaves nothing behind."""
    done = run("--json", "--size", "64M", "--cut", "2", VHOSTPC_DEMO_RECOVER_FOR="0", TMPDIR=str(short_path))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "vhostpc: the link was lost, and this was not recovered within 5 s: the migration is postcopy-paused at the "
        "source and postcopy-paused at the destination"
    )
    assert not of_the_demo(short_path)
    assert not list(short_path.iterdir())


@pytest.mark.parametrize("count", ["-1", "21", "1.5", "x"])
def test_cuts_that_cannot_be(count: str) -> None:
    done = run("--cut", count)
    assert done.returncode == 2
    assert "--cut" in done.stderr


def test_pauses_that_do_not_agree_are_named() -> None:
    result = good()
    result.pages.background, result.requests.read, result.requests.again = 7, 4, 2
    result.pauses = [Pause(1, 2, 0.5, 1, 2 * TARGET_PAGE, 3, 2)]
    assert judge(result, [MACHINE], 1) == []
    assert "was to be lost 2 times, and was lost 1 times" in "; ".join(judge(result, [MACHINE], 2))
    result.requests.read = 5
    assert "2 pages were requested and 2 again, but 5 requests reached" in "; ".join(
        judge(result, [MACHINE], 1)
    )
    result.pauses[0].sent_twice = 40
    told = "; ".join(judge(result, [MACHINE], 1))
    assert "pause 1: 40 pages were sent twice, but 35 at most were in flight" in told
    assert "9 were sent" not in told
    assert "but 6 were placed, and 40 were lost with the link" in told


async def test_a_lost_link(short_path: Path) -> None:
    """Both ends lose it in the middle of what is sent; nobody can connect until it is mended."""
    near, target = short_path / "near", short_path / "target"
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    with trio.fail_after(10), listener:
        await listener.bind(str(target))
        listener.listen(1)
        async with open_relay(near, target, 0) as relay, trio.open_nursery() as nursery:
            source = await trio.open_unix_socket(str(near))
            destination = trio.SocketStream((await listener.accept())[0])
            nursery.start_soon(relay.lose_after, 5)
            await trio.testing.wait_all_tasks_blocked()
            await source.send_all(b"123456789")
            assert b"".join([part async for part in destination]) == b"12345"
            assert relay.carried == 5
            assert await source.receive_some() == b""
            with pytest.raises(OSError, match="refused"):
                await trio.open_unix_socket(str(near))
            relay.mend()
            again: trio.SocketStream | None = None
            while again is None:
                with contextlib.suppress(OSError):
                    again = await trio.open_unix_socket(str(near))
                await trio.lowlevel.checkpoint()
            other = trio.SocketStream((await listener.accept())[0])
            await other.send_all(b"back")
            assert await again.receive_some() == b"back"
            await again.send_all(b"6789")
            assert await other.receive_some() == b"6789"
            await trio.testing.wait_all_tasks_blocked()
            assert relay.carried == 9
            for stream in (source, destination, again, other):
                await stream.aclose()
