"""What a proxy is to do, and where: ``cut@request=20``. Parsed from one word each, with errors that name what is wrong.

::

    ACTION[=ARGUMENT]@POINT[=VALUE][,OPTION=VALUE]...

Numbers may be ranges, ``page=100..900``: one of them is drawn.
"""

from __future__ import annotations

import math
import random
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from vhostpc.errors import VhostpcError
from vhostpc.proxy.points import POINTS, Field, Point, Takes, Way

ALWAYS = 0
"""Of ``times``: at each connection, for ever."""
RANDOM_BYTES = 1 << 20
FOREVER = math.inf
MOST_SECONDS = 1e6
_KINDS = ("main", "recovery", "preempt", "multifd", "tls", "unknown")

ACTIONS = {
    "cut": "break the link: both ends get a reset. way=: end that direction, and lose the rest of it",
    "fin": "end both directions in order, and lose the rest",
    "drop": "lose everything from here on, without a word to either end",
    "hold": "pass nothing for SECONDS; for ever if not given",
    "delay": "from here on pass each byte by itself, SECONDS after the one before",
    "lag": "from here on each byte arrives SECONDS later than it was sent",
    "corrupt": "change a bit of FIELD, the point's first one if not given",
}
OPTIONS = {
    "at": "before, middle, after (the default), or the number of bytes of the element that still pass; with corrupt: "
    "the byte of the field that is changed",
    "way": "forward, back or both. Default: both, but the point's direction for delay and lag",
    "on": "main, recovery, recovery-2 (the second one), preempt, multifd, or N: the Nth connection. Default: any",
    "for": "seconds after which a delay or a lag ends",
    "to": "with corrupt: the number that is written in place of a field, or the text in place of a name",
    "times": "how often, once a connection; or always",
    "alone": "only its connection is cut, ended, dropped or held, not all that are open",
}
ON_ALL = ("cut", "fin", "drop", "hold")
_TEXTS = ("block", "name", "machine")
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30}
_NUMBER = re.compile(r"(0x[0-9a-f]{1,16}|[0-9]{1,19})([kmg]?)", re.IGNORECASE)


class BadFault(VhostpcError):
    """A fault that makes no sense; the text names the word."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to do. ``str`` of it is the word that it is parsed from, with what was drawn."""

    action: str
    point: Point
    value: int | float | str | None = None
    amount: float = FOREVER
    """Seconds of hold, delay and lag."""
    field: str = ""
    at: str | int = "after"
    way: Way = Way.BOTH
    on: str = ""
    lasting: float = FOREVER
    to: str = ""
    times: int = 1
    alone: bool = False
    text: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def whole(self) -> bool:
        """Whether its place is found only when the element is there, so that the element must wait for it."""
        return self.point.is_element and (self.at != "after" or self.action == "corrupt")

    @property
    def is_text(self) -> bool:
        """Of corrupt: whether the field is a name."""
        return self.field in _TEXTS

    @property
    def part(self) -> Field:
        """Of corrupt: the field."""
        return self.point.fields[self.field]

    def place(self, begin: int, inner: int, end: int) -> int:
        """The byte of the direction up to which it lets pass. ``inner``: where ``at=N`` counts from."""
        if self.action == "corrupt" or self.at == "before":
            return begin
        if self.at == "middle":
            return (inner + end) // 2
        return end if isinstance(self.at, str) else min(inner + self.at, end)


def _number(word: str, text: str, rng: random.Random) -> int:
    """A number, also in hexadecimal or with K, M, G; or one drawn from ``A..B``."""
    first, dots, last = word.partition("..")
    found = [_NUMBER.fullmatch(part) for part in ([first, last] if dots else [first])]
    numbers = [
        int(match[1], 0 if "x" in match[1].lower() else 10) << _UNITS[match[2].lower()]
        for match in found
        if match
    ]
    if len(numbers) != len(found):
        raise BadFault(f"{text!r}: {word!r} is not a number, nor a range such as 10..20")
    if numbers[0] > numbers[-1]:
        raise BadFault(f"{text!r}: {word!r} is an empty range")
    if numbers[-1] >> 63:
        raise BadFault(f"{text!r}: {word!r} is too large")
    return rng.randint(numbers[0], numbers[-1]) if dots else numbers[0]


