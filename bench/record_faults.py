"""Records in which order, and when, a machine touches its pages for the first time after a postcopy switch.

``python -m bench.record_faults FOLDER [NAME ...]`` makes the files of ``bench/faults``, which ``bench.prefetch`` plays.
All memory is missing at the destination and the source sends nothing but what is asked for, so each first touch is a
fault, and the recording does not depend on an order of pages.

The guests are of QEMU 10.0 with TCG, 256 MiB, a Linux kernel and busybox: QEMU, our endpoint that holds the machine, a
second QEMU, whose trace has the faults with their threads. The own machine is that of ``vhostpc demo`` with its
bridge; its endpoint traces faults.

A file is compressed text: a line of JSON (``what``, ``pages``, ``zeros``: runs of pages of zeros as first page and
count), then for each first touch the thread, the page, and how many microseconds the thread ran since its touch before
was answered (the first: since the first touch of all).
"""

from __future__ import annotations

import gzip
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from tests.qemu import guest, peers, vm
from tests.qemu.test_qemu_endpoint import completed, prepare
from tests.sequences.nodes import endpoint_node
from vhostpc.cli.demo.processes import bridge, endpoint, far_side, machine

from .recordings import Recording, Touch

SECONDS = 12
"""How long the machine runs while only what it asks for comes."""
MOST = 9000
"""Touches that a file has at most: the first ones."""
SIZE = 256 << 20
DEMO_SIZE, DEMO_CHECKS, VCPUS = 128 << 20, 3000, 2
NEXT_TO_NOTHING = 1
TRACED = 1000

FILES = """
mkdir /data
n=0
while [ $n -lt 240 ]; do
    dd if=/dev/urandom of=/data/$n bs=4096 count=$((8 + n * 37 % 180)) 2>/dev/null
    n=$((n + 1))
done
"""
LINES = "seq 1 60000 | awk '{print $1 * 7919 % 60013, $1}' >/lines\n"
QUIET = "while :; do date >/now; sleep 0.1; done\n"
READS = "while :; do for f in $(ls /data | shuf); do md5sum /data/$f >/sum; done; done\n"
WORKS = """while :; do
    sort -n /lines >/sorted
    tar c /data/1? /data/2? 2>/dev/null | gzip -1 >/packed
    awk '{s += $2} END {print s}' /sorted >/total
    find / -xdev -name '*1*' | wc -l >/found
    n=0
    while [ $n -lt 20 ]; do cat /data/$((n * 11)) | md5sum >/sum; n=$((n + 1)); done
done
"""
READY = "echo working\n"
GUESTS = {
    "quiet": (1, "a shell that writes the time every 0.1 s", FILES + READY + QUIET),
    "reads": (1, "md5sum of files in tmpfs, in random order", FILES + READY + READS),
    "works": (1, "sort, tar, gzip, awk, find and md5sum in a loop", FILES + LINES + READY + WORKS),
    "two": (
        2,
        "two processors: md5sum of files in random order, and sort, tar, gzip, awk, find",
        FILES + LINES + "(" + READS + ") &\n" + READY + WORKS,
    ),
    "checker": (1, "the tests' checker: random pages of nearly all memory, which lie scattered", ""),
}

TRACED_EVENTS = ("postcopy_ram_fault_thread_request", "postcopy_place_page", "postcopy_place_page_zero")
TRACING = tuple(word for event in TRACED_EVENTS for word in ("-trace", event))


def initrd(kernel: peers.Kernel, script: str, folder: Path) -> Path:
    files = guest.base_files(kernel)
    files["bin/guest"] = guest.Entry(0o100755, guest.program().read_bytes())
    if script:
        files["work"] = guest.Entry(0o100644, script.encode())
    path = folder / "initrd"
    path.write_bytes(gzip.compress(guest.archive(files), 1))
    return path


def zero_runs(ram: bytes) -> list[tuple[int, int]]:
    nothing = bytes(4096)
    runs: list[list[int]] = []
    for page in range(len(ram) >> 12):
        if ram[page << 12 : (page + 1) << 12] == nothing:
            if runs and sum(runs[-1]) == page:
                runs[-1][1] += 1
            else:
                runs.append([page, 1])
    return [(first, count) for first, count in runs]


def touches(faults: Iterable[tuple[int, int, int, int]]) -> list[Touch]:
    """Of (thread, page, when it faulted, when it went on) in microseconds, by when it faulted."""
    names: dict[int, int] = {}
    went_on: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()
    found: list[Touch] = []
    begin = None
    for thread, page, faulted, gone in sorted(faults, key=lambda row: row[2]):
        begin = faulted if begin is None else begin
        if (thread, page) in seen:  # a thread that a signal woke
            continue
        seen.add((thread, page))
        number = names.setdefault(thread, len(names))
        found.append(Touch(number, page, max(0, faulted - went_on.get(thread, begin))))
        went_on[thread] = gone
    return found[:MOST]


