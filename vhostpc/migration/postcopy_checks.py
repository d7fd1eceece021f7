"""Whether postcopy can be done: the source's advice, compared with the capabilities and memory here."""

from __future__ import annotations

from collections.abc import Sequence

from vhostpc.errors import UfdError
from vhostpc.memory.mapping import mlock_future_in_force
from vhostpc.pages.ramblock import RamBlock
from vhostpc.ufd.flags import Features
from vhostpc.ufd.uffd import Userfaultfd
from vhostpc.units import TARGET_PAGE, in_units, page_sizes
from vhostpc.wire.migration.elements import BadStream, PostcopyAdvise, RamBlocks, RamDiscard


def check_advise(event: PostcopyAdvise, *, postcopy: bool, two_way: bool) -> None:
    """``postcopy``: the capability here; ``two_way``: the channel. Raises BadStream: why not, and what to change."""
    why = None
    if event.page_sizes is None and not postcopy:
        return  # for dirty bitmaps, which would be sections of their own
    if event.page_sizes is None:
        why = "RAM postcopy is enabled but have 0 byte advise"
    elif not postcopy:
        why = "the source may switch to postcopy, but postcopy-ram is not enabled here"
    elif event.target_page != TARGET_PAGE:
        why = f"the source has target pages of {event.target_page} bytes, not {TARGET_PAGE}"
    elif not two_way:
        why = "the source may switch to postcopy, but the channel is one-way"
    elif mlock_future_in_force():
        why = (
            "postcopy cannot be done here: mlockall(MCL_FUTURE) is in force in this process, "
            "and mapping memory would create the missing pages"
        )
    else:
        try:
            Userfaultfd.open(features=Features.MISSING_SHMEM).close()
        except UfdError as e:
            why = f"postcopy cannot be done here: {e}"
    if why is not None:
        raise BadStream(event.offset, why)


def check_page_sizes(event: RamBlocks, advised: PostcopyAdvise, blocks: Sequence[RamBlock]) -> None:
    """All sizes of host pages here must be those that were advised. Raises BadStream."""
    ours = 0
    for block in blocks:
        ours |= block.page_size
    if ours != advised.page_sizes:
        raise BadStream(
            event.offset,
            f"postcopy needs pages of the same sizes: RAM here has pages of {page_sizes(ours)}, "
            f"the source advised {page_sizes(advised.page_sizes)}",
        )


def check_discard(event: RamDiscard, block: RamBlock) -> None:
    """A source discards whole host pages. Raises BadStream."""
    for start, length in event.ranges:
        if (start | length) % block.page_size:
            raise BadStream(
                event.offset,
                f"discard of {length:#x} bytes at {start:#x} of {block.name!r}, "
                f"which are not whole pages of {in_units(block.page_size)}",
            )
