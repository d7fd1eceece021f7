"""Open a tap device and choose its queues (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import fcntl
import os
import struct

from vhostpc.errors import VhostpcError

_TUNSETIFF, _TUNSETQUEUE = 0x400454CA, 0x400454D9
_IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x0100
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400


def open_tap(name: str, *, multi_queue: bool = False) -> int:
    """A non-blocking descriptor of tap device ``name``, which is made if it is not there (CAP_NET_ADMIN).

    ``multi_queue``: one queue of several, one call each. Raises VhostpcError that says what to do.
    """
    if not 0 < len(name.encode()) < 16:
        raise VhostpcError(f"tap {name!r}: a name has 1 to 15 bytes")
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise VhostpcError(f"/dev/net/tun: {e.strerror}; is the tun module loaded?") from None
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_MULTI_QUEUE if multi_queue else 0)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
    except OSError as e:
        os.close(fd)
        hint = {
            1: "it needs CAP_NET_ADMIN, or a tap device that belongs to this user",
            16: "another program has it open",
            22: "it exists with other flags: is it a tap device, with as many queues as asked for?",
        }.get(e.errno or 0, e.strerror)
        raise VhostpcError(f"tap {name}: {hint}") from None
    return fd


def attach_queue(fd: int, attached: bool) -> None:
    """Let one queue of several have frames of the network, or give them all to the others (TUNSETQUEUE).

    What waits in a queue that is let go is dropped. Raises OSError, EINVAL if the queue is so already.
    """
    flag = _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE
    fcntl.ioctl(fd, _TUNSETQUEUE, struct.pack("=16sH22x", b"", flag))
