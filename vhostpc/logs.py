"""Loggers with a limited rate of lines: lines that a peer causes must not fill a disk or block the loop."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from dataclasses import dataclass

#: How many lines of one kind are written within an interval (s); further ones are counted.
BURST = 10
INTERVAL = 10.0

_OURS = "of_the_ration"


@dataclass(slots=True)
class _Kind:
    """The lines of one template since ``began``. ``last`` is the newest suppressed one."""

    name: str
    began: float
    written: int = 0
    left_out: int = 0
    level: int = logging.INFO
    last: str = ""


class Ration(logging.Filter):
    """Passes the first :data:`BURST` lines of a template in each :data:`INTERVAL`, and counts the rest.

    The count is reported with the first line of any kind after the interval, and by :meth:`settle`. Lines for
    debugging always pass: somebody has switched them on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """See :class:`logging.Filter`."""
        if record.levelno <= logging.DEBUG or hasattr(record, _OURS):
            return True
        now = time.monotonic()
        with self._lock:
            counts = self._counts(now)
            # The template as it stands in the code: a peer cannot make kinds.
            key = record.name, str(record.msg)
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = _Kind(record.name, now)
            passes = kind.written < BURST
            if passes:
                kind.written += 1
            else:
                kind.left_out += 1
                # Not the record: its arguments may own descriptors.
                kind.level, kind.last = record.levelno, record.getMessage()
            first = kind.left_out == 1
        for kind in counts:
            _say(kind, f"{kind.left_out} lines were suppressed, the last one: {kind.last}")
        if first and not passes:
            _say(kind, "more lines like the last one follow: they are only counted")
        return passes

    def settle(self) -> None:
        """Report suppressed lines now."""
        with self._lock:
            counts = self._counts(None)
        for kind in counts:
            _say(kind, f"{kind.left_out} lines were suppressed, the last one: {kind.last}")

    def forget(self) -> None:
        """Start over, without a report."""
        with self._lock:
            self._kinds.clear()

    def _counts(self, now: float | None) -> list[_Kind]:
        """Kinds whose count is to be reported, and which start over."""
        over = {key: kind for key, kind in self._kinds.items() if now is None or now - kind.began >= INTERVAL}
        for key in over:
            del self._kinds[key]
        return [kind for kind in over.values() if kind.left_out]


def _say(kind: _Kind, text: str) -> None:
    logging.getLogger(kind.name).log(kind.level, "%s", text, extra={_OURS: True})


#: This process's.
ration = Ration()
atexit.register(ration.settle)


def rationed_logger(name: str) -> logging.Logger:
    """The logger of that name, whose rate of lines is limited from now on."""
    log = logging.getLogger(name)
    log.addFilter(ration)
    return log
