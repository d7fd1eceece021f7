"""The back-end's half of postcopy: ADVISE, LISTEN, the exchange of addresses, END.

Specification, "Migration" and POSTCOPY_*; the order is QEMU's. After LISTEN every memory message is a
three-step exchange: the front-end sends regions, we answer with our addresses of them, the front-end says
that it has stored them; only then is memory registered and made accessible, so that no fault comes before
the front-end can translate it.
"""

from __future__ import annotations

from vhostpc.backend.pair_answers import PairAnswers
from vhostpc.errors import PostcopyRefused, RemoteProtocolError, UfdError
from vhostpc.logs import rationed_logger
from vhostpc.memory.mapping import Mapping, Supply, mlock_future_in_force
from vhostpc.ufd import Features, Userfaultfd
from vhostpc.wire.vhost_user import PostcopyPhase

log = rationed_logger(__name__)


def refusal() -> str | None:
    """Why this process cannot do postcopy, in one sentence, or None. Opens a userfaultfd and closes it."""
    if mlock_future_in_force():
        return (
            "mlockall(MCL_FUTURE) is in force in this process: mapping memory would create the missing pages"
        )
    try:
        with open_ufd():
            return None
    except UfdError as e:
        return str(e)


def open_ufd() -> Userfaultfd:
    """A userfaultfd that can report missing pages of shared memory. Raises UfdError.

    With the threads that wait, so that the front-end can count those at one page.
    """
    optional = Features.MISSING_HUGETLBFS | Features.THREAD_ID
    return Userfaultfd.open(features=Features.MISSING_SHMEM, optional=optional)


class Postcopy:
    """The state of one session's postcopy."""

    def __init__(
        self, supply: Supply, name: str, *, no_fault: bool = False, answer_each_pair: bool = False
    ) -> None:
        self.phase = PostcopyPhase.OFF
        self._no_fault = no_fault
        self._supply = supply
        self._name = name
        self._ufds: list[Userfaultfd] = []
        self._awaiting: list[Mapping] = []  # addresses sent, not yet stored by the front-end
        self.pairs = PairAnswers(answer_each_pair)
        self._regions = 0
        self._bytes = 0

    @property
    def listening(self) -> bool:
        return self.phase is PostcopyPhase.LISTENING

    def advise(self) -> int:
        """POSTCOPY_ADVISE: a userfaultfd for the front-end; the descriptor stays ours.

        May be repeated (QEMU sends one for each queue pair): memory will be registered with the last ufd; the
        others stay open, because the front-end polls them. Raises PostcopyRefused, UfdError.
        """
        if mlock_future_in_force():
            raise PostcopyRefused(
                "postcopy refused: mlockall(MCL_FUTURE) is in force in this process and would create pages"
            )
        if self.phase is PostcopyPhase.ENDED:
            self.close()
        if len(self._ufds) >= 256:
            raise RemoteProtocolError("POSTCOPY_ADVISE came more than 256 times")
        ufd = open_ufd()
        self._ufds.append(ufd)
        self.pairs.advised()
        self._supply.arm(ufd.fileno())
        again = self.phase is not PostcopyPhase.OFF
        if not again:
            self.phase = PostcopyPhase.ADVISED
            log.info("%s: postcopy advised", self._name)
            if self._no_fault:
                self._never_fault()
        elif self.pairs.wanted:
            log.info("%s: postcopy advised again: a further queue pair, to be answered unasked", self._name)
        else:
            log.warning(
                "%s: postcopy advised again, as QEMU does for each queue pair: QEMU 10.0 may now wait for ever"
                " for an answer that it did not request; start this back-end with --answer-each-pair, give guests"
                " that migrate by postcopy one queue pair (queues=1), or migrate them by precopy",
                self._name,
            )
        return ufd.fileno()

    def _never_fault(self) -> None:
        """The ufd is registered all the same: nobody must be able to make a page that was not sent."""
        try:
            with Userfaultfd.open(features=Features.MINOR_HUGETLBFS) as asking:
                self._supply.never_fault(asking.fileno())
            huge = ""
        except UfdError as e:
            self._supply.never_fault(None)
            huge = f"; huge pages will be refused: {e}"
        log.info(
            "%s: postcopy without faults: absent pages are not requested but waited for%s", self._name, huge
        )

    def listen(self, has_memory: bool) -> bool:
        """POSTCOPY_LISTEN: memory that is shared from now on may miss pages. False: refused."""
        if self.phase is PostcopyPhase.LISTENING:
            return True
        if self.phase is not PostcopyPhase.ADVISED:
            log.error("%s: POSTCOPY_LISTEN without POSTCOPY_ADVISE refused", self._name)
            return False
        if has_memory:
            log.error("%s: POSTCOPY_LISTEN refused: memory was mapped before it", self._name)
            return False
        self.phase = PostcopyPhase.LISTENING
        log.info("%s: postcopy listening", self._name)
        return True

    def await_ack(self, mappings: list[Mapping], request: int, answer: bytes) -> None:
        """Their addresses were sent by this answer; the front-end's acknowledgement is still expected."""
        self._awaiting.extend(mappings)
        self.pairs.answered(request, answer)

    def acknowledged(self) -> int:
        """The front-end has stored our addresses: register the new mappings. Returns how many.

        There may be none: QEMU sends an acknowledgement after each stop and continue. Raises PostcopyRefused.
        """
        new, self._awaiting = self._awaiting, []
        self.pairs.acknowledged()
        for mapping in new:
            try:
                mapping.register()
            except OSError as e:
                raise PostcopyRefused(f"postcopy: memory cannot be registered: {e}") from None
        self._regions += len(new)
        if new:
            log.info(
                "%s: postcopy: %d region%s registered", self._name, len(new), "s" if len(new) > 1 else ""
            )
        return len(new)

    def forget(self, mappings: set[int]) -> None:
        """Forget regions that were removed before their addresses were acknowledged."""
        self._awaiting = [m for m in self._awaiting if id(m) not in mappings]

    def end(self) -> None:
        """POSTCOPY_END: every page has arrived. May be repeated."""
        if self.phase is PostcopyPhase.ENDED:
            return
        was_listening = self.listening
        self._supply.disarm()
        self.pairs.end()
        self._close_ufds()
        self.phase = PostcopyPhase.ENDED
        if was_listening:
            log.info("%s: postcopy ended: %s", self._name, self._waits())

    def without_listen(self) -> None:
        """The machine starts without LISTEN: the migration ended in precopy."""
        if self.phase is PostcopyPhase.ADVISED:
            self._supply.disarm()
            self._close_ufds()
            self.pairs.end()
            self.phase = PostcopyPhase.OFF
            log.info("%s: migration ended without postcopy", self._name)

    def lost(self) -> None:
        """The front-end is gone; log it if pages were still expected from it."""
        if self.listening:
            log.error("%s: front-end lost in postcopy: memory given up, %s", self._name, self._waits())

    def _waits(self) -> str:
        stats = self._supply.stats()
        return f"{stats.waits} touches waited, the longest {stats.longest_ns / 1e6:.1f} ms"

    def _close_ufds(self) -> None:
        for ufd in self._ufds:
            ufd.close()
        self._ufds.clear()

    def close(self) -> None:
        """Close our descriptors; mappings that are armed keep copies of theirs."""
        self._awaiting.clear()
        self._close_ufds()
        if self.phase is PostcopyPhase.ENDED:
            self.phase = PostcopyPhase.OFF
