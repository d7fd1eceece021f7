"""Recorded touches against a source that sends its background in one order or another. ``python -m bench.prefetch``.

A model: it has a link of some rate and latency, what the source may have written ahead of it, a destination that puts
pages in place one after the other, and the threads of the recording, each of which runs as long as it did between two
touches and waits for a page that has not come. The recorded order of touches is taken as given. A machine that waits
less would in truth do other things: its timers come between other instructions, its threads meet in another order. So
the figures compare orders; they do not foretell a migration.
"""

from __future__ import annotations

import heapq
import math
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial

from . import orders
from .orders import Make
from .recordings import Recording, recordings

PAGE, ZERO = 4104, 9
FAULT, WAKE, PLACE = 15.0, 15.0, 3.0
"""Microseconds from a touch to its request, from a page to its thread, and to put a page in place, also of zeros."""
CREDIT = 50_000.0
"""Microseconds of a capped background that may be made up for."""
NEVER = float("inf")


@dataclass(frozen=True)
class Line:
    """``rate``: bytes a microsecond. ``latency``: microseconds one way. ``ahead``: bytes in buffers on the way.

    ``urgent``: requested pages do not wait behind them (preempt). ``cap``: of the background, as ``rate``.
    """

    rate: float
    latency: float
    ahead: int = 256 << 10
    urgent: bool = False
    cap: float = 0.0


LINES = {
    "local": Line(1000, 10),
    "local, preempt": Line(1000, 10, urgent=True),
    "1 Gbit/s": Line(117, 100),
    "1 Gbit/s, preempt": Line(117, 100, urgent=True),
    "cap 100 MB/s": Line(1000, 10, cap=100),
    "cap 20 MB/s": Line(117, 100, cap=20),
    "100 Mbit/s, 5 ms": Line(11.7, 5000),
    "100 Mbit/s, 5 ms, preempt": Line(11.7, 5000, urgent=True),
}


@dataclass
class Played:
    """``waits``: microseconds that each touch of a page that had not come took.

    ``served``: requests that found their page unsent. ``end``: when the last touch was done.
    """

    waits: list[float]
    served: int
    end: float

    def quantile(self, share: float) -> float:
        found = sorted(self.waits)
        return found[min(len(found) - 1, int(share * len(found)))] if found else 0.0


def play(recording: Recording, line: Line, make: Make) -> Played:
    left = bytearray(b"\1") * recording.pages
    size = [PAGE] * recording.pages
    for first, count in recording.zeros:
        size[first : first + count] = [ZERO] * count
    order = make(left)
    mine: dict[int, list[tuple[int, int]]] = {}
    for touch in recording.touches:
        mine.setdefault(touch.thread, []).append((touch.page, touch.think))
    step = dict.fromkeys(mine, 0)
    arrival = [NEVER] * recording.pages
    waiting: dict[int, list[tuple[int, float]]] = {}
    events: list[
        tuple[float, int, int]
    ] = []  # when; 0: a thread touches, 1: a request has come to the source; which
    for thread, touches in mine.items():
        heapq.heappush(events, (float(touches[0][1]), 0, thread))
    waits: list[float] = []
    served = 0
    end = free = placed = urgent = after_cap = at = 0.0
    background, rate, latency = True, line.rate, line.latency
    queue: deque[tuple[float, int]] = deque()  # in buffers: when it is taken out of them, bytes
    queued = 0

    def go_on(thread: int, when: float) -> None:
        nonlocal end
        end = max(end, when)
        step[thread] += 1
        if step[thread] < len(mine[thread]):
            heapq.heappush(events, (when + mine[thread][step[thread]][1], 0, thread))

    def send(page: int, now: float) -> None:
        """In its turn, behind all that is on the way."""
        nonlocal free, placed, queued
        free = max(free, now) + size[page] / rate
        placed = max(placed, free + latency) + PLACE
        queue.append((placed - latency, size[page]))
        queued += size[page]
        came(page, placed)

    def came(page: int, when: float) -> None:
        arrival[page] = when
        for thread, begun in waiting.pop(page, ()):
            waits.append(when + WAKE - begun)
            go_on(thread, when + WAKE)

    while events:
        while queued > line.ahead:
            when, count = queue.popleft()
            at = max(at, when)
            queued -= count
        at = max(at, after_cap)
        if background and at <= events[0][0]:
            page = order.next()
            if page < 0:
                background = False
                continue
            left[page] = 0
            if line.cap:
                after_cap = max(after_cap, at - CREDIT) + size[page] / line.cap
            send(page, at)
            continue
        now, kind, which = heapq.heappop(events)
        if kind == 0:
            page = mine[which][step[which]][0]
            if arrival[page] <= now:
                go_on(which, now)
            elif arrival[page] < NEVER:  # in flight: a request is sent in vain
                waits.append(arrival[page] + WAKE - now)
                go_on(which, arrival[page] + WAKE)
                heapq.heappush(events, (now + FAULT + latency, 1, page))
            else:
                waiting.setdefault(page, []).append((which, now))
                heapq.heappush(events, (now + FAULT + latency, 1, page))
            continue
        sent = bool(left[which])
        order.asked(which, sent)
        if not sent:
            continue
        left[which] = 0
        served += 1
        if line.urgent:
            urgent = max(urgent, now) + size[which] / rate
            free = max(free, now) + size[which] / rate
            came(which, urgent + latency + PLACE)
        else:
            send(which, now)
    return Played(waits, served, end)


