"""Open a tap device and choose its queues (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

import trio

from vhostpc.errors import LinkLost, VhostpcError

_TUNSETIFF, _TUNGETIFF, _TUNSETQUEUE = 0x400454CA, 0x800454D2, 0x400454D9
_IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x0100
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400


def open_tap(name: str, *, multi_queue: bool = False, make: bool = False) -> int:
    """A non-blocking descriptor of tap device ``name``.

    ``multi_queue``: one queue of several, one call each. ``make``: create the device if it does not exist
    (CAP_NET_ADMIN); it is deleted with its last descriptor. Raises VhostpcError, with the remedy.
    """
    if not 0 < len(name.encode()) < 16:
        raise VhostpcError(f"tap {name!r}: a name must have 1 to 15 bytes")
    if not make:
        # TUNSETIFF would create a device for a name that was only mistyped.
        try:
            socket.if_nametoindex(name)
        except OSError:
            queues = " multi_queue" if multi_queue else ""
            raise VhostpcError(
                f"tap {name}: there is no such network device; to create it: ip tuntap add {name} mode tap{queues}"
            ) from None
    fd = _open_tun()
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_MULTI_QUEUE if multi_queue else 0)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
    except OSError as e:
        os.close(fd)
        hint = {
            1: "it needs CAP_NET_ADMIN, or a tap device that belongs to this user",
            16: "another program has it open",
            22: "it exists with other flags: is it a tap device with the requested number of queues?",
        }.get(e.errno or 0, e.strerror)
        raise VhostpcError(f"tap {name}: {hint}") from None
    return fd


def may_open_any_tap() -> bool:
    """Whether this process may open (and make) any tap device here, not only those of its user. Changes nothing.

    Raises VhostpcError where it may open none.
    """
    fd = _open_tun()
    try:
        # The kernel checks the privilege first, then it refuses a device that is neither tun nor tap (tun_set_iff).
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", b"", 0))
    except OSError as e:
        return e.errno != errno.EPERM
    finally:
        os.close(fd)
    return True


def _open_tun() -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        absent = e.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        mend = "modprobe tun" if absent else "let this process open it (its mode; DeviceAllow= in a unit)"
        raise VhostpcError(f"/dev/net/tun: {e.strerror}; {mend}") from None


def attach_queue(fd: int, attached: bool) -> None:
    """Attach one of several queues, so that it gets frames of the network, or detach it (TUNSETQUEUE).

    Frames that wait in a queue are dropped when it is detached. Raises OSError, EINVAL if the queue is in that state.
    """
    flag = _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE
    fcntl.ioctl(fd, _TUNSETQUEUE, struct.pack("=16sH22x", b"", flag))


#: Seconds between two checks that a tap device still exists. On its descriptor only a poll that also reports each frame
#: would report its end.
LOOK_INTERVAL = 1.0


async def until_deleted(fd: int, name: str) -> None:
    """Raise LinkLost when the tap device of ``fd``, one of its attached queues, is gone; otherwise wait for ever."""
    while True:
        try:
            fcntl.ioctl(fd, _TUNGETIFF, bytes(40))
        except OSError as e:
            if e.errno not in (errno.EBADFD, errno.ENODEV):
                raise
            raise LinkLost(f"tap {name} was deleted") from None
        await trio.sleep(LOOK_INTERVAL)
