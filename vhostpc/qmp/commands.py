"""The commands of QMP: one row each, and its function. QEMU's checks before a migration are here too."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from vhostpc.dialect import Dialect
from vhostpc.errors import is_foreseen, sentence
from vhostpc.logs import rationed_logger
from vhostpc.migration import uri
from vhostpc.migration.options import parameters
from vhostpc.migration.runstate import RunState, check_migrate
from vhostpc.migration.status import BUSY, Status
from vhostpc.qmp import types
from vhostpc.qmp.events import Events
from vhostpc.qmp.monitored import Endpoint
from vhostpc.qmp.schema import ANY, BOOL, NOTHING, STR, Array, Enum, Int, Introspection, Member, Struct, Type
from vhostpc.wire.qmp import NOT_FOUND, QmpError

log = rationed_logger(__name__)

MOST_CELLS = 1 << 16
"""Most cells of a map of memory, since the reply is one line."""


@dataclass
class Session:
    """One client's state. Descriptors it sent are its own until a command takes them over."""

    endpoint: Endpoint
    events: Events
    human: Callable[[Session, str], Awaitable[str]]
    """Runs a line of the text monitor, which stands on the commands here."""
    negotiated: bool = False
    oob: bool = False
    received: list[int] = field(default_factory=list)  # descriptors that no getfd has named yet
    named: dict[str, int] = field(default_factory=dict)
    own_end: bool = False  # the last descriptors that came were connections to this program
    text: bool = False  # a text monitor of its own, where ``migrate`` without -d waits
    leaving: bool = False  # the reply under way is the last: then the program ends

    @property
    def dialect(self) -> Dialect:
        return self.endpoint.options.dialect

    def take_received(self, fds: list[int]) -> None:
        """Descriptors came with a message; those before, which nobody named, are closed. So are connections to this
        program: as long as it holds a client's end of one it cannot see that the client has gone."""
        if fds:
            _close(self.received)
            own = [fd for fd in fds if _leads_here(fd)]
            _close(own)
            self.received = [fd for fd in fds if fd not in own]
            self.own_end = bool(own)

    def close(self) -> None:
        _close([*self.received, *self.named.values()])
        self.received, self.named = [], {}


def _leads_here(fd: int) -> bool:
    """Whether a descriptor is a connection to a socket that this process listens on, a monitor's or a migration's.

    (``own_sockets`` knows ends without a name too, but has to be told of each.)
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # no socket
        return False
    try:
        if sock.family != socket.AF_UNIX or not sock.getpeername():
            return False  # what has no name was not listened on
        peer: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return peer == os.getpid()
    except OSError:  # not connected
        return False
    finally:
        sock.detach()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


Handler = Callable[[Session, dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True)
class Command:
    """One command; ``arguments`` and ``result`` depend on the QEMU version. ``oob``: may run out of band."""

    name: str
    handler: Handler
    arguments: Callable[[Dialect], Struct] = lambda _: NOTHING
    result: Callable[[Dialect], Type] = lambda _: NOTHING
    oob: bool = False


# Handlers


async def _capabilities(session: Session, arguments: dict[str, Any]) -> Any:
    if session.negotiated:
        raise QmpError("Capabilities negotiation is already complete, command ignored", NOT_FOUND)
    session.oob = "oob" in arguments.get("enable", [])
    session.negotiated = True
    return {}


def version(dialect: Dialect) -> dict[str, Any]:
    """The answer of ``query-version`` and the greeting: the QEMU version that is followed, and this program's."""
    major, minor, micro = dialect.version
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": "vhostpc"}


async def _version(session: Session, _: dict[str, Any]) -> Any:
    return version(session.dialect)


async def _commands(_: Session, __: dict[str, Any]) -> Any:
    return [{"name": name} for name in COMMANDS]


async def _schema(session: Session, _: dict[str, Any]) -> Any:
    return schema(session.dialect)


async def _status(session: Session, _: dict[str, Any]) -> Any:
    state = session.endpoint.run_state
    told: dict[str, Any] = {"status": state, "running": state is RunState.RUNNING}
    if session.dialect.singlestep:
        told["singlestep"] = False
    return told


async def _stop(session: Session, _: dict[str, Any]) -> Any:
    await session.endpoint.stop()
    return {}


async def _cont(session: Session, _: dict[str, Any]) -> Any:
    await session.endpoint.cont()
    return {}


async def _quit(session: Session, _: dict[str, Any]) -> Any:
    session.events.shutdown()
    session.leaving = True
    return {}


def _address(session: Session, arguments: dict[str, Any], *, incoming: bool = False) -> uri.Address:
    text, channels = arguments.get("uri"), arguments.get("channels")
    if text is not None and not channels:
        return uri.parse_address(text, session.dialect, incoming=incoming)
    if text is None and channels:
        return uri.from_channels(channels)
    raise QmpError("need either 'uri' or 'channels' argument")


