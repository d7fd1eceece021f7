"""Refuse phrases that no native writer would use, in the documentation, and in comments and strings of the sources.

Each is named with its file and line, and with the words to use instead. A phrase may be spread over several lines.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("README.md", "CHANGELOG.md", "docs", "vhostpc", "examples", "bench", "tools", "tests")
#: The phrases themselves are here.
EXCEPTED = {"tools/check_words.py"}
#: Neither text nor written by hand.
OTHER = re.compile(r".*\.(?:svg|png|gz|xz|bin|img|typed)")

A_NOUN = "a noun before the clause (the thread that, a process that)"
#: A phrase as a regular expression whose spaces stand for any white space, and what to write instead.
REFUSED = {
    r"can not": "cannot",
    r"who(?:so)?ever": A_NOUN,
    r"who (?:waits|comes|calls|has|minds)": A_NOUN,
    r"what (?:comes|came|has come)": "a noun (the frames that, the received pages)",
    r"on (?:its|their) way": "in flight, in transit",
    r"lost else": "lost otherwise",
    r"manners": "behaviour",
    r"(?:be|is|are|was|were) had": "be available, be allocated",
    r"(?:is|are) not to be had": "is unavailable",
    r"for want of": "for lack of",
    r"(?:be|is|are) wanting": "be missing, run short",
    r"in hand": "in flight, in progress, current",
    r"half a one": "an incomplete one",
    r"tells? of nothing": "bring no work, report nothing",
    r"nobody thought of": "unexpected",
    r"in the midst": "in the middle",
    r"as texts": "as strings",
    r"takes? the letters": "accept the same single-letter options",
    r"looks? on (?:for|until)": "keep polling, watch",
    r"asking yourself": "querying it yourself",
    r"number for life": "the same number for its lifetime",
    r"looked at and ended": "inspected and shut down",
    r"calls are what costs": "per-call overhead dominates",
}
PATTERN = re.compile("|".join(rf"\b(?:{p})\b" for p in REFUSED).replace(" ", r"\s+"), re.IGNORECASE)
#: In C: a comment, a line of one, or a string.
C_WORDS = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:[^\"\\\n]|\\.)*\"", re.DOTALL)
#: Stands for code, so that no phrase reaches across it.
CODE = "\0"


def instead(phrase: str) -> str:
    """What to write in place of a phrase that was found."""
    words = " ".join(phrase.split())
    return next(better for p, better in REFUSED.items() if re.fullmatch(p, words, re.IGNORECASE))


def blank(text: str, words: Iterable[tuple[int, int]]) -> str:
    """Only the words between these indices; all else is code, except white space, which keeps its place."""
    shown = [c if c.isspace() else CODE for c in text]
    for begin, end in words:
        shown[begin:end] = text[begin:end]
    return "".join(shown)


def python_words(text: str) -> Iterator[tuple[int, int]]:
    """Where comments and strings are, without their marks: strings that follow one another are one text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            yield starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]


def prose(name: str, text: str) -> str:
    """The words of a file, each in its line."""
    if name.endswith(".py"):
        shown = blank(text, python_words(text))
        return re.sub(r"[\"'#]|\b[rbf]+(?=[\"'])", " ", shown)
    if name.endswith((".c", ".h")):
        shown = blank(text, ((m.start(), m.end()) for m in C_WORDS.finditer(text)))
        return re.sub(r"[\"*]", " ", shown)
    return re.sub(r"^[#>*-]+", lambda m: " " * len(m[0]), text, flags=re.MULTILINE)


def problems(name: str, text: str) -> list[str]:
    """A line for each refused phrase of a file."""
    found = []
    shown = prose(name, text)
    for match in PATTERN.finditer(shown):
        line = shown.count("\n", 0, match.start()) + 1
        found.append(f"{name}:{line}: '{' '.join(match[0].split())}': write {instead(match[0])}")
    return found


def names() -> list[str]:
    """The files to look at, as git knows them; new ones too. Without git, all that are there."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PLACES]
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    else:
        found = [p for place in PLACES for p in [ROOT / place, *(ROOT / place).rglob("*")]]
        listed = [str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts]
    wanted = (n for n in listed if n not in EXCEPTED and not OTHER.fullmatch(n))
    return sorted(n for n in wanted if (ROOT / n).is_file() and not (ROOT / n).is_symlink())


def main() -> int:
    found = []
    for name in names():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a recording, not a text
        found += problems(name, text)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
