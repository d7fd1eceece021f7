"""The two requests about the inflight region."""

from __future__ import annotations

import logging

from vhostpc.backend.answer import Answer, handles
from vhostpc.backend.state import SessionState
from vhostpc.errors import RemoteProtocolError
from vhostpc.logs import rationed_logger
from vhostpc.memory.inflight import InflightRegion, new_inflight_file, stride_of
from vhostpc.wire.vhost_user import Frame, Inflight, Request

log = rationed_logger(__name__)


@handles(Request.GET_INFLIGHT_FD)
async def get_inflight_fd(session: SessionState, frame: Frame) -> Answer:
    asked = Inflight.unpack(frame.payload)
    device = session.device
    if not asked.queues or not asked.queue_size:
        raise RemoteProtocolError(
            f"GET_INFLIGHT_FD: {asked.queues} queues of {asked.queue_size} entries have no inflight region"
        )
    size, fds = 0, []
    if asked.queues > device.num_queues or asked.queue_size > device.queue_size:
        level = logging.DEBUG if session.told_no_region else logging.WARNING  # once a session
        session.told_no_region = True
        log.log(
            level,
            "%s: no inflight region for %d queues of %d entries: the device has %d of at most %d",
            session.name,
            asked.queues,
            asked.queue_size,
            device.num_queues,
            device.queue_size,
        )
    else:
        # Closed with the frame, when the reply is sent: from then on the file is the front-end's.
        frame.fds.append(new_inflight_file(asked.queues, asked.queue_size))
        size, fds = asked.queues * stride_of(asked.queue_size), frame.fds
    reply = Inflight(size, 0, asked.queues, asked.queue_size).pack()
    return Answer(reply[: len(frame.payload)], tuple(fds))


@handles(Request.SET_INFLIGHT_FD)
async def set_inflight_fd(session: SessionState, frame: Frame) -> None:
    told = Inflight.unpack(frame.payload)
    for vring in session.vrings:
        if vring.running:
            raise RemoteProtocolError(f"SET_INFLIGHT_FD: ring {vring.index} is running")
    old = session.inflight
    session.inflight = InflightRegion(
        session.supply, frame.fds[0], told.offset, told.size, told.queues, told.queue_size
    )
    if old is not None:
        old.close()