def _seconds(word: str, text: str, rng: random.Random) -> float:
    first, dots, last = word.partition("..")
    try:
        numbers = [float(part) for part in ([first, last] if dots else [first])]
    except ValueError:
        numbers = [math.nan]
    if not all(0 <= number <= MOST_SECONDS for number in numbers) or numbers[0] > numbers[-1]:
        raise BadFault(f"{text!r}: {word!r} is not a number of seconds, nor a range such as 0.1..2")
    return round(rng.uniform(*numbers), 6) if dots else numbers[0]


def _one_of(word: str, known: Iterable[str], what: str, text: str) -> str:
    known = list(known)
    if word not in known:
        raise BadFault(f"{text!r}: {word!r} is no {what}; known: {', '.join(known)}")
    return word


def parse_fault(text: str, rng: random.Random | None = None) -> Fault:
    """A fault from its word. ``rng`` draws from ranges. Raises BadFault."""
    rng = rng or random.Random()
    what, sign, where = text.partition("@")
    if not sign:
        raise BadFault(f"{text!r} is not ACTION@POINT: it has no '@'")
    place, *options = where.split(",")
    action, gives, argument = what.partition("=")
    name, names, value = place.partition("=")
    _one_of(action, ACTIONS, "action", text)
    point = POINTS[_one_of(name, POINTS, "point", text)]
    fault = Fault(action, point)
    if names and not value:
        raise BadFault(f"{text!r}: nothing stands behind '{name}='")
    if gives and not argument:
        raise BadFault(f"{text!r}: nothing stands behind '{action}='")
    fault = replace(fault, value=_value(point, value, text, rng))
    if point.name == "random":
        assert isinstance(fault.value, int)
        drawn = rng.randrange(fault.value or 1)
        fault = replace(fault, point=POINTS["postcopy-byte"], value=drawn)
    fault = _argument(fault, argument, text, rng)
    seen: set[str] = set()
    for option in options:
        key, equals, given = option.partition("=")
        _one_of(key, OPTIONS, "option", text)
        if key in seen:
            raise BadFault(f"{text!r}: {key!r} twice")
        seen.add(key)
        if (key == "alone") == bool(equals) or (equals and not given):
            raise BadFault(f"{text!r}: {option!r} is not {key if key == 'alone' else key + '=VALUE'}")
        fault = _option(fault, key, given, text, rng)
    if "way" not in seen and action in ("delay", "lag"):
        fault = replace(fault, way=point.way)
    return replace(fault, text=_words(fault, what, options))


def _value(point: Point, value: str, text: str, rng: random.Random) -> int | float | str | None:
    takes = point.takes
    if takes is Takes.NOTHING:
        if value:
            raise BadFault(f"{text!r}: {point.name} takes no value, but has {value!r}")
        return None
    if not value:
        if takes is Takes.COUNT:
            return 1
        if point.name == "random":
            return RANDOM_BYTES
        raise BadFault(f"{text!r}: {point.name} takes {takes.value}: {point.name}=...")
    if takes is Takes.NAME:
        return value
    if takes is Takes.SECONDS:
        return _seconds(value, text, rng)
    number = _number(value, text, rng)
    if takes is Takes.COUNT and not _number(value.partition("..")[0], text, rng):
        raise BadFault(f"{text!r}: {point.name} counts from 1, and {value!r} may be 0")
    return number


def _argument(fault: Fault, argument: str, text: str, rng: random.Random) -> Fault:
    action, point = fault.action, fault.point
    if action == "corrupt":
        if point.way is Way.BOTH:
            raise BadFault(f"{text!r}: there is nothing to corrupt at {point.name!r}")
        if not point.is_element:
            if argument:
                raise BadFault(f"{text!r}: a byte has no field {argument!r}")
            return fault
        field = _one_of(argument or next(iter(point.fields)), point.fields, f"field of {point.name}", text)
        return replace(fault, field=field)
    if action in ("hold", "delay", "lag"):
        if argument:
            return replace(fault, amount=_seconds(argument, text, rng))
        if action != "hold":
            raise BadFault(f"{text!r}: {action} takes seconds: {action}=SECONDS")
    elif argument:
        raise BadFault(f"{text!r}: {action} takes no argument, but has {argument!r}")
    return fault


