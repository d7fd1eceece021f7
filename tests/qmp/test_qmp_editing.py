"""The text monitor on a person's terminal: log lines above its prompt, lines edited, called back and completed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio

from tests.kit.until import until
from tests.kit.window import window
from vhostpc.migration.options import Options
from vhostpc.qmp.human import complete
from vhostpc.qmp.qmp_client import open_monitor

LOG = r"[-0-9]{10} [0-9:,]{12} [A-Z]+ vhostpc[._a-z]*: "


def endpoint(path: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vhostpc", "endpoint", "--qmp", f"unix:{path}", "--monitor", "stdio"),
        *("--incoming", "defer", *more),
    ]


@pytest.mark.parametrize("why", ["a dumb terminal", "no library"])
async def test_log_lines_go_above_the_prompt(why: str, tmp_path: Path) -> None:
    """Where no library edits lines."""
    path = tmp_path / "qmp"
    (tmp_path / "prompt_toolkit.py").write_text("raise ImportError")
    env = {"TERM": "dumb"} if why == "a dumb terminal" else {"PYTHONPATH": str(tmp_path)}
    async with window(endpoint(path), **env) as person:
        await person.until(rf"{LOG}ready on .*\n(.*\n)*\(qemu\) $")
        async with open_monitor(str(path), "it") as client:
            await client.command("migrate-incoming", uri=f"unix:{tmp_path / 'in'}")
            await person.until(rf"\n{LOG}migration: setup\n\(qemu\) $")
            await person.press("info status\n")
            await person.until(r"\n\(qemu\) info status\nVM status: paused \(inmigrate\)\n\(qemu\) $")
            assert person.rows[-1] == "(qemu) "
            assert not [row for row in person.rows[:-1] if row == "(qemu) "]
            assert ("\x1b" in person.raw) == (why == "no library")
            await person.press("quit\n")
        assert await trio.to_thread.run_sync(person.process.wait) == 0


async def test_a_log_that_goes_elsewhere_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = " ".join(endpoint(tmp_path / "qmp", "--log-level", "debug"))
    async with window(["/bin/sh", "-c", f"{command} 2>{log}"], TERM="dumb") as person:
        await person.until(r"\(qemu\) $")
        await person.press("quit\n")
        assert await trio.to_thread.run_sync(person.process.wait) == 0
    assert "\x1b" not in log.read_text()
    assert "ready on" in log.read_text()
    assert os.path.getsize(log)


UP, LEFT, TAB, END_OF_FILE, INTERRUPT = "\x1b[A", "\x1b[D", "\t", "\x04", "\x03"


async def test_lines_are_edited_come_again_and_are_completed(tmp_path: Path) -> None:
    async with window(endpoint(tmp_path / "qmp")) as person:
        await person.until(r"\(qemu\) $")
        await person.press("info sttus" + LEFT * 3 + "a\r")
        await person.until(r"\n\(qemu\) info status *\nVM status: paused \(inmigrate\)\n\(qemu\) $")
        await person.press("bogus\r")
        await person.until(r"unknown command: 'bogus'\n\(qemu\) $")
        await person.press(UP + UP)
        await person.until(r"\n\(qemu\) info status$")
        await person.press("\r")
        await person.until(r"paused \(inmigrate\)\n(.*\n)*VM status: paused \(inmigrate\)\n\(qemu\) $")
        await person.press("migrate_set_c" + TAB)
        await person.until(r"\n\(qemu\) migrate_set_capability $")
        await person.press("postcopy-r" + TAB)
        await person.until(r"\n\(qemu\) migrate_set_capability postcopy-ram $")
        await person.press("on\r")
        await person.until(r"\n\(qemu\) migrate_set_capability postcopy-ram on *\n\(qemu\) $")
        await person.press(END_OF_FILE)
        await person.press("q\r")
        assert await trio.to_thread.run_sync(person.process.wait) == 0


async def test_log_lines_leave_what_is_typed(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with window(endpoint(path)) as person:
        await person.until(r"\(qemu\) $")
        await person.press("info st")
        await person.until(r"\(qemu\) info st$")
        async with open_monitor(str(path), "it") as client:
            await client.command("migrate-incoming", uri=f"unix:{tmp_path / 'in'}")
            await person.until(rf"\n{LOG}migration: setup *\n\(qemu\) info st$")
            await person.press("atus\r")
            await person.until(r"\n\(qemu\) info status *\nVM status: paused \(inmigrate\)\n\(qemu\) $")


@pytest.mark.parametrize("way", ["key", "signal", "monitor"])
async def test_the_terminal_is_given_back(way: str, tmp_path: Path) -> None:
    """At an interrupt by its key, at a signal, at a word to another monitor."""
    path = tmp_path / "qmp"
    async with window(endpoint(path)) as person:
        before = person.modes()
        await person.until(r"\(qemu\) $")
        await until(lambda: person.modes() != before)
        if way == "key":
            await person.press(INTERRUPT)
        elif way == "signal":
            person.process.terminate()
        else:
            async with open_monitor(str(path), "it") as client:
                await client.command("quit")
        assert await trio.to_thread.run_sync(person.process.wait) == 0
        assert person.modes() == before
        if way != "monitor":
            await person.until(f"{LOG}ended by {'SIGINT' if way == 'key' else 'SIGTERM'}")


async def test_a_stopped_terminal_stops_nothing_else(tmp_path: Path) -> None:
    """Log lines wait for it, the machine and other monitors do not."""
    path = tmp_path / "qmp"
    async with window(endpoint(path)) as person:
        await person.until(r"\(qemu\) $")
        person.stop_output()
        async with open_monitor(str(path), "it") as client:
            await client.command("migrate-incoming", uri=f"unix:{tmp_path / 'in'}")
            assert (await client.command("query-status"))["status"] == "inmigrate"
            person.start_output()
            await person.until(rf"{LOG}migration: setup *\n\(qemu\) $")
            person.stop_output()
            await client.command("quit")
        assert await trio.to_thread.run_sync(person.process.wait) == 0


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("mig", 8),
        ("info mig", ["migrate", "migrate_capabilities", "migrate_parameters"]),
        ("  help  info st", ["status"]),
        ("migrate u", ["unix:"]),
        ("migrate -d t", ["tcp:"]),
        ("migrate_set_capability postcopy-ram o", ["on", "off"]),
        ("migrate_set_parameter max-b", ["max-bandwidth"]),
        ("migrate_set_parameter multifd-compression z", ["zlib", "zstd"]),
        ("migrate_set_parameter cpu-throttle-tailslow of", ["off"]),
        ("migrate_set_parameter bogus ", []),
        ("stop ", []),
    ],
)
def test_what_a_word_may_become(before: str, found: int | list[str]) -> None:
    told = complete(Options("10.0"), before)
    assert (len(told) if isinstance(found, int) else told) == found
