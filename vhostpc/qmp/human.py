"""The text monitor: a line in, text out, in QEMU's words. Every command is built on one of QMP's.

Source: QEMU's manual (monitor); texts as recorded from 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vhostpc.migration.options import Options, Parameter, parameters
from vhostpc.migration.runstate import RunState
from vhostpc.migration.status import BUSY, Status
from vhostpc.qmp import sizes
from vhostpc.qmp.commands import Session, call
from vhostpc.qmp.line import Arguments, BadLine, Line
from vhostpc.wire.qmp import QmpError

_IN_MIB = ("max-bandwidth", "avail-switchover-bandwidth")
_NO_SIZE = (
    "Parameter '{}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, "
    "mega-, giga-, tera-, peta-\nand exabytes, respectively."
)

UNDER_WAY = BUSY - {Status.POSTCOPY_PAUSED}
"""Statuses in which ``migrate`` without -d goes on waiting."""


Handler = Callable[[Session, Arguments], Awaitable[str]]


@dataclass(frozen=True)
class _Row:
    names: str
    arguments: str  # as help shows them
    help: str
    handler: Handler
    types: tuple[str, ...] = ()  # as line.py says
    newer: tuple[str, ...] = ()  # where a dialect's are others


async def _set_capability(session: Session, given: Arguments) -> str:
    name, state = given.values
    if name not in dict(session.endpoint.options.capabilities()):
        raise QmpError(f"invalid parameter value: {name}")
    one = {"capability": name, "state": state}
    await call(session, "migrate-set-capabilities", {"capabilities": [one]})
    return ""


async def _set_parameter(session: Session, given: Arguments) -> str:
    name, text = map(str, given.values)
    row = parameters(session.dialect).get(name)
    if row is None:
        raise QmpError(f"invalid parameter value: {name}")
    if row.kind == "mapping":
        raise QmpError("The block-bitmap-mapping parameter can only be set through QMP")
    value: Any = text
    if row.kind == "bool":
        if text not in ("on", "off"):
            raise QmpError(f"Parameter '{name}' expects 'on' or 'off'")
        value = text == "on"
    elif row.kind == "words":
        value = text.split()
    elif row.kind not in ("enum", "text"):
        value = _number(row, text)
    await call(session, "migrate-set-parameters", {name: value})
    return ""


def _number(row: Parameter, text: str) -> int:
    """In QEMU's words for each sort of number. Raises QmpError."""
    if row.kind in ("uint8", "uint32"):
        try:
            number = sizes.unsigned(text)
        except ValueError:
            raise QmpError(f"Parameter '{row.name}' expects uint64") from None
        if number >> int(row.kind.removeprefix("uint")):
            raise QmpError(f"Parameter '{row.name}' expects {row.kind}_t")
        return number
    try:
        # Bandwidths that QEMU's text monitor takes without a suffix are in MiB.
        number = sizes.size(text, "m" if row.name in _IN_MIB else "b")
    except sizes.TooLarge:
        if row.name in _IN_MIB:
            raise QmpError(f"Invalid size {text}") from None
        raise QmpError(f"Value '{text}' is out of range for parameter '{row.name}'") from None
    except ValueError:
        if row.name in _IN_MIB:
            raise QmpError(f"Invalid size {text}") from None
        raise QmpError(_NO_SIZE.format(row.name)) from None
    if number >> 63 and row.name in (*_IN_MIB, "xbzrle-cache-size"):
        raise QmpError(f"Invalid size {text}")
    return number


def _simple(name: str, *arguments: str) -> Handler:
    async def handler(session: Session, given: Arguments) -> str:
        await call(session, name, dict(zip(arguments, given.values, strict=True)))
        return ""

    return handler


async def _migrate(session: Session, given: Arguments) -> str:
    await call(session, "migrate", {"uri": given.values[0], "resume": "r" in given.options})
    if "d" in given.options:
        return ""
    if not session.text:
        return "terminal does not allow synchronous migration, continuing detached\n"
    while (info := session.endpoint.info()).status in UNDER_WAY:
        await session.events.moved()
    # QEMU says it on its standard error, which who asked may not see.
    return f"Error: {info.error_desc}\n" if info.error_desc else ""


async def _info_migrate(session: Session, given: Arguments) -> str:
    """QEMU's lines; behind them what a person can do next, where there is something."""
    advice = session.endpoint.info().advice
    return await _migrate_lines(session, given) + (f"{advice}\n" if advice else "")


