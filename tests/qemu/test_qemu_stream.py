"""What real QEMUs send is read to its end without an unknown byte, and told right by ``vhostpc inspect``."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.hugepages import hugepages
from tests.kit.streams import encode
from tests.qemu import peers, vm
from tests.qemu.proc import child
from vhostpc.dialect import DIALECTS, Compat
from vhostpc.wire.migration import elements as el
from vhostpc.wire.migration.return_path import PageRequest, Pong, ReturnPathDecoder, Shut
from vhostpc.wire.migration.split import read_package, split
from vhostpc.wire.migration.stream import RamMode, StreamReader

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).resolve().parents[2]
# A virtio device and an old one beside those of the board.
DEVICES = ("-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-device", "e1000,romfile=")
BLOCK = 1 << 20


def pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            yield data


def read(path: Path, mode: RamMode) -> Iterator[el.StreamEvent]:
    """All events of a recording; nothing may be left over."""
    reader = StreamReader(mode)
    for data in pieces(path):
        yield from reader.feed(data)
    yield from reader.eof()
    assert reader.ended
    assert (reader.unread, reader.offset) == (0, path.stat().st_size)


def same_again(path: Path) -> bool:
    """The recording equals the encoding of what was read from it; pages go by in pieces of the stream."""
    events = read(path, RamMode.PAGES)
    with path.open("rb") as file:
        out = encode(events)
        return file.read() == out


def pages(events: list[el.StreamEvent]) -> Counter[str]:
    found: Counter[str] = Counter()
    for event in events:
        if isinstance(event, el.RamRun):
            assert event.fill == 0
            found[event.kind.value] += event.pages
    return found


def inspect(path: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "vhostpc", "inspect", "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] is None
    assert found["trailing"] == 0
    assert isinstance(found, dict)
    return found


def told(found: dict[str, Any]) -> dict[str, int]:
    whole: Counter[str] = Counter()
    for block in found["ram"]:
        whole.update(block["pages"])
    return {"data": whole["data"], "zero": whole["zero"]}


@pytest.mark.parametrize("version", ["7.2", "10.0", pytest.param("11.1", marks=pytest.mark.long)])
async def test_precopy_recorded(version: str, tmp_path: Path) -> None:
    qemu = peers.qemu(version)
    spec = vm.Spec(qemu, vm.Memory(size=128), extra=DEVICES)
    path = tmp_path / "stream"
    async with vm.vm(spec, "here", vm.Bare(), tmp_path) as here:
        nonce = await here.booted()
        await here.beat(nonce)
        wanted = [{"capability": "events", "state": True}]
        await here.qmp.command("migrate-set-capabilities", capabilities=wanted)
        await here.qmp.command("migrate-set-parameters", max_bandwidth=1 << 30)
        await here.qmp.command("migrate", uri=f"exec:cat > {path}")
        await here.qmp.event("MIGRATION", status="completed", limit=120)
        ram = (await here.qmp.command("query-migrate"))["ram"]
        # ``cat`` has written all when QEMU closed its pipe and waited for it: at its end at the latest.
        await here.quit()
    events = list(read(path, RamMode.RUNS))
    assert pages(events) == {"data": ram["normal"], "zero": ram["duplicate"]}
    assert next(e for e in events if isinstance(e, el.RamBlocks)).total == ram["total"]
    assert next(e for e in events if isinstance(e, el.Configuration)).machine == f"pc-i440fx-{version}"
    assert same_again(path)

    devices = [e for e in events if isinstance(e, el.DeviceSection)]
    description = events[-1]
    assert isinstance(description, el.VmDescription)
    assert description.disagrees is None
    names = [name for _, name in sorted((e.offset, e.idstr) for e in devices)]
    assert {"cpu", "timer", "globalstate"} <= set(names)
    assert any(name.endswith("/virtio-rng") for name in names)
    assert any(name.endswith("/e1000") for name in names)
    # The footers alone lead to the same sections.
    raw = path.read_bytes()
    end = next(e for e in events if isinstance(e, el.EndOfStream)).offset
    found = split(raw[devices[0].offset : end], devices[0].offset)
    assert (found.elements, found.doubt) == (devices, None)

    report = inspect(path)
    assert told(report) == {"data": ram["normal"], "zero": ram["duplicate"]}
    assert [r["name"] for r in report["elements"] if r["kind"] == "device"] == names


@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_inspect_listens_to_a_live_source(version: str, tmp_path: Path) -> None:
    """Without a return path the source takes it for a destination: it completes, and can go on."""
    path = tmp_path / "socket"
    spec = vm.Spec(peers.qemu(version), vm.Memory(size=128))
    argv = [sys.executable, "-m", "vhostpc", "inspect", "--json", f"unix:{path}"]
    async with vm.vm(spec, "here", vm.Bare(), tmp_path) as here, child("inspect", argv) as inspector:
        nonce = await here.booted()
        await inspector.err.find("waiting for a source at")
        wanted = [{"capability": "events", "state": True}]
        await here.qmp.command("migrate-set-capabilities", capabilities=wanted)
        await here.qmp.command("migrate", uri=f"unix:{path}")
        await here.qmp.event("MIGRATION", status="completed", limit=120)
        assert await inspector.wait() == 0
        await inspector.out.find("^}$")
        ram = (await here.qmp.command("query-migrate"))["ram"]
        found = json.loads("\n".join(inspector.out.lines))
        assert found["wrong"] is None
        assert told(found) == {"data": ram["normal"], "zero": ram["duplicate"]}
        await here.qmp.command("cont")
        await here.beat(nonce)


@pytest.mark.parametrize(
    ("version", "huge"),
    [
        pytest.param("7.2", False, id="7.2"),
        pytest.param("10.0", False, id="10.0"),
        pytest.param("10.0", True, id="10.0-huge"),
        pytest.param("11.1", False, id="11.1", marks=pytest.mark.long),
    ],
)
async def test_postcopy_recorded(version: Compat, huge: bool, tmp_path: Path) -> None:
    spec = vm.Spec(peers.qemu(version), vm.Memory(size=128, huge=huge), extra=DEVICES)
    with hugepages(256 if huge else 0):
        async with (
            vm.vm(spec, "here", vm.Bare(), tmp_path) as here,
            vm.vm(spec, "there", vm.Bare(), tmp_path, incoming=True) as there,
        ):
            nonce = await here.booted()
            await here.beat(nonce)
            moved = await vm.migrate_postcopy(here, there, tmp_path, record=tmp_path)
            if version in peers.VERSIONS:  # the newest one's guest may panic
                await there.beat(nonce)
    heard = {el.MUST_HEAR} if DIALECTS[version].loaded_ping else set()
    ram = moved.info["ram"]
    path = tmp_path / "forward"
    events = list(read(path, RamMode.RUNS))
    assert pages(events) == {"data": ram["normal"], "zero": ram["duplicate"]}
    assert same_again(path)

    advise = next(e for e in events if isinstance(e, el.PostcopyAdvise))
    blocks = {b.name: b.page_size for b in next(e for e in events if isinstance(e, el.RamBlocks)).blocks}
    assert advise == el.PostcopyAdvise(0x201000 if huge else 0x1000, 0x1000)
    assert blocks["mem"] == (0x200000 if huge else None)
    assert all(size is None for name, size in blocks.items() if name != "mem")
    assert any(isinstance(e, el.RamDiscard) for e in events)
    package = next(e for e in events if isinstance(e, el.Package))
    inside = read_package(package)
    assert b"".join(e.encode() for e in inside) == package.blob
    assert [type(e) for e in inside if not isinstance(e, el.DeviceSection)] == [
        el.PostcopyListen, el.Ping, *([el.Ping] if heard else []), el.PostcopyRun,
    ]  # fmt: skip
    assert sum(isinstance(e, el.DeviceSection) for e in inside) >= 30
    assert told(inspect(path)) == {"data": ram["normal"], "zero": ram["duplicate"]}

    decoder = ReturnPathDecoder()
    back = list(itertools.chain.from_iterable(decoder.feed(data) for data in pieces(tmp_path / "back")))
    assert {m.value for m in back if isinstance(m, Pong)} == {1, 2, 3, 4, *heard}
    assert back[-1] == Shut(0)
    requests = [m for m in back if isinstance(m, PageRequest)]
    assert len(requests) == ram["postcopy-requests"]
    assert {m.length for m in requests if m.block == "mem"} == {0x200000 if huge else 0x1000}
