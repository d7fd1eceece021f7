"""What a watcher tells does not depend on the pieces in which the bytes come, and no bytes make it fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.streams import POSTCOPY, PRECOPY, RECOVERY, h, read
from tests.proxy.test_proxy_points import BACK, RECOVERY_BACK
from vhostpc.proxy.watch import PreemptWatch, ReturnPathWatch, Seen, StreamWatch, Watch
from vhostpc.wire.migration.elements import BlockInfo
from vhostpc.wire.migration.stream import StreamReader

BLOCKS = (BlockInfo("ram0", 0x3000), BlockInfo("rom0", 0x1000))
URGENT = h("0000000000002008 04 72616d30") + b"\xbb" * 4096 + h("0000000000001022 00 0000000000000010")


def known() -> StreamReader:
    """The reader of a stream that passed before."""
    reader = StreamReader()
    read(POSTCOPY, reader)
    return reader


WATCHES: dict[str, tuple[Callable[[], Watch], bytes]] = {
    "precopy": (StreamWatch, PRECOPY),
    "postcopy": (StreamWatch, POSTCOPY),
    "recovery": (lambda: StreamWatch(recovery=True, before=known()), RECOVERY),
    "unknown recovery": (lambda: StreamWatch(recovery=True), RECOVERY),
    "preempt": (lambda: PreemptWatch(BLOCKS), URGENT),
    "return path": (ReturnPathWatch, BACK),
    "return path of a recovery": (ReturnPathWatch, RECOVERY_BACK),
}


def watched(watch: Watch, data: bytes, cuts: Iterable[int], *, each: bool) -> list[Seen]:
    watch.each = each
    seen: list[Seen] = []
    fed = 0
    for begin, end in itertools.pairwise([0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]):
        before = watch.parsed
        fed = end
        for one in watch.feed(data[begin:end]):
            assert 0 <= one.begin <= one.end <= fed
            seen.append(one)
        assert before <= watch.parsed <= fed or watch.blind
    return [*seen, *watch.eof()]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", WATCHES)
@given(cuts=st.lists(st.integers(0, 13000), max_size=8))
def test_in_any_pieces(name: str, each: bool, cuts: list[int]) -> None:
    make, data = WATCHES[name]
    whole = watched(make(), data, [], each=each)
    assert watched(make(), data, cuts, each=each) == whole
    assert not {one.name for one in whole} & {"unreadable", "truncated"}
    assert ("" in {one.name for one in whole}) is (
        name == "preempt" or (each and not name.startswith("return"))
    )


@pytest.mark.parametrize("name", WATCHES)
@given(
    changes=st.lists(st.tuples(st.integers(0, 13000), st.integers(0, 255)), max_size=3),
    cuts=st.lists(st.integers(0, 13000), max_size=4),
    each=st.booleans(),
    end=st.integers(0, 13000),
)
def test_broken_anywhere(
    name: str, changes: list[tuple[int, int]], cuts: list[int], each: bool, end: int
) -> None:
    """It is told once at most where reading ended, and nothing behind it."""
    make, data = WATCHES[name]
    broken = bytearray(data[: max(end, 1)])
    for at, byte in changes:
        broken[at % len(broken)] = byte
    seen = watched(make(), bytes(broken), cuts, each=each)
    names = [one.name for one in seen]
    # A package that cannot be read inside does not end the reading of its connection.
    assert names.count("unreadable") + names.count("truncated") <= 2


@pytest.mark.parametrize("name", WATCHES)
@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_noise(name: str, data: bytes, cut: int) -> None:
    watched(WATCHES[name][0](), data, [cut], each=True)
