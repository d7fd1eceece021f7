"""Capabilities and parameters of a migration: QEMU's names, defaults, ranges, and its words of refusal.

What the table names and this package does not do can not be switched on: it is refused, never ignored.
(The parameters announce-* and block-bitmap-mapping are about devices that no machine here has.)
Source: QEMU, docs/devel/migration and its QMP reference; defaults and sentences as recorded from 7.2 and 10.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vhostpc.errors import MigrationRefused

Compat = Literal["7.2", "10.0"]
"""The QEMU whose manners are kept where the two differ."""

_COMMON = (
    "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block "
    "return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate "
    "x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt"
).split()
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "7.2": tuple(_COMMON),
    "10.0": (
        *(name for name in _COMMON if name not in ("compress", "block")),
        "switchover-ack",
        "dirty-limit",
        "mapped-ram",
    ),
}
"""Names by version, in QEMU's order."""

SUPPORTED = frozenset({"events", "postcopy-ram", "return-path", "late-block-activate"})
"""Capabilities that can be switched on. (late-block-activate is about block devices, which we have none of.)"""

IN_PROGRESS = "There's a migration process in progress"

# (capability, its partner, the refusal), looked at in QEMU's order.
_CONFLICTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "7.2": (
        ("postcopy-ram", "x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
        ("compress", "multifd", "Multifd is not compatible with compress"),
    ),
    "10.0": (
        ("postcopy-ram", "x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
        ("postcopy-ram", "multifd", "Postcopy is not yet compatible with multifd"),
        ("multifd", "xbzrle", "Multifd is not compatible with xbzrle"),
        ("mapped-ram", "xbzrle", "Mapped-ram migration is incompatible with xbzrle"),
        ("mapped-ram", "postcopy-ram", "Mapped-ram migration is incompatible with postcopy"),
        (
            "auto-converge",
            "dirty-limit",
            "dirty-limit conflicts with auto-converge either of then available currently",
        ),
    ),
}
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


def check_capabilities(wanted: set[str], before: set[str], compat: Compat) -> None:
    """Refuse a set of capabilities that QEMU refuses, or that has one that we do not do."""
    if "background-snapshot" in wanted:
        for name in CAPABILITIES[compat]:
            if name in wanted and name not in _WITH_SNAPSHOT:
                raise MigrationRefused(f"Background-snapshot is not compatible with {name}")
    for one, other, text in _CONFLICTS[compat]:
        if one in wanted and other in wanted:
            raise MigrationRefused(text)
    for one, other, text in _NEEDS:
        if one in wanted and other not in wanted:
            raise MigrationRefused(text)
    if "dirty-limit" in wanted:
        raise MigrationRefused("dirty-limit requires KVM with accelerator property 'dirty-ring-size' set")
    for name in CAPABILITIES[compat]:
        if name in wanted - before and name not in SUPPORTED:
            raise MigrationRefused(unknown_value("capability", name))


# Parameters

Kind = Literal["size", "uint64", "uint32", "uint8", "bool", "text", "enum", "mapping"]
Check = Callable[[Any, Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Parameter:
    """One parameter. ``kind``: how its value is read; ``check``: what is wrong with a value, in QEMU's words.

    ``accepted``: the values of an enumeration (or of a switch) that we do; others of ``values`` are refused.
    """

    name: str
    kind: Kind
    default: Any
    check: Check | None = None
    unit: str = ""
    values: tuple[str, ...] = ()
    accepted: tuple[Any, ...] | None = None
    only: Compat | None = None
    unstable: bool = False


def _between(low: int, high: int, text: str) -> Check:
    return lambda value, _: None if low <= value <= high else text


def _value(name: str, low: int, high: int) -> Check:
    return _between(low, high, f"Parameter '{name}' expects a value between {low} and {high}")


def _integer(name: str, low: int, high: int) -> Check:
    return _between(low, high, f"Parameter '{name}' expects an integer in the range of {low} to {high}")


def _max_throttle(value: int, now: Mapping[str, Any]) -> str | None:
    if now["cpu-throttle-initial"] <= value <= 99:
        return None
    return "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"


def _cache(value: int, _: Mapping[str, Any]) -> str | None:
    if value >= 4096 and value & (value - 1) == 0:
        return None
    return "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"


_DOWNTIME = "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"

# In the order of QEMU's schema.
_PARAMETERS = (
    Parameter("announce-initial", "size", 50, _value("announce_initial", 0, 100000), "ms"),
    Parameter("announce-max", "size", 550, _value("announce_max", 0, 100000), "ms"),
    Parameter("announce-rounds", "size", 5, _value("announce_rounds", 0, 1000)),
    Parameter(
        "announce-step",
        "size",
        100,
        _between(1, 10000, "Parameter 'announce_step' expects a value between 0 and 10000"),
        "ms",
    ),
    Parameter("compress-level", "uint8", 1, _value("compress_level", 0, 9), only="7.2"),
    Parameter("compress-threads", "uint8", 8, _value("compress_threads", 1, 255), only="7.2"),
    Parameter("compress-wait-thread", "bool", True, only="7.2"),
    Parameter("decompress-threads", "uint8", 2, _value("decompress_threads", 1, 255), only="7.2"),
    Parameter("throttle-trigger-threshold", "uint8", 50, _integer("throttle_trigger_threshold", 1, 100)),
    Parameter("cpu-throttle-initial", "uint8", 20, _integer("cpu_throttle_initial", 1, 99)),
    Parameter("cpu-throttle-increment", "uint8", 10, _integer("cpu_throttle_increment", 1, 99)),
    Parameter("cpu-throttle-tailslow", "bool", False),
    Parameter("tls-creds", "text", ""),
    Parameter("tls-hostname", "text", ""),
    Parameter("tls-authz", "text", ""),
    Parameter("max-bandwidth", "size", 128 << 20, unit="bytes/second"),
    Parameter("avail-switchover-bandwidth", "size", 0, unit="bytes/second", only="10.0"),
    Parameter("downtime-limit", "uint64", 300, _between(0, 2_000_000, _DOWNTIME), "ms"),
    Parameter("x-checkpoint-delay", "uint32", 20000, unit="ms", unstable=True),
    Parameter("block-incremental", "bool", False, accepted=(False,), only="7.2"),
    Parameter("multifd-channels", "uint8", 2, _value("multifd_channels", 1, 255)),
    Parameter("xbzrle-cache-size", "size", 64 << 20, _cache, "bytes"),
    Parameter("max-postcopy-bandwidth", "size", 0),
    Parameter("max-cpu-throttle", "uint8", 99, _max_throttle),
    Parameter("multifd-compression", "enum", "none", values=("none", "zlib", "zstd")),
    Parameter("multifd-zlib-level", "uint8", 1, _value("multifd_zlib_level", 0, 9)),
    Parameter("multifd-qatzip-level", "uint8", 1, _value("multifd_qatzip_level", 1, 9), only="10.0"),
    Parameter("multifd-zstd-level", "uint8", 1, _value("multifd_zstd_level", 0, 20)),
    Parameter("block-bitmap-mapping", "mapping", None),
    Parameter(
        "x-vcpu-dirty-limit-period",
        "uint64",
        1000,
        _value("x-vcpu-dirty-limit-period", 1, 1000),
        "ms",
        only="10.0",
        unstable=True,
    ),
    Parameter(
        "vcpu-dirty-limit",
        "uint64",
        1,
        _between(1, (1 << 64) - 1, "Parameter 'vcpu_dirty_limit' must be greater than 1 MB/s"),
        "MB/s",
        only="10.0",
    ),
    Parameter(
        "mode",
        "enum",
        "normal",
        values=("normal", "cpr-reboot", "cpr-transfer"),
        accepted=("normal",),
        only="10.0",
    ),
    Parameter("zero-page-detection", "enum", "multifd", values=("none", "legacy", "multifd"), only="10.0"),
    Parameter("direct-io", "bool", False, accepted=(False,), only="10.0"),
)
# QEMU 7.2 takes these levels and keeps the old ones.
_IDLE_IN_72 = {"multifd-zlib-level", "multifd-zstd-level"}
_REFUSED = {"direct-io": "No build-time support for direct-io"}


def parameters(compat: Compat) -> dict[str, Parameter]:
    """The parameters of that version, by name, in QEMU's order."""
    return {p.name: p for p in _PARAMETERS if p.only in (None, compat)}


@dataclass
class Options:
    """The capabilities that are on and the parameters' values of one endpoint."""

    compat: Compat = "10.0"
    on: set[str] = field(default_factory=set)
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = {p.name: p.default for p in parameters(self.compat).values()} | self.values

    def __contains__(self, capability: str) -> bool:
        return capability in self.on

    def __getitem__(self, parameter: str) -> Any:
        return self.values[parameter]

    def capabilities(self) -> list[tuple[str, bool]]:
        return [(name, name in self.on) for name in CAPABILITIES[self.compat]]

    def set_capabilities(self, changes: Iterable[tuple[str, bool]], *, busy: bool) -> None:
        """All of them or none. ``busy``: a migration is under way. Raises MigrationRefused."""
        if busy:
            raise MigrationRefused(IN_PROGRESS)
        wanted = set(self.on)
        for name, state in changes:
            if name not in CAPABILITIES[self.compat]:
                raise MigrationRefused(unknown_value("capability", name))
            (wanted.add if state else wanted.discard)(name)
        check_capabilities(wanted, self.on, self.compat)
        self.on = wanted

    def set_parameters(self, changes: Mapping[str, Any]) -> None:
        """All of them or none; also while a migration runs. Raises MigrationRefused."""
        known = parameters(self.compat)
        if self.compat == "7.2":
            changes = {name: value for name, value in changes.items() if name not in _IDLE_IN_72}
        now = {**self.values, **changes}
        for name, row in known.items():
            if name not in changes:
                continue
            value = changes[name]
            text = row.check(value, now) if row.check else None
            if text:
                raise MigrationRefused(text)
            if row.accepted is not None and value not in row.accepted:
                raise MigrationRefused(_REFUSED.get(name) or unknown_value(name, _spelt(value)))
        self.values = now

    def check_start(self) -> None:
        """What QEMU looks at when a migration starts. Raises MigrationRefused."""
        if self.values["tls-creds"]:
            raise MigrationRefused(f"No TLS credentials with id '{self.values['tls-creds']}'")


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
