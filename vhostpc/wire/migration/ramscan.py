"""The RAM section's bodies: the list of blocks, and records as runs of pages or page by page.

Generators that take from a :class:`Buffer` and yield None when they need more bytes. ``ramrec`` models the C loader;
this module also knows further records of precopy (XBZRLE, compressed).
"""

from __future__ import annotations

import struct
from collections.abc import Generator

from vhostpc.units import TARGET_PAGE, in_units
from vhostpc.units import page_sizes as in_words
from vhostpc.wire.buffer import Buffer
from vhostpc.wire.migration.elements import (
    BadStream,
    BlockInfo,
    RamBlocks,
    RamFlush,
    RamRun,
    RunKind,
    text_of,
)
from vhostpc.wire.migration.ramrec import EndOfSection, RamFlag, RamPage

MAX_BLOCKS = 4096
MAX_COMPRESSED = 4110
_WORD = struct.Struct(">Q")
_FLAGS = TARGET_PAGE - 1
_CONTINUE = int(RamFlag.CONTINUE)
_MARKS = frozenset({int(RamFlag.EOS), int(RamFlag.MULTIFD_FLUSH)})
_KINDS = {
    int(RamFlag.PAGE): RunKind.DATA,
    int(RamFlag.ZERO): RunKind.ZERO,
    int(RamFlag.XBZRLE): RunKind.XBZRLE,
    int(RamFlag.COMPRESS_PAGE): RunKind.COMPRESSED,
}

Records = Generator[RamRun | RamPage | RamFlush | None, None, EndOfSection]


def _need(buffer: Buffer, count: int) -> Generator[None, None, bytes]:
    while len(buffer) < count:
        yield None
    return buffer.take(count)


def _peek(buffer: Buffer, count: int) -> Generator[None, None, int]:
    while len(buffer) < count:
        yield None
    return int.from_bytes(buffer.data[buffer.at : buffer.at + count], "big")


def block_list(
    buffer: Buffer, page_sizes: int | None, ignore_shared: bool
) -> Generator[None, None, RamBlocks]:
    """The body of RAM's first section. ``page_sizes`` as advised: only then can a block name its own."""
    begin = buffer.offset
    (word,) = _WORD.unpack((yield from _need(buffer, 8)))
    if word & _FLAGS != RamFlag.MEM_SIZE:
        raise BadStream(begin, f"RAM begins with flags {word & _FLAGS:#x}, not with its list of blocks")
    total = word & ~_FLAGS
    blocks: dict[str, BlockInfo] = {}
    listed = 0
    while listed < total:
        at = buffer.offset
        size = (yield from _need(buffer, 1))[0]
        if size == 0:
            raise BadStream(at, "a RAM block without a name")
        name = text_of((yield from _need(buffer, size)))
        if name in blocks:
            raise BadStream(at, f"RAM block {name!r} is listed twice")
        if len(blocks) == MAX_BLOCKS:
            raise BadStream(at, f"more than {MAX_BLOCKS} RAM blocks")
        where = buffer.offset
        (length,) = _WORD.unpack((yield from _need(buffer, 8)))
        if length % TARGET_PAGE or length > total - listed:
            raise BadStream(
                where,
                f"RAM block {name!r} of {in_units(length)}, where {in_units(total - listed)} of {in_units(total)} "
                "are left",
            )
        listed += length
        page_size = None
        if page_sizes is not None and page_sizes & ~(2 * TARGET_PAGE - 1):
            page_size = yield from _page_size(buffer, name, page_sizes, last=listed == total)
        address = None
        if ignore_shared:
            (address,) = _WORD.unpack((yield from _need(buffer, 8)))
        blocks[name] = BlockInfo(name, length, page_size, address)
    at = buffer.offset
    (word,) = _WORD.unpack((yield from _need(buffer, 8)))
    flush = word == RamFlag.MULTIFD_FLUSH
    if flush:
        at = buffer.offset
        (word,) = _WORD.unpack((yield from _need(buffer, 8)))
    if word != RamFlag.EOS:
        raise BadStream(at, f"word {word:#x} behind the list of RAM blocks, where its end belongs")
    return RamBlocks(tuple(blocks.values()), flush, offset=begin)


def _page_size(buffer: Buffer, name: str, page_sizes: int, last: bool) -> Generator[None, None, int | None]:
    """The page size that may follow a block's length: its first byte, in the place of a name's length, is 0."""
    if last:
        word = yield from _peek(buffer, 8)
        if word in (RamFlag.EOS, RamFlag.MULTIFD_FLUSH):
            return None
    elif (yield from _peek(buffer, 1)) != 0:
        return None
    at = buffer.offset
    (size,) = _WORD.unpack((yield from _need(buffer, 8)))
    if size & (size - 1) or size <= TARGET_PAGE or not size & page_sizes:
        raise BadStream(
            at, f"RAM block {name!r} with pages of {in_units(size)}, but {in_words(page_sizes)} were advised"
        )
    return int(size)


