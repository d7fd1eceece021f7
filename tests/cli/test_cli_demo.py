"""``vhostpc demo``: the numbers agree, for root and for others; a disagreement is named; the report is complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import trio

from tests.kit.until import until
from vhostpc.cli.demo.books import (
    Far,
    Frames,
    Pages,
    Requests,
    Result,
    judge,
)
from vhostpc.cli.demo.pictures import Band, Frame, cells, svg, ticks
from vhostpc.cli.demo.processes import child
from vhostpc.cli.demo.relay import Relay, find_page
from vhostpc.cli.demo.report import length, overlap, union
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import RamFlag

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
pytestmark = pytest.mark.ufd


def run(*arguments: str, profile: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, with the rights of a profile of ``tests.kit.confine``."""
    confined = [sys.executable, "-m", "tests.kit.confine", profile] if profile else []
    return subprocess.run(
        [*confined, sys.executable, "-m", "vhostpc", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def check_numbers(text: str, mib: int = 128) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(text)
    assert numbers["ok"], numbers["problems"]
    assert [p["name"] for p in numbers["phases"]] == ["before", "precopy", "switch", "postcopy", "after"]
    assert all(p["begin"] <= p["end"] for p in numbers["phases"])
    pages = numbers["pages"]
    again = sum(pause["sent_twice"] for pause in numbers.get("pauses", ()))
    assert pages["total"] == mib * 256 == pages["precopy"] + pages["background"] + pages["requested"] - again
    assert pages["bad"] == pages["twice"] == 0
    assert all(pages[way] > 0 for way in ("precopy", "background", "requested", "checked"))
    waits = {w["name"]: w for w in numbers["waits"]}
    assert set(waits) == {"vCPU 0", "vCPU 1", "guest's drivers", "net0's bridge"}
    assert all(waits[name]["faults"] and waits[name]["standstill_ns"] > 0 for name in ("vCPU 0", "vCPU 1"))
    assert waits["net0's bridge"]["faults"] > 0
    assert all(w["p50_ns"] <= w["p99_ns"] <= w["longest_ns"] <= w["blocked_ns"] for w in waits.values())
    together = numbers["together"]
    assert together["blocktime_ms"] == together["vcpus_ns"] // 1_000_000
    assert (
        together["all_ns"]
        <= together["vcpus_ns"]
        <= min(waits[n]["blocked_ns"] for n in ("vCPU 0", "vCPU 1"))
    )
    assert sum(w["faults"] for w in waits.values()) == numbers["requests"]["faults"]
    assert numbers["frames"][0]["received"] > 0
    assert numbers["bytes"]["total"] > pages["total"] * TARGET_PAGE
    return numbers


def check_lanes(numbers: dict[str, Any], picture: ElementTree.Element) -> None:
    """What is drawn of single faults lasts as long as was counted where they were answered."""
    words = "|".join("".join(text.itertext()) for text in picture.iter(f"{SVG}text"))
    drawn = [int(ms) for ms in re.findall(r"\|(\d+) ms, [0-9.]+ %", words)]
    counted = [w["blocked_ns"] for w in numbers["waits"]]
    counted += [numbers["together"]["vcpus_ns"], numbers["together"]["all_ns"]]
    assert drawn == [pytest.approx(ns / 1e6, rel=0.05, abs=5) for ns in counted]


@pytest.fixture(scope="module")
def with_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The numbers of a run, and its report."""
    page = tmp_path_factory.mktemp("demo") / "run.html"
    done = run("--json", "--size", "64M", "--report", str(page))
    assert done.returncode == 0, done.stderr + done.stdout
    return check_numbers(done.stdout, 64), page.read_text()


def test_report_stands_by_itself(with_report: tuple[dict[str, Any], str]) -> None:
    numbers, page = with_report
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert len(page) < 400_000
    assert set(re.findall(r"https?://[^\"' <]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|<script|<link|<img| src=", page)
    pictures = list(tree.iter(f"{SVG}svg"))
    assert [p.findtext(f"{SVG}title") for p in pictures] == [
        "Memory present at the destination over time",
        "Time that each fault waited, over time",
        "When each vCPU and each client waited",
        "Memory at six moments",
    ]
    for picture in pictures:
        width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
        for element in picture.iter():
            assert -1 <= float(element.get("x", 0)) <= width, element.attrib
            assert -1 <= float(element.get("y", 0)) <= height, element.attrib
    names = {"".join(text.itertext()) for text in pictures[2].iter(f"{SVG}text")}
    assert {w["name"] for w in numbers["waits"]} <= names
    assert {"postcopy", "seconds", "all vCPUs", "and bridges"} <= names
    check_lanes(numbers, pictures[2])
    cells_told = {"".join(cell.itertext()) for cell in tree.iter("td")}
    assert str(numbers["pages"]["requested"]) in cells_told
    assert str(numbers["frames"][0]["sent"]) in cells_told


def test_without_cuts_no_pauses_are_told(with_report: tuple[dict[str, Any], str]) -> None:
    numbers, page = with_report
    assert not {"pauses", "steps"} & set(numbers)
    assert "again" not in numbers["requests"]
    assert "pause" not in page


def test_report_in_a_narrow_window(with_report: tuple[dict[str, Any], str]) -> None:
    """Pictures and tables scroll by themselves; letters stay large enough to read."""
    _, page = with_report
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert 'name="viewport" content="width=device-width,initial-scale=1"' in page
    assert ".scroll{overflow-x:auto}" in page
    least = re.search(r"@media screen\{\.scroll \.pic\{min-width:(\d+)px\}\}", page)
    letters = re.search(r"\.pic\{[^}]*font:(\d+)px", page)
    assert least
    assert letters
    inside = [e for div in tree.iter("div") if div.get("class") == "scroll" for e in div]
    assert all(div.get("tabindex") == "0" for div in tree.iter("div"))  # by keys, too
    pictures, numbers = list(tree.iter(f"{SVG}svg")), list(tree.iter("table"))
    assert inside == [*pictures, *numbers]
    for picture in pictures:
        assert int(letters[1]) * int(least[1]) / float(picture.attrib["width"]) >= 11


def test_what_is_pink_and_what_is_red_is_told_in_one_place(with_report: tuple[dict[str, Any], str]) -> None:
    _, page = with_report
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    (key,) = [e for e in tree.iter("ul") if e.get("class") == "key"]
    told = ["".join(row.itertext()) for row in key]
    assert [words.partition(":")[0] for words in told] == ["pink", "red"]
    colours = [row[0].get("class") for row in key]
    assert colours == ["gap", "alarm"]
    body = page.partition("<body>")[2]
    for kind in colours:
        assert f".key .{kind}" in page  # as it is in the pictures
        assert f'class="{kind}"' in body.partition("<svg")[2]
    document = (ROOT / "docs" / "demo.md").read_text()
    for text in (body, document):
        assert len(re.findall(r"\bpink\b", text, re.IGNORECASE)) == 1
        assert len(re.findall(r"\bred\b", text, re.IGNORECASE)) == 1


def test_table() -> None:
    done = run()
    assert done.returncode == 0, done.stderr + done.stdout
    words = (
        "precopy, in the background, p50, p99, vCPU 1, net0's bridge, downtime, all vCPUs at once, block time"
    )
    for word in words.split(", "):
        assert word in done.stdout
    assert "Every frame and every page is accounted for" in done.stdout
    for word in ("precopy: pages are sent", "postcopy: it runs", "100%"):
        assert word in done.stderr


def test_ordinary_user() -> None:
    """No right but to run programs: user-mode-only userfaultfds in every process."""
    done = run("--json", profile="nobody")
    assert done.returncode == 0, done.stderr + done.stdout
    check_numbers(done.stdout)


def test_where_userfaultfd_is_denied() -> None:
    done = run("--json", profile="denied")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "userfaultfd" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_byte_is_found() -> None:
    done = run("--json", VHOSTPC_DEMO_CORRUPT="1")
    assert done.returncode == 1, done.stderr + done.stdout
    numbers = json.loads(done.stdout)
    assert not numbers["ok"]
    assert any(
        "bad pages, the first: page" in p or "have the wrong content" in p for p in numbers["problems"]
    )
    for problem in numbers["problems"]:
        assert f"vhostpc: {problem}" in done.stderr


@pytest.mark.parametrize("size", ["4M", "100000001", "x"])
def test_sizes_that_cannot_be(size: str) -> None:
    done = run("--size", size)
    assert done.returncode == 2
    assert "--size" in done.stderr


def good() -> Result:
    result = Result()
    result.pages = Pages(total=10, precopy=4, background=4, requested=2, placed=6, checked=9)
    result.requests = Requests(faults=3, wakes=3, made=2, read=2)
    result.frames = [Frames("net0", 20, 15, 2, 0, 3, 0, 0)]
    result.far = Far(came=18, echoed=18)
    return result


MACHINE: dict[str, Any] = {
    "problems": [],
    "vcpus": [{"name": "vCPU 0", "bad": 0, "first-bad": None}],
    "devices": [{"name": "net0", "faults": {"found-nothing": 0, "waiting-now": 0}}],
}


def test_numbers_that_agree() -> None:
    assert judge(good(), [MACHINE]) == []


@pytest.mark.parametrize(
    ("where", "name", "value", "sentence"),
    [
        ("pages", "precopy", 3, "3 pages arrived by precopy and 6 by postcopy, of 10"),
        ("pages", "twice", 1, "1 pages arrived twice"),
        ("pages", "requested", 3, "4 pages were sent in the background and 3 on request, but 6 were placed"),
        ("pages", "bad", 1, "1 of 9 pages have the wrong content"),
        ("requests", "read", 1, "2 pages were requested, but 1 requests reached"),
        ("requests", "wakes", 2, "3 faults were read, but 2 answered"),
        ("frames", "received", 14, "20 frames were sent, but 14 returned"),
        ("frames", "lost", 1, "1 frames were lost while the machine ran"),
        ("frames", "damaged", 1, "1 frames returned damaged"),
        ("frames", "doubled", 1, "1 frames returned twice"),
        ("far", "echoed", 17, "18 frames left the bridges, but 17 were sent back"),
        ("far", "came", 14, "20 frames were sent, 14 left the bridges, 15 returned"),
        ("far", "damaged", 1, "1 frames left the bridges damaged"),
    ],
)
def test_what_does_not_agree_is_named(where: str, name: str, value: int, sentence: str) -> None:
    result = good()
    part = result.frames[0] if where == "frames" else getattr(result, where)
    assert name in asdict(part)
    setattr(part, name, value)
    assert sentence in "; ".join(judge(result, [MACHINE]))


def test_what_a_machine_reports_is_named() -> None:
    machine = {
        "problems": ["back-end net0 is gone"],
        "vcpus": [{"name": "vCPU 1", "bad": 2, "first-bad": "page 7"}],
        "devices": [{"name": "net0", "faults": {"found-nothing": 1, "waiting-now": 1}}],
    }
    found = judge(good(), [machine])
    assert found == [
        "back-end net0 is gone",
        "vCPU 1 met 2 bad pages, the first: page 7",
        "net0: 1 faults belong to no page",
        "net0: 1 faults still wait",
    ]


def test_spans_of_time() -> None:
    one = union([(5, 6), (1, 3), (2, 4), (4, 4.5), (8, 9)])
    assert one == [(1, 4.5), (5, 6), (8, 9)]
    assert length(one) == 5.5
    assert overlap(one, [(0, 2), (4, 8.5)]) == [(1, 2), (4, 4.5), (5, 6), (8, 8.5)]
    assert overlap(one, []) == union([]) == []


def record(offset: int, flags: RamFlag) -> bytes:
    return (offset | flags).to_bytes(8, "big") + bytes(TARGET_PAGE)


def test_a_byte_of_one_page_is_damaged_once() -> None:
    flags = RamFlag.PAGE | RamFlag.CONTINUE
    data = (
        b"x" * 13
        + record(TARGET_PAGE, flags)
        + record(5 * TARGET_PAGE, flags)
        + record(6 * TARGET_PAGE, flags)
    )
    assert find_page(data, 0) == 21
    assert find_page(data, 2 * TARGET_PAGE) == 21 + TARGET_PAGE + 8
    assert find_page(data[: 21 + TARGET_PAGE - 1], 0) is None
    relay = Relay(0)
    assert relay.pass_on(data) == data
    relay.harm = True
    changed = relay.pass_on(data)
    assert [i for i, (a, b) in enumerate(zip(data, changed, strict=True)) if a != b] == [
        21 + TARGET_PAGE // 2
    ]
    assert relay.pass_on(data) == data


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 64), (3.52, 6.1), (0, 4096), (5, 5)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert all(len(f"{t:g}") <= 4 for t in found)


def test_a_lane_shows_how_much_of_a_moment_was_waited() -> None:
    frame = Frame([Band("a", 0, 10)], 0, 10, 100)
    before = len(frame.parts)
    frame.intervals([(2.0, 3.0)], 0, 20, "c0")
    tall = [float(t) for t in re.findall(r"v-([\d.]+)h", "".join(frame.parts[before:]))]
    step = (frame.right - frame.left) / 10 / 1.5
    assert tall.count(20.0) in (int(step) - 1, int(step), int(step) + 1)
    assert sum(tall) == pytest.approx(20 * step, rel=0.02)


def test_cells_are_shaded() -> None:
    picture = svg(10, 10, cells([0, 0.2, 1, 1, 0.9], 3, 0, 0, 5), "x")
    paths = ElementTree.fromstring(picture).findall(f"{SVG}path")
    assert [p.get("fill-opacity") for p in paths] == ["0.25", "1.00"]
    assert [p.get("d") for p in paths] == ["M5 0h5v5h-5z", "M10 0h5v5h-5zM0 5h10v5h-10z"]


def of_the_demo(folder: Path) -> set[int]:
    """Processes that the demonstration with this TMPDIR has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{folder}/vhostpc-demo-".encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix="d") as name:
        yield Path(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
async def test_what_ends_it_ends_all_of_it(number: signal.Signals, short_path: Path) -> None:
    """Its processes, sockets and folders, however it ends and wherever it stands."""
    argv = [sys.executable, "-m", "vhostpc", "demo", "--json", "--size", "64M"]
    process = await trio.lowlevel.open_process(
        argv,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(short_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        with trio.fail_after(60):
            await until(
                lambda: list(short_path.glob("vhostpc-demo-*/migration.sock")), what="the migration to begin"
            )
            await until(lambda: len(of_the_demo(short_path)) == 4)
            process.send_signal(number)
            async for _ in process.stderr:
                pass
            code = await process.wait()
            await until(lambda: not of_the_demo(short_path))
            await until(lambda: not list(short_path.iterdir()))
    finally:
        await process.stderr.aclose()
        if process.poll() is None:
            process.kill()
    assert code == (-number if number == signal.SIGKILL else 128 + number)


async def test_a_process_outlives_threads_that_were_idle(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may take longer than trio keeps a thread that has nothing to do."""
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0.01)

    def of_trio() -> bool:
        names = []
        for path in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):
                names.append(path.read_text())
        return any(name.lower().startswith("trio") for name in names)

    with trio.fail_after(60):
        async with child("program", "timeit", "-n1", "-r1", "input()", log=short_path / "log") as process:
            await trio.to_thread.run_sync(short_path.exists)
            await until(lambda: not of_trio(), what="trio's threads to end")
            assert process.poll() is None
            await process.stdin.send_all(b"\n")
            await process.wait()
            assert process.poll() == 0


def test_a_machine_that_does_not_fit() -> None:
    done = run("--size", "900G")
    assert done.returncode == 3
    assert "a machine of 900 GiB at both ends needs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_report_into_no_folder(tmp_path: Path) -> None:
    """It is told before the run, not behind it."""
    done = run("--report", str(tmp_path / "no" / "run.html"))
    assert done.returncode == 2
    assert "is not there, or cannot be written to" in done.stderr
