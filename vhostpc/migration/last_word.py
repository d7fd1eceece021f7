"""The last word of a destination that has everything, said again to a source that has not heard it."""

from __future__ import annotations

from vhostpc.errors import ChannelLost
from vhostpc.logs import rationed_logger
from vhostpc.migration.channel import Channel
from vhostpc.migration.link import CHUNK
from vhostpc.pages.ramblock import RamSet
from vhostpc.wire.migration.elements import BadStream, BitmapRequest, PostcopyResume
from vhostpc.wire.migration.return_path import ReceivedBitmap, ResumeAck, Shut
from vhostpc.wire.migration.stream import RamMode, StreamReader

log = rationed_logger(__name__)


async def say_again(channel: Channel, ram: RamSet, lost: StreamReader) -> None:
    """Answer a recovery of which nothing is missing: all pages are here, and the machine runs, or has run.

    The source paused behind its last page, or when the SHUT was lost. It sends no page, and hears SHUT.
    ``lost``: the reader of the link before.
    Raises BadStream, ChannelLost.
    """
    blocks = {block.name: block for block in ram.blocks}
    reader = StreamReader(RamMode.RUNS, continues=lost)
    while not reader.ended:
        data = await channel.receive_some(CHUNK)
        for event in reader.feed(data) if data else reader.eof():
            if isinstance(event, BitmapRequest):
                if event.block not in blocks:
                    raise BadStream(
                        event.offset, f"RECV_BITMAP for RAM block {event.block!r}, which is unknown"
                    )
                block = blocks[event.block]
                await channel.send_all(ReceivedBitmap(block.name, block.received_bitmap()).encode())
            elif isinstance(event, PostcopyResume):
                await channel.send_all(ResumeAck().encode())
        if not data and not reader.ended:
            raise ChannelLost("the source closed the connection before the end")
    await channel.send_all(Shut(0).encode())
    log.info("migration: the source was told once more that everything has arrived")
