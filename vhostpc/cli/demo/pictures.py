"""Pictures as SVG text: a frame with a time axis, and what is drawn into it. No library, no file, no script.

Colours are classes (``c0`` to ``c5``, ``ink``, ``faint``), so that one style sheet serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 860
LEFT, RIGHT, TOP, BOTTOM = 104, 16, 26, 36
STYLE = """
.pic{--c0:#2f6fb2;--c1:#d9820f;--c2:#1f8f6b;--c3:#b0408c;--c4:#7a6ad0;--c5:#8a8f98;--ink:#23272e;--soft:#5d6570;
--grid:#d9dde3;--band0:#eef1f5;--band1:#ffffff;--alarm:#c23b3b;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;max-width:100%;height:auto}
@media (prefers-color-scheme:dark){.pic{--c0:#6ba6e8;--c1:#f0a63c;--c2:#4cc79c;--c3:#e07fc0;--c4:#a597f5;--c5:#9aa1ab;
--ink:#e6e9ee;--soft:#a4acb8;--grid:#3a414c;--band0:#20252d;--band1:#171b21;--alarm:#ef7b7b}}
@media print{.pic{--c0:#2f6fb2;--c1:#d9820f;--c2:#1f8f6b;--c3:#b0408c;--c4:#7a6ad0;--c5:#8a8f98;--ink:#000;--soft:#444;
--grid:#ccc;--band0:#f1f1f1;--band1:#fff;--alarm:#c23b3b}}
.pic text{fill:var(--soft)}.pic .ink{fill:var(--ink)}.pic .b{font-weight:600;fill:var(--ink)}
.pic .e{text-anchor:end}.pic .m{text-anchor:middle}
.pic .grid{stroke:var(--grid);stroke-width:1;fill:none;shape-rendering:crispEdges}
.pic .edge{stroke:var(--soft);stroke-width:1;fill:none;shape-rendering:crispEdges}
.pic .band0{fill:var(--band0)}.pic .band1{fill:var(--band1)}.pic .gap{fill:var(--alarm);opacity:.28}
.pic .lost{fill:var(--c4);opacity:.3}
.pic .c0{fill:var(--c0)}.pic .c1{fill:var(--c1)}.pic .c2{fill:var(--c2)}.pic .c3{fill:var(--c3)}
.pic .c4{fill:var(--c4)}.pic .c5{fill:var(--c5)}
.pic .dots{fill:none;stroke-width:2.6;stroke-linecap:round;stroke-opacity:.6}
.pic .dots.c0{stroke:var(--c0)}.pic .dots.c1{stroke:var(--c1)}.pic .dots.c2{stroke:var(--c2)}
.pic .dots.c3{stroke:var(--c3)}.pic .dots.c4{stroke:var(--c4)}.pic .dots.c5{stroke:var(--c5)}
.pic .alarm{fill:var(--alarm)}
""".replace("\n", "")


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, words: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{number(x)}" y="{number(y)}"{mark}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"/>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from ``low`` to ``high``, ``most`` steps at most."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(width: float, height: float, parts: Iterable[str], title: str) -> str:
    """One picture. ``title`` is read out to people who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pic" viewBox="0 0 {number(width)} {number(height)}" '
        f'width="{number(width)}" height="{number(height)}" role="img"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


@dataclass
class Band:
    """A phase: its name, and from when to when. ``over``: the class of what is drawn over phases; "" for a phase."""

    name: str
    begin: float
    end: float
    over: str = ""


@dataclass
class Frame:
    """A plot over time: phases as bands behind it, seconds below it. ``height``: of the plot itself."""

    bands: Sequence[Band]
    begin: float
    end: float
    height: float
    left: float = LEFT
    width: float = WIDTH
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bottom = TOP + self.height
        for i, band in enumerate(sorted(self.bands, key=lambda band: bool(band.over))):
            x, end = self.x(band.begin), self.x(band.end)
            if band.end <= self.begin or band.begin >= self.end:
                continue
            if band.over:
                self.parts.append(rect(x, TOP, max(end - x, 1.5), self.height, band.over))
            else:
                self.parts.append(rect(x, TOP, end - x, self.height, f"band{i % 2}"))
                if end - x > 7 * len(band.name):
                    self.parts.append(text((x + end) / 2, TOP - 8, band.name, "m b"))

    @property
    def right(self) -> float:
        return self.width - RIGHT

    def x(self, at: float) -> float:
        share = (at - self.begin) / (self.end - self.begin)
        return self.left + min(max(share, 0.0), 1.0) * (self.right - self.left)

    def time_axis(self) -> None:
        for at in ticks(self.begin, self.end, 10):
            x = self.x(at)
            self.parts.append(f'<path class="edge" d="M{number(x)} {number(self.bottom)}v4"/>')
            self.parts.append(text(x, self.bottom + 17, f"{at:g}", "m"))
        self.parts.append(text(self.right, self.bottom + 31, "seconds", "e"))
        self.parts.append(
            f'<path class="edge" d="M{number(self.left)} {number(self.bottom)}H{number(self.right)}"/>'
        )

    def value_axis(
        self, marks: Sequence[tuple[float, str]], y: Callable[[float], float], label: str = ""
    ) -> None:
        for value, words in marks:
            at = y(value)
            self.parts.append(
                f'<path class="grid" d="M{number(self.left)} {number(at)}H{number(self.right)}"/>'
            )
            self.parts.append(text(self.left - 8, at + 4, words, "e"))
        if label:
            self.parts.append(text(8, TOP - 8, label))

    def area(
        self, lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]], kind: str
    ) -> None:
        """Between two lines of (x, y), both from left to right."""
        points = [*upper, *reversed(lower)]
        path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{path}Z"/>')

    def dots(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Dots that would overlap are drawn once."""
        path, at = "", (0, 0)
        for x, y in sorted({(round(x), round(y)) for x, y in points}):
            path += f"m{x - at[0]} {y - at[1]}h0"
            at = x, y
        if path:
            self.parts.append(f'<path class="{kind} dots" d="{path.replace("m", "M", 1)}"/>')

    def intervals(self, found: Sequence[tuple[float, float]], y: float, height: float, kind: str) -> None:
        """The share of each moment that lies in these disjoint spans of time, as columns."""
        step = 1.5
        count = math.ceil((self.right - self.left) / step)
        second = (self.right - self.left) / (self.end - self.begin)
        filled = [0.0] * count
        for begin, end in found:
            left, right = ((at - self.begin) * second / step for at in (begin, end))
            for i in range(max(int(left), 0), min(int(right) + 1, count)):
                filled[i] += max(0.0, min(right, i + 1) - max(left, i))
        path = []
        for i, share in enumerate(filled):
            tall = max(min(share, 1.0) * height, 1.0)
            if share:
                x = self.left + i * step
                path.append(
                    f"M{number(x)} {number(y + height)}v-{number(tall)}h{number(step)}v{number(tall)}z"
                )
        if path:
            self.parts.append(f'<path class="{kind}" d="{"".join(path)}"/>')

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """(colour, words) side by side, below the axis."""
        x, y = self.left, self.bottom + 24
        for kind, words in entries:
            self.parts.append(rect(x, y, 10, 10, kind))
            self.parts.append(text(x + 15, y + 9.5, words, "ink"))
            x += 15 + 6.7 * len(words) + 22

    def draw(self, title: str, below: float = BOTTOM) -> str:
        return svg(self.width, self.bottom + below, self.parts, title)


def cells(
    shares: Sequence[float], columns: int, x: float, y: float, size: float, shades: int = 4
) -> list[str]:
    """A field of squares, row by row, the darker the fuller: one path for each shade."""
    rows = (len(shares) + columns - 1) // columns
    parts = [rect(x, y, columns * size, rows * size, "band0")]
    for shade in range(1, shades + 1):
        path = []
        for row in range(rows):
            at = row * columns
            line = [math.ceil(s * shades - 1e-9) == shade for s in shares[at : at + columns]] + [False]
            start = None
            for i, on in enumerate(line):
                if on and start is None:
                    start = i
                elif not on and start is not None:
                    width, top, left = (i - start) * size, y + row * size, x + start * size
                    path.append(
                        f"M{number(left)} {number(top)}h{number(width)}v{number(size)}h-{number(width)}z"
                    )
                    start = None
        if path:
            parts.append(f'<path class="c0" fill-opacity="{shade / shades:.2f}" d="{"".join(path)}"/>')
    return parts
