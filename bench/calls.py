"""R4: system calls and locks a page, in a postcopy in which nothing breaks. ``python -m bench.calls [CHECKOUT]``.

A pair of endpoints, once under ``strace -f -c`` and once with ``native/locks.c`` preloaded, which counts the mutexes
that the package's C code locks. *Flow*: an idle machine, its pages sent unasked, at two sizes. *Asked*: F2's toucher,
idle, with two numbers of touches. What a run more costs, divided by the pages that it has more, is a page's own; what
is done once drops out. Calls that a page makes less than once in a hundred are left out; ``epoll_wait``, ``futex`` and
the like of the trio loop go by the second, and are more the longer it lasts.

CHECKOUT is another one of the package, built, with its own ``.venv``: to compare two, run this with each, in turn. It
is no row: there is no peer whose figure would say anything.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from . import ROOT, f2
from .ends import BLOCK, LIMIT, OURS, end
from .native import tool

SIZES = (64, 256)  # MiB
TOUCHES = (300, 1300)
LEAST = 0.01
STEP = 0.02
SIDES = ("source", "target")

Ways = dict[str, list[str]]


async def flow(folder: Path, program: Sequence[str], under: Ways, mib: int) -> None:
    """All pages of an idle machine, unasked."""
    async with AsyncExitStack() as stack:
        ends = []
        for side, more in zip(SIDES, ([], ["--incoming", "defer"]), strict=True):
            monitor = folder / f"{side}.qmp"
            argv = [
                *under[side],
                *program,
                "endpoint",
                "--qmp",
                f"unix:{monitor}",
                "--ram",
                f"{BLOCK}={mib}M",
            ]
            argv += ["--vcpus", "1", "--vcpu-writes", "0", "--vcpu-checks", "0", *more]
            ends.append(await stack.enter_async_context(end(OURS, argv, monitor)))
        source, target = ends
        for it in ends:
            await it.allow("postcopy-ram")
        await target.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
        await source.qmp.command("migrate-set-parameters", max_bandwidth=1 << 20, max_postcopy_bandwidth=0)
        await source.qmp.command("migrate", uri=f"unix:{folder}/in")
        await source.reaches("active")
        await source.qmp.command("migrate-start-postcopy")
        for it in ends:
            await it.reaches("completed")


async def asked(folder: Path, program: Sequence[str], under: Ways, touches: int) -> None:
    """So many pages, one after the other, next to nothing unasked."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(f2.toucher(folder / "source.vu"))
        source = await stack.enter_async_context(
            f2.endpoint(folder, "source", program=[*under["source"], *program])
        )
        child = await stack.enter_async_context(f2.toucher(folder / "target.vu", touches))
        target = await stack.enter_async_context(
            f2.endpoint(folder, "target", "--incoming", "defer", program=[*under["target"], *program])
        )
        f2.fill(source)
        await f2.switch(source, target, folder, child, ("postcopy-ram",), 0)


Run = Callable[[Path, Sequence[str], Ways, int], Awaitable[None]]


async def system_calls(run: Run, program: Sequence[str], size: int) -> dict[str, Counter[str]]:
    """By end and name."""
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        # With -D the endpoint is our own child; strace says what it counted when that has ended.
        under = {side: ["strace", "-D", "-f", "-c", "-o", str(folder / f"{side}.calls")] for side in SIDES}
        await run(folder, program, under, size)
        found = {}
        for side in SIDES:
            with trio.fail_after(LIMIT):
                while " total\n" not in (said := (folder / f"{side}.calls").read_text()):
                    await trio.sleep(STEP)
            lines = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) (?: *\d+)? +(\w+)$", said, re.MULTILINE)
            found[side] = Counter({name: int(count) for count, name in lines if name != "total"})
    return found


async def locks(run: Run, program: Sequence[str], size: int) -> dict[str, Counter[str]]:
    library = tool("locks", "-shared", "-fPIC", "-ldl")
    with tempfile.TemporaryDirectory(prefix="vpc-bench-") as text:
        folder = Path(text)
        under = {side: ["env", f"LD_PRELOAD={library}", f"LOCKS={folder / side}"] for side in SIDES}
        for side in SIDES:
            (folder / side).mkdir()
        await run(folder, program, under, size)
        # Helpers that an endpoint runs lock nothing of ours.
        return {
            side: Counter({"lock": sum(int(file.read_text()) for file in (folder / side).iterdir())})
            for side in SIDES
        }


async def main(checkout: Path) -> None:
    program = ["env", "-C", str(checkout), str(checkout / ".venv/bin/python"), "-m", "vhostpc"]
    print("| what | end | calls a page |\n| --- | --- | --- |")
    for what, run, sizes, pages in (
        ("flow", flow, SIZES, (SIZES[1] - SIZES[0]) << 8),
        ("asked", asked, TOUCHES, TOUCHES[1] - TOUCHES[0]),
    ):
        for count in (system_calls, locks):
            few, many = [await count(run, program, size) for size in sizes]
            for side in SIDES:
                more = {name: (many[side][name] - few[side][name]) / pages for name in sorted(many[side])}
                told = ", ".join(f"{name} {share:.3f}" for name, share in more.items() if share >= LEAST)
                print(
                    f"| {what}, {count.__name__.replace('_', ' ')} | {side} | {told or 'none'} |", flush=True
                )


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