async def _migrate_lines(session: Session, given: Arguments) -> str:
    info = await call(session, "query-migrate", {})
    if session.dialect.grouped_info:
        rest = (*session.dialect.globals, *_blocktime_grouped(info)) if given.options else ()
        return "".join(f"{line}\n" for line in (*_grouped(info), *rest))
    lines = list(session.dialect.globals)
    if "status" in info:
        why = f" ({info['error-desc']})" if "error-desc" in info else ""
        lines.append(f"Migration status: {info['status']}{why}")
        lines.append(f"total time: {info.get('total-time', 0)} ms")
    for name, text in (
        ("expected-downtime", "expected downtime"),
        ("downtime", "downtime"),
        ("setup-time", "setup"),
    ):
        if name in info:
            lines.append(f"{text}: {info[name]} ms")
    if ram := info.get("ram"):
        lines += [
            f"transferred ram: {ram['transferred'] >> 10} kbytes",
            f"throughput: {ram['mbps']:.2f} mbps",
            f"remaining ram: {ram['remaining'] >> 10} kbytes",
            f"total ram: {ram['total'] >> 10} kbytes",
            f"duplicate: {ram['duplicate']} pages",
            *([f"skipped: {ram['skipped']} pages"] if "skipped" in ram else []),
            f"normal: {ram['normal']} pages",
            f"normal bytes: {ram['normal-bytes'] >> 10} kbytes",
            f"dirty sync count: {ram['dirty-sync-count']}",
            f"page size: {ram['page-size'] >> 10} kbytes",
            f"multifd bytes: {ram['multifd-bytes'] >> 10} kbytes",
            f"pages-per-second: {ram['pages-per-second']}",
        ]
        for name, text in (
            ("dirty-pages-rate", "dirty pages rate: {} pages"),
            ("postcopy-requests", "postcopy request count: {}"),
            ("precopy-bytes", "precopy ram: {} kbytes"),
            ("downtime-bytes", "downtime ram: {} kbytes"),
            ("postcopy-bytes", "postcopy ram: {} kbytes"),
        ):
            if ram[name]:
                lines.append(text.format(ram[name] >> 10 if name.endswith("bytes") else ram[name]))
    if "postcopy-blocktime" in info:
        lines.append(f"postcopy blocktime: {info['postcopy-blocktime']}")
        lines.append(f"postcopy vcpu blocktime: {_ranges(info['postcopy-vcpu-blocktime'])}")
    return "".join(line + "\n" for line in lines)


