"""The C loader under the sanitizers and its Python twin, on the same streams."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.kit.framed_streams import BLOCKS, case, expected
from tests.native import output
from vhostpc.wire.migration.ramrec import BadRecord

EOS, EOF = 1, 2


def _line(seed: int) -> str:
    """What the program has to say of this case."""
    want = expected(case(seed))
    why = 0
    if want.how in ("end", "closed"):
        rc = EOS if want.how == "end" else EOF
    else:
        rc = -errno.EBADMSG
        why = BadRecord.TRUNCATED if want.how == "cut inside" else BadRecord[want.how.split()[0]]
    weights = {name: 1 + 100 * i for i, name in enumerate(BLOCKS)}
    total = sum(sum(data) * (weights[name] + at // 4096) for (name, at), data in want.pages.items())
    received = len({(name, at // BLOCKS[name][1]) for name, at in want.pages})
    ended = int(want.complete)
    return f"{rc} {int(why)} {want.consumed} {want.sections} {ended} {received} {total}"


def check_loads(program: Path, seeds: Sequence[int]) -> int:
    """Compare them on these cases; how many they were."""
    data = bytearray()
    for seed in seeds:
        one = case(seed)
        data += struct.pack("=5I", one.framed, one.last, one.armed, one.fed, len(one.stream)) + one.stream
    said = output(program, data=bytes(data)).splitlines()
    assert len(said) == len(seeds)
    for seed, line in zip(seeds, said, strict=True):
        assert line == _line(seed), f"seed {seed}: {line!r}, where the twin has {_line(seed)!r}"
    return len(said)
