"""The exceptions of vhostpc, one tree.

Codecs raise :class:`LocalProtocolError`; whoever fed them bytes from a peer turns that into
:class:`RemoteProtocolError`, because only there it is known who was wrong.
"""

from __future__ import annotations


class VhostpcError(Exception):
    """Base of everything this package raises on purpose. ``str(e)`` is one sentence for people."""


class ProtocolError(VhostpcError):
    """Somebody broke the vhost-user protocol or the migration stream."""


class LocalProtocolError(ProtocolError):
    """We were about to send, or were asked to parse, something that the protocol does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow."""


class PeerClosed(VhostpcError):
    """The peer closed the connection where a message was expected."""


class RequestFailed(VhostpcError):
    """The peer answered a request with failure, or not in time."""


class PostcopyRefused(VhostpcError):
    """Postcopy can not be done, or not be made safe, with this peer, process or memory."""


class GuestMemoryError(VhostpcError):
    """Guest memory could not be mapped, found or touched."""


class BadAddress(GuestMemoryError):
    """An address that no region of the memory table holds."""


class MemoryLost(GuestMemoryError):
    """Whoever brings the missing pages is gone: nothing may be read from or written to this memory."""


class BrokenQueue(VhostpcError):
    """The driver put something on the ring that the specification does not allow.

    The ring stays stopped until the front-end sets it up again.
    """


class UfdError(VhostpcError):
    """A userfaultfd operation failed.

    ``errno`` is the kernel's number; the text says what was asked and how to allow it.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class StreamError(ProtocolError):
    """RAM records or return-path messages that the migration stream does not allow."""


class ChannelLost(VhostpcError):
    """The link to the source of pages broke."""


class MigrationRefused(VhostpcError):
    """A migration, or an option of it, is refused before anything happened; the text is QEMU's."""