ORDERS: dict[str, Make] = {
    "linear (QEMU 10.0 with preempt)": orders.Linear,
    "behind the last request (before)": orders.Behind,
    "near requests, in widening groups (built)": orders.Near,
    "the same, and sequential runs that grow": orders.NearAndOn,
    "bubble around the last request, 1:1": lambda left: orders.Bubbles(left, 1),
    "bubble around the last request, 3:1": lambda left: orders.Bubbles(left, 1, 3),
    "bubbles around the last 7, 3:1": lambda left: orders.Bubbles(left, 7, 3),
    "bubbles around the last 32, 3:1": lambda left: orders.Bubbles(left, 32, 3),
    "behind the last 2 in turn": lambda left: orders.Turns(left, 2),
    "behind the last 8 in turn": lambda left: orders.Turns(left, 8),
    "behind the last 8 in turn, 8 pages each": lambda left: orders.Turns(left, 8, 8),
    "8 streams that grow": lambda left: orders.Streams(left, 8),
    "aligned 64 KiB, then behind": lambda left: orders.Group(left, 16),
    "aligned 256 KiB, then behind": lambda left: orders.Group(left, 64),
    "16 pages ahead, then linear": lambda left: orders.Ahead(left, 16),
    "256 pages ahead, then linear": lambda left: orders.Ahead(left, 256),
    "strides, then behind": orders.Stride,
}
BEFORE = "behind the last request (before)"
FORESEEN = "foreseen (no order can know)"
LOCAL = ("quiet", "reads", "works", "two")
"""Recordings with locality; the others touch pages at random."""


def mean(ratios: list[float]) -> float:
    return math.exp(statistics.mean(math.log(max(ratio, 0.001)) for ratio in ratios))


def figures(played: Played, base: Played) -> list[float]:
    pairs = [
        (len(played.waits), len(base.waits)),
        (played.served, base.served),
        (played.quantile(0.99), base.quantile(0.99)),
        (sum(played.waits), sum(base.waits)),
    ]
    return [a / max(b, 1e-9) for a, b in pairs]


def main() -> None:
    lines = sys.argv[1:] or list(LINES)
    known = recordings()
    for line in lines:
        print(f"\n{line}: touches that waited, requests served, p99 of the waits, sum of the waits\n")
        names = list(known)
        print("| order | " + " | ".join(names) + " | mean of " + ", ".join(LOCAL) + " |")
        print("| --- |" + " --- |" * (len(names) + 1))
        before = {name: play(known[name], LINES[line], ORDERS[BEFORE]) for name in names}
        for label in (*ORDERS, FORESEEN):
            cells, found = [], {}
            for name in names:
                future = [touch.page for touch in known[name].touches]
                make = ORDERS.get(label, partial(orders.Foreseen, future=future))
                found[name] = figures(play(known[name], LINES[line], make), before[name])
                cells.append(" ".join(f"{value:.2f}" for value in found[name]))
            means = [mean([found[name][i] for name in LOCAL]) for i in range(4)]
            cells.append(" ".join(f"{value:.2f}" for value in means))
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
        for name in names:
            it = before[name]
            print(
                f"\n{name}, before: {len(it.waits)} touches waited, {it.served} served,"
                f" p50 {it.quantile(0.5):.0f} us, p99 {it.quantile(0.99):.0f} us, {sum(it.waits) / 1000:.0f} ms in all"
            )


if __name__ == "__main__":
    main()
