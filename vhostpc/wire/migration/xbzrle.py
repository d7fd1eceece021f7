"""XBZRLE: a page as its difference to the destination's copy. Precopy only.

Runs alternate: the length of an unchanged run (the first may be 0), the length of a changed run, and its bytes. A
length is a uleb128 of at most two bytes. The last unchanged run is left out. Source: QEMU, docs (xbzrle).
"""

from __future__ import annotations

from vhostpc.errors import StreamError


def apply(page: bytes, delta: bytes) -> bytes:
    """The new page. Raises :class:`~vhostpc.errors.StreamError` for a malformed difference."""
    out = bytearray(page)
    at = place = 0

    def length() -> int:
        nonlocal at
        piece = delta[at : at + 2]
        if not piece or (piece[0] & 0x80 and (len(piece) < 2 or piece[1] & 0x80)):
            raise StreamError(f"XBZRLE: no length at byte {at} of {len(delta)}")
        two = piece[0] & 0x80
        at += 2 if two else 1
        return piece[0] & 0x7F | piece[1] << 7 if two else piece[0]

    while at < len(delta):
        stays = length()
        if place and not stays:
            raise StreamError(f"XBZRLE: nothing stays before byte {at} of {len(delta)}")
        changes = length()
        place += stays
        new = delta[at : at + changes]
        if not changes or len(new) != changes or place + changes > len(page):
            raise StreamError(f"XBZRLE: {changes} changed bytes at {place}, of a page of {len(page)}")
        out[place : place + changes] = new
        place += changes
        at += changes
    return bytes(out)
