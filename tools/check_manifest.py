"""Check manifests of vhost-user back-end programs against the rules that managers hold them to.

``python tools/check_manifest.py [FILE...]``; without arguments, all that stand below ``examples/``. The rules
are those of the schema published with QEMU (docs/interop/vhost-user.json).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A manager gives up the whole folder when it meets a type outside of this list.
TYPES = frozenset(
    "9p balloon block caif console crypto gpu input net rng rpmsg rproc-serial scsi vsock fs".split()
)
NAME = re.compile(r"\d\d-[^/]+\.json")


def problems(path: Path) -> list[str]:
    """What is wrong with one manifest, in sentences; empty when nothing is."""
    found = []
    if not NAME.fullmatch(path.name):
        found.append("the name is not NN-name.json, so its place in the order is not told")
    text = path.read_text()
    if not text:
        return found  # an empty file hides one of the same name in a less specific folder
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        return [*found, f"not JSON: {e}"]
    if not isinstance(data, dict):
        return [*found, "not a JSON object"]
    for key in ("description", "type", "binary"):
        if not isinstance(data.get(key), str) or not data[key]:
            found.append(f"{key!r} must be a text")
    if isinstance(data.get("type"), str) and data["type"] not in TYPES:
        found.append(f"type {data['type']!r} is not one of {', '.join(sorted(TYPES))}")
    if isinstance(data.get("binary"), str) and not data["binary"].startswith("/"):
        found.append("'binary' must be an absolute path")
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        found.append("'tags' must be a list of texts")
    found += [f"unknown key {key!r}" for key in data.keys() - {"description", "type", "binary", "tags"}]
    return found


def manifests() -> list[Path]:
    """The manifests of the examples."""
    return sorted((ROOT / "examples").rglob("*.json"))


def main(names: list[str]) -> None:
    paths = [Path(name) for name in names] or manifests()
    lines = [f"{path}: {problem}" for path in paths for problem in problems(path)]
    if lines:
        sys.exit("\n".join(lines))
    print(f"manifests: {len(paths)} checked")


if __name__ == "__main__":
    main(sys.argv[1:])