def _with_descriptor(session: Session, address: uri.Address, *, incoming: bool = False) -> uri.Address:
    """An fd address gets the descriptor that a client gave under that name; it is no longer the client's.

    Where a machine comes in, a number is one that this process was started with, as with QEMU.
    """
    if not isinstance(address, uri.Fd) or (incoming and address.name[:1].isdigit()):
        return address
    if address.name not in session.named:
        raise QmpError(f"File descriptor named '{address.name}' has not been found")
    fd = session.named.pop(address.name)
    if not session.dialect.fd_of_file and not _is_channel(fd):
        os.close(fd)
        raise QmpError("fd: migration to a file is not supported. Use file: instead.")
    return uri.Fd(address.name, fd)


def _is_channel(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)


async def _migrate(session: Session, arguments: dict[str, Any]) -> Any:
    endpoint = session.endpoint
    for name in ("blk", "inc"):
        if arguments.get(name):
            raise QmpError("QEMU compiled without old-style (blk/-b, inc/-i) block migration")
    address = _address(session, arguments)
    check_migrate(endpoint.run_state, endpoint.info().status, resume=bool(arguments.get("resume")))
    endpoint.options.check_start()
    if isinstance(address, uri.File) and "postcopy-ram" in endpoint.options:
        raise QmpError("Postcopy requires a migration channel that goes both ways, a file does not")
    await endpoint.migrate(_with_descriptor(session, address), resume=bool(arguments.get("resume")))
    return {}


async def _incoming(session: Session, arguments: dict[str, Any]) -> Any:
    endpoint = session.endpoint
    if endpoint.has_listened:
        raise QmpError("The incoming migration has already been started")
    if endpoint.run_state is not RunState.INMIGRATE:
        raise QmpError("'-incoming' was not specified on the command line")
    address = _address(session, arguments, incoming=True)
    endpoint.options.check_start()
    stays = not arguments.get("exit-on-error", True)
    await endpoint.incoming(_with_descriptor(session, address, incoming=True), exit_on_error=not stays)
    return {}


async def _pause(session: Session, _: dict[str, Any]) -> Any:
    await session.endpoint.pause()
    return {}


async def _recover(session: Session, arguments: dict[str, Any]) -> Any:
    session.endpoint.check_recover()
    address = _address(session, arguments, incoming=True)
    await session.endpoint.recover(_with_descriptor(session, address, incoming=True))
    return {}


async def _cancel(session: Session, _: dict[str, Any]) -> Any:
    await session.endpoint.cancel()
    return {}


async def _start_postcopy(session: Session, _: dict[str, Any]) -> Any:
    endpoint = session.endpoint
    if "postcopy-ram" not in endpoint.options:
        raise QmpError("Enable postcopy with migrate_set_capability before the start of migration")
    if endpoint.run_state is RunState.INMIGRATE or endpoint.info().status is Status.NONE:
        raise QmpError("Postcopy must be started after migration has been started")
    await endpoint.start_postcopy()
    return {}


async def _set_capabilities(session: Session, arguments: dict[str, Any]) -> Any:
    changes = [(item["capability"], item["state"]) for item in arguments["capabilities"]]
    status = session.endpoint.info().status
    comes = session.endpoint.run_state is RunState.INMIGRATE
    if comes and ("postcopy-ram", True) in changes and (why := session.endpoint.postcopy_refusal()):
        raise QmpError(why)
    busy = status in BUSY and not comes
    session.endpoint.options.set_capabilities(
        changes, busy=busy, listened=comes and session.endpoint.has_listened
    )
    return {}


async def _get_capabilities(session: Session, _: dict[str, Any]) -> Any:
    return [{"state": on, "capability": name} for name, on in session.endpoint.options.capabilities()]


async def _set_parameters(session: Session, arguments: dict[str, Any]) -> Any:
    session.endpoint.options.set_parameters(arguments)
    session.endpoint.parameters_changed()
    return {}


async def _get_parameters(session: Session, _: dict[str, Any]) -> Any:
    options = session.endpoint.options
    values = {name: options[name] for name in parameters(session.dialect)}
    return {name: value for name, value in values.items() if value is not None}


async def _info(session: Session, _: dict[str, Any]) -> Any:
    return session.endpoint.info().as_qmp(session.dialect)


async def _report(session: Session, _: dict[str, Any]) -> Any:
    return session.endpoint.report()


async def _trace(session: Session, arguments: dict[str, Any]) -> Any:
    return session.endpoint.trace(arguments.get("from", 0))


async def _map(session: Session, arguments: dict[str, Any]) -> Any:
    cells = arguments.get("cells", 1024)
    if not 1 <= cells <= MOST_CELLS:
        raise QmpError(f"Parameter 'cells' expects a number from 1 to {MOST_CELLS}")
    return session.endpoint.map(cells)


async def _verify(session: Session, _: dict[str, Any]) -> Any:
    return await session.endpoint.verify()


async def _getfd(session: Session, arguments: dict[str, Any]) -> Any:
    if not session.received and session.own_end:
        raise QmpError("The file descriptor is a connection to this program itself")
    if not session.received:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
    fd, *others = session.received
    session.received = []
    _close(others)
    name = arguments["fdname"]
    if name[:1].isdigit():
        os.close(fd)
        raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
    if name in session.named:
        os.close(session.named.pop(name))
    session.named[name] = fd
    return {}


