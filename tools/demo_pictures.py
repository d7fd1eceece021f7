"""``python tools/demo_pictures.py FOLDER``: run the demonstration and write its report's pictures, for the docs."""

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
    demo = Demo()
    result = trio.run(demo.run)
    if result.problems:
        sys.exit("; ".join(result.problems))
    for name, (_, _, picture) in Pictures(result, demo.story).all().items():
        path = folder / f"{name}.svg"
        path.write_text(standalone(picture), encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
