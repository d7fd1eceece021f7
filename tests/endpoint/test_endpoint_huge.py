"""Huge pages to the end: 2 MiB and 1 GiB beside 4 KiB in one machine, by postcopy with preempt, over a lost link."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.endpoint.test_endpoint_machine import arrived
from tests.kit.hugepages import hugepages
from tests.kit.own_machine import STEP, WAIT, migrate, pair

pytestmark = pytest.mark.ufd
MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("also", [[], ["postcopy-preempt"]], ids=["one", "two"])
@pytest.mark.parametrize(("page", "size"), [("2M", 2 * MIB), ("1G", GIB)], ids=["2M", "1G"])
async def test_beside_small_ones_over_a_lost_link(
    page: str, size: int, also: list[str], tmp_path: Path
) -> None:
    """A page of which a part has come when the link is lost comes again, whole."""
    blocks = max(size, 64 * MIB) >> 20
    ram = ["low=16M", f"high={blocks}M,page={page}"]
    with hugepages(2 * blocks, size):
        async with pair(tmp_path, ram=ram, vcpus=2) as (source, destination):
            await source.until_works()
            for end in (source, destination):
                await end.set("postcopy-ram", *also)
            await source.set(max_postcopy_bandwidth=8 * MIB)
            await migrate(source, destination, tmp_path)
            await source.qmp.command("migrate-start-postcopy")
            await destination.process.err.find("may run here")
            with trio.fail_after(WAIT):  # somebody waits for a huge page, and it comes
                while not (await destination.report())["asked"]["waiting-now"]:
                    await trio.sleep(STEP)
            await source.qmp.command("migrate-pause")
            for end in (source, destination):
                await end.until_status("postcopy-paused")
            again = f"unix:{tmp_path}/again"
            await destination.qmp.command("migrate-recover", uri=again)
            await source.qmp.command("migrate", uri=again, resume=True)
            await source.set(max_postcopy_bandwidth=0)
            here = await arrived(source, destination)
            huge = next(block for block in here["blocks"] if block["name"] == "high")
            assert huge["page-size"] == size
