"""docs/machine.md's two ends by hand: its commands as they stand, but for the folder and the ports."""

from __future__ import annotations

import re
import shlex
import socket
import sys
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kit.pages import ROOT, files
from tests.kit.terminal_wire import listens
from tests.kit.until import until
from tests.peers.child import Child, open_child
from vhostpc.qmp.qmp_client import QmpClient, open_monitor

LIMIT = 120
PAGE = ROOT / "docs" / "machine.md"


def commands() -> list[str]:
    """The lines of the section's blocks that are no Python."""
    section = PAGE.read_text().split("## Two ends by hand")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [line for kind, block in blocks if not kind for line in block.splitlines() if line]


def free_ports(found: dict[str, str]) -> dict[str, str]:
    """For each port of the page one that is free now. UDP and TCP; all are held until all are found."""
    with ExitStack() as held:
        for port in sorted(found):
            kind = socket.SOCK_STREAM if port.startswith("44") else socket.SOCK_DGRAM
            here = held.enter_context(socket.socket(socket.AF_INET, kind))
            here.bind(("127.0.0.1", 0))
            found[port] = str(here.getsockname()[1])
    return found


@pytest.mark.ufd
async def test_two_ends_by_hand(tmp_path: Path) -> None:
    lines = commands()
    whole = "\n".join([*lines, files()["reflect.py"]])
    ports = free_ports(dict.fromkeys(re.findall(r"\b4\d{3}\b", whole), ""))

    def here(text: str) -> str:
        return re.sub(r"\b4\d{3}\b", lambda m: ports[m[0]], text.replace("/run/", f"{tmp_path}/"))

    (tmp_path / "reflect.py").write_text(here(files()["reflect.py"]))

    def argv(line: str) -> list[str]:
        program, *arguments = shlex.split(here(line))
        if program == "vhostpc":
            return [sys.executable, "-m", "vhostpc", *arguments]
        assert program == "python3"
        return [sys.executable, *(str(tmp_path / a) if a == "reflect.py" else a for a in arguments)]

    assert len(lines) == 5
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            children: list[Child] = []
            monitors: list[QmpClient] = []
            for line in lines:
                # In the order in which a person types them: each when the one before is ready.
                child = await stack.enter_async_context(open_child(argv(line), name=line, cwd=ROOT))
                children.append(child)
                if path := re.search(r"--socket-path (\S+)|--qmp unix:(\S+)", here(line)):
                    where = path[1] or path[2]
                    # Its name is there before it listens.
                    await until(partial(listens, Path(where)), LIMIT, f"{line}: {child.said}")
                    if path[2]:
                        monitors.append(await stack.enter_async_context(open_monitor(where, line)))
            try:
                await moved(monitors[0], monitors[1], here("tcp:127.0.0.1:4444"))
            except BaseException as e:
                e.add_note("\n".join(f"{c.name}\n{c.last_words()}" for c in children))
                raise


async def moved(source: QmpClient, destination: QmpClient, uri: str) -> None:
    """The section's QMP commands, and frames that come back at both places."""

    async def frames(end: QmpClient) -> int:
        report: dict[str, Any] = await end.command("x-vhostpc-report")
        return int(report["devices"][0]["received"])

    async def more(end: QmpClient, number: int) -> None:
        while await frames(end) < number:
            await trio.sleep(0.02)

    await more(source, 100)
    wanted = [{"capability": "postcopy-ram", "state": True}]
    for end in (source, destination):
        await end.command("migrate-set-capabilities", capabilities=wanted)
    await source.command("migrate", uri=uri)
    await source.command("migrate-start-postcopy")
    while (await destination.command("query-migrate")).get("status") != "completed":
        await trio.sleep(0.02)
    await more(destination, await frames(destination) + 100)
    report = await destination.command("x-vhostpc-report")
    assert report["running"]
    assert report["problems"] == []
    (device,) = report["devices"]
    assert device["damaged"] == device["doubled"] == device["lost"] == 0
    assert [vcpu["bad"] for vcpu in report["vcpus"]] == [0, 0]
