"""The numbers of ``vhostpc demo``, and whether they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vhostpc.units import TARGET_PAGE

MOST_IN_HAND = 128 << 10
"""Bytes of pages that a source has made ready for its connection and not sent yet, at most."""
AT_SWITCH = 192
"""Most frames that a device can lose at a switch: those in flight, and those sent before the destination answered."""


@dataclass
class Phase:
    """A phase: its name, and its times in seconds since the traffic began."""

    name: str
    begin: float
    end: float


@dataclass
class Pages:
    """Host pages, by the path on which they arrived."""

    total: int = 0
    precopy: int = 0
    """Arrived while the machine still ran at its source, and were not sent again."""
    resent: int = 0
    """Arrivals in precopy that a later one, or postcopy, replaced."""
    background: int = 0
    requested: int = 0
    """Sent because a thread waited for them."""
    placed: int = 0
    """Placed at the destination in postcopy."""
    twice: int = 0
    """Arrived in postcopy although they were present."""
    checked: int = 0
    bad: int = 0


@dataclass
class Waits:
    """How long one client waited for pages, in nanoseconds."""

    name: str
    faults: int
    p50_ns: int
    p99_ns: int
    longest_ns: int
    blocked_ns: int
    """The time in which it waited; of several threads, in which at least one did."""
    standstill_ns: int | None = None
    """Of a vCPU: from its last beat at the source to its first at the destination."""


@dataclass
class Together:
    """The time in which all waited for pages at once."""

    vcpus_ns: int = 0
    all_ns: int = 0
    """All vCPUs and all bridges."""
    blocktime_ms: int = 0
    """All vCPUs, as QEMU counts it: ``postcopy-blocktime``."""


@dataclass
class Frames:
    """Frames of one device: ``sent`` = ``received`` + lost ones + ``flying``."""

    name: str
    sent: int
    received: int
    lost_at_switch: int
    lost: int
    flying: int
    damaged: int
    doubled: int


@dataclass
class Requests:
    """``faults`` were read, ``wakes`` answered; ``made`` requests went out and ``read`` arrived at the source."""

    faults: int = 0
    wakes: int = 0
    made: int = 0
    read: int = 0
    again: int = 0
    """Sent once more over another link."""


@dataclass
class Waiting:
    """Threads of one client that waited for a page when the link came back, and the longest of their waits."""

    name: str
    threads: int
    longest_ns: int


@dataclass
class Pause:
    """A loss of the link in postcopy: from ``begin`` to ``end``, when both ends went on, in seconds since the traffic
    began. ``share``: of the pages of postcopy, how many had arrived.
    """

    begin: float
    end: float
    share: float
    attempts: int
    """To connect again, the one that succeeded included."""
    in_flight: int
    """Bytes that the source had sent and the destination did not receive."""
    sent_twice: int
    """Pages that were sent before, and are sent again."""
    asked_again: int
    """Page requests that were sent again."""
    waiting: list[Waiting] = field(default_factory=list)


@dataclass
class Step:
    """A status that an end of the migration had from then on."""

    at: float
    end: str
    status: str


@dataclass
class Far:
    """Frames at the far side of the bridges."""

    came: int = 0
    echoed: int = 0
    damaged: int = 0
    doubled: int = 0


@dataclass
class Traffic:
    """Bytes of the migration's stream."""

    precopy: int = 0
    downtime: int = 0
    postcopy: int = 0
    total: int = 0


@dataclass
class Result:
    """The numbers of a demonstration; ``problems`` says which of them do not agree, one sentence each."""

    phases: list[Phase] = field(default_factory=list)
    pages: Pages = field(default_factory=Pages)
    waits: list[Waits] = field(default_factory=list)
    together: Together = field(default_factory=Together)
    frames: list[Frames] = field(default_factory=list)
    far: Far = field(default_factory=Far)
    requests: Requests = field(default_factory=Requests)
    bytes: Traffic = field(default_factory=Traffic)
    downtime_ms: int = 0
    total_ms: int = 0
    seconds: float = 0
    pauses: list[Pause] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    """The statuses of both ends from the first loss of the link on."""
    problems: list[str] = field(default_factory=list)


def frames_of(device: dict[str, Any]) -> Frames:
    """From the report of an endpoint."""
    names = "name sent received lost_at_switch lost flying damaged doubled".split()
    return Frames(**{name: device[name.replace("_", "-")] for name in names})


