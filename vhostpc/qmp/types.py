"""The types of the commands here, for each QEMU version."""

from __future__ import annotations

from vhostpc.dialect import Dialect
from vhostpc.migration.options import Parameter, parameters
from vhostpc.qmp.schema import (
    BOOL,
    NUMBER,
    STR,
    Array,
    Enum,
    Int,
    Member,
    StrOrNull,
    Struct,
    Type,
    optional,
)

_INT = Int()
_UNSIGNED = {"size": 64, "uint64": 64, "uint32": 32, "uint8": 8}


def _one_of(tag: str, kinds: tuple[tuple[str, Struct], ...]) -> Struct:
    return Struct((Member(tag, Enum(tuple(name for name, _ in kinds))),), tag, kinds)


def _inet(dialect: Dialect) -> Struct:
    return Struct(
        (
            Member("host", STR),
            Member("port", STR),
            Member("numeric", BOOL, True),
            Member("to", Int(16, False), True),
            *optional(("ipv4", "ipv6", "keep-alive", "mptcp"), BOOL),
            *optional(dialect.keep_alive, Int(32, False)),
        )
    )


def _socket(dialect: Dialect) -> Struct:
    return _one_of(
        "type",
        (
            ("inet", _inet(dialect)),
            ("unix", Struct((Member("path", STR), *optional(("abstract", "tight"), BOOL)))),
            ("vsock", Struct((Member("cid", STR), Member("port", STR)))),
            ("fd", Struct((Member("str", STR),))),
        ),
    )


def _channels(dialect: Dialect) -> Member:
    address = _one_of(
        "transport",
        (
            ("socket", _socket(dialect)),
            ("exec", Struct((Member("args", Array(STR)),))),
            ("rdma", _inet(dialect)),
            ("file", Struct((Member("filename", STR), Member("offset", Int(64, False))))),
        ),
    )
    channel = Struct((Member("channel-type", Enum(("main", "cpr"))), Member("addr", address)))
    return Member("channels", Array(channel), True)


_BITMAP = Struct(
    (
        Member("name", STR),
        Member("alias", STR),
        Member("transform", Struct(optional(("persistent",), BOOL)), True),
    )
)
_MAPPING = Array(Struct((Member("node-name", STR), Member("alias", STR), Member("bitmaps", Array(_BITMAP)))))

RUN_STATES = Enum(
    tuple(
        "debug inmigrate internal-error io-error paused postmigrate prelaunch finish-migrate restore-vm "
        "running save-vm shutdown suspended watchdog guest-panicked colo".split()
    )
)
SHUTDOWN_CAUSES = Enum(
    tuple(
        "none host-error host-qmp-quit host-qmp-system-reset host-signal host-ui guest-shutdown guest-reset "
        "guest-panic subsystem-reset snapshot-load".split()
    )
)


def _where_to(dialect: Dialect) -> tuple[Member, ...]:
    return (Member("uri", STR, True), _channels(dialect)) if dialect.channels else (Member("uri", STR),)


def migrate(dialect: Dialect) -> Struct:
    return Struct((*_where_to(dialect), *optional(dialect.migrate_flags, BOOL)))


def incoming(dialect: Dialect) -> Struct:
    stays = optional(("exit-on-error",), BOOL) if dialect.exit_on_error else ()
    return Struct((*_where_to(dialect), *stays))


def recover(_: Dialect) -> Struct:
    return Struct((Member("uri", STR),))


def capability_status(dialect: Dialect) -> Struct:
    features = [(name, "unstable") for name in ("x-colo", "x-ignore-shared")]
    features += [(name, "deprecated") for name in dialect.deprecated_capabilities]
    names = Enum(dialect.capabilities, tuple(features))
    return Struct((Member("capability", names), Member("state", BOOL)))


def parameter(row: Parameter) -> Type:
    if row.kind in _UNSIGNED:
        return Int(_UNSIGNED[row.kind], False)
    if row.kind == "bool":
        return BOOL
    if row.kind == "enum":
        return Enum(row.values)
    if row.kind == "words":
        return Array(STR)
    return StrOrNull() if row.kind == "text" else _MAPPING


def parameter_set(dialect: Dialect, *, result: bool = False) -> Struct:
    """All parameters, each optional; in a result, strings are never null, despite the type."""
    never_null = result and not dialect.null_parameters
    return Struct(
        tuple(
            Member(
                row.name,
                STR if never_null and row.kind == "text" else parameter(row),
                True,
                ("unstable",) if row.unstable else (),
            )
            for row in parameters(dialect).values()
        )
    )


def status(dialect: Dialect) -> Enum:
    return Enum(dialect.statuses)


def run_status(dialect: Dialect) -> Struct:
    single = (Member("singlestep", BOOL),) if dialect.singlestep else ()
    return Struct((Member("running", BOOL), *single, Member("status", RUN_STATES)))


VERSION = Struct(
    (
        Member("qemu", Struct(tuple(Member(n, _INT) for n in ("major", "minor", "micro")))),
        Member("package", STR),
    )
)


_NS = Int(64, False)
_LATENCIES = (
    Member("postcopy-latency", _NS, True, ("unstable",)),
    Member("postcopy-latency-dist", Array(_NS), True, ("unstable",)),
    Member("postcopy-vcpu-latency", Array(_NS), True, ("unstable",)),
    Member("postcopy-non-vcpu-latency", _NS, True, ("unstable",)),
)


def info(dialect: Dialect) -> Struct:
    """``query-migrate``: the fields that are returned here."""
    numbers = (
        "transferred remaining total duplicate skipped normal normal-bytes dirty-pages-rate mbps "
        "dirty-sync-count postcopy-requests page-size multifd-bytes pages-per-second precopy-bytes "
        "downtime-bytes postcopy-bytes dirty-sync-missed-zero-copy"
    ).split()
    ram = Struct(
        tuple(
            Member(name, NUMBER if name == "mbps" else _INT)
            for name in numbers
            if name != "skipped" or dialect.skipped_pages
        )
    )
    return Struct(
        (
            Member("status", status(dialect), True),
            Member("ram", ram, True),
            *optional(("remaining",) if dialect.remaining else (), _INT),
            *optional(("total-time", "expected-downtime", "downtime", "setup-time"), _INT),
            Member("error-desc", STR, True),
            Member("blocked-reasons", Array(STR), True),
            Member("postcopy-blocktime", Int(32, False), True),
            Member("postcopy-vcpu-blocktime", Array(Int(32, False)), True),
            *(_LATENCIES if dialect.latency else ()),
            Member("socket-address", Array(_socket(dialect)), True),
        )
    )
