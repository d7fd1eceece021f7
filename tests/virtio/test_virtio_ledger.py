"""The books of a ring, without a ring and without C."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from vhostpc.virtio.ledger import Ledger


@dataclass(eq=False)
class Taken:
    number: int
    completed: bool = False
    again: bool = False
    late: bool = False


def taken(count: int) -> tuple[Ledger[Taken], list[Taken]]:
    """Books with so many chains, all with the device."""
    ledger = Ledger[Taken]()
    chains = [Taken(number) for number in range(count)]
    for chain in chains:
        ledger.take(chain)
    return ledger, chains


def answer(ledger: Ledger[Taken], chain: Taken) -> None:
    chain.completed = True
    ledger.answers.append(chain)


def test_it_loads_no_native_code() -> None:
    text = "import sys, vhostpc.virtio.ledger; sys.exit('vhostpc._native' in sys.modules)"
    subprocess.run([sys.executable, "-c", text], check=True)


@given(order=st.permutations(range(8)), in_order=st.booleans())
def test_answers_in_any_order(order: list[int], in_order: bool) -> None:
    """Each is pushed once; in the driver's order where that was asked for, else as they come."""
    ledger, chains = taken(8)
    ledger.in_order = in_order
    pushed: list[int] = []
    for number in order:
        answer(ledger, chains[number])
        batch = list(ledger.pushable())
        pushed += [chain.number for chain in batch]
        ledger.pushed(batch)
    assert pushed == (sorted(order) if in_order else order)
    assert not ledger.open
    assert not ledger.answers
    assert ledger.returnable


@given(answered=st.sets(st.integers(0, 5)), pushed=st.booleans())
def test_only_the_youngest_can_be_given_back(answered: set[int], pushed: bool) -> None:
    """Whether the answers are pushed or wait for it."""
    ledger, chains = taken(6)
    for number in answered:
        answer(ledger, chains[number])
    if pushed:
        ledger.pushed(list(ledger.pushable()))
    rest = set(range(6)) - answered
    assert ledger.returnable == (not rest or not answered or min(rest) > max(answered))


def test_a_chain_that_is_to_be_done_again_is_not_given_back() -> None:
    ledger, (first, second) = taken(2)
    first.again = True  # those come first
    assert not ledger.returnable
    assert not ledger.leave_again()  # the device has it
    ledger.ready.append(first)
    assert ledger.leave_again() == [first]
    assert ledger.returnable
    assert ledger.open == [second]


@given(answered=st.sets(st.integers(0, 5)), had=st.sets(st.integers(0, 5)))
def test_a_gap_is_what_the_device_has_not_had_below_an_answer(answered: set[int], had: set[int]) -> None:
    ledger, chains = taken(6)
    for chain in chains:
        if chain.number not in had | answered:
            ledger.ready.append(chain)
    for number in answered:
        answer(ledger, chains[number])
    expected = [c for c in ledger.ready if any(number > c.number for number in answered)]
    assert list(ledger.gaps()) == expected
    for chain in expected:
        ledger.hand_over(chain)
        assert ledger.ready[0] is chain


def test_nothing_is_left_when_it_is_cleared() -> None:
    ledger, chains = taken(3)
    answer(ledger, chains[1])
    ledger.ready.append(chains[2])
    assert ledger.clear() == chains
    assert not [*ledger.open, *ledger.answers, *ledger.ready]
