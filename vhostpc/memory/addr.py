"""Integers that must not be mixed."""

from __future__ import annotations

from typing import NewType

#: Address in the guest's physical address space.
GuestAddr = NewType("GuestAddr", int)
#: Address in the front-end's process, as the memory table names it.
FrontAddr = NewType("FrontAddr", int)
#: Address in our own process. Only ever sent to the front-end; never dereferenced in Python.
OwnAddr = NewType("OwnAddr", int)
