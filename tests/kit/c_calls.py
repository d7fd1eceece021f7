"""A call graph of our C sources, read off their text: good for plain C without function pointers to our own functions.

Comments and strings are dropped, function bodies are found by their braces, and a function-like macro counts as a
function. A name that stands in a body counts as a call, with or without parentheses, so that nothing is missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "vhostpc" / "_native"

NOISE = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
HEAD = re.compile(
    r"^(?!\s|#|\}|struct \w+ \{|union|enum|typedef)[^;{}#]*?\b(\w+)\([^;{}]*\)\s*\{", re.MULTILINE
)
MACRO = re.compile(r"^#define (\w+)\((?:[^()]*)\)((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
NAME = re.compile(r"\b[A-Za-z_]\w*")


@dataclass
class Function:
    file: str
    name: str
    body: str
    #: Known to its own file alone.
    private: bool = False
    #: Arguments of each call, by the name that is called; an empty list where the name stands without parentheses.
    calls: dict[str, list[list[str]]] = field(default_factory=dict)


def c_files(pattern: str = "*.[ch]") -> list[Path]:
    """Our files of C, in all folders of the native half; what cffi makes is not among them."""
    return sorted(path for path in NATIVE.rglob(pattern) if not path.name.startswith("_vpc"))


def without_noise(text: str) -> str:
    return NOISE.sub(lambda m: "\n" * m[0].count("\n") or " ", text)


def closing(text: str, at: int, pair: str) -> int:
    """Index behind the bracket that closes the one at ``at``."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if not depth:
            return i + 1
    raise AssertionError(f"unbalanced {pair} behind {text[at : at + 60]!r}")


def arguments(text: str) -> list[str]:
    """Those between two parentheses, apart."""
    found, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            found.append("")
        else:
            found[-1] += c
    return [" ".join(a.split()) for a in found]


def functions(path: Path) -> Iterator[Function]:
    text = without_noise(path.read_text())
    for m in MACRO.finditer(text):
        yield Function(path.name, m[1], m[2].replace("\\\n", "\n"), path.suffix == ".c")
    text = re.sub(r"^#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.MULTILINE)
    at = 0
    while head := HEAD.search(text, at):
        at = closing(text, head.end() - 1, "{}")
        private = path.suffix == ".c" and head[0].startswith("static ")
        yield Function(path.name, head[1], text[head.end() - 1 : at], private)


class CallGraph:
    """Functions of all files; one that is static is known to its own file first."""

    def __init__(self, paths: list[Path]) -> None:
        self.functions = [f for path in paths for f in functions(path)]
        self._by_file = {(f.file, f.name): f for f in self.functions}
        self._by_name = {f.name: f for f in self.functions if not f.private}
        for f in self.functions:
            for m in NAME.finditer(f.body):
                if m[0] != f.name and self.find(m[0], f.file):
                    behind = f.body[m.end() :].lstrip()
                    start = len(f.body) - len(behind)
                    args = behind.startswith("(") and f.body[start + 1 : closing(f.body, start, "()") - 1]
                    f.calls.setdefault(m[0], []).append(arguments(args) if args else [])

    def find(self, name: str, file: str = "") -> Function | None:
        return self._by_file.get((file, name)) or self._by_name.get(name)

    def reaching(
        self, seeds: set[str], *, passes: Callable[[list[str]], bool] = lambda args: True
    ) -> set[tuple[str, str]]:
        """(file, name) of the functions from which one of ``seeds`` can be reached.

        ``passes(arguments)``: does a call with these arguments count?
        """
        reached = {(f.file, f.name) for f in self.functions if f.name in seeds}
        assert {name for _, name in reached} == seeds, "a seed is not in the sources"
        while True:
            more = {
                (f.file, f.name)
                for f in self.functions
                if (f.file, f.name) not in reached and any(self._leads(f, reached, passes))
            }
            if not more:
                return reached
            reached |= more

    def _leads(
        self, f: Function, reached: set[tuple[str, str]], passes: Callable[[list[str]], bool]
    ) -> Iterator[bool]:
        for name, calls in f.calls.items():
            callee = self.find(name, f.file)
            assert callee is not None
            if (callee.file, callee.name) in reached:
                yield any(map(passes, calls))
