"""A vhost-user back-end of our own machine, for the machine's life: one connection, in QEMU's order of messages.

A back-end that is killed, breaks the protocol, lies or answers too late is abandoned: it is named in the log and among
the machine's problems, its userfaultfd is no longer read, and the machine goes on without it. The same happens after an
unexpected error of our own in dealing with it; then the log has the traceback.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from math import inf

import trio

from vhostpc.errors import (
    PeerClosed,
    PostcopyRefused,
    ProtocolError,
    RequestFailed,
    UfdError,
    VhostpcError,
    sentence,
)
from vhostpc.frontend import BackendPostcopy, Driver, FrontEnd, GuestRegion, MemoryShare, connect, start_ring
from vhostpc.frontend.rings import ring_addr
from vhostpc.frontend.share import SharedLog
from vhostpc.logs import rationed_logger
from vhostpc.pages.faultclient import Client, ClientNumbers
from vhostpc.pages.service import FaultService
from vhostpc.wire.vhost_user import Feature, PostcopyPhase, ProtocolFeature

log = rationed_logger(__name__)

TIMEOUT = 10.0
"""Seconds that an answer may take, unless the back-end waits for a page meanwhile."""
SILENCE = 0.5
"""Seconds to wait for one before a line is logged."""
NO_LOG = "Migration disabled: vhost lacks VHOST_F_LOG_ALL feature."
NO_LOG_FD = "Migration disabled: vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature."
MRG_RXBUF = 1 << 15
WANTED = int(Feature.VERSION_1 | Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES) | MRG_RXBUF
"""Features that our driver uses."""
# The device status (virtio 1.2, 2.1): ACKNOWLEDGE, DRIVER and FEATURES_OK; the same and DRIVER_OK.
_FEATURES_OK, _DRIVER_OK = 0xB, 0xF


@asynccontextmanager
async def open_backend(
    path: str, name: str, regions: Sequence[GuestRegion], *, timeout: float = TIMEOUT
) -> AsyncIterator[BackEnd]:
    """Connect to the socket and negotiate. Raises PeerClosed, RequestFailed, RemoteProtocolError.

    The log names the back-end that it waits for, and says until when.
    """
    wait = trio.CancelScope()
    # Not in a nursery here: the connection made meanwhile lives longer.
    trio.lowlevel.spawn_system_task(_tell_wait, wait, f"{name}: waiting for the back-end at {path}", timeout)
    try:
        async with connect(path, timeout=timeout) as front:
            try:
                await front.negotiate(features=WANTED)
            except (PeerClosed, ProtocolError, RequestFailed) as error:
                raise type(error)(f"the back-end at {path}: {error}") from None
            wait.cancel()
            backend = BackEnd(front, name, path, regions, timeout)
            try:
                yield backend
            finally:
                backend.end_of_life()
    finally:
        wait.cancel()


async def _tell_wait(wait: trio.CancelScope, what: str, timeout: float) -> None:
    with wait:
        await trio.sleep(SILENCE)
        log.warning("%s, for at most %g s", what, timeout)


class BackEnd:
    """Made by :func:`open_backend`. No method raises for an error of the back-end, unless its docstring says so."""

    def __init__(
        self, front: FrontEnd, name: str, path: str, regions: Sequence[GuestRegion], timeout: float
    ) -> None:
        self.front = front
        self.name = name
        self.path = path
        self.features = front.features
        """The features that the driver has acknowledged."""
        self.problem: str | None = None
        """Why it was abandoned; None while it works."""
        self.gone = trio.Event()
        """Set when it was abandoned."""
        self.postcopy: BackendPostcopy | None = None
        self._timeout = timeout
        self._ending = False
        self._memory = MemoryShare(front, regions)
        self._log: SharedLog | None = None
        self._rings: list[Driver] = []
        self._numbers: ClientNumbers | None = None
        front.on_closed(self._closed)

    # --- what it can do

    @property
    def header(self) -> int:
        """Bytes before each frame (virtio 1.2, 5.1.6.1)."""
        return 12 if self.features & (int(Feature.VERSION_1) | MRG_RXBUF) else 10

    def blocked(self) -> str | None:
        """Why a machine with this back-end cannot migrate, in QEMU's words."""
        if not self.front.offered_features & Feature.LOG_ALL:
            return NO_LOG
        if ProtocolFeature.LOG_SHMFD not in self.front.protocol_features:
            return NO_LOG_FD
        return None

    def postcopy_refusal(self) -> str | None:
        if ProtocolFeature.PAGEFAULT in self.front.protocol_features:
            return None
        return f"Postcopy is not supported: vhost-user backend not capable of postcopy ({self.name})"

    # --- trouble

    @property
    def works(self) -> bool:
        return self.problem is None

    def leave(self, why: str) -> None:
        """Abandon it: close the connection, stop reading its faults. Raises nothing."""
        if self.problem is not None:
            return
        self.problem = f"back-end {self.name} ({self.path}): {why}"
        self.gone.set()
        log.error("%s: the machine goes on without it", self.problem)
        self.front.close()
        try:
            self._forget()
        except Exception:
            log.exception("%s: abandoning it", self.name)

    def end_of_life(self) -> None:
        """From here on the end of its connection is no error."""
        self._ending = True

    def _closed(self) -> None:
        if not self._ending:
            self.leave(str(self.front.error) if self.front.error else "it closed the connection")

    def _forget(self) -> None:
        if self.postcopy is not None and self.postcopy.client is not None:
            self._numbers = self.numbers()
            self.postcopy.forget()

    async def _try(self, what: str, call: Callable[[], Awaitable[None]]) -> None:
        if not self.works:
            return
        try:
            await call()
        except Exception as error:
            self.leave(f"{what}: {self._why(error)}")

    def _why(self, error: Exception) -> str:
        """One sentence; unexpected errors go to the log as well."""
        if isinstance(error, VhostpcError | OSError):
            return str(error)
        log.error("%s: unexpected error", self.name, exc_info=error)
        return f"{type(error).__name__}: {error}"

    # --- rings

    def acknowledge(self, features: int) -> bool:
        """The driver has acknowledged these; False if the back-end does not offer all of them, or some are unknown."""
        if features & ~(self.front.offered_features & WANTED):
            return False
        self.features = features
        return True

    async def start(self, rings: Sequence[Driver], bases: Sequence[int]) -> None:
        """Share the memory with it and start its rings, each at its base."""
        self._rings = list(rings)
        await self._try("starting", lambda: self._start(bases))

    async def _start(self, bases: Sequence[int]) -> None:
        front = self.front
        if front.protocol_features:
            for index in range(len(self._rings)):
                await front.set_vring_enable(index, True)
        await self._set_features()
        await self._set_status(_FEATURES_OK)
        if self.postcopy is None:  # otherwise it has had the memory since LISTEN
            await self._memory.share()
        if self._log is not None:
            # QEMU sends this after the rings; sent before them, no write can be missed.
            await self._memory.set_log(self._log)
        for index, driver in enumerate(self._rings):
            await start_ring(front, self._memory, index, driver, base=bases[index], enable=False)
            # In order: frames that one ring sends must find the others started.
            await front.barrier()
        await self._set_status(_DRIVER_OK)

    async def _set_status(self, status: int) -> None:
        if ProtocolFeature.STATUS in self.front.protocol_features:
            await self.front.set_status(status)

    async def _set_features(self) -> None:
        await self.front.set_features(self.features | (int(Feature.LOG_ALL) if self._log else 0))

    async def stop(self) -> list[int] | None:
        """Stop its rings; the next index of each, None if it reports none. May wait for a page that the back-end needs.

        It writes no guest memory when this returns, unless it was abandoned.
        """
        bases: list[int] = []

        async def stop_all() -> None:
            rings = range(len(self._rings))
            bases.extend(
                await self._while_it_waits_for_pages(lambda: self.front.get_vring_bases(rings, timeout=inf))
            )
            await self._set_status(0)

        try:
            await self._try("stopping", stop_all)
        finally:
            count, self._rings = len(self._rings), []
        return bases if self.works and len(bases) == count else None

    async def _while_it_waits_for_pages(self, ask: Callable[[], Awaitable[list[int]]]) -> list[int]:
        """Its answer. A back-end that waits for a page may take as long as the page does. Raises RequestFailed."""
        answers: list[list[int]] = []
        errors: list[Exception] = []

        async def wait() -> None:
            try:
                answers.append(await ask())
            except Exception as error:  # raised by itself: a nursery would put it into a group
                errors.append(error)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            while True:
                await trio.sleep(self._timeout)
                if not self._waits_for_page():
                    nursery.cancel_scope.cancel()
                    break
        if errors:
            raise errors[0]
        if not answers:
            raise RequestFailed(f"GET_VRING_BASE: no answer within {self._timeout:g} s")
        return answers[0]

    def _waits_for_page(self) -> bool:
        client = self._client()
        return client is not None and not client.removed and client.numbers().waiting_for_page > 0

    # --- dirty log

    async def set_log(self, area: SharedLog | None) -> None:
        """From now on it marks its writes in ``area``; None: no more."""
        if area is self._log:
            return
        self._log = area
        if self._rings:  # otherwise when it starts
            await self._try("dirty log", self._switch_log)

    async def _switch_log(self) -> None:
        if self._log is not None:
            await self._memory.set_log(self._log)
        await self._set_features()
        for index, driver in enumerate(self._rings):
            await self.front.set_vring_addr(ring_addr(self._memory, index, driver, log=self._log is not None))

    # --- postcopy

    async def advise(self, service: FaultService) -> None:
        """Raises PostcopyRefused, naming it."""
        if not self.works:
            return
        postcopy = BackendPostcopy(self.front, service, name=self.name)
        try:
            await postcopy.advise()
        except PostcopyRefused:
            raise
        except (OSError, UfdError) as error:  # an error of ours, with its answer
            raise PostcopyRefused(
                f"postcopy refused: the faults of {self.name} cannot be read here: {sentence(error)}"
            ) from None
        except Exception as error:
            raise PostcopyRefused(
                f"postcopy refused: {self.name} does not answer ADVISE: {self._why(error)}"
            ) from None
        self.postcopy = postcopy

    async def listen(self) -> None:
        """Raises PostcopyRefused, naming it: the machine has not run."""
        if not self.works or self.postcopy is None:
            return
        try:
            await self.postcopy.listen()
            await self.postcopy.share(self._memory)
        except Exception as error:
            raise PostcopyRefused(f"postcopy refused by {self.name}: {self._why(error)}") from None

    @property
    def listens(self) -> bool:
        """It was told LISTEN, and not yet END."""
        return self.postcopy is not None and self.postcopy.phase is PostcopyPhase.LISTENING

    async def end(self) -> None:
        """POSTCOPY_END, or the end of a precopy that might have become one."""
        postcopy = self.postcopy
        if postcopy is None:
            return

        async def end() -> None:
            self._numbers = self.numbers()
            await postcopy.end()

        await self._try("POSTCOPY_END", end)  # an abandoned back-end was forgotten before
        self.postcopy = None

    def _client(self) -> Client | None:
        """Its place in a fault service that lives."""
        postcopy = self.postcopy
        return postcopy.client if postcopy is not None and not postcopy.service.closed else None

    def numbers(self) -> ClientNumbers | None:
        """Its faults in the last postcopy, None if there was none."""
        client = self._client()
        return self._numbers if client is None else client.numbers()
