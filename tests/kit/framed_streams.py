"""RAM sections with their frames, random and broken, for the C loader and its Python twin."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import BadRamStream, BadRecord, RamEncoder, RamModel

BLOCKS = {
    "ram0": (6 * TARGET_PAGE, TARGET_PAGE),
    "rom": (2 * TARGET_PAGE, TARGET_PAGE),
    "big": (32 * 1024, 16 * 1024),
}
SECTION = 7


@dataclass(frozen=True)
class Case:
    """``fed``: so many bytes are fed, the others read. ``framed``: from behind a header, ``last``: of the END."""

    stream: bytes = field(repr=False)
    framed: bool
    last: bool
    fed: int
    armed: bool


@dataclass(frozen=True)
class Verdict:
    """How a loader ends, how far it came, and the pages that it made."""

    how: str
    consumed: int
    sections: int
    complete: bool
    pages: dict[tuple[str, int], bytes] = field(repr=False)
    """By block and offset of target pages."""


def _records(rng: random.Random, encoder: RamEncoder) -> bytes:
    out = bytearray()
    for _ in range(rng.randrange(6)):
        block = rng.choice(["ram0", "ram0", "rom", "big"])
        pages = [rng.randrange(BLOCKS[block][0] // TARGET_PAGE)]
        if block == "big" and rng.random() < 0.8:  # a host page, whole
            first = rng.randrange(2) * 4
            pages = list(range(first, first + 4))
        for page in pages:
            if rng.random() < 0.5:
                out += encoder.zero(block, page * TARGET_PAGE, rng.choice([0, 0, 0, 7]))
            else:
                out += encoder.page(block, page * TARGET_PAGE, bytes([rng.randrange(256)]) * TARGET_PAGE)
    return bytes(out)


def _frame(kind: int, section: int = SECTION) -> bytes:
    return struct.pack(">BI", kind, section)


def case(seed: int) -> Case:
    """Mostly right; in one of two something is cut, changed, repeated or left out."""
    rng = random.Random(seed)
    framed, last = rng.random() < 0.8, rng.random() < 0.2
    encoder = RamEncoder()
    pieces = [_records(rng, encoder), encoder.end()]
    if framed:
        pieces.append(_frame(0x7E))
        if not last:
            for _ in range(rng.randrange(4)):
                pieces += [_frame(2), _records(rng, encoder), encoder.end(), _frame(0x7E)]
            if rng.random() < 0.6:
                pieces += [_frame(3), _records(rng, encoder), encoder.end(), _frame(0x7E)]
        pieces.append(rng.choice([b"", b"\0", b"\x08\0\2", _frame(2), _frame(3), _frame(2, 8), b"\x02\0"]))
    else:
        pieces.append(rng.choice([b"", b"behind"]))
    if rng.random() < 0.2:
        at = rng.randrange(len(pieces))
        pieces[at : at + 1] = rng.choice([[], [pieces[at]] * 2])
    stream = bytearray(b"".join(pieces))
    if stream and rng.random() < 0.2:
        stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
    if stream and rng.random() < 0.2:  # of what is no page's content
        at = stream.find(rng.choice([b"\x7e", b"ram0", b"\0\0\0\x10"]))
        if at >= 0:
            stream[at + rng.randrange(4) % (len(stream) - at)] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        del stream[rng.randrange(len(stream) + 1) :]
    return Case(bytes(stream), framed, last, rng.randrange(len(stream) + 1), rng.random() < 0.7)


def expected(case: Case) -> Verdict:
    """What the plain model makes of it."""
    pages: dict[tuple[str, int], bytes] = {}

    def place(block: str, offset: int, data: bytes) -> None:
        for at in range(0, len(data), TARGET_PAGE):
            pages[block, offset + at] = data[at : at + TARGET_PAGE]

    model = RamModel(
        BLOCKS, place, section=SECTION if case.framed else None, last=case.last, calm=not case.armed
    )
    how, consumed = "end", -1
    try:
        for at in range(0, len(case.stream), 1000):
            model.feed(case.stream[at : at + 1000])
        if not model.ended:
            model.eof()
            how = "closed"
    except BadRamStream as e:
        consumed = e.offset
        how = "cut inside" if e.why is BadRecord.TRUNCATED else f"{e.why.name} at {e.offset}"
    consumed = model.consumed if consumed < 0 else consumed
    return Verdict(how, consumed, model.sections if case.framed else 0, model.complete, pages)
