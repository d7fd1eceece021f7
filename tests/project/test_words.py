"""``tools/check_words.py`` finds a phrase that is refused, in words and not in code, and there is none."""

from __future__ import annotations

import pytest

from tools.check_words import names, problems

# Of two parts, so that these are no findings themselves.
CANNOT = " ".join(["can", "not"])
ANYBODY = "who" + "ever"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.md", f"# A page\n\nIt {CANNOT} be.\n", 3),
        ("a.md", f"It can\n{CANNOT[4:]} be.\n", 1),
        ("a.md", f"> it {CANNOT}\n".replace(" n", "\n> n"), 1),
        ("a.py", f"x = 1\n# It {CANNOT} be.\n", 2),
        ("a.py", f"# It can\n# {CANNOT[4:]} be.\n", 1),
        ("a.py", f'def f():\n    """Says.\n\n    It {CANNOT} be.\n    """\n', 4),
        ("a.py", f'x = f"it {{y}} {CANNOT}"\n', 1),
        ("a.py", f'x = (\n    "it can "\n    "{CANNOT[4:]} be"\n)\n', 2),
        ("a.c", f"int x; /* It can\n * {CANNOT[4:]} be. */\n", 1),
        ("a.c", f'int x;\nchar *y = "it {CANNOT} be";\n', 2),
        ("a.service", f"# It {CANNOT} be.\n", 1),
    ],
)
def test_a_phrase_is_found(name: str, text: str, line: int) -> None:
    assert problems(name, text) == [f"{name}:{line}: '{CANNOT}': write cannot"]


def test_each_phrase_is_named() -> None:
    first, second = problems("a.md", f"{ANYBODY} comes\n\n{CANNOT}\n")
    assert first.startswith(f"a.md:1: '{ANYBODY}': write a noun")
    assert second == f"a.md:3: '{CANNOT}': write cannot"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", f"{ANYBODY} = 1\n"),
        ("a.py", 'x = can(["can", "not"])\n'),
        ("a.py", 'y = "can" if can else "not"\n'),
        ("a.c", f"int {ANYBODY};\n"),
        ("a.md", "It cannot be, nor can nothing.\n"),
    ],
)
def test_code_and_other_words_are_let_pass(name: str, text: str) -> None:
    assert problems(name, text) == []


def test_the_files_that_are_looked_at() -> None:
    assert {"README.md", "docs/demo.md", "vhostpc/_native/virtio/vq.c", "tests/project/test_words.py"} <= set(
        names()
    )
    assert "tools/check_words.py" not in names()