def traced(text: str, block: str) -> list[tuple[int, int, int, int]]:
    """Faults of QEMU's trace."""
    waiting: list[tuple[int, int, int, int]] = []
    found: list[tuple[int, int, int, int]] = []
    for line in text.splitlines():
        match = re.search(r"(\d+)\.(\d{6}):(postcopy_\w+) (.*)$", line)
        if match is None:
            continue
        at = int(match[1]) * 1_000_000 + int(match[2])
        if match[3] == "postcopy_ram_fault_thread_request":
            fields = re.search(
                r"HVA=(?:0x)?([0-9a-f]+) rb=(\S+) offset=(?:0x)?([0-9a-f]+) pid=(\d+)", match[4]
            )
            assert fields, line
            if fields[2] == block:
                waiting.append((int(fields[4]), int(fields[3], 16) >> 12, at, int(fields[1], 16) >> 12))
        else:
            fields = re.search(r"(?:host_addr|host|addr)=(?:0x)?([0-9a-f]+)", match[4])
            assert fields, line
            page = int(fields[1], 16) >> 12
            found += [
                (thread, number, begun, at) for thread, number, begun, address in waiting if address == page
            ]
            waiting = [row for row in waiting if row[3] != page]
    return found


async def of_a_guest(name: str) -> Recording:
    processors, what, script = GUESTS[name]
    kernel = peers.kernel()
    qemu = peers.qemu("10.0")
    with tempfile.TemporaryDirectory(prefix="vpc-record-") as text, trio.fail_after(240):
        folder = Path(text)
        append = "console=ttyS0 quiet panic=-1" + (" vm.run=/work" if script else "")
        extra = ("-initrd", str(initrd(kernel, script, folder)), "-append", append, "-smp", str(processors))
        spec = vm.Spec(qemu, vm.Memory(size=SIZE >> 20), extra)
        there = replace(spec, extra=(*extra, *TRACING))
        async with (
            endpoint_node("10.0", "held", folder, ram=f"mem={SIZE >> 20}M") as node,
            vm.vm(there, "there", vm.Bare(), folder, incoming=True) as target,
        ):
            async with vm.vm(spec, "here", vm.Bare(), folder) as source:
                await source.serial.find("working" if script else "beat=", limit=120)
                await trio.sleep(4)
                await prepare(node)
                await prepare(source, max_bandwidth=1 << 30)
                await node.qmp.command("migrate-incoming", uri=f"unix:{folder}/in")
                await source.qmp.command("migrate", uri=f"unix:{folder}/in")
                await completed(source)
                await completed(node)
                await source.save_ram(folder / "ram")
            zeros = zero_runs((folder / "ram").read_bytes())
            await prepare(target, "postcopy-ram", "postcopy-blocktime")
            await prepare(node, "postcopy-ram", max_bandwidth=1 << 20, max_postcopy_bandwidth=NEXT_TO_NOTHING)
            await target.qmp.command("migrate-incoming", uri=f"unix:{folder}/out")
            since = len(node.qmp.events)
            await node.qmp.command("migrate", uri=f"unix:{folder}/out")
            await node.qmp.command("migrate-start-postcopy")
            await target.qmp.event("RESUME", 0)
            await trio.sleep(SECONDS)
            seen = target.trace_file.read_text(errors="replace")
            await node.qmp.command("migrate-set-parameters", max_postcopy_bandwidth=0)
            await completed(node, since)
        return Recording(f"QEMU 10.0 guest: {what}", SIZE >> 12, zeros, touches(traced(seen, "mem")))


async def of_our_machine() -> Recording:
    with tempfile.TemporaryDirectory(prefix="vpc-record-") as text, trio.fail_after(120):
        folder = Path(text)
        async with (
            far_side() as (_, address),
            bridge("here", folder, address) as here,
            bridge("there", folder, address) as there,
            endpoint("source", folder, *machine(DEMO_SIZE, VCPUS, DEMO_CHECKS, here)) as source,
            endpoint(
                "destination",
                folder,
                *machine(DEMO_SIZE, VCPUS, DEMO_CHECKS, there),
                *("--incoming", "defer", "--trace-faults"),
            ) as destination,
        ):
            await trio.sleep(1)
            await destination.set("postcopy-ram", "events")
            await destination.command("migrate-incoming", uri=f"unix:{folder}/in")
            await source.set(
                "postcopy-ram", "events", max_bandwidth=1 << 20, max_postcopy_bandwidth=NEXT_TO_NOTHING
            )
            await source.command("migrate", uri=f"unix:{folder}/in")
            await source.command("migrate-start-postcopy")
            await trio.sleep(SECONDS / 2)
            faults, start = [], 0
            while True:
                found = await destination.command("x-vhostpc-trace", from_=start)
                start = found["next"]
                faults += [
                    # A client's threads are told apart where the kernel reports them.
                    (client << 32 | thread, page, begun // 1000, end // 1000)
                    for client, thread, block, page, _, begun, end in found["faults"]
                    if block == 0
                ]
                if len(found["faults"]) < TRACED:
                    break
            for end in (source, destination):
                await end.command("quit")
        what = "own machine of the demonstration: two vCPUs that rewrite and check random pages, one bridge"
        return Recording(what, DEMO_SIZE >> 12, [], touches(faults))


RECORDERS: dict[str, Callable[[], Awaitable[Recording]]] = {
    **{name: partial(of_a_guest, name) for name in GUESTS},
    "own": of_our_machine,
}


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names or RECORDERS:
        made = trio.run(RECORDERS[name])
        path = Path(folder) / f"{name}.gz"
        path.write_bytes(made.packed())
        print(f"{path}: {len(made.touches)} touches of {made.pages} pages, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
