"""The examples of the documentation and of ``examples/``: each is what it says it is."""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import trio

from tests.kit.pages import PAGES, ROOT, blocks, files
from tests.kit.raw_front_end import NEXT, WRITE, Guest, RawFrontEnd
from tests.peers.child import Child, open_child
from vhostpc.wire import vhost_user as vu
from vhostpc.wire.vhost_user import Request

LIMIT = 60

FILES = files()
DEVICES = {
    name: kind[1] for name, text in FILES.items() if (kind := re.search(r"class (\w+)\(Device\)", text))
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_in_the_pages_compiles(page: Path) -> None:
    for text in blocks(page):
        compile(text, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_there_are_devices() -> None:
    assert {"sectors.py", "echo.py", "slow.py", "sized.py", "wire.py"} <= set(DEVICES)


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_devices_of_the_pages_are_devices(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", "vhostpc", "backend", f"{folder / name}:{DEVICES[name]}"]
    done = subprocess.run(
        [*command, "--print-capabilities"], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["type"]


@asynccontextmanager
async def served(*target: str) -> AsyncIterator[tuple[RawFrontEnd, Child]]:
    """``vhostpc backend`` with a front-end at the other end of a socket pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "vhostpc", "backend", *target, "--fd", str(theirs.fileno())]
    with trio.fail_after(LIMIT):
        async with open_child(command, name="back-end", cwd=ROOT, pass_fds=(theirs.fileno(),)) as child:
            theirs.close()
            front = RawFrontEnd(ours)
            try:
                yield front, child
                front.close()
                assert await child.wait() == 0, child.said
            except BaseException as e:
                e.add_note(f"the back-end said:\n{child.last_words()}")
                raise
            finally:
                front.close()


async def ask(front: RawFrontEnd, requests: list[bytes], room: int) -> list[bytes]:
    """Each request through ring 0 with ``room`` writable bytes; the answers in the order of the requests."""
    guest = Guest()
    ring = guest.ring(0, 16)
    await front.negotiate()
    await guest.send_memory(front)
    await ring.send_setup(front)
    heads = []
    for i, text in enumerate(requests):
        first = 2 * i
        answer = guest.put(0x90000 + 0x1000 * i, bytes(room))
        if text:
            ring.set_desc(first, guest.put(0x80000 + 0x1000 * i, text), len(text), NEXT, first + 1)
            ring.set_desc(first + 1, answer, room, WRITE)
        else:
            ring.set_desc(first, answer, room, WRITE)
        heads.append(first)
    ring.offer(*heads)
    await ring.until_used(len(requests))
    lengths = dict(ring.used_element(i) for i in range(len(requests)))
    found = [guest.mem[0x90000 + 0x1000 * i :][: lengths[head]] for i, head in enumerate(heads)]
    await front.ask(Request.GET_VRING_BASE, vu.VringState(0, 0).pack())
    guest.close()
    return found


async def test_sectors(folder: Path) -> None:
    def head(kind: int, sector: int) -> bytes:
        return struct.pack("<IIQ", kind, 0, sector)

    async with served(f"{folder}/sectors.py:Sectors") as (front, _):
        await front.negotiate()
        frame = await front.ask(Request.GET_CONFIG, vu.ConfigSpace(0, 0, bytes(60)).pack())
        assert vu.ConfigSpace.unpack(frame.payload).data == struct.pack("<Q52x", (1 << 30) // 512)
    async with served(f"{folder}/sectors.py:Sectors") as (front, _):
        read, other = await ask(front, [head(0, 7), head(8, 0)], 2 * 512 + 1)
        assert (len(read), read[-1]) == (1025, 0)
        for i, number in enumerate((7, 8)):
            line = read[512 * i :][:512]
            assert line.rstrip() == b"sector %d" % number
            assert line.endswith(b"\n")
        assert other[-1] == 2  # unsupported


async def test_entropy() -> None:
    async with served("examples/rng/rng.py:Rng") as (front, _):
        first, second = await ask(front, [b"", b""], 512)
        assert len(first) == len(second) == 512
        assert first != second
        assert first.count(0) < 64


async def test_echo(folder: Path) -> None:
    async with served(f"{folder}/echo.py:Echo") as (front, _):
        assert await ask(front, [b"hello", b"world"], 64) == [b"olleh", b"dlrow"]


async def test_answers_out_of_order(folder: Path) -> None:
    async with served(f"{folder}/slow.py:Slow") as (front, _):
        requests = [b"request %d" % i for i in range(8)]
        assert await ask(front, requests, 64) == requests


async def test_config_space(folder: Path) -> None:
    async with served(f"{folder}/sized.py:Sized", "-o", "sectors=4096") as (front, _):
        await front.negotiate()
        asked = vu.ConfigSpace(0, 0, bytes(8)).pack()
        frame = await front.ask(Request.GET_CONFIG, asked)
        assert vu.ConfigSpace.unpack(frame.payload).data == (4096).to_bytes(8, "little")
    async with served(f"{folder}/sized.py:Sized") as (front, _):
        (answer,) = await ask(front, [b"a request"], 64)
        assert (len(answer), answer[-1]) == (64, 2)  # the status is the last byte, not a part of the data


@asynccontextmanager
async def bridge(path: Path) -> AsyncIterator[socket.socket]:
    """The bridge example at ``path``, and the socket that its frames go to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        far.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            command = [sys.executable, "examples/bridge", "--fd", str(listener.fileno()), "-l", "127.0.0.1:0"]
            command += ["-r", f"127.0.0.1:{far.getsockname()[1]}"]
            async with open_child(command, name="bridge", cwd=ROOT, pass_fds=(listener.fileno(),)) as child:
                try:
                    yield far
                except BaseException as e:
                    e.add_note(f"the bridge said:\n{child.last_words()}")
                    raise


@pytest.mark.ufd
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("drive.py", r"1000 frames sent, stopped at \d+\n$"),
        (
            "move.py",
            r"\d+ frames, 4096 pages placed, 0 twice\n\d+ pages asked for by the back-end, p99 [\d.]+ ms\n$",
        ),
    ],
)
async def test_front_end(name: str, pattern: str, folder: Path) -> None:
    path = folder / "b.sock"
    with trio.fail_after(LIMIT):
        async with bridge(path) as far:
            async with open_child([sys.executable, folder / name, path], name=name, cwd=folder) as child:
                assert await child.wait() == 0, child.said
                assert re.search(pattern, child.said), child.said
            assert len(far.recv(4096)) == 1400


def by_hand() -> list[list[str]]:
    """The blocks of README's section about two terminals, as lines."""
    section = (ROOT / "README.md").read_text().split("## The same by hand")[1].split("\n## ")[0]
    return [block.strip().splitlines() for block in re.findall(r"```\n(.*?)```", section, re.DOTALL)]


def commands_of(lines: list[str]) -> list[str]:
    return [line.removeprefix("(qemu) ") for line in lines if line.startswith("(qemu) ")]


@pytest.mark.ufd
async def test_a_move_by_hand(tmp_path: Path) -> None:
    """README's two terminals: its commands as they stand, and the lines of their answers but for the numbers."""
    first, second, back = by_hand()
    sock = str(tmp_path / "vm.sock")

    def here(line: str) -> str:
        return line.replace("/tmp/vm.sock", sock)

    def start(line: str) -> list[str]:
        program, *arguments = line.split()
        assert program == "vhostpc"
        return [sys.executable, "-m", "vhostpc", *arguments]

    async def say(child: trio.Process, line: str) -> str:
        """A command, and what is answered up to the next prompt."""
        assert child.stdin is not None
        await child.stdin.send_all(here(line).encode() + b"\n")
        return await prompt(child)

    async def prompt(child: trio.Process) -> str:
        assert child.stdout is not None
        text = ""
        while not text.endswith("(qemu) "):
            data = await child.stdout.receive_some()
            assert data, text
            text += data.decode().replace("\r", "")
        return text

    def matches(expected: str, text: str) -> bool:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(expected))
        return re.search(f"^{pattern}$", text, re.MULTILINE) is not None

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            ends: list[trio.Process] = []
            for line in (first[0], second[0]):
                ends.append(
                    await nursery.start(
                        partial(
                            trio.run_process,
                            start(line),
                            stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL,
                            cwd=ROOT,
                        )
                    )
                )
            source, destination = ends
            for end in ends:
                await prompt(end)
            for line in commands_of(second):
                await say(destination, line)
            for i, line in enumerate(back):
                if not line.startswith("(qemu) "):
                    continue
                answer = await say(source, line.removeprefix("(qemu) "))
                expected = []
                for told in back[i + 1 :]:
                    if told.startswith("(qemu) "):
                        break
                    expected.append(told)
                while "info migrate" in line and "completed" not in answer:
                    answer = await say(source, "info migrate")
                for told in expected:
                    assert told == "..." or matches(told, answer), (told, answer)
            while "VM status: running" not in (answer := await say(destination, "info status")):
                assert "inmigrate" in answer, answer
            assert "`VM status: running`" in (ROOT / "README.md").read_text()
            for end in ends:
                assert end.stdin is not None
                await end.stdin.send_all(b"quit\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_of_the_pages_exist(page: Path) -> None:
    """Of ``vhostpc`` commands: those in ``code`` and in blocks."""
    helps: dict[str, str] = {}
    for name, rest in re.findall(
        r"vhostpc (demo|endpoint|doctor|inspect|proxy|bridge|blk)\b([^\n`]*)", page.read_text()
    ):
        if name not in helps:
            done = subprocess.run(
                [sys.executable, "-m", "vhostpc", name, "--help"],
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=True,
            )
            helps[name] = done.stdout
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in helps[name], f"{page.name}: vhostpc {name} has no {option}"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda p: p.name)
def test_pictures_of_the_pages(picture: Path) -> None:
    """Small, whole, and used by a page."""
    text = picture.read_text()
    assert len(text) < 60_000
    assert set(re.findall(r"https?://[^\"\' <]*", text)) == {"http://www.w3.org/2000/svg"}
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert any(f"pictures/{picture.name}" in page.read_text() for page in PAGES)