def judge(result: Result, machines: Sequence[dict[str, Any]], cuts: int = 0) -> list[str]:
    """The disagreements, one sentence each. ``machines``: the last reports of source and destination.

    ``cuts``: how many times the link was to be lost.
    """
    found = []

    def must(good: bool, sentence: str) -> None:
        if not good:
            found.append(sentence)

    for machine in machines:
        found.extend(machine["problems"])
        for vcpu in machine["vcpus"]:
            must(
                not vcpu["bad"], f"{vcpu['name']} met {vcpu['bad']} bad pages, the first: {vcpu['first-bad']}"
            )
        for device in machine["devices"]:
            faults = device["faults"]
            must(
                not faults["found-nothing"],
                f"{device['name']}: {faults['found-nothing']} faults belong to no page",
            )
            must(not faults["waiting-now"], f"{device['name']}: {faults['waiting-now']} faults still wait")
    _judge_pages(result, must)
    _judge_pauses(result, must, cuts)
    for f in result.frames:
        must(
            f.sent == f.received + f.lost_at_switch + f.lost + f.flying,
            f"{f.name}: {f.sent} frames were sent, but {f.received} returned, {f.lost_at_switch + f.lost} were "
            f"lost, {f.flying} are in flight",
        )
        must(f.lost == 0, f"{f.name}: {f.lost} frames were lost while the machine ran")
        must(f.lost_at_switch <= AT_SWITCH, f"{f.name}: {f.lost_at_switch} frames were lost at the switch")
        must(f.received > 0, f"{f.name}: no frame returned")
        must(f.damaged == 0, f"{f.name}: {f.damaged} frames returned damaged")
        must(f.doubled == 0, f"{f.name}: {f.doubled} frames returned twice")
    _judge_far(result, must)
    return found


def _judge_pages(result: Result, must: Any) -> None:
    p, r = result.pages, result.requests
    must(p.bad == 0, f"{p.bad} of {p.checked} pages have the wrong content")
    must(
        p.precopy + p.placed == p.total,
        f"{p.precopy} pages arrived by precopy and {p.placed} by postcopy, of {p.total}",
    )
    must(p.twice == 0, f"{p.twice} pages arrived twice in postcopy")
    again = sum(pause.sent_twice for pause in result.pauses)
    lost = f", and {again} were lost with the link" if result.pauses else ""
    must(
        p.background + p.requested == p.placed + again,
        f"in postcopy {p.background} pages were sent in the background and {p.requested} on request, but {p.placed} "
        f"were placed{lost}",
    )
    if result.pauses:  # requests, too, are lost with a link
        must(
            r.read <= r.made + r.again,
            f"{r.made} pages were requested and {r.again} again, but {r.read} requests reached the source",
        )
    else:
        must(r.made == r.read, f"{r.made} pages were requested, but {r.read} requests reached the source")
    must(r.faults == r.wakes, f"{r.faults} faults were read, but {r.wakes} answered")
    must(r.made > 0, "no thread had to wait for a page: this was not a postcopy migration")


def _judge_pauses(result: Result, must: Any, cuts: int) -> None:
    pauses = result.pauses
    must(len(pauses) == cuts, f"the link was to be lost {cuts} times, and was lost {len(pauses)} times")
    for number, pause in enumerate(pauses, 1):
        most = (pause.in_flight + MOST_IN_HAND) // TARGET_PAGE + 1
        must(
            0 <= pause.sent_twice <= most,
            f"pause {number}: {pause.sent_twice} pages were sent twice, but {most} at most were in flight",
        )


def _judge_far(result: Result, must: Any) -> None:
    far = result.far
    sent = sum(f.sent for f in result.frames)
    received = sum(f.received for f in result.frames)
    away = sum(f.flying + f.lost_at_switch for f in result.frames)
    must(far.damaged == 0, f"{far.damaged} frames left the bridges damaged")
    must(far.doubled == 0, f"{far.doubled} frames left the bridges twice")
    must(far.came == far.echoed, f"{far.came} frames left the bridges, but {far.echoed} were sent back")
    must(
        received <= far.came <= sent and sent - far.came <= away,
        f"{sent} frames were sent, {far.came} left the bridges, {received} returned",
    )
