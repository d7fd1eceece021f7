"""``python -m tests.kit.ufd_child``: open a userfaultfd, print the outcome on stdout. For ``tests.kit.confine``."""

from __future__ import annotations

import errno
import json
import sys

from vhostpc.errors import UfdError
from vhostpc.ufd import Userfaultfd, probe


def report() -> dict[str, object]:
    """What opening gave, and what a probe says."""
    found = probe()
    answer: dict[str, object] = {
        "ways": {w.way.name: errno.errorcode.get(w.errno, "") for w in found.ways},
        "best": None if found.best is None else found.best.name,
        "problem": found.problem,
    }
    try:
        with Userfaultfd.open() as ufd:
            answer |= {"opened": repr(ufd), "user_mode_only": ufd.user_mode_only}
    except UfdError as e:
        answer |= {"error": str(e), "errno": errno.errorcode[e.errno]}
    return answer


if __name__ == "__main__":
    json.dump(report(), sys.stdout)
