"""Who plays a scenario: a pair of QEMUs, or ours in the place of one or both; and what is compared of them."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from tests.sequences.nodes import Node, Told, endpoint_node, own_node, qemu_node, take_a_machine
from tests.sequences.stage import Stage
from vhostpc.dialect import Compat

Play = Callable[[Stage], Awaitable[None]]
Who = Literal["qemu", "held", "own"]
"""A QEMU; our endpoint, with a machine that it only holds; our endpoint, with a machine of its own that runs."""
Before = Literal["running", "prelaunch", "came"]
"""The machine at the source runs; it was begun with ``-S``; it has come, stopped, from a QEMU."""
LIMIT = 120  # seconds for a scenario


@dataclass(frozen=True)
class Cast:
    """``src``, ``dst``: who. ``before``: the machine at the source. ``starts``: the destination lets it run.

    A machine that is held does not run: it is like that of a QEMU that was begun with ``-S``, to which it came.
    """

    src: Who = "qemu"
    dst: Who = "qemu"
    before: Before = "running"
    starts: bool = True

    def stand_ins(self) -> Cast:
        """The same with a QEMU in each place."""
        return Cast("qemu", "qemu", self.before, self.starts)


@contextlib.asynccontextmanager
async def _source(cast: Cast, compat: Compat, folder: Path) -> AsyncIterator[Node]:
    stopped = cast.before != "running"
    if cast.src == "own":
        assert cast.before != "came"
        made = own_node(compat, "src", folder, stopped=stopped)
    elif cast.src == "held":
        assert cast.before == "came"
        made = endpoint_node(compat, "src", folder)
    else:
        made = qemu_node(compat, "src", incoming=cast.before == "came", stopped=stopped)
    async with made as node:
        if cast.before == "came":  # a QEMU that stands in for ours has taken its machine as ours has
            await take_a_machine(node, compat, folder)
        yield node


def _destination(
    cast: Cast, compat: Compat, folder: Path, small: bool
) -> contextlib.AbstractAsyncContextManager[Node]:
    size = 32 if small else 64
    if cast.dst == "own":
        return own_node(compat, "dst", folder, size=size, incoming=True, stopped=not cast.starts)
    if cast.dst == "held":
        assert not cast.starts
        return endpoint_node(compat, "dst", folder, ram="mem=32M" if small else None)
    return qemu_node(compat, "dst", size=size, incoming=True, stopped=not cast.starts)


@dataclass(frozen=True)
class Played:
    """What each node told, and what stood in error-desc."""

    src: Told
    dst: Told
    src_fields: dict[str, set[tuple[str, ...]]]
    dst_fields: dict[str, set[tuple[str, ...]]]
    errors: dict[str, list[str]]
    """By node; with the folder of the sockets as ``FOLDER``, ports as ``PORT``."""


async def perform(play: Play, cast: Cast, compat: Compat, *, small: bool = False) -> Played:
    """``small``: the destination has another size of memory than the source."""
    with tempfile.TemporaryDirectory() as name, trio.fail_after(LIMIT):
        folder = Path(name)
        async with _source(cast, compat, folder) as src, _destination(cast, compat, folder, small) as dst:
            await play(Stage(src, dst, folder))
            for node in (src, dst):
                said = "\n".join(node.process.err.lines)
                assert "Traceback" not in said, said
            errors = {
                node.name: [re.sub(r":\d+'", ":PORT'", text.replace(name, "FOLDER")) for text in node.errors]
                for node in (src, dst)
            }
            return Played(src.told(), dst.told(), src.fields, dst.fields, errors)


# --- what may differ between two runs of the same


def plain(events: Sequence[str], first: int = 1) -> list[str]:
    """Without the passes whose number is a matter of speed; each that is counted has its turn.

    How often the memory is gone through before the machine stops depends on how fast it goes, so those passes
    are left out, and the numbers of all. Where nothing tells that the machine has stopped (7.2, one that was
    stopped before) that takes the last pass, too. One may end while it is cancelled.
    ``first``: the number of the first pass that is told.
    """
    kept: list[str] = []
    going = False
    passes = first - 1
    for text in events:
        if text == "setup":
            passes = first - 1
        if text.startswith("PASS "):
            passes += 1
            assert text == f"PASS {passes}", events
            if not going and kept[-1:] not in (["PASS"], ["cancelling"]):
                kept.append("PASS")
            continue
        if text in ("STOP", "device") and kept[-1:] == ["PASS"]:
            kept.pop()
        kept.append(text)
        if text in ("active", "RESUME"):
            going = True
        elif not text.startswith("["):
            going = False
    return kept