def _ranges(numbers: Iterable[int]) -> str:
    """Each number once, in order, neighbours as a range: so QEMU's text monitor writes lists of numbers."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in ranges)


def _size(number: int) -> str:
    """With three digits and a binary prefix, as QEMU's size_to_str."""
    # The next prefix from 1000 of the one before on.
    power = min(max(math.frexp(number / (1000 / 1024))[1] - 1, 0) // 10, 6)
    return f"{number / (1 << 10 * power):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"


_TIMES = (
    ("total", "total-time"),
    ("setup", "setup-time"),
    ("exp_down", "expected-downtime"),
    ("down", "downtime"),
)


def _grouped(info: dict[str, Any]) -> list[str]:
    """``info migrate`` with several numbers on a line."""
    lines = []
    if reasons := info.get("blocked-reasons"):
        lines += ["Outgoing migration blocked:", *(f"  {reason}" for reason in reasons)]
    if "status" in info:
        why = f" ({info['error-desc']})" if "error-desc" in info else ""
        lines.append(f"Status: \t\t{info['status']}{why}")
    if info.get("total-time"):
        told = [f"{word}={info[name]}" for word, name in _TIMES if name in info]
        lines.append(f"Time (ms): \t\t{', '.join(told)}")
    if "remaining" in info:
        lines.append(f"Remaining: \t\t{_size(info['remaining'])}")
    if addresses := info.get("socket-address"):
        lines += ["Sockets: [", *(f"\t{_spelt(address)}" for address in addresses), "]"]
    if ram := info.get("ram"):
        rates = f", dirty={ram['dirty-pages-rate']}" if ram["dirty-pages-rate"] else ""
        others = [f"dirty_syncs={ram['dirty-sync-count']}"]
        if ram["postcopy-requests"]:
            others.append(f"postcopy_req={ram['postcopy-requests']}")
        if ram["downtime-bytes"]:
            others.append(f"downtime_bytes={ram['downtime-bytes']}")
        lines += [
            "RAM info:",
            f"  Throughput (Mbps): \t{ram['mbps']:.2f}",
            f"  Sizes: \t\tpagesize={_size(ram['page-size'])}, total={_size(ram['total'])}",
            f"  Transfers: \t\ttransferred={_size(ram['transferred'])}, remain={_size(ram['remaining'])}",
            f"    Channels: \t\tprecopy={_size(ram['precopy-bytes'])}, multifd={_size(ram['multifd-bytes'])}, "
            f"postcopy={_size(ram['postcopy-bytes'])}",
            f"    Page Types: \tnormal={ram['normal']}, zero={ram['duplicate']}",
            f"  Page Rates (pps): \ttransfer={ram['pages-per-second']}{rates}",
            f"  Others: \t\t{', '.join(others)}",
        ]
    return lines


def _blocktime_grouped(info: dict[str, Any]) -> list[str]:
    """The lines of ``info migrate -a`` about block time."""
    if "postcopy-blocktime" not in info:
        return []
    lines = [
        f"Postcopy Blocktime (ms): {info['postcopy-blocktime']}",
        *_in_tens("Postcopy vCPU Blocktime (ms):", info["postcopy-vcpu-blocktime"]),
    ]
    if "postcopy-latency" in info:
        lines += [
            f"Postcopy Latency (ns): {info['postcopy-latency']}",
            f"Postcopy non-vCPU Latency (ns): {info['postcopy-non-vcpu-latency']}",
            *_in_tens("Postcopy vCPU Latencies (ns):", info["postcopy-vcpu-latency"]),
            "Postcopy Latency Distribution:",
            *(
                f"  [ {_time(1 << power):>8} - {_time(2 << power):>8} ]: {count:>10}"
                for power, count in enumerate(info["postcopy-latency-dist"])
            ),
        ]
    return lines


def _in_tens(title: str, numbers: Sequence[int]) -> list[str]:
    parts = [", ".join(map(str, numbers[at : at + 10])) for at in range(0, len(numbers), 10)]
    told = ",\n  ".join(parts)
    return [title, f" [{told}]"]


def _time(us: int) -> str:
    """In whole units."""
    for unit in ("us", "ms"):
        if us < 1000:
            return f"{us} {unit}"
        us //= 1000
    return f"{us} sec"


def _spelt(address: dict[str, Any]) -> str:
    if address["type"] == "inet":
        return f"tcp:{address['host']}:{address['port']}"
    return f"unix:{address['path']}" if address["type"] == "unix" else f"fd:{address['str']}"


async def _info_capabilities(session: Session, _: Arguments) -> str:
    found = session.endpoint.options.capabilities()
    return "".join(f"{name}: {'on' if on else 'off'}\n" for name, on in found)


async def _info_parameters(session: Session, _: Arguments) -> str:
    lines = []
    rows = parameters(session.dialect)
    for name in session.dialect.parameters_in_text:
        value = session.endpoint.options[name]
        if value is None:
            continue
        if rows[name].kind == "text":
            value = f"'{value}'"
        elif rows[name].kind == "bool":
            value = "on" if value else "off"
        elif rows[name].kind == "words":
            lines.append("".join((f"{name}:", *(f" {word}" for word in value), "\n")))
            continue
        unit = f" {rows[name].unit}" if rows[name].unit else ""
        lines.append(f"{name}: {value}{unit}\n")
    return "".join(lines)


async def _info_status(session: Session, _: Arguments) -> str:
    state = session.endpoint.run_state
    if state is RunState.RUNNING:
        return "VM status: running\n"
    return f"VM status: paused{'' if state is RunState.PAUSED else f' ({state})'}\n"


async def _help(session: Session, given: Arguments) -> str:
    words = Line(str(given.values[0])).strings()
    return "" if words is None else _help_of(session, words)


async def _info_help(session: Session, __: Arguments) -> str:
    return _help_of(session, ["info"])


def _help_of(session: Session, words: list[str]) -> str:
    info = words[:1] == ["info"]
    table = _info_rows(session) if info else _ROWS
    asked = words[: 2 if info else 1]
    if not asked or asked == ["info"]:
        return "".join(_line(row, info=info) for row in table)
    found = _find(table, asked[-1])
    return _line(found, info=info) if found else f"unknown command: '{' '.join(asked)}'\n"


def _find(table: tuple[_Row, ...], name: str) -> _Row | None:
    return next((row for row in table if name in row.names.split("|")), None)


def _line(row: _Row, *, info: bool) -> str:
    prefix = "info " if info else ""
    return f"{prefix}{row.names} {row.arguments} -- {row.help}\n"


_INFO = (
    _Row("migrate", "", "show migration status", _info_migrate),
    _Row("migrate_capabilities", "", "show current migration capabilities", _info_capabilities),
    _Row("migrate_parameters", "", "show current migration parameters", _info_parameters),
    _Row("status", "", "show the current VM status (running|paused)", _info_status),
)
_MIGRATE_ALL = _Row(
    "migrate", "[-a]", "show migration status (-a: all, dump all status)", _info_migrate, ("-a",)
)


def _info_rows(session: Session) -> tuple[_Row, ...]:
    return (_MIGRATE_ALL, *_INFO[1:]) if session.dialect.grouped_info else _INFO


_ROWS = (
    _Row("cont|c", "", "resume emulation", _simple("cont")),
    _Row("help|?", "[cmd]", "show the help", _help, ("S?",)),
    _Row("info", "[subcommand]", "show various information about the system state", _info_help),
    _Row(
        "migrate",
        "[-d] [-r] uri",
        "migrate to URI (using -d to not wait for completion)",
        _migrate,
        ("-d", "-r", "s"),
    ),
    _Row("migrate_cancel", "", "cancel the current VM migration", _simple("migrate_cancel")),
    _Row(
        "migrate_incoming",
        "uri",
        "Continue an incoming migration from an -incoming defer",
        _simple("migrate-incoming", "uri"),
        ("s",),
    ),
    _Row(
        "migrate_pause",
        "",
        "Pause an ongoing migration (postcopy-only)",
        _simple("migrate-pause"),
    ),
    _Row(
        "migrate_recover",
        "uri",
        "Continue a paused incoming postcopy migration",
        _simple("migrate-recover", "uri"),
        ("s",),
    ),
    _Row(
        "migrate_set_capability",
        "capability state",
        "Enable/Disable the usage of a capability for migration",
        _set_capability,
        ("s", "b"),
    ),
    _Row(
        "migrate_set_parameter",
        "parameter value",
        "Set the parameter for migration",
        _set_parameter,
        ("s", "s"),
        ("s", "S"),
    ),
    _Row("migrate_start_postcopy", "", "switch a migration to postcopy", _simple("migrate-start-postcopy")),
    _Row("quit|q", "", "quit the emulator", _simple("quit")),
    _Row("stop|s", "", "stop emulation", _simple("stop")),
)


async def run(session: Session, line: str) -> str:
    """Run a line; its output, with line ends for a terminal."""
    return (await _run(session, line)).replace("\n", "\r\n")


async def _run(session: Session, text: str) -> str:
    line = Line(text)
    name = line.name()
    if not name:
        return ""
    row = _find(_ROWS, name)
    if row is not None and row.names == "info" and line.rest:
        row = _find(_info_rows(session), line.name())
    if row is None:
        return f"unknown command: '{line.read}'\n"
    said = line.read
    try:
        types = row.newer if row.newer and session.dialect.parameter_is_rest else row.types
        return await row.handler(session, line.arguments(row.names, types))
    except BadLine as exc:
        return f'{exc}\nTry "help {said.rstrip()}" for more information\n'
    except QmpError as exc:
        return f"Error: {exc}\n"


_SCHEMES = ("exec:", "fd:", "file:", "tcp:", "unix:")


def complete(options: Options, before: str) -> list[str]:
    """The completions of the last word of a line that begins with ``before``."""
    *words, word = before.lstrip().split(" ")
    words = [one for one in words if one]
    return [one for one in _candidates(options, words) if one.startswith(word)]


def _candidates(options: Options, words: list[str]) -> list[str]:
    names = [name for row in _ROWS for name in row.names.split("|")]
    match words:
        case [] | ["help" | "?"]:
            return names
        case ["info"] | ["help" | "?", "info"]:
            return [row.names for row in _INFO]
        case ["migrate"]:
            return ["-d", "-r", *_SCHEMES]
        case ["migrate", "-d" | "-r"] | ["migrate_incoming" | "migrate_recover"]:
            return [*_SCHEMES]
        case ["migrate_set_capability"]:
            return [name for name, _ in options.capabilities()]
        case ["migrate_set_capability", _]:
            return ["on", "off"]
        case ["migrate_set_parameter"]:
            return [*parameters(options.dialect)]
        case ["migrate_set_parameter", name]:
            row = parameters(options.dialect).get(name)
            if row is None or row.kind not in ("bool", "enum"):
                return []
            return ["on", "off"] if row.kind == "bool" else [*row.values]
    return []
