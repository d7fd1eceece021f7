"""``vhostpc proxy``: a timeline on stdout, faults as words, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.kit.proxied import Got, take
from tests.kit.streams import POSTCOPY
from tests.proxy.test_proxy_points import BACK
from tests.qemu.proc import Child, child
from vhostpc.cli.proxy import in_words
from vhostpc.proxy import Event
from vhostpc.proxy.faults import ACTIONS, OPTIONS
from vhostpc.proxy.points import POINTS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60


def proxy_argv(folder: Path, *more: str) -> list[str]:
    addresses = [f"unix:{folder}/near", f"unix:{folder}/target"]
    return [sys.executable, "-m", "vhostpc", "proxy", *addresses, *more]


@contextlib.asynccontextmanager
async def running(folder: Path, *more: str) -> AsyncIterator[Child]:
    async with child("proxy", proxy_argv(folder, *more), cwd=str(ROOT)) as process:
        await process.err.find("ready on unix:")
        yield process


async def carried(folder: Path) -> tuple[Got, Got]:
    """A whole migration: what the destination got, and the source."""
    there, returned = Got(), Got()
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        (folder / "target").unlink()
    await sock.bind(str(folder / "target"))
    sock.listen()
    async with trio.SocketListener(sock) as listener:
        async with await trio.open_unix_socket(folder / "near") as near, await listener.accept() as far:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take, far, there)
                nursery.start_soon(take, near, returned)
                await near.send_all(POSTCOPY)
                while len(there.data) < len(POSTCOPY) and not there.how:
                    await trio.sleep(0.002)
                with contextlib.suppress(trio.BrokenResourceError):
                    await far.send_all(BACK)
                    await near.send_eof()
                    await far.send_eof()
    return there, returned


async def told(process: Child, name: str) -> dict[str, object]:
    found = await process.out.find(f'"event": "{name}"')
    line: dict[str, object] = json.loads(found.string)
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_timeline_for_programs(number: signal.Signals, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with running(tmp_path, "--json", "--seed", "7") as process:
            there, returned = await carried(tmp_path)
            assert (there.data, returned.data) == (POSTCOPY, BACK)
            await told(process, "end")
            assert await process.stop(number) == 0
            await process.drained()
    lines = [json.loads(line) for line in process.out.lines]
    assert lines[0].items() >= {
        "event": "listening", "uri": f"unix:{tmp_path}/near", "seed": 7, "faults": [],
    }.items()  # fmt: skip
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    names = [line["event"] for line in lines]
    assert {"round", "request"} & set(names) == set()
    summed = [line for line in lines if line["event"] == "ram"]
    pages = [line["pages"].get(kind, 0) for line in summed for kind in ("data", "zero")]
    assert (sum(pages), sum(line["requests"] for line in summed)) == (5, 2)
    assert sum(line["rounds"] for line in summed) == 3
    assert (
        lines[-1].items() >= {"event": "end", "how": "closed", "forward": len(POSTCOPY), "back": 77}.items()
    )
    assert not (tmp_path / "near").exists()


async def test_each_request_and_part(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with running(tmp_path, "--json", "--each") as process:
            await carried(tmp_path)
            await told(process, "end")
            assert await process.stop() == 0
            await process.drained()
    names = [json.loads(line)["event"] for line in process.out.lines]
    assert (names.count("round"), names.count("request"), names.count("ram")) == (3, 2, 0)


async def test_lines_for_people(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with running(tmp_path, "--fault", "hold=0@pong=3") as process:
            await carried(tmp_path)
            await process.out.find(r"^ +\d+\.\d+ +#1 +end +how closed  forward 12645  back 77$")
            await process.out.find(r"^ +\d+\.\d+ +#1 -> +4309  ping +value 2$")
            await process.out.find(r"^ +\d+\.\d+ +#1 <- +fault +fault hold=0@pong=3  action hold  byte 53$")


async def test_a_fault_that_was_not_done(tmp_path: Path) -> None:
    """Two were, one not: a test that breaks nothing must not pass for one that does."""
    faults = ("cut@request=2", "cut@byte=10..20", "cut@eof,on=recovery")
    with trio.fail_after(LIMIT):
        async with running(
            tmp_path, "--json", *(word for text in faults for word in ("--fault", text))
        ) as process:
            _, returned = await carried(tmp_path)
            assert returned.data == BACK[:69]
            there, _ = await carried(tmp_path)
            assert 10 <= len(there.data) <= 20
            await process.out.find(r'"end", "connection": 2, "how": "cut"')
            assert await process.stop() == 1
            await process.drained()
    assert process.err.lines[-1] == "vhostpc: not done: cut@eof,on=recovery"


async def test_the_seed_draws_the_same(tmp_path: Path) -> None:
    drawn = set()
    for _ in range(2):
        with trio.fail_after(LIMIT):
            async with running(tmp_path, "--json", "--seed", "12", "--fault", "cut@random") as process:
                drawn.add(str((await told(process, "listening"))["faults"]))
    assert len(drawn) == 1
    assert "cut@postcopy-byte=" in drawn.pop()


async def test_it_goes_on_when_nobody_reads(tmp_path: Path) -> None:
    """``vhostpc proxy ... | head -1`` must not break a migration."""
    with trio.fail_after(LIMIT):
        command = " ".join(proxy_argv(tmp_path)) + " | head -1"
        async with child("proxy", ["sh", "-c", command], cwd=str(ROOT)) as process:
            await process.err.find("ready on unix:")
            for _ in range(2):
                there, returned = await carried(tmp_path)
                assert (there.data, returned.data) == (POSTCOPY, BACK)
            # The shell would wait for it.
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)


def refused(*arguments: str) -> str:
    """What a wrong use is answered; with the code of wrong usage."""
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "proxy", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["unix:/a"], "Missing argument 'TARGET'"),
        (["nowhere", "unix:/b"], "unknown migration protocol: nowhere"),
        (["unix:/a", "exec:cat"], "'exec:cat' is neither tcp:HOST:PORT nor unix:PATH"),
        (["tcp:host", "unix:/b"], "error parsing address 'host'"),
        (["unix:/a", "unix:/a"], "LISTEN and TARGET are the same, unix:/a"),
        (["unix:/a", "unix:/b", "--fault", "cut@nowhere"], "'nowhere' is no point"),
        (["unix:/a", "unix:/b", "--seed", "-1"], "'--seed'"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "proxy", f"unix:{tmp_path}/no/where", f"unix:{tmp_path}/b"],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vhostpc: Failed to bind socket to")


def test_the_help_has_all_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "proxy", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True,
    )  # fmt: skip
    words = set(done.stdout.replace("=", " ").replace("[", " ").split())
    assert {*ACTIONS, *POINTS, *OPTIONS} <= words


def test_a_line() -> None:
    event = Event(12.5, "discard", 2, "forward", 4253, {"block": "ram0", "ranges": 1})
    assert in_words(event, 1.25) == "  1.250000   #2 ->        4253  discard           block ram0  ranges 1"
