"""The words that say what a proxy does and where: each form, and each kind of nonsense."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostpc.errors import MigrationRefused
from vhostpc.proxy import BadFault, open_proxy, parse_fault
from vhostpc.proxy.faults import ACTIONS, OPTIONS, Plan
from vhostpc.proxy.points import POINTS, Takes, Way


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cut@request", "cut@request=1"),
        ("cut@request=0x14", "cut@request=20"),
        ("cut@byte=1M", "cut@byte=1048576"),
        ("cut@byte=64k", "cut@byte=65536"),
        ("cut@run,at=before,on=main", "cut@run,at=before,on=main"),
        ("cut@section=0000:00:01.3/piix4_pm,at=7", "cut@section=0000:00:01.3/piix4_pm,at=7"),
        ("fin@eof", "fin@eof"),
        ("drop@pong=3,way=back,alone", "drop@pong=3,way=back,alone"),
        ("hold@time=1.5", "hold@time=1.5"),
        ("hold=2.5@round=3", "hold=2.5@round=3"),
        ("delay=0.001@postcopy-byte=0,for=10", "delay=0.001@postcopy-byte=0,for=10"),
        ("lag=1@connect", None),
        ("lag=0.1@byte=0,way=both", "lag=0.1@byte=0,way=both"),
        ("corrupt@bitmap", "corrupt@bitmap=1"),
        ("corrupt=size@bitmap=2,to=24,on=recovery-2", "corrupt=size@bitmap=2,to=24,on=recovery-2"),
        ("cut@resume,times=always", "cut@resume,times=always"),
        ("cut@shut,times=3,on=17", "cut@shut,times=3,on=17"),
    ],
)
def test_forms(text: str, shown: str | None) -> None:
    if shown is None:
        with pytest.raises(BadFault, match="'connect' is no point"):
            parse_fault(text)
        return
    fault = parse_fault(text)
    assert str(fault) == shown
    assert parse_fault(shown) == fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no '@'"),
        ("cut", "'cut' is not ACTION@POINT: it has no '@'"),
        ("@run", "'' is no action; known: cut, fin, drop, hold, delay, lag, corrupt"),
        ("break@run", "'break' is no action"),
        ("Cut@run", "'Cut' is no action"),
        ("cut@", "'' is no point; known: head, "),
        ("cut@RUN", "'RUN' is no point"),
        ("cut@run=1", "run takes no value, but has '1'"),
        ("cut@run=", "nothing stands behind 'run='"),
        ("cut=@run", "nothing stands behind 'cut='"),
        ("cut=5@run", "cut takes no argument, but has '5'"),
        ("fin=5@run", "fin takes no argument"),
        ("drop=5@run", "drop takes no argument"),
        ("hold=@run", "nothing stands behind 'hold='"),
        ("hold=x@run", "'x' is not a number of seconds"),
        ("hold=-1@run", "'-1' is not a number of seconds"),
        ("hold=nan@run", "'nan' is not a number of seconds"),
        ("hold=inf@run", "'inf' is not a number of seconds"),
        ("hold=2..1@run", "'2..1' is not a number of seconds"),
        ("delay@run", "delay takes seconds: delay=SECONDS"),
        ("lag@run", "lag takes seconds: lag=SECONDS"),
        ("cut@pong", "pong takes a number: pong=..."),
        ("cut@section", "section takes a name"),
        ("cut@byte", "byte takes a number of bytes"),
        ("cut@time", "time takes seconds"),
        ("cut@time=soon", "'soon' is not a number of seconds"),
        ("cut@request=0", "request counts from 1, and '0' may be 0"),
        ("cut@request=0..5", "request counts from 1, and '0..5' may be 0"),
        ("cut@request=5..", "'5..' is not a number, nor a range"),
        ("cut@request=..5", "'..5' is not a number, nor a range"),
        ("cut@request=1..2..3", "is not a number, nor a range"),
        ("cut@request=9..3", "'9..3' is an empty range"),
        ("cut@request=1.5", "'1.5' is not a number"),
        ("cut@request=-1", "'-1' is not a number"),
        ("cut@request=٣", "is not a number"),
        ("cut@byte=99999999999G", "is too large"),
        ("cut@byte=0xffffffffffffffff", "is too large"),
        ("cut@run,", "'' is no option; known: at, way, on, for, to, times, alone"),
        ("cut@run,where=x", "'where' is no option"),
        ("cut@run,at", "'at' is not at=VALUE"),
        ("cut@run,at=", "'at=' is not at=VALUE"),
        ("cut@run,at=begin", "'begin' is not a number"),
        ("cut@run,at=before,at=after", "'at' twice"),
        ("cut@byte=5,at=before", "'at' means nothing at byte, which has no length"),
        ("cut@time=1,at=before", "'at' means nothing at time"),
        ("corrupt@run,at=before", "'before' is not a number"),
        ("cut@run,way=up", "'up' is no direction; known: forward, back, both"),
        ("fin@run,way=back", "'way' means nothing with fin"),
        ("corrupt@run,way=back", "'way' means nothing with corrupt"),
        ("cut@run,on=0", "'0' is no kind of connection"),
        ("cut@run,on=first", "'first' is no kind of connection; known: main, recovery"),
        ("cut@run,on=recovery-", "'recovery-' is no kind of connection"),
        ("cut@run,on=recovery-0", "'recovery-0' is no kind of connection"),
        ("cut@run,on=main-2", "'main-2' is no kind of connection"),
        ("cut@run,for=5", "'for' means nothing with cut"),
        ("hold=1@run,for=5", "'for' means nothing with hold"),
        ("lag=1@run,for=long", "'long' is not a number of seconds"),
        ("cut@run,to=5", "'to' means nothing with cut"),
        ("corrupt@pong=3,to=x", "'x' is not a number"),
        ("corrupt@pong=3,to=0x100000000", "does not fit into 4 bytes"),
        ("corrupt=type@pong=3,to=65536", "does not fit into 2 bytes"),
        ("corrupt@byte=3,to=256", "does not fit into a byte"),
        ("corrupt=mark@pong=3", "'mark' is no field of pong; known: value, type, length"),
        ("corrupt=data@byte=3", "a byte has no field 'data'"),
        ("corrupt@time=1", "there is nothing to corrupt at 'time'"),
        ("cut@run,times=0", "'times=0' is never"),
        ("cut@run,times=often", "'often' is not a number"),
        ("cut@run,alone=yes", "'alone=yes' is not alone"),
        ("delay=1@run,alone", "'alone' means nothing with delay"),
        ("corrupt@run,alone", "'alone' means nothing with corrupt"),
    ],
)
def test_nonsense_is_named(text: str, words: str) -> None:
    with pytest.raises(BadFault) as caught:
        parse_fault(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith(repr(text))


def test_ranges() -> None:
    drawn = [parse_fault("cut@request=5..9", random.Random(seed)).value for seed in range(200)]
    assert set(drawn) == {5, 6, 7, 8, 9}
    held = parse_fault("hold=0.5..2@pong=2..3,times=2..4", random.Random(1))
    assert 0.5 <= held.amount <= 2
    assert parse_fault(str(held)) == held
    again = parse_fault("hold=0.5..2@pong=2..3,times=2..4", random.Random(1))
    assert again == held


def test_random_is_a_byte_of_postcopy() -> None:
    for seed in range(100):
        fault = parse_fault("cut@random=100", random.Random(seed))
        assert fault.point is POINTS["postcopy-byte"]
        assert isinstance(fault.value, int)
        assert 0 <= fault.value < 100
        assert str(fault) == f"cut@postcopy-byte={fault.value}"
    assert len({parse_fault("cut@random", random.Random(seed)).value for seed in range(100)}) > 90


WORDS = st.sampled_from(
    [
        *ACTIONS,
        *POINTS,
        *OPTIONS,
        "@",
        "=",
        ",",
        "..",
        "1",
        "0",
        "before",
        "main",
        "recovery-1",
        "always",
        "9e9",
        "-",
    ]
)


@given(st.one_of(st.text(), st.lists(WORDS, max_size=12).map("".join)))
def test_anything_is_a_fault_or_named(text: str) -> None:
    """And a fault's own word is the same fault again."""
    try:
        fault = parse_fault(text, random.Random(0))
    except BadFault:
        return
    assert parse_fault(str(fault)) == fault