def _option(fault: Fault, key: str, given: str, text: str, rng: random.Random) -> Fault:
    action, point = fault.action, fault.point

    def only(allowed: Iterable[str]) -> None:
        if action not in allowed:
            raise BadFault(f"{text!r}: {key!r} means nothing with {action}")

    if key == "at":
        if not point.is_element:
            raise BadFault(f"{text!r}: 'at' means nothing at {point.name}, which has no length")
        if given in ("before", "middle", "after") and action != "corrupt":
            return replace(fault, at=given)
        return replace(fault, at=_number(given, text, rng))
    if key == "way":
        only(set(ACTIONS) - {"corrupt", "fin"})
        return replace(fault, way=Way(_one_of(given, [way.value for way in Way], "direction", text)))
    if key == "on":
        kind, _, number = given.partition("-")
        if re.fullmatch(r"[1-9][0-9]{0,5}", given) or (
            kind == "recovery" and re.fullmatch(r"[1-9][0-9]{0,5}", number)
        ):
            return replace(fault, on=given)
        return replace(fault, on=_one_of(given, _KINDS, "kind of connection", text))
    if key == "for":
        only(("delay", "lag"))
        return replace(fault, lasting=_seconds(given, text, rng))
    if key == "to":
        only(("corrupt",))
        if fault.field and fault.field not in _TEXTS:
            written = _number(given, text, rng)
            width = fault.part.length
            if width and written >> 8 * width:
                raise BadFault(f"{text!r}: {given!r} does not fit into {width} bytes")
            return replace(fault, to=str(written))
        if not fault.field and _number(given, text, rng) > 0xFF:
            raise BadFault(f"{text!r}: {given!r} does not fit into a byte")
        return replace(fault, to=given)
    if key == "times":
        if given == "always":
            return replace(fault, times=ALWAYS)
        times = _number(given, text, rng)
        if not times:
            raise BadFault(f"{text!r}: 'times=0' is never")
        return replace(fault, times=times)
    only(ON_ALL)
    return replace(fault, alone=True)


def _words(fault: Fault, what: str, options: list[str]) -> str:
    """The word again, with what was drawn from ranges."""
    drawn = {"at": fault.at, "for": fault.lasting, "to": fault.to, "times": fault.times}
    shown = [
        f"{key}={drawn[key]}" if ".." in given and key in drawn else option
        for option in options
        for key, _, given in [option.partition("=")]
    ]
    action = f"{fault.action}={_plain(fault.amount)}" if ".." in what else what
    where = fault.point.name if fault.value is None else f"{fault.point.name}={_plain(fault.value)}"
    return ",".join([f"{action}@{where}", *shown])


def _plain(value: int | float | str) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


class Place(Protocol):
    """The connection at which a fault may be due."""

    number: int
    kind: str
    recovery: int
    """Which recovery it is, from 1; 0 for any other connection."""


class Plan:
    """Faults in order: each waits until the one before it was done."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._queue = deque(faults)
        self._met: set[int] = set()
        self._left = self._queue[0].times if self._queue else 0
        self.changed = trio.Event()
        """Set, and replaced, when another fault may be due."""

    def look_again(self) -> None:
        """More is known about a connection."""
        self.changed.set()
        self.changed = trio.Event()

    @property
    def wants_pages(self) -> bool:
        """Whether pages must be counted one by one."""
        return any(fault.point.name in ("page", "postcopy-page") for fault in self._queue)

    @property
    def armed(self) -> Fault | None:
        """The one that is next."""
        return self._queue[0] if self._queue else None

    @property
    def pending(self) -> list[Fault]:
        """Those that were not done, but for what is done always."""
        return [fault for fault in self._queue if fault.times != ALWAYS]

    def add(self, fault: Fault) -> None:
        """Put it behind the others."""
        self._queue.append(fault)
        if len(self._queue) == 1:
            self._begin()

    def _begin(self) -> None:
        self._met.clear()
        self._left = self._queue[0].times if self._queue else 0
        self.look_again()

    def at(self, place: Place) -> Fault | None:
        """The one that is next, if it may be done at that connection."""
        fault = self.armed
        if fault is None or place.number in self._met:
            return None
        if not fault.on or fault.on in (str(place.number), place.kind):
            return fault
        return fault if place.recovery and fault.on == f"recovery-{place.recovery}" else None

    def take(self, place: Place) -> None:
        """The one that is next is being done at that connection."""
        fault = self._queue[0]
        self._met.add(place.number)
        if fault.times == ALWAYS:
            return
        self._left -= 1
        if not self._left:
            self._queue.popleft()
            self._begin()
