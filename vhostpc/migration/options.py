"""Capabilities and parameters of a migration: QEMU's names, defaults, ranges, and its words of refusal.

Options in the table that this package does not implement are refused, never ignored.
(The parameters announce-* and block-bitmap-mapping are about devices that no machine here has.)
Source: QEMU, docs/devel/migration and its QMP reference; defaults and sentences as recorded from 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from vhostpc.dialect import DEFAULT, DIALECTS, Compat, Dialect
from vhostpc.errors import MigrationRefused
from vhostpc.units import TARGET_PAGE

SUPPORTED = frozenset(
    {"events", "postcopy-ram", "postcopy-preempt", "return-path", "postcopy-blocktime", "late-block-activate"}
)
"""Capabilities that can be switched on. (late-block-activate is about block devices, which we have none of.)"""

IN_PROGRESS = "There's a migration process in progress"

_WITH_SNAPSHOT = {
    *("background-snapshot", "zero-blocks", "events", "block", "x-ignore-shared", "postcopy-preempt"),
    *("switchover-ack", "dirty-limit", "mapped-ram"),
}
_NEEDS = (
    ("zero-copy-send", "multifd", "Zero copy only available for non-compressed non-TLS multifd migration"),
    ("postcopy-preempt", "postcopy-ram", "Postcopy preempt requires postcopy-ram"),
    ("switchover-ack", "return-path", "Capability 'switchover-ack' requires capability 'return-path'"),
)


def unknown_value(name: str, value: str) -> str:
    """QEMU's sentence for a value that an enumeration does not have."""
    return f"Parameter '{name}' does not accept value '{value}'"


def check_capabilities(wanted: set[str], before: set[str], dialect: Dialect) -> None:
    """Refuse a set of capabilities that QEMU refuses, or that includes one that is not implemented here."""
    _check_needs(dialect.needs, wanted)
    if "background-snapshot" in wanted:
        for name in dialect.capabilities:
            if name in wanted and name not in _WITH_SNAPSHOT:
                raise MigrationRefused(f"Background-snapshot is not compatible with {name}")
    for one, other, text in dialect.conflicts:
        if one in wanted and other in wanted:
            raise MigrationRefused(text)
    _check_needs(_NEEDS, wanted)
    if "dirty-limit" in wanted:
        raise MigrationRefused("dirty-limit requires KVM with accelerator property 'dirty-ring-size' set")
    for name in dialect.capabilities:
        if name in wanted - before and name not in SUPPORTED:
            raise MigrationRefused(unknown_value("capability", name))


def _check_needs(needs: tuple[tuple[str, str, str], ...], wanted: set[str]) -> None:
    for one, other, text in needs:
        if one in wanted and other not in wanted:
            raise MigrationRefused(text)


# Parameters