@given(st.sampled_from(sorted(POINTS)), st.binary(max_size=64))
def test_fields_lie_in_their_element(name: str, element: bytes) -> None:
    """Of any bytes: a peer may send anything."""
    for field in POINTS[name].fields.values():
        begin, length = field.span(element)
        assert 0 <= begin <= begin + length <= len(element)


def test_each_row_of_the_table() -> None:
    for point in POINTS.values():
        assert point.words
        assert bool(point.fields) == (point.takes not in (Takes.BYTES, Takes.SECONDS)), point.name
        assert (point.way is Way.BOTH) == (point.takes is Takes.SECONDS), point.name


class Here:
    def __init__(self, number: int, kind: str = "main", recovery: int = 0) -> None:
        self.number, self.kind, self.recovery = number, kind, recovery


def test_a_plan_goes_in_order() -> None:
    first, second, third = (
        parse_fault(text) for text in ("cut@run,on=main", "hold@run,times=2", "cut@eof,on=recovery-2")
    )
    plan = Plan([first, second])
    plan.add(third)
    main, recovery, last = Here(1), Here(2, "recovery", 1), Here(3, "recovery", 2)
    assert (plan.at(main), plan.at(recovery)) == (first, None)
    plan.take(main)
    assert (plan.at(main), plan.at(recovery)) == (second, second)
    plan.take(recovery)
    assert (plan.at(main), plan.at(recovery)) == (second, None)
    plan.take(main)
    assert plan.pending == [third]
    assert [plan.at(place) for place in (main, recovery, last)] == [None, None, third]
    plan.take(last)
    assert plan.armed is None
    assert plan.at(last) is None


async def test_the_library_refuses_the_same(tmp_path: Path) -> None:
    for listen_at, target, faults, error in (
        ("exec:cat", f"unix:{tmp_path}/b", [], BadFault),
        ("nowhere", f"unix:{tmp_path}/b", [], MigrationRefused),
        (f"unix:{tmp_path}/no/a", f"unix:{tmp_path}/b", [], MigrationRefused),
        (f"unix:{tmp_path}/a", f"unix:{tmp_path}/b", ["cut@nowhere"], BadFault),
    ):
        with pytest.raises(error):
            async with open_proxy(listen_at, target, faults):
                pass
    async with open_proxy(f"unix:{tmp_path}/a", f"unix:{tmp_path}/b") as proxy:
        with pytest.raises(BadFault, match="no action"):
            proxy.add("nothing@run")
        assert proxy.pending == []
    with pytest.raises(KeyError):  # an error of the block is raised as it is
        async with open_proxy(f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"):
            raise KeyError
