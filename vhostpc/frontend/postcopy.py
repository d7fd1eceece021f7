"""QEMU's part in the postcopy of one back-end: ADVISE, LISTEN, addresses, END.

Its userfaultfd becomes a client of the fault service; the client of a back-end that ends is removed. Nothing here
serves a fault: the fault loop does, which needs no turn of this task.
"""

from __future__ import annotations

from collections.abc import Sequence

from vhostpc.errors import LocalProtocolError, PostcopyRefused, RequestFailed, UfdError
from vhostpc.frontend.client import FrontEnd
from vhostpc.frontend.share import BackendRegion, MemoryShare, check_mode, set_nonblocking
from vhostpc.pages.faultclient import Client, ClientRange
from vhostpc.pages.service import FaultService
from vhostpc.ufd import Userfaultfd, is_userfaultfd
from vhostpc.wire.vhost_user import FLAG_NEED_REPLY, PostcopyPhase, ProtocolFeature, Request


class BackendPostcopy:
    """The postcopy of one back-end. ``client`` is its place in the fault service, None before ADVISE.

    ``timeout``: seconds for the replies to ADVISE, LISTEN and END.
    """

    def __init__(self, front: FrontEnd, service: FaultService, *, name: str = "back-end") -> None:
        self.front = front
        self.service = service
        self.name = name
        self.phase = PostcopyPhase.OFF
        self.client: Client | None = None
        self._older: list[Client] = []

    async def advise(self) -> Client:
        """POSTCOPY_ADVISE: get the back-end's ufd and read its faults from now on. May be repeated.

        The client of the last ADVISE receives the faults. Raises PostcopyRefused when the back-end gives no
        ufd, UfdError and OSError when we cannot read it.
        """
        if ProtocolFeature.PAGEFAULT not in self.front.protocol_features:
            raise PostcopyRefused(f"postcopy refused: {self.name} did not offer it (PAGEFAULT)")
        frame = await self.front.request(Request.POSTCOPY_ADVISE)
        try:
            if frame.payload or len(frame.fds) != 1:
                raise PostcopyRefused(
                    f"postcopy refused: {self.name} answered ADVISE with {len(frame.payload)} bytes and "
                    f"{len(frame.fds)} descriptors, not with one userfaultfd"
                )
            fd = frame.fds[0]
            if not is_userfaultfd(fd):
                raise PostcopyRefused(f"postcopy refused: {self.name}'s descriptor is not a userfaultfd")
            set_nonblocking(fd)
            try:
                ufd = Userfaultfd.from_fd(fd)
            except UfdError as e:
                raise PostcopyRefused(f"postcopy refused: {self.name}'s userfaultfd: {e}") from None
            frame.take_fd()
            with ufd:
                client = self.service.add_client(ufd, self.name)
        finally:
            frame.close_fds()
        if self.client is not None:
            self._older.append(self.client)
        else:
            self.front.on_closed(self.forget)
        self.client = client
        if self.phase is not PostcopyPhase.LISTENING:
            self.phase = PostcopyPhase.ADVISED
        return client

    async def listen(self) -> None:
        """POSTCOPY_LISTEN: memory is missing pages from now on. An answer is always requested."""
        await self._status(Request.POSTCOPY_LISTEN)
        self.phase = PostcopyPhase.LISTENING

    async def share(self, memory: MemoryShare, *, ack: Request | None = None) -> list[BackendRegion]:
        """Exchange addresses; see :meth:`MemoryShare.share_postcopy`. May be repeated."""
        if self.phase is not PostcopyPhase.LISTENING:
            raise LocalProtocolError("addresses can be exchanged only after LISTEN")
        check_mode(memory)
        return await memory.share_postcopy(self.store, ack=ack)

    def store(self, bases: Sequence[BackendRegion]) -> None:
        """Let the fault service translate the back-end's addresses."""
        if self.client is None:
            raise LocalProtocolError("addresses can be stored only after ADVISE")
        # Whole host pages: a region that begins inside one is mapped from that page's start.
        ranges = []
        for b in bases:
            size = b.region.block.page_size
            lead = b.region.offset % size
            length = (lead + b.region.size + size - 1) // size * size
            ranges.append(ClientRange(b.base - lead, length, b.region.block, b.region.offset - lead))
        self.client.set_ranges(ranges)

    async def end(self) -> None:
        """POSTCOPY_END: every page has arrived. The back-end unregisters; then we close our copy of its ufd."""
        try:
            await self._status(Request.POSTCOPY_END)
        finally:
            self.forget()
        self.phase = PostcopyPhase.ENDED

    def forget(self) -> None:
        """Stop serving this back-end's faults: it ended postcopy, or it is gone."""
        for client in (*self._older, self.client):
            if client is not None:
                client.remove()

    async def _status(self, request: Request) -> None:
        status = await self.front.ask_u64(request, flags=FLAG_NEED_REPLY)
        if status:
            raise RequestFailed(f"{self.name}: {request.name} failed with status {status}")
