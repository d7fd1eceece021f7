"""The report of ``vhostpc demo``: a run in pictures, as one self-contained HTML page."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import reduce
from html import escape
from math import log10

from vhostpc.cli.demo.books import Result
from vhostpc.cli.demo.pictures import BOTTOM, STYLE, TOP, Band, Frame, cells, rect, svg, text, ticks
from vhostpc.cli.demo.run import DRIVERS, MIB, Sample, Story
from vhostpc.cli.demo.tables import GOOD, tables
from vhostpc.units import TARGET_PAGE

Spans = list[tuple[float, float]]
"""From when to when, in seconds."""
COLUMNS = 40
MOST_DOTS = 2500
"""Most faults of each client, so that the page stays small; the slowest are kept."""
LEAST_WIDTH = 820
"""Pixels of a picture in a window: where it has fewer, it scrolls. Its letters would be too small to read."""
KEY = (
    ("gap", "pink: the switch. The machine is stopped: it has left its source and does not run here yet"),
    (
        "alarm",
        "red: a vCPU that is stopped at the switch, from its last beat at the source to its first here",
    ),
)
"""The colours that mean the same in all pictures."""
KEY_OF_PAUSES = (("lost", "violet: a pause. The link is lost, until both ends have recovered"),)
TOGETHER = "c5"
"""The colour of the lanes of all at once."""
STATUSES = {
    "postcopy-active": "c2",
    "postcopy-paused": "alarm",
    "postcopy-recover-setup": "c1",
    "postcopy-recover": "c0",
}
"""Colours of the statuses of an end; completed has none."""
PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#23272e;--soft:#5d6570;--line:#d9dde3;--back:#fff;--good:#1f7a55;--bad:#b3261e;
--alarm:#c23b3b;--violet:#7a6ad0}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#a4acb8;--line:#3a414c;--back:#12151a;--good:#4cc79c;
--bad:#ef7b7b;--alarm:#ef7b7b;--violet:#a597f5}}
@media print{:root{--ink:#000;--soft:#444;--line:#ccc;--back:#fff;--alarm:#c23b3b;--violet:#7a6ad0}
figure,table{break-inside:avoid}}
body{margin:2rem auto;max-width:54rem;padding:0 1rem;color:var(--ink);background:var(--back);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2.2rem 0 .3rem}p{margin:.3rem 0 .6rem}
.soft,figcaption{color:var(--soft);font-size:.9rem}figure{margin:0}.good{color:var(--good)}.bad{color:var(--bad)}
table{border-collapse:collapse;margin:.4rem 0 1.2rem;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.22rem .9rem .22rem 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}th{font-weight:600;vertical-align:bottom}
caption{text-align:left;font-weight:600;padding:.3rem 0}td{white-space:nowrap}
.scroll{overflow-x:auto}@media screen{.scroll .pic{min-width:LEASTpx}}
.key{list-style:none;padding:0;margin:.6rem 0}.key i{display:inline-block;width:.9em;height:.9em;margin-right:.5em;
vertical-align:-.1em}.key .gap{background:var(--alarm);opacity:.28}.key .alarm{background:var(--alarm)}
.key .lost{background:var(--violet);opacity:.3}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.5rem 1rem;padding:0;
margin:.8rem 0;list-style:none}
.facts b{display:block;font-size:1.25rem}
""".replace("\n", "").replace("LEAST", str(LEAST_WIDTH))


