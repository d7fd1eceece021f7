"""The contents of a stream as ``vhostpc inspect`` collects and prints them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from vhostpc.errors import StreamError
from vhostpc.migration.heads import refusals
from vhostpc.units import in_units, page_sizes
from vhostpc.wire.migration import elements as el
from vhostpc.wire.migration import vmdesc
from vhostpc.wire.migration.ramrec import EndOfSection, RamPage
from vhostpc.wire.migration.split import split_package


@dataclass
class RamSections:
    """Consecutive RAM sections, which are reported in one line."""

    offset: int
    sections: int = 0
    pages: Counter[str] = field(default_factory=Counter)
    ends: bool = False

    def words(self) -> str:
        parts = counted(self.sections, "RAM section")
        last = ", the last one" if self.ends else ""
        return f"{parts}{last}: {pages_in_words(self.pages)}"


def pages_in_words(pages: Counter[str]) -> str:
    return (
        ", ".join(f"{count} {kind}" for kind, count in sorted(pages.items())) + " pages"
        if pages
        else "no page"
    )


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def command_words(event: object) -> str:
    match event:
        case el.Ping(value=value):
            return f"PING {value}"
        case el.PostcopyAdvise(page_sizes=None):
            return "POSTCOPY_ADVISE, not for RAM"
        case el.PostcopyAdvise(page_sizes=sizes, target_page=target):
            return f"POSTCOPY_ADVISE: host pages of {page_sizes(sizes)}, target pages of {page_sizes(target)}"
        case el.RamDiscard(block=block, ranges=ranges):
            total = sum(length for _, length in ranges)
            return f"POSTCOPY_RAM_DISCARD: {in_units(total)} of {block} in {counted(len(ranges), 'range')}"
        case el.BitmapRequest(block=block):
            return f"RECV_BITMAP: {block}"
    names = {
        el.OpenReturnPath: "OPEN_RETURN_PATH",
        el.PostcopyListen: "POSTCOPY_LISTEN",
        el.PostcopyRun: "POSTCOPY_RUN",
        el.EnableColo: "ENABLE_COLO",
        el.PostcopyResume: "POSTCOPY_RESUME",
        el.SwitchoverStart: "SWITCHOVER_START",
    }
    return names[type(event)]  # type: ignore[index]


Tell = Callable[[int, str, str, dict[str, Any]], None]
"""Receives an element: its offset, its kind, words for people, names and values for programs."""


class Report:
    """Feed it events: each element is reported at once. Then ``lines`` or ``as_json`` summarize the stream.

    Nothing is kept for each element: a stream may have any number of them.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.blocks: tuple[el.BlockInfo, ...] = ()
        self.pages: dict[str, Counter[str]] = {}
        self.wrong: el.BadStream | None = None
        self.refused: dict[str, int] = {}
        """Elements that our destination refuses, with the first byte of each."""
        self.doubts: list[int] = []
        """Bytes before which device sections have a second reading."""
        self.trailing = 0
        self._return_path = False
        self._ram: RamSections | None = None

    def take(self, event: el.StreamEvent) -> None:
        """Raises BadStream for a package that is wrong inside."""
        match event:
            case el.SectionPart() | el.SectionEnd():
                if self._ram is None:
                    self._ram = RamSections(event.offset)
                self._ram.sections += 1
                self._ram.ends = isinstance(event, el.SectionEnd)
            case el.RamRun():
                kind = "filled" if event.fill else event.kind.value
                self.pages[event.block][kind] += event.pages
                if self._ram is not None:
                    self._ram.pages[kind] += event.pages
                if event.kind in (el.RunKind.XBZRLE, el.RunKind.COMPRESSED):
                    self._refuse(event, f"RAM pages in the form {event.kind.value!r}")
            case RamPage() | EndOfSection() | el.RamFlush() | el.RamData() | el.Footer():
                pass
            case _:
                self.flush()
                self._element(event)

    def _refuse(self, event: el.At, why: str) -> None:
        self.refused.setdefault(why, event.offset)

    def flush(self) -> None:
        """End the line of RAM sections."""
        ram, self._ram = self._ram, None
        if ram is not None:
            self._row(ram.offset, "ram", ram.words(), sections=ram.sections, pages=dict(ram.pages))

    def _row(self, offset: int, kind: str, words: str, **more: Any) -> None:
        self._tell(offset, kind, words, more)

    def _element(self, event: el.StreamEvent, indent: str = "") -> None:
        if isinstance(event, el.Configuration | el.RamBlocks):
            for why in refusals(event):
                self._refuse(event, why)
        match event:
            case el.Header():
                self._row(event.offset, "header", f"QEVM, version {el.VERSION}", version=el.VERSION)
            case el.Configuration():
                self._configuration(event)
            case el.SectionStart():
                words = f"section {event.section_id}, {event.idstr} version {event.version}"
                self._row(event.offset, "start", words, id=event.section_id, name=event.idstr)
            case el.RamBlocks():
                self.blocks = event.blocks
                self.pages = {block.name: Counter() for block in event.blocks}
                words = f"{len(event.blocks)} of {in_units(event.total)} in all"
                self._row(event.offset, "blocks", words, total=event.total)
            case el.DeviceSection():
                words = (
                    f"{indent}section {event.section_id}, {event.idstr} instance {event.instance} "
                    f"version {event.version}: {len(event.body)} bytes"
                )
                self._row(
                    event.offset,
                    "device",
                    words,
                    id=event.section_id,
                    name=event.idstr,
                    instance=event.instance,
                    version=event.version,
                    size=len(event.body),
                    package=bool(indent),
                )
            case el.Package():
                self._row(event.offset, "package", f"{len(event.blob)} bytes:", size=len(event.blob))
                if not self._return_path:
                    self._refuse(event, "a package, but no return path for page requests was opened")
                found = split_package(event)
                for inner in found.elements:
                    self._element(inner, "  ")
                if found.doubt is not None:
                    self.doubts.append(found.doubt)
            case el.EndOfStream():
                self._row(event.offset, "end", "end of the stream")
            case el.VmDescription():
                self._description(event)
            case _:
                assert isinstance(event, el.At)
                self._return_path = self._return_path or isinstance(event, el.OpenReturnPath)
                if isinstance(event, el.EnableColo):
                    self._refuse(event, "ENABLE_COLO")
                words = command_words(event)
                self._row(
                    event.offset, "command", indent + words, name=words.split(maxsplit=1)[0].rstrip(":,")
                )

    def _configuration(self, event: el.Configuration) -> None:
        words = f"machine {event.machine}"
        more: dict[str, Any] = {"machine": event.machine}
        if event.target_page_bits is not None:
            words += f", target pages of {event.target_page_bits} bits"
            more["target_page_bits"] = event.target_page_bits
        if event.capabilities is not None:
            words += f", capabilities {' '.join(event.capabilities)}"
            more["capabilities"] = list(event.capabilities)
        if event.uuid is not None:
            words += f", UUID {event.uuid.hex()}"
            more["uuid"] = event.uuid.hex()
        self._row(event.offset, "configuration", words, **more)

    def _description(self, event: el.VmDescription) -> None:
        try:
            count = len(vmdesc.parse(event.text))
        except StreamError:
            count = 0
        words = f"{len(event.text)} bytes of JSON about {counted(count, 'device section')}"
        words += ", which do not match" if event.disagrees else ", all with the lengths that it gives"
        self._row(event.offset, "description", words, size=len(event.text), devices=count)
        self.wrong = event.disagrees

    def lines(self) -> Iterator[str]:
        """The lines after the elements."""
        if self.blocks:
            width = max(len(block.name) for block in self.blocks)
            yield ""
            yield "RAM blocks"
            for block in self.blocks:
                more = f", pages of {in_units(block.page_size)}" if block.page_size else ""
                more += f", at {block.guest_address:#x}" if block.guest_address is not None else ""
                yield (
                    f"  {block.name:<{width}}  {in_units(block.length)}{more}: "
                    f"{pages_in_words(self.pages[block.name])}"
                )
        if self.trailing:
            yield ""
            yield f"{self.trailing} bytes follow the end. They are not part of the stream."
        for doubt in self.doubts:
            yield ""
            yield f"The device sections before byte {doubt} have more than one reading."
        if self.refused:
            yield ""
            yield "Our destination refuses this stream:"
            for why, offset in self.refused.items():
                yield f"{offset:>12}  {why}"
        yield ""
        yield f"Wrong: {self.wrong}" if self.wrong else "Nothing wrong."

    def as_json(self) -> dict[str, Any]:
        """All but the elements."""
        wrong = self.wrong and {"offset": self.wrong.offset, "reason": self.wrong.reason}
        return {
            "wrong": wrong,
            "refused": [{"offset": at, "reason": why} for why, at in self.refused.items()],
            "doubts": self.doubts,
            "ram": [
                {
                    "name": block.name,
                    "length": block.length,
                    "page_size": block.page_size,
                    "guest_address": block.guest_address,
                    "pages": dict(self.pages[block.name]),
                }
                for block in self.blocks
            ],
            "trailing": self.trailing,
        }


class Words:
    """Prints words, one line per element."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def tell(self, offset: int, kind: str, words: str, _: dict[str, Any]) -> None:
        self._out.write(f"{offset:>12}  {kind:<13}  {words}\n")

    def end(self, report: Report) -> None:
        self._out.writelines(f"{line}\n" for line in report.lines())


class Json:
    """Prints one JSON object, element by element."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._begun = False

    def tell(self, offset: int, kind: str, _: str, more: dict[str, Any]) -> None:
        before = ",\n" if self._begun else '{\n  "elements": [\n'
        self._begun = True
        self._out.write(f"{before}    {json.dumps({'offset': offset, 'kind': kind, **more})}")

    def end(self, report: Report) -> None:
        rest = json.dumps(report.as_json(), indent=2).removeprefix("{")
        self._out.write(f"\n  ],{rest}\n" if self._begun else f'{{\n  "elements": [],{rest}\n')
