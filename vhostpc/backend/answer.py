"""The result of a request's handler, and the table of handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vhostpc.backend.state import SessionState
from vhostpc.wire.vhost_user import Frame, Request, pack_u64


@dataclass(frozen=True)
class Answer:
    """A reply: payload and descriptors (which stay the handler's).

    ``failed``: the request could not be done. ``always``: sent even if no ack was requested.
    """

    payload: bytes = b""
    fds: tuple[int, ...] = ()
    failed: bool = False
    always: bool = False


FAILED = Answer(pack_u64(1), failed=True)
Handler = Callable[[SessionState, Frame], Awaitable[Answer | None]]
HANDLERS: dict[int, Handler] = {}


def handles(request: Request) -> Callable[[Handler], Handler]:
    def note(handler: Handler) -> Handler:
        HANDLERS[request] = handler
        return handler

    return note
