"""The answers of a destination to its source: PONGs, bitmaps, the final report.

They leave by the fault service, behind its page requests. Nothing here waits for the source, except the final report.
"""

from __future__ import annotations

import trio

from vhostpc.errors import ChannelLost, is_foreseen, sentence
from vhostpc.logs import rationed_logger
from vhostpc.migration.channel import Channel
from vhostpc.migration.link import IncomingLink
from vhostpc.pages.ramblock import RamSet
from vhostpc.pages.service import FaultService
from vhostpc.wire.migration.elements import BadStream, BitmapRequest, Ping, PostcopyResume
from vhostpc.wire.migration.return_path import Pong, ReceivedBitmap, ResumeAck, Shut

log = rationed_logger(__name__)

MAX_ANSWERS = 64 << 10
"""Bytes of the return path that may wait while a source sends PINGs and reads no answer."""
SHUT_LIMIT = 10.0  # seconds in which the source must take the final report


class Answers:
    """By ``service``, whose return path is the source's. Methods raise ChannelLost where that is broken."""

    def __init__(self, service: FaultService) -> None:
        self._service = service

    def send(self, message: bytes) -> None:
        try:
            self._service.send(message)
        except OSError as e:
            raise _broken(e) from None

    def pong(self, event: Ping) -> None:
        """Raises BadStream, too."""
        if self._service.numbers().outbox_bytes > MAX_ANSWERS:
            raise BadStream(event.offset, "a PING, but the source does not read the answers to earlier ones")
        self.send(Pong(event.value).encode())

    def say_bitmap(self, link: IncomingLink, ram: RamSet, event: BitmapRequest) -> None:
        """Which pages of a block have arrived, in a recovery. Raises BadStream, too."""
        blocks = {block.name: block for block in ram.blocks}
        if event.block not in blocks:
            raise BadStream(event.offset, f"RECV_BITMAP of an unknown RAM block: {event.block!r}")
        if event.block in link.bitmaps_said:
            raise BadStream(event.offset, f"RECV_BITMAP of a RAM block again: {event.block!r}")
        link.bitmaps_said.add(event.block)
        self.send(ReceivedBitmap(event.block, blocks[event.block].received_bitmap()).encode())

    def resume(self, link: IncomingLink, ram: RamSet, event: PostcopyResume) -> None:
        """The source knows what is missing: pages are requested again. Raises BadStream, too."""
        if len(link.bitmaps_said) < len(ram.blocks):
            raise BadStream(
                event.offset, "POSTCOPY_RESUME before the bitmap of every RAM block was asked for"
            )
        try:
            self._service.resume(ResumeAck().encode())
        except OSError as e:
            raise _broken(e) from None

    async def shut(self, channel: Channel) -> None:
        """The final report. The machine is whole here: a source that does not take it changes nothing. Never raises."""
        try:
            with trio.fail_after(SHUT_LIMIT):
                self.send(Shut(0).encode())
                while self._service.numbers().outbox_bytes:
                    await trio.lowlevel.wait_writable(channel.out_fd)
                    self.send(b"")
        except trio.TooSlowError:
            log.warning("migration: the source no longer reads the return path")
        except Exception as error:
            log.warning(
                "migration: the source does not know that everything has arrived: %s",
                sentence(error),
                exc_info=None if is_foreseen(error) else error,
            )


def _broken(error: OSError) -> ChannelLost:
    return ChannelLost(f"the return path to the source broke: {error.strerror}")
