"""The demonstration's result as tables of text, for the terminal and for the report."""

from __future__ import annotations

from vhostpc.cli.demo.books import Result
from vhostpc.cli.demo.run import MIB


def duration(ns: int) -> str:
    return f"{ns / 1e6:.2f} ms"


def moment(seconds: float) -> str:
    return f"{seconds:.2f} s"


def volume(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


def tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a run: titles, heads and rows, numbers as text. For the terminal and the report.

    Those about the pauses only where the link was lost.
    """
    p, b = result.pages, result.bytes
    share = 100 / max(p.total, 1)
    came = [
        ["precopy", f"{p.precopy}", f"{p.precopy * share:.1f} %"],
        ["postcopy, in the background", f"{p.background}", f"{p.background * share:.1f} %"],
        ["postcopy, on request", f"{p.requested}", f"{p.requested * share:.1f} %"],
        ["total", f"{p.total}", ""],
        ["bad", f"{p.bad}", ""],
    ]
    waits = [
        [
            w.name,
            str(w.faults),
            *(duration(ns) if w.faults else "-" for ns in (w.p50_ns, w.p99_ns, w.longest_ns)),
            "-" if w.standstill_ns is None else duration(w.standstill_ns),
        ]
        for w in result.waits
    ]
    together = result.together
    stood = [(w.name, w.blocked_ns) for w in result.waits]
    stood += [("all vCPUs at once", together.vcpus_ns), ("all vCPUs and bridges at once", together.all_ns)]
    postcopy = sum(p.end - p.begin for p in result.phases if p.name == "postcopy") * 1e9
    blocked = [[who, duration(ns), f"{100 * ns / max(postcopy, 1):.1f} %"] for who, ns in stood]
    frames = [
        [f.name, *map(str, (f.sent, f.received, f.lost_at_switch, f.lost, f.flying))] for f in result.frames
    ]
    times = [
        ["downtime, as QEMU counts it", f"{result.downtime_ms} ms"],
        ["block time, as QEMU counts it", f"{result.together.blocktime_ms} ms"],
        ["whole migration", f"{result.total_ms} ms"],
        ["bytes by precopy", volume(b.precopy)],
        ["bytes while the machine was stopped", volume(b.downtime)],
        ["bytes by postcopy", volume(b.postcopy)],
    ]
    return [
        ("how the pages arrived", ["path", "pages", "share"], came),
        (
            "waits for missing pages",
            ["who", "faults", "p50", "p99", "longest", "stopped at the switch"],
            waits,
        ),
        ("block time: blocked by missing pages", ["who", "blocked", "share of postcopy"], blocked),
        *(pauses(result) if result.pauses else ()),
        (
            "network frames",
            ["device", "sent", "returned", "lost at the switch", "lost otherwise", "in flight"],
            frames,
        ),
        ("times and bytes", ["figure", "value"], times),
    ]


def pauses(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """What each loss of the link was like, who waited, and the statuses of both ends."""
    rows, waits = [], []
    for number, p in enumerate(result.pauses, 1):
        rows.append(
            [
                str(number),
                moment(p.begin),
                f"{100 * p.share:.1f} %",
                moment(p.end - p.begin),
                str(p.attempts),
                volume(p.in_flight),
                str(p.sent_twice),
                str(p.asked_again),
            ]
        )
        found = {w.name: f"{w.threads}: {duration(w.longest_ns)}" for w in p.waiting}
        waits.append([str(number), *(found.get(w.name, "-") for w in result.waits)])
    steps = [
        [
            moment(s.at),
            *(
                s.status.removeprefix("postcopy-") if s.end == end else ""
                for end in ("source", "destination")
            ),
        ]
        for s in result.steps
    ]
    return [
        (
            "pauses: the link was lost in postcopy, and both ends recovered",
            [
                "pause",
                "at",
                "had arrived",
                "length",
                "attempts",
                "in flight",
                "pages sent twice",
                "asked again",
            ],
            rows,
        ),
        (
            "threads that waited in a pause, and the longest of their waits",
            ["pause", *(w.name for w in result.waits)],
            waits,
        ),
        ("statuses of both ends (postcopy-...)", ["at", "source", "destination"], steps),
    ]


GOOD = "Every frame and every page is accounted for; each page arrived once, with the right content."
