"""The places of a migration at which a proxy can do something: their names, and what can be told of each.

An element is a message or a piece of one direction of a connection that has a name: a command, a page, a request. The
names are QEMU's (docs/devel/migration), in small letters.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Way(enum.Enum):
    """A direction of a connection, or both."""

    FORWARD = "forward"
    """From the source to the destination: from LISTEN to TARGET."""
    BACK = "back"
    """The return path: from TARGET to LISTEN."""
    BOTH = "both"

    def __str__(self) -> str:
        return self.value


class Takes(enum.Enum):
    """What stands behind ``POINT=``."""

    NOTHING = "nothing"
    COUNT = "a count from 1"
    """The so-manieth of its kind on its connection; 1 if it is not given."""
    VALUE = "a number"
    """A number that the element itself carries."""
    NAME = "a name"
    BYTES = "a number of bytes"
    SECONDS = "seconds"


@dataclass(frozen=True, slots=True)
class Field:
    """A part of an element that can be corrupted. ``bit``: the one that is flipped in its last byte.

    ``begin`` and ``length`` are bytes of the element; a ``begin`` below 0 counts from its end. ``name_at``: the byte
    that has the length of a block's or section's name: of 0, that of no name. The field is the name; with ``behind``
    it is ``length`` bytes that begin so many bytes behind the name. ``length`` 0: to the end, but ``spare`` bytes.
    """

    begin: int = 0
    length: int = 0
    name_at: int = 0
    behind: int | None = None
    spare: int = 0
    bit: int = 1

    def span(self, element: bytes) -> tuple[int, int]:
        """Its first byte in the element, and how many it has; no byte where the element has no such field."""
        begin, length = self.begin, self.length
        if self.name_at:
            if self.name_at >= len(element):
                return 0, 0
            size = element[self.name_at]
            if self.behind is None:
                begin, length = self.name_at + 1, size
            else:
                begin = self.name_at + 1 + size + self.behind
        if begin < 0:
            begin += len(element)
        if not length:
            length = len(element) - self.spare - begin
        return (begin, length) if begin >= 0 and length > 0 and begin + length <= len(element) else (0, 0)


_COMMAND = {"command": Field(1, 2), "length": Field(3, 2)}
_MESSAGE = {"type": Field(0, 2), "length": Field(2, 2)}
_VALUE = {"value": Field(4, 4), **_MESSAGE}
# A bit of the number of the page, one of the flags (PAGE or ZERO becomes nothing), the content.
_PAGE = {
    "data": Field(-1, 1),
    "offset": Field(6, 1, bit=0x10),
    "flags": Field(7, 1, bit=0x80),
    "block": Field(name_at=8),
}


@dataclass(frozen=True, slots=True)
class Point:
    """A row of the table. ``way`` is BOTH where it belongs to no direction; ``fields``: the first is the default."""

    name: str
    way: Way
    takes: Takes
    words: str
    fields: dict[str, Field]

    @property
    def is_element(self) -> bool:
        """Whether it has a begin and an end."""
        return bool(self.fields)


def _table() -> dict[str, Point]:
    forward, back, both = Way.FORWARD, Way.BACK, Way.BOTH
    nothing, count = Takes.NOTHING, Takes.COUNT
    rows: list[tuple[str, Way, Takes, str, dict[str, Field]]] = [
        ("head", forward, nothing, "magic and version", {"version": Field(4, 4), "magic": Field(0, 4)}),
        (
            *("configuration", forward, nothing, "the machine type"),
            {"machine": Field(5), "length": Field(1, 4)},
        ),
        ("ping", forward, Takes.VALUE, "PING with that value", {"value": Field(5, 4), **_COMMAND}),
        (
            *("advise", forward, nothing, "POSTCOPY_ADVISE"),
            {"page-sizes": Field(5, 8), "target-page": Field(13, 8), **_COMMAND},
        ),
        ("blocks", forward, nothing, "the list of RAM blocks", {"total": Field(0, 8, bit=0x80)}),
        ("page", forward, count, "the Nth page", _PAGE),
        (
            *(
                "postcopy-page",
                forward,
                count,
                "the Nth page behind the package, or of a recovery or of preempt",
            ),
            _PAGE,
        ),
        (
            *("round", forward, count, "the end of the Nth part of RAM"),
            {"footer": Field(9, 4), "end": Field(0, 8)},
        ),
        ("switchover", forward, nothing, "SWITCHOVER_START", _COMMAND),
        (
            *("discard", forward, count, "the Nth RAM_DISCARD"),
            {
                "start": Field(8, name_at=6, behind=1, length=8),
                "size": Field(16, name_at=6, behind=9, length=8),
                "block": Field(name_at=6),
                **_COMMAND,
            },
        ),
        (
            "package",
            forward,
            nothing,
            "PACKAGED; at=N is byte N inside it",
            {"size": Field(5, 4), **_COMMAND},
        ),
        ("listen", forward, nothing, "POSTCOPY_LISTEN, in the package", _COMMAND),
        (
            *("section", forward, Takes.NAME, "the device section of that name, in the package"),
            {
                "body": Field(0, name_at=5, behind=8, spare=5),
                "name": Field(name_at=5),
                "footer": Field(-4, 4),
            },
        ),
        ("run", forward, nothing, "POSTCOPY_RUN, the end of the package", _COMMAND),
        (
            "recv-bitmap",
            forward,
            count,
            "the Nth RECV_BITMAP, of a recovery",
            {"block": Field(name_at=5), **_COMMAND},
        ),
        ("resume", forward, nothing, "POSTCOPY_RESUME, of a recovery", _COMMAND),
        ("eof", forward, nothing, "the byte that ends the stream", {"kind": Field(0, 1, bit=0x40)}),
        ("byte", forward, Takes.BYTES, "behind the first N bytes of the connection", {}),
        (
            *("postcopy-byte", forward, Takes.BYTES),
            "the same, counted from the package on, or on the connection of a recovery",
            {},
        ),
        ("random", forward, Takes.BYTES, "postcopy-byte, anywhere below N; 1M if not given", {}),
        (
            *("request", back, count, "the Nth page request"),
            {"start": Field(4, 8), "size": Field(12, 4), "block": Field(name_at=16), **_MESSAGE},
        ),
        ("pong", back, Takes.VALUE, "PONG with that value", _VALUE),
        (
            *("bitmap", back, count, "the Nth bitmap that answers RECV_BITMAP"),
            {
                "bits": Field(name_at=4, behind=8, spare=8),
                "size": Field(name_at=4, behind=0, length=8),
                "mark": Field(-8, 8),
                "block": Field(name_at=4),
                **_MESSAGE,
            },
        ),
        ("resume-ack", back, nothing, "RESUME_ACK", _VALUE),
        ("shut", back, nothing, "SHUT, the destination's last word", _VALUE),
        ("back-byte", back, Takes.BYTES, "behind the first N bytes of the return path", {}),
        ("time", both, Takes.SECONDS, "so many seconds after the connection was made", {}),
    ]
    return {name: Point(name, way, takes, words, fields) for name, way, takes, words, fields in rows}


POINTS = _table()
