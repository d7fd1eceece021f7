"""Links that break at any byte of a postcopy, and of its recoveries: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from tests.kit.own_machine import check, pair
from vhostpc.proxy import open_proxy

pytestmark = pytest.mark.ufd

CUTS = 5
FEW, MANY = 3, 40
"""Migrations, of five cuts each."""
FIRST = ["random=4M", "random=64K", "request=1..30", "postcopy-page=1..200"]
"""Behind the package."""
PLACES = [
    *(*FIRST, "random=1K", "back-byte=1..2000"),
    *(
        "recv-bitmap",
        "bitmap,at=middle",
        "bitmap",
        "resume,at=before",
        "resume",
        "resume-ack,at=middle",
        "resume-ack",
    ),
]
"""And of a recovery, from its first byte on."""
SLACK = 8 << 20
"""Bytes that may be in flight when a link breaks: sockets and the proxy's own buffers, on both of its sides."""


def places(seed: int) -> list[str]:
    """The first in the first link; each of the others in one recovery more."""
    rng = random.Random(seed)
    found = [f"cut@{rng.choice(FIRST)},on=main"]
    for number in range(1, CUTS):
        found.append(f"cut@{rng.choice(PLACES)},on=recovery{f'-{number}' if number > 1 else ''}")
    return found


async def cut(seed: int, folder: Path) -> None:
    """A machine with vCPUs that check every page and traffic through two bridges moves, and its link is cut."""
    target = f"unix:{folder}/incoming"
    faults = places(seed)
    with trio.fail_after(120):
        async with (
            pair(folder, ram=("pc.ram=64M",), vcpus=2, both=["--recover-for", "60"]) as (source, destination),
            open_proxy(f"unix:{folder}/proxy", target, faults, seed=seed) as proxy,
        ):
            await source.until_works(50, 50)
            for side in (source, destination):
                await side.set("postcopy-ram", max_postcopy_bandwidth=8 << 20)
            await destination.qmp.command("migrate-incoming", uri=target)
            await source.qmp.command("migrate", uri=proxy.uri)
            await source.qmp.command("migrate-start-postcopy")
            for number in range(1, CUTS + 1):
                await proxy.wait("end", connection=number)
            await source.set(max_postcopy_bandwidth=0)
            for side in (source, destination):
                await side.until_status("completed", not_these=["failed"])
            assert proxy.pending == [], (seed, faults)
            report = await destination.until_works()
            check(report)
            sent = (await source.report())["sent"]
            placed = report["came"]["placed"]
            twice = (sent["data-pages"] + sent["zero-pages"]) * 4096 - placed * 4096
            assert 0 <= twice <= CUTS * SLACK, (seed, sent, report["came"])
            assert report["came"]["already"] == 0


@pytest.mark.parametrize("seed", range(FEW))
async def test_cuts(seed: int, tmp_path: Path) -> None:
    await cut(seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(FEW, MANY))
async def test_two_hundred_cuts(seed: int, tmp_path: Path) -> None:
    await cut(seed, tmp_path)
