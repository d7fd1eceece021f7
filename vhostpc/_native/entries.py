"""The one table of C entry points and of threads: which touch guest memory, which may wait, and where they may run.

It names the entries that touch or wait; all others may be called anywhere. ``docs/threads.md`` is this table as a page.
``tests/project/test_docs_threads.py`` compares it with the call graph of the C sources, so that no entry is left out,
and with every call in Python.
"""

from __future__ import annotations

from enum import Enum, StrEnum


class Thread(StrEnum):
    """Names of our threads, as /proc/PID/task/TID/comm shows them (15 bytes at most)."""

    HOP = "vpc-hop"
    LATE = "vpc-late"
    #: Made by C (``memory/ahead.c``).
    AHEAD = "vpc-ahead"
    PUMP = "vpc-pump"
    FAULT = "vpc-fault"
    LOAD = "vpc-load"
    SOURCE = "vpc-source"
    #: Requested pages, in or out, where they have a connection of their own.
    URGENT = "vpc-urgent"
    DRIVER = "vpc-driver"
    FAR = "vpc-far"
    BLOCKS = "vpc-blocks"
    FILE = "vpc-file"
    VCPU = "vpc-vcpu"
    DIRTY = "vpc-dirty"
    TERMINAL = "vpc-terminal"
    #: A thread that was borrowed and waits to be borrowed again.
    IDLE = "vpc-idle"


class Use(Enum):
    """How Python may call an entry."""

    #: At once, on any thread.
    PLAIN = "anywhere"
    #: By ``Gate.call`` (``Queue.touch``), or with the flag VPC_TRY.
    GATE = "the gate"
    #: A long call on a thread of its own, by ``run_loop``.
    OWN_THREAD = "a thread of its own"
    #: The same; it waits for descriptors only.
    LOOP = "a thread of its own, for descriptors only"
    #: The same; it touches RAM blocks where no page of them is missing.
    CALM_LOOP = "a thread of its own, where nothing is missing"
    #: RAM blocks of the front-end's guest: a thread call with a limiter of the owner's.
    HOP = "a thread call"

    @property
    def is_loop(self) -> bool:
        """It waits for descriptors."""
        return self in (Use.OWN_THREAD, Use.LOOP, Use.CALM_LOOP)

    @property
    def touches(self) -> bool:
        return self is Use.CALM_LOOP or self.may_wait

    @property
    def may_wait(self) -> bool:
        return self in (Use.GATE, Use.OWN_THREAD, Use.HOP)


_TABLE = {
    Use.GATE: """
        vpc_vq_pop vpc_vq_push vpc_vq_enable_notify vpc_chain_load vpc_late_look vpc_chain_touch
        vpc_chain_read vpc_chain_write
    """,
    Use.OWN_THREAD: "vpc_pump_in vpc_pump_out vpc_driver_run vpc_vcpu_run",
    Use.HOP: """
        vpc_driver_reset vpc_driver_post vpc_driver_reap vpc_driver_look
        vpc_ram_read vpc_ram_write vpc_ram_fill vpc_ram_verify
        vpc_vcpu_fill vpc_vcpu_sweep
    """,
    Use.LOOP: "vpc_fault_run vpc_far_run vpc_save_wait vpc_save_hear vpc_dirty_run",
    # A page source's own blocks have all their pages; a load writes through its mapping only before LISTEN.
    Use.CALM_LOOP: "vpc_save_run vpc_save_round vpc_load_run",
}

#: An entry that is not named here touches nothing and waits for nothing (PLAIN).
ENTRIES = {name: use for use, names in _TABLE.items() for name in names.split()}


def use_of(entry: str) -> Use:
    """How Python may call a function of C that is declared to it."""
    return ENTRIES.get(entry, Use.PLAIN)
