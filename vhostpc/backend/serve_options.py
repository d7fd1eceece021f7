"""The options of a back-end, besides its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vhostpc.errors import VhostpcError
from vhostpc.memory.mapping import PAGES_AHEAD
from vhostpc.virtio.features import NetFeature
from vhostpc.wire.vhost_user import Feature, ProtocolFeature


@dataclass(frozen=True)
class Options:
    """Options of :func:`vhostpc.backend.serve`.

    ``hide_features``, ``hide_protocol_features``: bits (as masks) not to offer. ``inband``: offer in-band
    notifications (QEMU acknowledges them and does not implement them). ``once``: end with the first session.
    ``slow``: touch guest memory only on borrowed threads, never on the trio thread. ``no_fault``: in postcopy never
    touch a page before it is here, for front-ends that cannot serve a back-end's fault (QEMU 10.0 with
    postcopy-preempt): a thread that needs an absent page waits until the front-end has it by other means, which may be
    the migration's end. ``answer_each_pair``: in postcopy give our addresses once more for each further queue pair, as
    QEMU 10.0 and 11.1 expect without a request; QEMU 7.2 with memory slots does not. ``pages_ahead``: how
    many missing pages of postcopy a session asks for at a time before a thread needs them, 0 to 64; each costs it a
    small thread.
    """

    hide_features: int = 0
    hide_protocol_features: int = 0
    inband: bool = False
    once: bool = False
    slow: bool = False
    no_fault: bool = False
    answer_each_pair: bool = False
    pages_ahead: int = PAGES_AHEAD


def feature_bits(names: Iterable[str]) -> int:
    """A mask of feature bits given by name (EVENT_IDX, MRG_RXBUF, ...) or number. Raises VhostpcError."""
    return _mask(names, {**dict(NetFeature.__members__), **dict(Feature.__members__)}, "feature")


def protocol_feature_bits(names: Iterable[str]) -> int:
    """A mask of protocol feature bits given by name (PAGEFAULT, ...) or number. Raises VhostpcError."""
    return _mask(names, dict(ProtocolFeature.__members__), "protocol feature")


def _mask(names: Iterable[str], known: Mapping[str, int], what: str) -> int:
    mask = 0
    for name in names:
        if name.isdigit() and int(name) < 64:
            mask |= 1 << int(name)
        elif name.upper() in known:
            mask |= int(known[name.upper()])
        else:
            raise VhostpcError(f"no {what} {name!r}; known: {', '.join(sorted(known))}, or a bit number")
    return mask