async def _closefd(session: Session, arguments: dict[str, Any]) -> Any:
    name = arguments["fdname"]
    if name not in session.named:
        raise QmpError(f"File descriptor named '{name}' not found")
    os.close(session.named.pop(name))
    return {}


async def _human(session: Session, arguments: dict[str, Any]) -> Any:
    if arguments.get("cpu-index", 0) != 0:
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    return await session.human(session, arguments["command-line"])


_FD_NAME = Struct((Member("fdname", STR),))

_ROWS = (
    Command(
        "qmp_capabilities",
        _capabilities,
        lambda _: Struct((Member("enable", Array(Enum(("oob",))), True),)),
    ),
    Command("query-version", _version, result=lambda _: types.VERSION),
    Command("query-commands", _commands, result=lambda _: Array(Struct((Member("name", STR),)))),
    # The real type describes itself at length; nobody needs it to read the answer.
    Command("query-qmp-schema", _schema, result=lambda _: Array(Struct((Member("name", STR),)))),
    Command("query-status", _status, result=types.run_status),
    Command("stop", _stop),
    Command("cont", _cont),
    Command("quit", _quit),
    Command("migrate", _migrate, types.migrate),
    Command("migrate-incoming", _incoming, types.incoming),
    Command("migrate-pause", _pause, oob=True),
    Command("migrate-recover", _recover, types.recover, oob=True),
    Command("migrate_cancel", _cancel),
    Command("migrate-start-postcopy", _start_postcopy),
    Command(
        "migrate-set-capabilities",
        _set_capabilities,
        lambda dialect: Struct((Member("capabilities", Array(types.capability_status(dialect))),)),
    ),
    Command(
        "query-migrate-capabilities",
        _get_capabilities,
        result=lambda dialect: Array(types.capability_status(dialect)),
    ),
    Command("migrate-set-parameters", _set_parameters, types.parameter_set),
    Command(
        "query-migrate-parameters",
        _get_parameters,
        result=lambda dialect: types.parameter_set(dialect, result=True),
    ),
    Command("query-migrate", _info, result=types.info),
    # Ours, no commands of QEMU.
    Command("x-vhostpc-report", _report, result=lambda _: ANY),
    Command(
        "x-vhostpc-trace",
        _trace,
        lambda _: Struct((Member("from", Int(64, False), True),)),
        lambda _: ANY,
    ),
    Command(
        "x-vhostpc-map",
        _map,
        lambda _: Struct((Member("cells", Int(32, False), True),)),
        lambda _: ANY,
    ),
    Command("x-vhostpc-verify", _verify, result=lambda _: ANY),
    Command("getfd", _getfd, lambda _: _FD_NAME),
    Command("closefd", _closefd, lambda _: _FD_NAME),
    Command(
        "human-monitor-command",
        _human,
        lambda _: Struct((Member("command-line", STR), Member("cpu-index", Int(), True))),
        lambda _: STR,
    ),
)
COMMANDS = {row.name: row for row in _ROWS}


@cache
def _arguments(name: str, dialect: Dialect) -> Struct:
    return COMMANDS[name].arguments(dialect)


@cache
def schema(dialect: Dialect) -> list[dict[str, Any]]:
    """The result of ``query-qmp-schema``."""
    told = Introspection()
    for row in _ROWS:
        told.command(
            row.name, row.arguments(dialect), row.result(dialect), **({"allow-oob": True} if row.oob else {})
        )
    told.event("MIGRATION", Struct((Member("status", types.status(dialect)),)))
    told.event("MIGRATION_PASS", Struct((Member("pass", Int()),)))
    told.event("STOP", NOTHING)
    told.event("RESUME", NOTHING)
    told.event("SHUTDOWN", Struct((Member("guest", BOOL), Member("reason", types.SHUTDOWN_CAUSES))))
    return told.entries


def find(session: Session, name: str, *, out_of_band: bool = False) -> Command:
    """The command of that name, if the session may run it now. Raises QmpError."""
    if not session.negotiated and name != "qmp_capabilities":
        raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", NOT_FOUND)
    if name not in COMMANDS:
        raise QmpError(f"The command {name} has not been found", NOT_FOUND)
    if out_of_band and not COMMANDS[name].oob:
        raise QmpError(f"The command {name} does not support OOB")
    return COMMANDS[name]


async def call(session: Session, name: str, arguments: dict[str, Any], *, out_of_band: bool = False) -> Any:
    """Run a command; its result. Every refusal is a QmpError."""
    command = find(session, name, out_of_band=out_of_band)
    try:
        return await command.handler(session, _arguments(name, session.dialect).check(arguments))
    except QmpError:
        raise
    except Exception as exc:  # a command that fails ends neither the monitor nor the machine
        if not is_foreseen(exc):
            log.error("monitor: %s: %s", name, sentence(exc), exc_info=exc)
        raise QmpError(sentence(exc)) from exc
