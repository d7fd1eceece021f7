"""The JSON behind a precopy stream: the length, and so the end, of each device section.

A device's entry has ``name``, ``instance_id``, ``version``, ``fields`` (each ``size``, and ``array_len`` when
the array is written once for all) and ``subsections`` (each with a head of 1 byte, its name and a u32); old
devices have ``size`` alone. A field's size includes everything nested in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vhostpc.errors import StreamError
from vhostpc.wire.migration.elements import BadStream, Busy, DeviceSection, Slices, at_once
from vhostpc.wire.migration.split import section_head

MAX_DESCRIPTION = 4 << 20
"""Bytes; QEMU's are some 100 KB. JSON takes many times its length when parsed."""
MAX_VALUES = 200_000
"""Values in it; QEMU's are some thousand. They are parsed in one piece."""
_MAX_DEPTH = 32
_MAX_SIZE = 1 << 40
_PIECE = 2000
"""Sections that are examined in one slice."""


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """One device section: its names, and the bytes of its body."""

    name: str
    instance: int
    version: int | None
    size: int


def _number(entry: dict[str, Any], key: str, default: int | None = None) -> int:
    value = entry.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_SIZE:
        raise StreamError(f"the description has no sensible {key!r} where one belongs")
    return value


def _entries(entry: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = entry.get(key, [])
    if not isinstance(value, list) or not all(isinstance(e, dict) for e in value):
        raise StreamError(f"the description's {key!r} is not a list of objects")
    return value


def _name(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise StreamError(f"the description has no {key!r} where one belongs")
    return value


def _size(entry: dict[str, Any], depth: int = 0) -> int:
    if depth > _MAX_DEPTH:
        raise StreamError("the description is nested too deeply")
    total = sum(_number(f, "size") * (_number(f, "array_len", 1) or 1) for f in _entries(entry, "fields"))
    for sub in _entries(entry, "subsections"):
        name = _name(sub, "vmsd_name").encode("utf-8", "surrogatepass")
        total += 1 + 1 + len(name) + 4 + _size(sub, depth + 1)
    return total


def parse(text: bytes) -> tuple[DeviceDescription, ...]:
    """The device sections in the order of the stream. Raises :class:`~vhostpc.errors.StreamError`."""
    if len(text) > MAX_DESCRIPTION:
        raise StreamError(f"a description of {len(text)} bytes, at most {MAX_DESCRIPTION}")
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise StreamError(f"a description of more than {MAX_VALUES} values")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        raise StreamError("the description is not JSON") from None
    if not isinstance(whole, dict) or "devices" not in whole:
        raise StreamError("the description lists no devices")
    return tuple(
        DeviceDescription(
            _name(entry, "name"),
            _number(entry, "instance_id", 0),
            _number(entry, "version") if "version" in entry else None,
            _number(entry, "size") if "size" in entry else _size(entry),
        )
        for entry in _entries(whole, "devices")
    )


def without(
    devices: Sequence[DeviceDescription], early: Sequence[DeviceSection]
) -> Sequence[DeviceDescription]:
    """The sections after those that came before the pages, which are listed first. Raises BadStream."""
    for device, section in zip(devices, early, strict=False):
        if (device.name, device.instance, device.size) != (
            section.idstr,
            section.instance,
            len(section.body),
        ):
            raise BadStream(
                section.offset,
                f"section {section.idstr!r} instance {section.instance} of {len(section.body)} bytes, where the "
                f"description has {device.name!r} instance {device.instance} of {device.size}",
            )
    return devices[len(early) :]


def split_by(devices: Sequence[DeviceDescription], data: bytes, offset: int) -> list[DeviceSection]:
    """The sections of ``data``, which begins at byte ``offset`` of the stream and must contain nothing else.

    Names, instances, versions and footers are compared. Raises :class:`BadStream`.
    """
    return at_once(split_in_slices(devices, data, offset))


def split_in_slices(
    devices: Sequence[DeviceDescription], data: bytes, offset: int
) -> Slices[list[DeviceSection]]:
    """As :func:`split_by`."""
    out: list[DeviceSection] = []
    at = 0
    for device in devices:
        head = section_head(data, at, offset)
        if (head.idstr, head.instance) != (device.name, device.instance):
            raise BadStream(
                offset + at,
                f"section {head.idstr!r} instance {head.instance}, where the description has "
                f"{device.name!r} instance {device.instance}",
            )
        if device.version is not None and head.version != device.version:
            raise BadStream(
                offset + at,
                f"section {head.idstr!r} of version {head.version}, of {device.version} by the description",
            )
        end = head.body + device.size
        if data[end : end + 5] != b"\x7e" + head.section_id.to_bytes(4, "big"):
            raise BadStream(
                offset + end,
                f"section {head.idstr!r} has no footer behind the {device.size} bytes of its description",
            )
        out.append(head.section(data[head.body : end], offset))
        at = end + 5
        if not len(out) % _PIECE:
            yield Busy.BUSY
    if at != len(data):
        raise BadStream(offset + at, f"{len(data) - at} bytes that the description does not mention")
    return out
