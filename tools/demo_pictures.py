"""``python tools/demo_pictures.py FOLDER``: run the demonstration and write its report's pictures, for the docs.

Those of the pauses are from another run, with cuts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from vhostpc.cli.demo.report import Pictures, standalone
from vhostpc.cli.demo.run import Demo


def main() -> None:
    """See the module's docstring."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for cuts in (0, 2):
        demo = Demo(cuts=cuts)
        result = trio.run(demo.run)
        if result.problems:
            sys.exit("; ".join(result.problems))
        pictures = Pictures(result, demo.story).all()
        names = {"lanes": "pauses", "statuses": "statuses"} if cuts else {name: name for name in pictures}
        for name, file in names.items():
            path = folder / f"{file}.svg"
            path.write_text(standalone(pictures[name][2]), encoding="utf-8")
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
