"""The exceptions of vhostpc, one tree.

Codecs raise :class:`LocalProtocolError`; a caller that fed them bytes from a peer turns that into
:class:`RemoteProtocolError`, because only the caller knows which side was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames


def first_of(error: BaseException) -> BaseException:
    """The first error in a group that is not a cancellation, as the cause of the others. Any other error is itself."""
    while isinstance(error, BaseExceptionGroup):
        errors = error.split(Exception)[0] or error
        error = errors.exceptions[0]
    return error


def let_go(error: BaseException) -> None:
    """Forget the local variables of the calls that an error came through: it may be kept for its text, and would keep
    descriptors and memory. Of cancelled tasks there may be more, in cycles: see ``gc.collect``."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        clear_frames(one.__traceback__)
        todo += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions


def sentence(error: BaseException) -> str:
    """The error, for people: its own or the system's sentence, otherwise its name, which a log explains."""
    error = first_of(error)
    if isinstance(error, VhostpcError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory: {error}" if str(error) else "there is not enough memory"
    if isinstance(error, OSError) and str(error):
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror or error}"
    return f"internal error: {type(error).__name__}: {error}"


def is_foreseen(error: BaseException) -> bool:
    """Whether a peer, a machine or the system can cause this; any other error gets a traceback in the log."""
    return isinstance(first_of(error), VhostpcError | OSError | MemoryError)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Add the purpose to an OSError whose call reports only a shortage."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from None


class VhostpcError(Exception):
    """Base of everything this package raises on purpose. ``str(e)`` is one sentence for people."""


class ProtocolError(VhostpcError):
    """One side broke the vhost-user protocol or the migration stream."""


class LocalProtocolError(ProtocolError):
    """We were about to send, or were asked to parse, something that the protocol does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow."""


class PeerClosed(VhostpcError):
    """The peer closed the connection where a message was expected."""


class RequestFailed(VhostpcError):
    """The peer answered a request with failure, or not in time."""


class PostcopyRefused(VhostpcError):
    """Postcopy cannot be done, or not be made safe, with this peer, process or memory."""


class GuestMemoryError(VhostpcError):
    """Guest memory could not be mapped, found or touched."""


class BadAddress(GuestMemoryError):
    """An address that no region of the memory table holds."""


class MemoryLost(GuestMemoryError):
    """The peer that delivers missing pages is gone, or has taken pages away: the memory must not be read or written."""


class LeftAsleep(MemoryLost):
    """The same, and a thread that waits for one of its pages could not be released: the objects that it uses stay."""


class PageBorn(GuestMemoryError):
    """A page that nobody sent is where another is expected, or was discarded: it would be mistaken for that one.

    ``block``: name; ``page``: number of the host page in it. The text names the clients that could have made it.
    """

    def __init__(self, message: str, block: str, page: int) -> None:
        super().__init__(message)
        self.block = block
        self.page = page


class BrokenQueue(VhostpcError):
    """The driver put something on the ring that the specification does not allow.

    The ring stays stopped until the front-end sets it up again.
    """


class QueueEnded(VhostpcError):
    """A queue's session, or a chain's run of its ring, has ended: it can no longer be used.

    A chain that was not completed was given back to the driver.
    """


class LinkLost(VhostpcError):
    """The link that a device connects its guest to is gone for good, such as a tap device that was deleted."""


class UfdError(VhostpcError):
    """A userfaultfd operation failed.

    ``errno`` is the kernel's number; the text names the operation and says how to allow it.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class Shortage(VhostpcError):
    """This process, or the computer, cannot start more threads. (For descriptors and memory it is OSError.)"""


class StreamError(ProtocolError):
    """RAM records or return-path messages that the migration stream does not allow."""


class ChannelLost(VhostpcError):
    """The link to the source of pages broke."""


class MigrationRefused(VhostpcError):
    """A migration, or an option of it, is refused before anything has happened; the text is QEMU's."""