class RamScanner:
    """Reads records. The block of CONTINUE is kept for the life of the channel."""

    def __init__(self, blocks: tuple[BlockInfo, ...] = ()) -> None:
        self.lengths = {block.name: block.length for block in blocks}
        self._block: str | None = None

    def records(self, buffer: Buffer, pages: bool, postcopy: bool, each: bool = False) -> Records:
        """The records of one section; returns its end. ``pages``: each page with its content; ``each``: each page as
        a run."""
        run: RamRun | None = None
        unpack = _WORD.unpack_from
        while True:
            while len(buffer) < 8:
                yield None
            begin = buffer.offset
            try:
                word = unpack(buffer.data, buffer.at)[0]
                if word in _MARKS:
                    if run is not None:
                        yield run
                        run = None
                    if word == RamFlag.MULTIFD_FLUSH:
                        if postcopy:
                            raise BadStream(begin, "a multifd marker in postcopy")
                        buffer.at += 8
                        yield RamFlush(offset=begin)
                        continue
                    buffer.at += 8
                    return EndOfSection()
                flags = word & _FLAGS
                start = word - flags
                kind = _KINDS.get(flags & ~_CONTINUE)
                if kind is None or (postcopy and kind not in (RunKind.DATA, RunKind.ZERO)):
                    raise BadStream(
                        begin, f"a RAM record with flags {flags:#x}{' in postcopy' if postcopy else ''}"
                    )
                need, block = 8, self._block
                if not flags & _CONTINUE:
                    while len(buffer) < 9:
                        yield None
                    size = buffer.data[buffer.at + 8]
                    need = 9 + size
                    while len(buffer) < need:
                        yield None
                    block = text_of(bytes(buffer.data[buffer.at + 9 : buffer.at + need]))
                    if block not in self.lengths:
                        raise BadStream(begin, f"a RAM page of block {block!r}, which was not listed")
                elif block is None:
                    raise BadStream(begin, "a RAM page that continues a block, but none was named before")
                if start >= self.lengths[block]:
                    raise BadStream(
                        begin,
                        f"a RAM page at {start:#x} of block {block!r}, which has {self.lengths[block]:#x} bytes",
                    )
            except BadStream:
                if run is not None:
                    yield run
                raise
            if kind is RunKind.DATA:
                whole = need + TARGET_PAGE
            elif kind is RunKind.ZERO:
                whole = need + 1
            else:
                try:
                    whole = yield from self._delta(buffer, need, kind)
                except BadStream:
                    if run is not None:
                        yield run
                    raise
            while len(buffer) < whole:
                yield None
            self._block = block
            at = buffer.at
            fill = buffer.data[at + need] if kind is RunKind.ZERO else 0
            buffer.at += whole
            if pages:
                if kind not in (RunKind.DATA, RunKind.ZERO):
                    raise BadStream(
                        begin, f"a RAM page in the form {kind.value!r}, which is not accepted here"
                    )
                data = bytes(buffer.data[at + need : at + whole]) if kind is RunKind.DATA else None
                yield RamPage(block, start, data, fill)
            elif each:
                yield RamRun(block, start, 1, kind, fill, offset=begin)
            elif run is None:
                run = RamRun(block, start, 1, kind, fill, offset=begin)
            else:
                # The hot loop of a large stream: a run's object is made anew only when it ends.
                run, more = self._extend(buffer, run, block, start, kind, fill, begin)
                if more is not None:
                    yield run
                    run = more

    def _extend(
        self, buffer: Buffer, run: RamRun, block: str, start: int, kind: RunKind, fill: int, begin: int
    ) -> tuple[RamRun, RamRun | None]:
        """Join a page to a run, and the complete records after it that continue the run."""
        if (block, kind, fill) != (run.block, run.kind, run.fill) or start != run.start + run.length:
            return run, RamRun(block, start, 1, kind, fill, offset=begin)
        count = run.pages + 1
        if kind in (RunKind.DATA, RunKind.ZERO):
            data, at, end = buffer.data, buffer.at, len(buffer.data)
            size = TARGET_PAGE if kind is RunKind.DATA else 1
            flag = (RamFlag.PAGE if kind is RunKind.DATA else RamFlag.ZERO) | RamFlag.CONTINUE
            most = self.lengths[block] // TARGET_PAGE - run.start // TARGET_PAGE
            want = int(flag) + run.start + count * TARGET_PAGE
            unpack = _WORD.unpack_from
            while (
                at + 8 + size <= end
                and count < most
                and unpack(data, at)[0] == want
                and (size > 1 or data[at + 8] == fill)
            ):
                at += 8 + size
                count += 1
                want += TARGET_PAGE
            buffer.at = at
        return RamRun(run.block, run.start, count, run.kind, run.fill, offset=run.offset), None

    @staticmethod
    def _delta(buffer: Buffer, need: int, kind: RunKind) -> Generator[None, None, int]:
        """Bytes of a record whose payload names its own length."""
        head = 3 if kind is RunKind.XBZRLE else 4
        while len(buffer) < need + head:
            yield None
        at = buffer.at + need
        raw = bytes(buffer.data[at : at + head])
        if kind is RunKind.XBZRLE:
            size, most = int.from_bytes(raw[1:], "big"), TARGET_PAGE
            if raw[0] != 1:
                raise BadStream(buffer.offset, f"an XBZRLE page of encoding {raw[0]}")
        else:
            size, most = int.from_bytes(raw, "big"), MAX_COMPRESSED
        if not 0 < size <= most:
            raise BadStream(buffer.offset, f"a RAM page in the form {kind.value!r} of {size} bytes")
        return need + head + size