Kind = Literal["size", "uint64", "uint32", "uint8", "bool", "text", "enum", "mapping", "words"]
Check = Callable[[Any, Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Parameter:
    """One parameter. ``kind``: how its value is read; ``check``: the expected values, as QEMU names them in a
    refusal.

    ``accepted``: the values of an enumeration (or of a switch) that are implemented; others of ``values`` are refused.
    """

    name: str
    kind: Kind
    default: Any
    check: Check | None = None
    unit: str = ""
    values: tuple[str, ...] = ()
    accepted: tuple[Any, ...] | None = None
    unstable: bool = False


def _between(low: int, high: int, text: str) -> Check:
    return lambda value, _: None if low <= value <= high else text


def _value(low: int, high: int) -> Check:
    return _between(low, high, f"expects a value between {low} and {high}")


def _integer(low: int, high: int) -> Check:
    return _between(low, high, f"expects an integer in the range of {low} to {high}")


def _max_throttle(value: int, now: Mapping[str, Any]) -> str | None:
    if now["cpu-throttle-initial"] <= value <= 99:
        return None
    return "expects an integer in the range of {initial} to 99"


def _cache(value: int, _: Mapping[str, Any]) -> str | None:
    if value >= TARGET_PAGE and value & (value - 1) == 0:
        return None
    return "expects a power of two no less than the target page size"


def _chunk(value: int, _: Mapping[str, Any]) -> str | None:
    if 1 << 20 <= value <= 1 << 30 and value & (value - 1) == 0:
        return None
    return "expects a power of 2 in the range 1MiB to 1024MiB"


_DOWNTIME = "expects an integer in the range of 0 to (2000 * 1000) ms"

# Of all versions.
_PARAMETERS = (
    Parameter("announce-initial", "size", 50, _value(0, 100000), "ms"),
    Parameter("announce-max", "size", 550, _value(0, 100000), "ms"),
    Parameter("announce-rounds", "size", 5, _value(0, 1000)),
    Parameter(
        "announce-step",
        "size",
        100,
        _between(1, 10000, "expects a value between 0 and 10000"),
        "ms",
    ),
    Parameter("compress-level", "uint8", 1, _value(0, 9)),
    Parameter("compress-threads", "uint8", 8, _value(1, 255)),
    Parameter("compress-wait-thread", "bool", True),
    Parameter("decompress-threads", "uint8", 2, _value(1, 255)),
    Parameter("throttle-trigger-threshold", "uint8", 50, _integer(1, 100)),
    Parameter("cpu-throttle-initial", "uint8", 20, _integer(1, 99)),
    Parameter("cpu-throttle-increment", "uint8", 10, _integer(1, 99)),
    Parameter("cpu-throttle-tailslow", "bool", False),
    Parameter("tls-creds", "text", ""),
    Parameter("tls-hostname", "text", ""),
    Parameter("tls-authz", "text", ""),
    Parameter("max-bandwidth", "size", 128 << 20, unit="bytes/second"),
    Parameter("avail-switchover-bandwidth", "size", 0, unit="bytes/second"),
    Parameter("downtime-limit", "uint64", 300, _between(0, 2_000_000, _DOWNTIME), "ms"),
    Parameter("x-checkpoint-delay", "uint32", 20000, unit="ms", unstable=True),
    Parameter("block-incremental", "bool", False, accepted=(False,)),
    Parameter("multifd-channels", "uint8", 2, _value(1, 255)),
    Parameter("xbzrle-cache-size", "size", 64 << 20, _cache, "bytes"),
    Parameter("max-postcopy-bandwidth", "size", 0),
    Parameter("max-cpu-throttle", "uint8", 99, _max_throttle),
    Parameter("multifd-compression", "enum", "none", values=("none", "zlib", "zstd")),
    Parameter("multifd-zlib-level", "uint8", 1, _value(0, 9)),
    Parameter("multifd-qatzip-level", "uint8", 1, _value(1, 9)),
    Parameter("multifd-zstd-level", "uint8", 1, _value(0, 20)),
    Parameter("block-bitmap-mapping", "mapping", None),
    Parameter(
        "x-vcpu-dirty-limit-period",
        "uint64",
        1000,
        _value(1, 1000),
        "ms",
        unstable=True,
    ),
    Parameter(
        "vcpu-dirty-limit",
        "uint64",
        1,
        _between(1, (1 << 64) - 1, "must be greater than 1 MB/s"),
        "MB/s",
    ),
    Parameter(
        "mode",
        "enum",
        "normal",
        accepted=("normal",),
    ),
    Parameter("zero-page-detection", "enum", "multifd", values=("none", "legacy", "multifd")),
    Parameter("direct-io", "bool", False, accepted=(False,)),
    # For the mode cpr-exec alone, which is not implemented.
    Parameter("cpr-exec-command", "words", []),
    Parameter("x-rdma-chunk-size", "size", 1 << 20, _chunk, "bytes", unstable=True),
)
_REFUSED = {"direct-io": "No build-time support for direct-io"}


_BY_NAME = {row.name: row for row in _PARAMETERS}


@cache
def parameters(dialect: Dialect) -> dict[str, Parameter]:
    """The parameters of that version, by name, in QEMU's order."""
    own: dict[str, dict[str, Any]] = {
        "mode": {"values": dialect.modes},
        "max-postcopy-bandwidth": {"unit": dialect.postcopy_bandwidth_unit},
    }
    return {name: replace(_BY_NAME[name], **own.get(name, {})) for name in dialect.parameters}


@dataclass
class Options:
    """The capabilities that are on and the parameters' values of one endpoint."""

    compat: Compat = DEFAULT
    on: set[str] = field(default_factory=set)
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = {p.name: p.default for p in parameters(self.dialect).values()} | self.values

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.compat]

    def __contains__(self, capability: str) -> bool:
        return capability in self.on

    def __getitem__(self, parameter: str) -> Any:
        return self.values[parameter]

    def capabilities(self) -> list[tuple[str, bool]]:
        return [(name, name in self.on) for name in self.dialect.capabilities]

    def set_capabilities(
        self, changes: Iterable[tuple[str, bool]], *, busy: bool, listened: bool = False
    ) -> None:
        """Set all of them or none. ``busy``: a migration is in progress; ``listened``: a machine is waited for.

        Raises MigrationRefused.
        """
        if busy:
            raise MigrationRefused(IN_PROGRESS)
        wanted = set(self.on)
        for name, state in changes:
            if name not in self.dialect.capabilities:
                raise MigrationRefused(unknown_value("capability", name))
            (wanted.add if state else wanted.discard)(name)
        check_capabilities(wanted, self.on, self.dialect)
        if listened and self.dialect.preempt_before_incoming and "postcopy-preempt" in wanted - self.on:
            raise MigrationRefused("Postcopy preempt must be set before incoming starts")
        self.on = wanted

    def set_parameters(self, changes: Mapping[str, Any]) -> None:
        """Set all of them or none; also while a migration runs. Raises MigrationRefused."""
        known = parameters(self.dialect)
        ignored = self.dialect.ignored_parameters
        changes = {name: value for name, value in changes.items() if name not in ignored}
        now = {**self.values, **changes}
        for name, row in known.items():
            if name not in changes:
                continue
            value = changes[name]
            text = row.check(value, now) if row.check else None
            if text:
                words = text.format(initial=self.dialect.spelt("cpu-throttle-initial"))
                raise MigrationRefused(f"{self.dialect.subject(name)} {words}")
            if row.accepted is not None and value not in row.accepted:
                raise MigrationRefused(_REFUSED.get(name) or unknown_value(name, _spelt(value)))
        self.values = now

    def check_start(self) -> None:
        """The checks that QEMU makes when a migration starts. Raises MigrationRefused."""
        if self.values["tls-creds"]:
            raise MigrationRefused(f"No TLS credentials with id '{self.values['tls-creds']}'")


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
