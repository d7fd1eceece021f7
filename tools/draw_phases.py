"""Writes docs/phases.md: the phases of a migration, drawn from the tables in vhostpc/migration/phase.py.

python tools/draw_phases.py [FILE]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from vhostpc.dialect import DIALECTS
from vhostpc.migration.phase import AWAY, CAME, PACKAGE_GONE, Event, Phase, Side, statuses, table

PAGE = Path(__file__).parent.parent / "docs" / "phases.md"
HEAD = """\
# The phases of a migration

Made by `python tools/draw_phases.py` from `vhostpc/migration/phase.py`; a test compares the two.

Each end is in one phase, and an event leads to the next one. An arrow that is not drawn is an error of this program.
QEMU's status, whether the machine may run at this end, and whether the migration can be cancelled follow from the phase
and from the version of QEMU (`--compat`) whose behaviour is followed.

One arrow crosses the point of no return: `package` in a postcopy, `sent` in a precopy. From there on the destination
may run the machine. Before it any failure is `fail`, and the machine runs on at its source. Behind it a failure is
`lose`, and only the destination's word `never-ran` gives the machine back.
"""
TITLES: dict[Side, str] = {"source": "The source", "destination": "The destination"}


def phases(side: Side) -> list[Phase]:
    """Those of one end, in the order of their definition."""
    found = {
        phase for compat in DIALECTS for pair, after in _arrows(side, compat) for phase in (pair[0], after)
    }
    return [phase for phase in Phase if phase in found]


def _arrows(side: Side, compat: str) -> list[tuple[tuple[Phase, Event], Phase]]:
    return list(table(side, next(d for name, d in DIALECTS.items() if name == compat)).items())


def diagram(side: Side) -> str:
    """A state diagram in Mermaid, as hosts of repositories draw it; arrows to the same phase are left out."""
    events: dict[tuple[Phase, Phase], list[str]] = defaultdict(list)
    for compat in DIALECTS:
        for (phase, event), after in _arrows(side, compat):
            if phase is not after and event not in events[phase, after]:
                events[phase, after].append(event)
    names = {phase: phase.replace("-", "_") for phase in Phase}
    lines = [f"    {names[phase]} : {phase}" for phase in phases(side)]
    lines += [
        f"    {names[a]} --> {names[b]} : {', '.join(words)}" for (a, b), words in events.items() if words
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def rows(side: Side) -> str:
    """What follows from each phase."""
    lines = [
        f"| phase | {' | '.join(f'status, {compat}' for compat in DIALECTS)} | may run here | can be cancelled |",
        f"|---|{'---|' * (len(DIALECTS) + 2)}",
    ]
    for phase in phases(side):
        told = [", ".join(statuses(phase, side, dialect)) for dialect in DIALECTS.values()]
        runs = phase not in AWAY if side == "source" else phase in CAME
        cancel = side == "source" and any(
            (phase, Event.CANCEL) in table(side, dialect) for dialect in DIALECTS.values()
        )
        answer = "no: refused" if phase in PACKAGE_GONE else "yes" if cancel else ""
        lines.append(f"| `{phase}` | {' | '.join(told)} | {'yes' if runs else 'no'} | {answer} |")
    return "\n".join(lines)


def page() -> str:
    parts = [HEAD]
    for side, title in TITLES.items():
        parts += [f"## {title}\n", diagram(side) + "\n", rows(side) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page())
