"""The text monitor: a line in, text out, as QEMU words it. Every command stands on one of QMP's.

Source: QEMU's manual (monitor); texts as recorded from 7.2 and 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from vhostpc.migration.options import Compat, parameters
from vhostpc.migration.state import BUSY, Status
from vhostpc.qmp.commands import Session, call
from vhostpc.wire.qmp import QmpError

_SUFFIX = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_NO_SIZE = (
    "Parameter '{}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, "
    "mega-, giga-, tera-, peta-\nand exabytes, respectively."
)
_WORD = re.compile(r'\s*(?:"([^"]*)"|(\S+))')


UNDER_WAY = BUSY - {Status.POSTCOPY_PAUSED}
"""Statuses in which ``migrate`` without -d goes on waiting."""

_OWN_GLOBAL: dict[Compat, str] = {"7.2": "decompress-error-check: on", "10.0": "send-switchover-start: on"}
# QEMU's settings of a machine type, which say how its streams look.
_GLOBALS: dict[Compat, tuple[str, ...]] = {
    compat: (
        *("globals:", "store-global-state: on", "only-migratable: off", "send-configuration: on"),
        *("send-section-footer: on", own, "clear-bitmap-shift: 18"),
    )
    for compat, own in _OWN_GLOBAL.items()
}


class _Usage(Exception):
    pass


@dataclass(frozen=True)
class _Row:
    names: str
    arguments: str  # as help shows them
    help: str
    handler: Callable[[Session, list[str]], Awaitable[str]]
    words: int = 0  # how many must come
    options: str = ""


async def _set_capability(session: Session, words: list[str]) -> str:
    name, state = (*words, "")[:2]
    if state not in ("on", "off"):
        raise _Usage("Expected 'on' or 'off'")
    if name not in dict(session.endpoint.options.capabilities()):
        raise QmpError(f"invalid parameter value: {name}")
    one = {"capability": name, "state": state == "on"}
    await call(session, "migrate-set-capabilities", {"capabilities": [one]})
    return ""


async def _set_parameter(session: Session, words: list[str]) -> str:
    name, text = words
    row = parameters(session.compat).get(name)
    if row is None:
        raise QmpError(f"invalid parameter value: {name}")
    if row.kind == "mapping":
        raise QmpError("The block-bitmap-mapping parameter can only be set through QMP")
    value: Any = text
    if row.kind == "bool":
        if text not in ("on", "off"):
            raise QmpError(f"Parameter '{name}' expects 'on' or 'off'")
        value = text == "on"
    elif row.kind not in ("enum", "text"):
        found = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+(?:\.[0-9]+)?)([bkmgtpe]?)", text, re.IGNORECASE)
        if found is None:
            raise QmpError(_NO_SIZE.format(name))
        # Bandwidths that QEMU's text monitor takes without a suffix are in MiB.
        unit = "m" if name in ("max-bandwidth", "avail-switchover-bandwidth") else "b"
        try:
            number = int(found[1], 16) if found[1].lower().startswith("0x") else float(found[1])
            if found[1].isdigit():
                number = int(found[1])
            value = int(number * _SUFFIX[found[2].lower() or unit])
        except (ValueError, OverflowError):  # thousands of digits
            raise QmpError(_NO_SIZE.format(name)) from None
    await call(session, "migrate-set-parameters", {name: value})
    return ""


def _simple(name: str, *arguments: str) -> Callable[[Session, list[str]], Awaitable[str]]:
    async def handler(session: Session, words: list[str]) -> str:
        await call(session, name, dict(zip(arguments, words, strict=False)))
        return ""

    return handler


async def _migrate(session: Session, words: list[str]) -> str:
    await call(session, "migrate", {"uri": words[-1], "resume": "-r" in words[:-1]})
    if "-d" in words[:-1]:
        return ""
    if not session.text:
        return "terminal does not allow synchronous migration, continuing detached\n"
    while (info := session.endpoint.info()).status in UNDER_WAY:
        await session.events.moved()
    # QEMU says it on its standard error, which who asked may not see.
    return f"Error: {info.error_desc}\n" if info.error_desc else ""


async def _info_migrate(session: Session, _: list[str]) -> str:
    info = await call(session, "query-migrate", {})
    lines = list(_GLOBALS[session.compat])
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
    return "".join(line + "\n" for line in lines)


async def _info_capabilities(session: Session, _: list[str]) -> str:
    found = session.endpoint.options.capabilities()
    return "".join(f"{name}: {'on' if on else 'off'}\n" for name, on in found)


async def _info_parameters(session: Session, _: list[str]) -> str:
    lines = []
    rows = parameters(session.compat)
    hidden = ("multifd-zlib-level", "multifd-zstd-level", "multifd-qatzip-level", "tls-authz")
    names = [name for name in rows if name not in hidden]
    names.remove("max-cpu-throttle")
    names.insert(names.index("tls-creds"), "max-cpu-throttle")
    names.insert(names.index("max-postcopy-bandwidth") + 1, "tls-authz")
    if "zero-page-detection" in names:
        names.remove("zero-page-detection")
        names.insert(names.index("multifd-compression"), "zero-page-detection")
    # xbzrle-cache-size and what follows it come after the compression.
    for name in ("multifd-compression", "zero-page-detection"):
        if name in names:
            names.remove(name)
            names.insert(names.index("xbzrle-cache-size"), name)
    for name in names:
        value = session.endpoint.options[name]
        if value is None:
            continue
        if rows[name].kind == "text":
            value = f"'{value}'"
        elif rows[name].kind == "bool":
            value = "on" if value else "off"
        unit = f" {rows[name].unit}" if rows[name].unit else ""
        lines.append(f"{name}: {value}{unit}\n")
    return "".join(lines)


async def _info_status(session: Session, _: list[str]) -> str:
    state = session.endpoint.run_state
    if state == "running":
        return "VM status: running\n"
    return f"VM status: paused{'' if state == 'paused' else f' ({state})'}\n"


async def _help(_: Session, words: list[str]) -> str:
    table = _INFO if words[:1] == ["info"] else _ROWS
    name = " ".join(words)
    if not words or words == ["info"]:
        return "".join(_line(row, table) for row in table)
    found = next((row for row in table if words[-1] in row.names.split("|")), None)
    return _line(found, table) if found else f"unknown command: '{name}'\n"


def _line(row: _Row, table: tuple[_Row, ...]) -> str:
    prefix = "info " if table is _INFO else ""
    return f"{prefix}{row.names} {row.arguments} -- {row.help}\n"


_INFO = (
    _Row("migrate", "", "show migration status", _info_migrate),
    _Row("migrate_capabilities", "", "show current migration capabilities", _info_capabilities),
    _Row("migrate_parameters", "", "show current migration parameters", _info_parameters),
    _Row("status", "", "show the current VM status (running|paused)", _info_status),
)
_ROWS = (
    _Row("cont|c", "", "resume emulation", _simple("cont")),
    _Row("help|?", "[cmd]", "show the help", _help, -1),
    _Row("info", "[subcommand]", "show various information about the system state", _help, -1),
    _Row(
        "migrate", "[-d] [-r] uri", "migrate to URI (using -d to not wait for completion)", _migrate, 1, "dr"
    ),
    _Row("migrate_cancel", "", "cancel the current VM migration", _simple("migrate_cancel")),
    _Row(
        "migrate_incoming",
        "uri",
        "Continue an incoming migration from an -incoming defer",
        _simple("migrate-incoming", "uri"),
        1,
    ),
    _Row(
        "migrate_set_capability",
        "capability state",
        "Enable/Disable the usage of a capability for migration",
        _set_capability,
        2,
    ),
    _Row("migrate_set_parameter", "parameter value", "Set the parameter for migration", _set_parameter, 2),
    _Row("migrate_start_postcopy", "", "switch a migration to postcopy", _simple("migrate-start-postcopy")),
    _Row("quit|q", "", "quit the emulator", _simple("quit")),
    _Row("stop|s", "", "stop emulation", _simple("stop")),
)


async def run(session: Session, line: str) -> str:
    """Run a line; what it prints, with lines that end as a terminal wants them."""
    return (await _run(session, line)).replace("\n", "\r\n")


async def _run(session: Session, line: str) -> str:
    words = [found[1] if found[1] is not None else found[2] for found in _WORD.finditer(line)]
    if not words:
        return ""
    table: tuple[_Row, ...] = _ROWS
    name, prefix = words.pop(0), ""
    if name == "info" and words:
        table, name, prefix = _INFO, words.pop(0), "info "
    row = next((row for row in table if name in row.names.split("|")), None)
    if row is None:
        return f"unknown command: '{prefix}{name}'\n"
    if row.names == "info":
        return await _help(session, ["info"])
    hint = f'Try "help {prefix}{name}" for more information\n'
    given = [word for word in words if row.options and re.fullmatch("-.+", word)]
    for word in given:
        if word[1:] not in row.options:
            return f"{row.names}: unsupported option {word}\n{hint}"
    plain = [word for word in words if word not in given]
    if row.words >= 0:
        if len(plain) < min(row.words, 1) or (row.handler is _set_parameter and len(plain) < 2):
            return f"{row.names}: string expected\n{hint}"
        if len(plain) > row.words:
            return f"{row.names}: extraneous characters at the end of line\n{hint}"
    try:
        return await row.handler(session, given + plain)
    except _Usage as exc:
        return f"{exc}\n{hint}"
    except QmpError as exc:
        return f"Error: {exc}\n"
