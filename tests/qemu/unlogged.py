"""``python unlogged.py PROGRAM OPTION...``: an example whose writes are missing from the dirty log.

All is answered as ever, but no ring hears of the log: what a test of the log has to find.
"""

import runpy
import sys
from pathlib import Path

from vhostpc.virtio import ring


def set_log(self: ring.Ring, log: object, log_used: bool, used_gpa: int) -> None:
    """In place of ``Ring.set_log``: the log is thrown away."""


ring.Ring.set_log = set_log  # type: ignore[method-assign]
sys.argv = sys.argv[1:]
program = Path(sys.argv[0])
# As the interpreter does with a folder that it is given.
sys.path.insert(0, str(program))
runpy.run_path(str(program / "__main__.py"), run_name="__main__")
