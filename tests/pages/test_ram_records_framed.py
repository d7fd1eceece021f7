"""RAM sections with their frames: the C loader and its plain twin agree, however the stream is cut or broken."""

from __future__ import annotations

import os
import socket
from collections import Counter

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kit.framed_streams import BLOCKS, SECTION, Case, case, expected
from vhostpc.errors import ChannelLost
from vhostpc.pages.ramblock import Bits, RamSet
from vhostpc.pages.service import FaultService
from vhostpc.units import TARGET_PAGE
from vhostpc.wire.migration.ramrec import BadRamStream

pytestmark = pytest.mark.ufd


async def check(case: Case) -> None:
    want = expected(case)
    with RamSet() as ram, FaultService(ram) as service:
        for name, (length, page_size) in BLOCKS.items():
            # Host pages of four of the kernel's: gathering is what is tested.
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.ftruncate(fd, length)
            ram.add(name, fd, length, page_size)
            os.close(fd)
        if case.armed:
            service.arm()
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with ours, service.open_channel(ours.fileno()) as channel:
            with theirs:
                theirs.sendall(case.stream[case.fed :])
            channel.feed(case.stream[: case.fed])
            try:
                await channel.load(SECTION if case.framed else None, last=case.last)
                how = "end"
            except BadRamStream as e:
                how = f"{e.why.name} at {e.offset}"
            except ChannelLost as e:
                how = "cut inside" if "inside" in str(e) else "closed"
            numbers = channel.numbers()
            assert (how, numbers.bytes, numbers.sections) == (want.how, want.consumed, want.sections)
            assert numbers.ended == want.complete
            if how == "end":
                rest = channel.take()
                assert rest == case.stream[want.consumed :][: len(rest)]
        for (of, offset), data in want.pages.items():
            assert os.pread(ram[of].fd, TARGET_PAGE, offset) == data
        for block in ram.blocks:
            hosts = {offset // block.page_size for name, offset in want.pages if name == block.name}
            assert hosts == {page for page in range(block.pages) if block.test_bit(Bits.RECEIVED, page)}
            made = block.length - sum(length for _, length in block.holes())
            assert made == TARGET_PAGE * sum(name == block.name for name, _ in want.pages)


@settings(deadline=None, max_examples=250)
@given(seed=st.integers(0, 1 << 32))
@example(seed=1)
def test_loader_and_twin_agree(seed: int) -> None:
    async def limited() -> None:
        with trio.fail_after(20):
            await check(case(seed))

    trio.run(limited)


def test_the_cases_are_of_all_kinds() -> None:
    """What they end in, and that a good part is right."""
    seen = Counter(expected(case(seed)).how.split()[0] for seed in range(3000))
    assert seen["end"] > 900
    for kind in ("closed", "cut", "FLAGS", "NO_BLOCK", "NAME", "OFFSET", "HOST_PAGE", "FOOTER"):
        assert seen[kind] >= 3, (kind, seen)
