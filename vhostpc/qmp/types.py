"""The types of the commands here, for each QEMU version."""

from __future__ import annotations

from vhostpc.migration.options import CAPABILITIES, Compat, Parameter, parameters
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

_INET = Struct(
    (
        Member("host", STR),
        Member("port", STR),
        Member("numeric", BOOL, True),
        Member("to", Int(16, False), True),
        *optional(("ipv4", "ipv6", "keep-alive", "mptcp"), BOOL),
    )
)
_SOCKET_KINDS = (
    ("inet", _INET),
    ("unix", Struct((Member("path", STR), *optional(("abstract", "tight"), BOOL)))),
    ("vsock", Struct((Member("cid", STR), Member("port", STR)))),
    ("fd", Struct((Member("str", STR),))),
)
_SOCKET = Struct((Member("type", Enum(tuple(k for k, _ in _SOCKET_KINDS))),), "type", _SOCKET_KINDS)
_TRANSPORTS = (
    ("socket", _SOCKET),
    ("exec", Struct((Member("args", Array(STR)),))),
    ("rdma", _INET),
    ("file", Struct((Member("filename", STR), Member("offset", Int(64, False))))),
)
_ADDRESS = Struct((Member("transport", Enum(tuple(k for k, _ in _TRANSPORTS))),), "transport", _TRANSPORTS)
_CHANNEL = Struct((Member("channel-type", Enum(("main", "cpr"))), Member("addr", _ADDRESS)))
_CHANNELS = Member("channels", Array(_CHANNEL), True)

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


def migrate(compat: Compat) -> Struct:
    if compat == "7.2":
        return Struct((Member("uri", STR), *optional(("blk", "inc", "detach", "resume"), BOOL)))
    return Struct((Member("uri", STR, True), _CHANNELS, *optional(("detach", "resume"), BOOL)))


def incoming(compat: Compat) -> Struct:
    if compat == "7.2":
        return Struct((Member("uri", STR),))
    return Struct((Member("uri", STR, True), _CHANNELS, Member("exit-on-error", BOOL, True)))


def capability_status(compat: Compat) -> Struct:
    features = [(name, "unstable") for name in ("x-colo", "x-ignore-shared")]
    if compat != "7.2":
        features.append(("zero-blocks", "deprecated"))
    return Struct((Member("capability", Enum(CAPABILITIES[compat], tuple(features))), Member("state", BOOL)))


def parameter(row: Parameter) -> Type:
    if row.kind in _UNSIGNED:
        return Int(_UNSIGNED[row.kind], False)
    if row.kind == "bool":
        return BOOL
    if row.kind == "enum":
        return Enum(row.values)
    return StrOrNull() if row.kind == "text" else _MAPPING


def parameter_set(compat: Compat, *, result: bool = False) -> Struct:
    """All parameters, each optional; in a result, texts are never null."""
    return Struct(
        tuple(
            Member(
                row.name,
                STR if result and row.kind == "text" else parameter(row),
                True,
                ("unstable",) if row.unstable else (),
            )
            for row in parameters(compat).values()
        )
    )


def status(compat: Compat) -> Enum:
    recover = () if compat == "7.2" else ("postcopy-recover-setup",)
    return Enum(
        (
            *"none setup cancelling cancelled active postcopy-active postcopy-paused".split(),
            *recover,
            *"postcopy-recover completed failed colo pre-switchover device wait-unplug".split(),
        )
    )


def run_status(compat: Compat) -> Struct:
    single = (Member("singlestep", BOOL),) if compat == "7.2" else ()
    return Struct((Member("running", BOOL), *single, Member("status", RUN_STATES)))


VERSION = Struct(
    (
        Member("qemu", Struct(tuple(Member(n, _INT) for n in ("major", "minor", "micro")))),
        Member("package", STR),
    )
)


def info(compat: Compat) -> Struct:
    """``query-migrate``: the fields that are told here."""
    numbers = (
        "transferred remaining total duplicate skipped normal normal-bytes dirty-pages-rate mbps "
        "dirty-sync-count postcopy-requests page-size multifd-bytes pages-per-second precopy-bytes "
        "downtime-bytes postcopy-bytes dirty-sync-missed-zero-copy"
    ).split()
    ram = Struct(
        tuple(
            Member(name, NUMBER if name == "mbps" else _INT)
            for name in numbers
            if name != "skipped" or compat == "7.2"
        )
    )
    return Struct(
        (
            Member("status", status(compat), True),
            Member("ram", ram, True),
            *optional(("total-time", "expected-downtime", "downtime", "setup-time"), _INT),
            Member("error-desc", STR, True),
            Member("blocked-reasons", Array(STR), True),
            Member("socket-address", Array(_SOCKET), True),
        )
    )
