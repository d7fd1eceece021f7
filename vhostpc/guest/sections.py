"""Device sections of our own machine, in QEMU's form: consecutive fields of fixed sizes, and JSON about them.

A section's body has no length of its own, so each field says where it ends: an integer by its size, bytes by the
integer before them. The JSON has for each field its name, its type in QEMU's words and its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vhostpc.errors import StreamError
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.elements import Configuration, DeviceSection

_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8}


@dataclass(frozen=True, slots=True)
class Field:
    """``kind``: an unsigned integer of QEMU's name, or ``buffer``: ``size`` bytes, or as many as ``counted`` says."""

    name: str
    kind: str
    size: int = 0
    counted: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of a section of this name. This program writes ``version``; it knows no older ones."""

    idstr: str
    version: int
    fields: tuple[Field, ...]

    def pack(self, number: int, instance: int, values: Mapping[str, Any]) -> DeviceSection:
        """Section ``number`` of the stream. The sizes of counted buffers are filled in."""
        counts = {f.counted: len(values[f.name]) for f in self.fields if f.counted}
        body = b"".join(
            bytes(values[f.name]).ljust(f.size, b"\0")
            if f.kind == "buffer"
            else (counts[f.name] if f.name in counts else int(values[f.name])).to_bytes(_BYTES[f.kind], "big")
            for f in self.fields
        )
        return DeviceSection(number, self.idstr, instance, self.version, body)

    def unpack(self, section: DeviceSection) -> dict[str, Any]:
        """The fields' values. Raises StreamError: another version, an end too early, bytes left over."""
        what = name_of(section)
        if section.version != self.version:
            newer = "newer" if section.version > self.version else "older"
            raise StreamError(
                f"{what} has version {section.version}, which is {newer} than the one known here, {self.version}"
            )
        values, at = self._read(section)
        if at != len(section.body):
            raise StreamError(f"{what} has {len(section.body) - at} bytes behind its last field")
        return values

    def sizes(self, section: DeviceSection) -> list[int]:
        """Bytes of each field of a section that :meth:`pack` made."""
        values, _ = self._read(section)
        return [len(values[f.name]) if f.kind == "buffer" else _BYTES[f.kind] for f in self.fields]

    def _read(self, section: DeviceSection) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = 0
        for f in self.fields:
            size = _BYTES.get(f.kind) or (values[f.counted] if f.counted else f.size)
            data = section.body[at : at + size]
            if len(data) < size:
                raise StreamError(
                    f"{name_of(section)} ends after {len(section.body)} bytes, inside {f.name!r}"
                )
            values[f.name] = data if f.kind == "buffer" else int.from_bytes(data, "big")
            at += size
        return values, at


MACHINE = Layout(
    "vhostpc-machine",
    1,
    (
        Field("vcpus", "uint32"),
        Field("net_devices", "uint32"),
        # CLOCK_MONOTONIC of the source when the machine stopped: meaningful on the same computer only.
        Field("stopped_ns", "uint64"),
    ),
)
NET = Layout(
    "vhost-user-net",
    1,
    (
        Field("features", "uint64"),
        Field("rx_base", "uint16"),
        Field("tx_base", "uint16"),
        Field("lost_at_switch", "uint64"),
        # Numbers of the frames that were in flight when the machine stopped.
        Field("flying_first", "uint64"),
        Field("flying_end", "uint64"),
        Field("rx_size", "uint32"),
        Field("rx_driver", "buffer", counted="rx_size"),
        Field("tx_size", "uint32"),
        Field("tx_driver", "buffer", counted="tx_size"),
    ),
)
VCPU = Layout("vcpu", 1, (Field("size", "uint32"), Field("state", "buffer", counted="size")))
# QEMU's own: the run state with its NUL, and how many bytes of it count.
GLOBALSTATE = Layout("globalstate", 1, (Field("size", "uint32"), Field("runstate", "buffer", 100)))
LAYOUTS = {layout.idstr: layout for layout in (MACHINE, NET, VCPU, GLOBALSTATE)}


def name_of(section: DeviceSection) -> str:
    return f"section {section.idstr!r} (instance {section.instance})"


def globalstate(number: int, run_state: str) -> DeviceSection:
    text = run_state.encode() + b"\0"
    return GLOBALSTATE.pack(number, 0, {"size": len(text), "runstate": text})


def run_state_of(section: DeviceSection) -> str:
    """Raises StreamError."""
    values = GLOBALSTATE.unpack(section)
    text, nul, _ = values["runstate"].partition(b"\0")
    if not nul or values["size"] != len(text) + 1 or not text.isascii():
        raise StreamError(f"{name_of(section)} does not hold a run state")
    return str(text.decode("ascii"))


def description(configuration: Configuration, sections: Sequence[DeviceSection]) -> bytes:
    """The JSON that follows a precopy stream."""
    name = configuration.machine.encode()
    whole = {
        "configuration": {
            "vmsd_name": "configuration",
            "version": 1,
            "fields": [_entry("len", "uint32", 4), _entry("name", "buffer", len(name))],
        },
        "page_size": TARGET_PAGE,
        "devices": [_device(section) for section in sections],
    }
    return json.dumps(whole).encode()


def _device(section: DeviceSection) -> dict[str, Any]:
    layout = LAYOUTS[section.idstr]
    return {
        "name": section.idstr,
        "instance_id": section.instance,
        "vmsd_name": section.idstr,
        "version": section.version,
        "fields": [
            _entry(f.name, f.kind, size) for f, size in zip(layout.fields, layout.sizes(section), strict=True)
        ],
    }


def _entry(name: str, kind: str, size: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "size": size}