class Pictures:
    """All pictures of one run, on one axis of time."""

    def __init__(self, result: Result, story: Story) -> None:
        self.result = result
        self.story = story
        self.bands = [
            Band(p.name, p.begin, p.end, "gap" if p.name == "switch" else "") for p in result.phases
        ]
        self.begin, self.end = result.phases[0].begin, result.phases[-1].end
        self.bands += [Band("pause", p.begin, p.end, "lost") for p in result.pauses]
        self.phase = {p.name: p for p in result.phases}
        self.samples = story.samples
        self.colours = {w.name: f"c{i}" for i, w in enumerate(result.waits)}

    def frame(self, height: float, *, near: bool = False) -> Frame:
        """``near``: only from shortly before the switch to shortly after the last page."""
        if not near:
            return Frame(self.bands, self.begin, self.end, height)
        switch, post = self.phase["switch"], self.phase["postcopy"]
        more = 0.06 * (post.end - switch.begin)
        return Frame(self.bands, switch.begin - more, post.end + more, height)

    def all(self) -> dict[str, tuple[str, str, str]]:
        """Name: title, how to read it, the picture."""
        found = {
            "arrivals": (
                "How memory arrives",
                "The height is the memory that the destination holds. In precopy it grows while the machine still "
                "runs at its source; at the switch the pages that were rewritten meanwhile are discarded, and all "
                "missing pages follow: in the background, or at once where a thread waits for one.",
                self.arrivals(),
            ),
            "faults": (
                "How long a missing page takes",
                "Each dot is one page fault: when a thread touched a missing page, and how long it waited until the "
                "page arrived from the source (the scale is logarithmic; a tenfold wait is a line higher).",
                self.faults(),
            ),
            "lanes": (
                "Who stood still, and when",
                "One lane for each vCPU and each other client that touches memory: the higher a column, the more of "
                "that moment was spent waiting for pages; at a full one it did nothing else. The two lanes below have "
                "the moments in which all of them stood still at once. "
                "At the right: how long it stood still in postcopy, and the part of that phase.",
                self.lanes(),
            ),
            "memory": (
                "RAM filling up",
                f"All of memory at six moments, row by row from address 0; one square is "
                f"{self.story.size // max(len(self.samples[-1].cells), 1) >> 10} KiB, the stronger its "
                "colour, the more of it has arrived.",
                self.memory(),
            ),
        }
        if self.result.pauses:
            found["statuses"] = (
                "How both ends recover",
                "The status of each end, as its monitor told it. The source tries again and again to connect while the "
                "link is down, at longer intervals; then both compare what has arrived, and go on.",
                self.statuses(),
            )
        return found

    def arrivals(self) -> str:
        frame = self.frame(220)
        size = self.story.size / MIB
        unit = TARGET_PAGE / MIB
        asked = sorted(f.end for f in self.story.faults if f.asked)
        run = self.phase["postcopy"].begin

        def y(mib: float) -> float:
            return frame.bottom - mib / size * frame.height

        marks = [(v, f"{v:g} MiB") for v in ticks(0, size, 5)]
        kept = self.result.pages.precopy
        lines: list[list[tuple[float, float]]] = [[], [], [], []]
        for s in self.samples:
            x, present = frame.x(s.at), s.present
            precopy = present if s.at < run else min(kept, present)
            requested = min(bisect_right(asked, s.at), present - precopy)
            heights = (0, precopy, precopy + requested, present)
            for line, height in zip(lines, heights, strict=True):
                line.append((x, y(height * unit)))
        for i, kind in enumerate(("c0", "c1", "c2")):
            frame.area(lines[i], lines[i + 1], kind)
        frame.value_axis(marks, y)
        frame.time_axis()
        frame.legend([("c0", "precopy"), ("c1", "requested by a fault"), ("c2", "background of postcopy")])
        return frame.draw("Memory present at the destination over time", BOTTOM + 6)

    def faults(self) -> str:
        frame = self.frame(240, near=True)
        waits = [max((f.end - f.begin) * 1e6, 1.0) for f in self.story.faults]
        low, high = 10.0, 100.0
        while waits and low > min(waits):
            low /= 10
        while waits and high < max(waits):
            high *= 10

        def y(us: float) -> float:
            return frame.bottom - (log10(us) - log10(low)) / (log10(high) - log10(low)) * frame.height

        marks = []
        at = low
        while at <= high * 1.01:
            marks.append(
                (at, f"{at:g} µs" if at < 1000 else f"{at / 1000:g} ms" if at < 1e6 else f"{at / 1e6:g} s")
            )
            at *= 10
        frame.value_axis(marks, y)
        shown = []
        for who, kind in self.colours.items():
            found = sorted((f for f in self.story.faults if f.who == who), key=lambda f: f.begin - f.end)
            if found:
                step = max(1, (len(found) - 200) // MOST_DOTS + 1)
                some = found[:200] + found[200::step]
                frame.dots(((frame.x(f.end), y(max((f.end - f.begin) * 1e6, 1.0))) for f in some), kind)
                shown.append((kind, who))
        frame.time_axis()
        frame.legend(shown)
        return frame.draw("Time that each fault waited, over time", BOTTOM + 6)

    def lanes(self) -> str:
        height, gap = 30.0, 10.0
        found = self.blocked()
        frame = self.frame(len(found) * (height + gap) + gap, near=True)
        post = self.phase["postcopy"]
        for i, (who, spans) in enumerate(found.items()):
            top = TOP + gap + i * (height + gap)
            frame.parts.append(text(frame.left - 8, top + height / 2 + 4, who, "e ink"))
            frame.parts.append(f'<path class="grid" d="M{frame.left} {top + height}H{frame.right}"/>')
            frame.intervals(spans, top, height, self.colours.get(who, TOGETHER))
            if who in self.story.stood:
                frame.intervals([self.story.stood[who]], top, height, "alarm")
            lasted = length(spans)
            told = f"{lasted * 1000:.0f} ms, {100 * lasted / max(post.end - post.begin, 1e-9):.1f} %"
            frame.parts.append(text(frame.right - 4, top + height / 2 + 4, told, "e ink"))
        frame.time_axis()
        frame.legend([("alarm", "stopped at the switch")])
        return frame.draw("When each vCPU and each client waited", BOTTOM + 6)

    def blocked(self) -> dict[str, Spans]:
        """When each of them waited for pages, and when all vCPUs did, and all vCPUs and bridges."""
        found = {
            who: union((f.begin, f.end) for f in self.story.faults if f.who == who) for who in self.colours
        }
        vcpus = [found[who] for who in found if who in self.story.stood]
        bridges = [spans for who, spans in found.items() if who not in (*self.story.stood, DRIVERS)]
        return found | {"all vCPUs": reduce(overlap, vcpus), "and bridges": reduce(overlap, vcpus + bridges)}

    def statuses(self) -> str:
        height, gap = 26.0, 12.0
        ends = ("source", "destination")
        frame = self.frame(len(ends) * (height + gap) + gap, near=True)
        for i, end in enumerate(ends):
            top = TOP + gap + i * (height + gap)
            frame.parts.append(text(frame.left - 8, top + height / 2 + 4, end, "e ink"))
            status, since = "postcopy-active", self.phase["postcopy"].begin
            for step in (step for step in self.result.steps if step.end == end):
                x = frame.x(since)
                frame.parts.append(
                    rect(x, top, max(frame.x(step.at) - x, 1.5), height, STATUSES.get(status, "c5"))
                )
                status, since = step.status, step.at
        frame.time_axis()
        frame.legend([(kind, status) for status, kind in STATUSES.items()])
        return frame.draw("The statuses of both ends from the first pause on", BOTTOM + 6)

    def moments(self) -> list[tuple[str, float]]:
        pre, post = self.phase["precopy"], self.phase["postcopy"]
        length = pre.end - pre.begin
        whole = next((s.at for s in self.samples if s.present == self.result.pages.total), post.end)
        follow = whole - post.begin
        return [
            ("a third of precopy", pre.begin + length / 3),
            ("the end of precopy", pre.end - 0.05),
            ("it runs here", post.begin + 0.02),
            ("a third of postcopy", post.begin + follow / 3),
            ("two thirds", post.begin + follow * 2 / 3),
            ("all has arrived", post.begin + follow + 0.05),
        ]

    def at(self, when: float) -> Sample:
        return min(self.samples, key=lambda s: abs(s.at - when))

    def memory(self) -> str:
        total = self.result.pages.total
        count = len(self.samples[-1].cells)
        room = [(i + 1) * total // count - i * total // count for i in range(count)]
        size, margin, head = 6.5, 28.0, 36.0
        wide, high = COLUMNS * size, (count + COLUMNS - 1) // COLUMNS * size
        parts = []
        for i, (name, when) in enumerate(self.moments()):
            sample = self.at(when)
            x, y = i % 3 * (wide + margin) + 2, i // 3 * (high + head + 14) + head
            parts.append(text(x, y - 20, name, "b"))
            share = sample.present / total
            parts.append(text(x, y - 6, f"{sample.at:.2f} s, {100 * share:.0f} %"))
            parts += cells([c / r for c, r in zip(sample.cells, room, strict=True)], COLUMNS, x, y, size)
        return svg(3 * wide + 2 * margin + 4, 2 * (high + head) + 20, parts, "Memory at six moments")


def union(found: Iterable[tuple[float, float]]) -> Spans:
    """The time that is in any of these spans: disjoint ones, in order."""
    spans: Spans = []
    for begin, end in sorted(found):
        if spans and begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((begin, end))
    return spans


def overlap(one: Spans, other: Spans) -> Spans:
    """The time that is in both; each is disjoint, and in order."""
    spans: Spans = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            spans.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return spans


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def facts(result: Result) -> list[tuple[str, str]]:
    p = result.pages
    faults = sum(w.faults for w in result.waits)
    stood = max((w.standstill_ns or 0 for w in result.waits), default=0)
    longest = max((w.longest_ns for w in result.waits), default=0)
    paused = [
        (f"{len(result.pauses)}", "times the link was lost"),
        (
            f"{max((pause.end - pause.begin for pause in result.pauses), default=0):.2f} s",
            "the longest pause",
        ),
        (f"{sum(pause.sent_twice for pause in result.pauses)}", "pages sent twice"),
    ]
    return [
        (f"{p.total * TARGET_PAGE / MIB:.0f} MiB", "of memory moved"),
        (f"{stood / 1e6:.1f} ms", "the vCPUs were stopped at the switch"),
        (f"{faults}", "page faults answered"),
        (f"{longest / 1e6:.1f} ms", "the longest of them"),
        (f"{result.together.vcpus_ns / 1e6:.1f} ms", "all vCPUs stood still at once"),
        (f"{p.bad}", "bad pages"),
        (f"{sum(f.lost + f.lost_at_switch for f in result.frames)}", "network frames lost"),
        *(paused if result.pauses else ()),
    ]


def table_html(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return scrolling(f"<table><caption>{escape(title)}</caption><tr>{head}</tr>{body}</table>", title)


def scrolling(what: str, name: str) -> str:
    """Sideways in a narrow window, by keys as well."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{what}</div>'


def html(result: Result, story: Story) -> str:
    """The whole page."""
    verdict = (
        '<p class="bad"><b>The numbers do not agree.</b></p><ul class="bad">'
        + "".join(f"<li>{escape(p)}</li>" for p in result.problems)
        + "</ul>"
        if result.problems
        else f'<p class="good"><b>{GOOD}</b></p>'
    )
    told = "".join(f"<li><b>{escape(a)}</b>{escape(b)}</li>" for a, b in facts(result))
    figures = "".join(
        f"<h2>{escape(title)}</h2><figure>{scrolling(picture, title)}<figcaption>{escape(read)}</figcaption></figure>"
        for title, read, picture in Pictures(result, story).all().values()
    )
    keys = KEY + (KEY_OF_PAUSES if result.pauses else ())
    key = "".join(f'<li><i class="{kind}"></i>{escape(words)}</li>' for kind, words in keys)
    numbers = "".join(table_html(*table) for table in tables(result))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f"<title>A machine moves</title><style>{PAGE_STYLE}{STYLE}</style></head><body>"
        "<h1>A machine moves</h1>"
        '<p class="soft">By precopy, then by postcopy, from one endpoint to another on this computer, with two vCPUs '
        "that rewrite and check their memory, and network traffic through a vhost-user bridge.</p>"
        f'{verdict}<ul class="facts">{told}</ul><p>In all pictures:</p><ul class="key">{key}</ul>{figures}'
        f"<h2>The numbers</h2>{numbers}</body></html>\n"
    )


def standalone(picture: str) -> str:
    """One picture as a file of its own."""
    first, rest = picture.split("><title>", 1)
    return f"{first}><style>{STYLE}</style><title>{rest}\n"
