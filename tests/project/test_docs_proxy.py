"""docs/proxy.md: its commands as they stand, its tables, its example."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.own_machine import End, pair
from tests.kit.pages import ROOT, files
from vhostpc.proxy import parse_fault
from vhostpc.proxy.faults import ACTIONS, OPTIONS
from vhostpc.proxy.points import POINTS

PAGE = (ROOT / "docs" / "proxy.md").read_text()
LIMIT = 90


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def by_hand() -> list[list[str]]:
    return [
        b.strip().splitlines()
        for b in re.findall(r"```\n(.*?)```", section("A link that is lost, and recovered"), re.DOTALL)
    ]


class Terminal:
    """A process whose monitor is on its terminal."""

    def __init__(self, process: trio.Process, folder: Path) -> None:
        self._process, self._folder = process, folder

    async def say(self, line: str) -> str:
        """A command, and what is answered up to the next prompt."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(line.replace("/tmp", str(self._folder)).encode() + b"\n")
        return await self.prompt()

    async def prompt(self) -> str:
        assert self._process.stdout is not None
        text = ""
        while not text.endswith("(qemu) "):
            data = await self._process.stdout.receive_some()
            assert data, text
            text += data.decode().replace("\r", "")
        return text

    async def type_all(self, lines: list[str]) -> None:
        """Commands, and what they answer; one that asks is asked until the expected line comes."""
        for at, line in enumerate(lines):
            if not line.startswith("(qemu) "):
                continue
            command = line.removeprefix("(qemu) ")
            answer = await self.say(command)
            expected = [told for told in lines[at + 1 :] if not told.startswith("(qemu) ")]
            if command == "info migrate":
                while not all(told == "..." or told in answer for told in expected):
                    answer = await self.say(command)


@pytest.mark.ufd
async def test_by_hand(tmp_path: Path) -> None:
    there, proxy, here, recover, resume, timeline = by_hand()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def start(line: str) -> trio.Process:
                program, *arguments = line.replace("/tmp", str(tmp_path)).split()
                assert program == "vhostpc"
                found: trio.Process = await nursery.start(
                    partial(
                        trio.run_process,
                        [sys.executable, "-m", "vhostpc", *arguments],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        cwd=ROOT,
                        check=False,
                    )
                )
                return found

            destination = Terminal(await start(there[0]), tmp_path)
            await destination.prompt()
            await destination.type_all(there)
            between = await start(proxy[0])
            assert between.stdout is not None
            printed = (await between.stdout.receive_some()).decode()  # it listens
            source = Terminal(await start(here[0]), tmp_path)
            await source.prompt()
            await source.type_all(here)
            await destination.type_all(recover)
            await source.type_all(resume)
            while "how closed" not in printed:
                printed += (await between.stdout.receive_some()).decode()
            between.terminate()
            assert await between.wait() == 0
            for terminal in (source, destination):
                assert terminal._process.stdin is not None
                await terminal._process.stdin.send_all(b"quit\n")
    (tmp_path / "printed").write_text(printed)
    lines = printed.replace(str(tmp_path), "/tmp").splitlines()
    # Each line of the page is there, in its order, but for numbers.
    found = iter(lines)
    for line in timeline:
        if line.strip() != "...":
            words = (re.sub(r"\d+", r"\\d+", re.escape(word)) for word in line.split())
            pattern = r"\s+".join(words)
            assert any(re.search(pattern, other) for other in found), f"{line}\n\n{printed}"


def cells(table: int) -> list[str]:
    rows = re.findall(r"\n\|---\|---\|\n((?:\|.*\n)+)", section("Faults"))[table]
    return [re.split(r"(?<!\\)\|", row)[1] for row in rows.splitlines()]


def test_tables() -> None:
    """Each action, point and option is on the page, and nothing else is."""
    others = (
        {"way"},
        set[str](),
        {*"middle after back both recovery recovery- preempt multifd".split(" ")},
    )
    for table, known in enumerate((set(ACTIONS), set(POINTS), set(OPTIONS))):
        words = {word for cell in cells(table) for word in re.findall(r"`([a-z-]+)", cell)}
        assert words - others[table] == known, table


@pytest.mark.parametrize("text", sorted(set(re.findall(r"[a-z]+(?:=[\d.]+)?@[^\s`\"]+", PAGE))))
def test_words_of_the_page_are_faults(text: str) -> None:
    assert parse_fault(text)


@pytest.mark.ufd
async def test_the_example(tmp_path: Path) -> None:
    """In the process of a test, with our own endpoints."""
    text = files()["lost_link.py"]
    path = tmp_path / "lost_link.py"
    path.write_text(text.replace("/tmp", str(tmp_path)))
    spec = importlib.util.spec_from_file_location("lost_link", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Monitor:
        def __init__(self, end: End) -> None:
            self._end = end

        async def execute(self, name: str, **arguments: Any) -> None:
            if arguments.get("resume") or name == "migrate-recover":
                await self._end.until_status("postcopy-paused")
            await self._end.qmp.command(name, **arguments)

    with trio.fail_after(LIMIT):
        async with pair(tmp_path) as (source, destination):
            for side in (source, destination):
                await side.set("postcopy-ram")
            events = await module.lose_the_link(Monitor(source), Monitor(destination))
            for side in (source, destination):
                await side.until_status("completed")
    assert events[-1]["event"] in ("shut", "closed", "end")
    assert len([event for event in events if event["event"] == "fault"]) == 1
