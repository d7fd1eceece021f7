"""C objects held by Python: freed once, and never while a call works on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

from vhostpc._native import check, ffi

_needed: Counter[int] = Counter()
"""The number of users of an object, by its address."""


def _address(raw: Any) -> int:
    return int(ffi.cast("uintptr_t", raw))


def made(kind: str, what: str, make: Callable[..., int], *args: Any) -> Any:
    """A new ``struct vpc_<kind>``: what ``make`` gives through the pointer behind ``args``. Raises OSError.

    It is for a :class:`Handle`, which frees it.
    """
    out = ffi.new(f"struct vpc_{kind} **")
    check(make(*args, out), what)
    return out[0]


class Handle:
    """Owns ``raw``, a pointer to a C object, until :meth:`close`; after that using it raises.

    The object itself is freed, by ``free``, when nothing refers to it any more. A call in progress does, so the objects
    that it works on stay. ``needs``: pointers of other handles that the object uses; those objects live as long as
    it does, even if others close theirs.

    ``ended``: what ``error`` says.
    """

    __slots__ = ("_ended", "_error", "_needs", "_raw")

    def __init__(
        self,
        raw: Any,
        free: Callable[[Any], None],
        ended: str,
        error: type[Exception] = ValueError,
        needs: Iterable[Any] = (),
    ) -> None:
        self._needs = list(needs)
        _needed.update(map(_address, self._needs))
        self._raw = ffi.gc(raw, partial(_free, free, self._needs) if self._needs else free)
        self._ended = ended
        self._error = error

    @property
    def raw(self) -> Any:
        """The pointer, to be passed to C. Raises ValueError, or the chosen error, after :meth:`close`."""
        if self._raw is None:
            raise self._error(self._ended)
        return self._raw

    @property
    def closed(self) -> bool:
        return self._raw is None

    def now_needs(self, *needs: Any) -> None:
        """It is about to use other objects in place of those given first."""
        _needed.update(map(_address, needs))
        _needed.subtract(map(_address, self._needs))
        self._needs[:] = needs

    def close(self, *, idle: bool = False) -> None:
        """Release it, and the objects that it needs: a call in progress still holds both. May be repeated.

        ``idle``: no call is in progress, so it is freed at once (unless another object needs it) instead of when the
        last traceback with a reference to it is collected.
        """
        raw, self._raw = self._raw, None
        self._needs = []
        if idle and raw is not None and not _needed[_address(raw)]:
            ffi.release(raw)


def _free(free: Callable[[Any], None], needs: list[Any], raw: Any) -> None:
    """``needs`` stand here to live until now."""
    free(raw)
    _needed.subtract(map(_address, needs))


class Owner:
    """Base of what owns an object of C, by a :class:`Handle` that its ``__init__`` makes. As a context manager it is
    closed at the end.
    """

    _native: Handle

    @property
    def handle(self) -> Any:
        """The C handle; ValueError, or the error that was chosen for it, after :meth:`close`."""
        return self._native.raw

    @property
    def closed(self) -> bool:
        """:meth:`close` was called."""
        return self._native.closed

    def close(self) -> None:
        """Let go of it; what uses it in C keeps it. Harmless again."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
