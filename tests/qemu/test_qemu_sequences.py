"""Our endpoint behaves at its monitor as the QEMU of the same version does, scenario by scenario.

Each scenario is played by a pair of QEMUs and by a cast with ours in it; what both nodes told must be the same:
statuses, STOP and RESUME and the passes in their order, run states in between, answers and refusals, which fields
query-migrate has.
"""

from __future__ import annotations

import pytest

from tests.qemu import peers
from tests.qemu.qmp import QmpClosed
from tests.sequences import plays
from tests.sequences.cast import Cast, Play, Played, perform, plain
from tests.sequences.stage import Stage, deaf
from vhostpc.dialect import DIALECTS, Compat

pytestmark = pytest.mark.qemu

HELD = Cast("held", "held", "came", starts=False)
TO_HELD = Cast("qemu", "held", starts=False)
FROM_HELD = Cast("held", "qemu", "came")
OWN = Cast("own", "own")
OWN_STOPPED = Cast("own", "own", "prelaunch")
OWN_TO_STOPPED = Cast("own", "own", starts=False)
OWN_STOPPED_TO_STOPPED = Cast("own", "own", "prelaunch", starts=False)
EVERYWHERE: tuple[Play, ...] = (
    plays.precopy,
    plays.precopy_with_return_path,
    plays.postcopy_at_once,
    plays.postcopy_before_connected,
    plays.postcopy_in_the_middle,
    plays.postcopy_with_preempt,
    plays.postcopy_after_the_end,
    plays.postcopy_not_possible,
    plays.cancel_active,
    plays.cancel_active_with_postcopy_allowed,
    plays.last_word_awaited,
    plays.cancel_in_postcopy,
    plays.cancel_nothing,
    plays.second_migrate,
    plays.again_after_cancel,
    plays.after_completion,
    plays.recovered,
    plays.recovered_at_the_second_attempt,
    plays.recovered_with_preempt,
)
# Where the other end has no part, or dies in it.
SOURCE: tuple[Play, ...] = (
    plays.stopped,
    plays.cancel_in_setup,
    plays.cancel_in_setup_of_tcp,
    plays.nobody_listens,
    plays.no_socket_there,
    plays.nobody_listens_at_tcp,
    plays.destination_dies,
    plays.destination_dies_with_return_path,
    plays.destination_dies_in_postcopy,
    plays.cancel_paused_postcopy,
    plays.another_size,
    plays.another_size_with_return_path,
    plays.again_after_failure,
)
DESTINATION: tuple[Play, ...] = (
    plays.stopped,
    plays.source_dies,
    plays.source_dies_in_postcopy,
    plays.another_size,
    plays.another_size_with_return_path,
    plays.another_size_outlived,
    plays.waiting,
)
# Of a machine that can run at both ends.
RUNNING: tuple[Play, ...] = (
    plays.stopped_and_continued,
    plays.cont_at_one_that_waits,
    plays.continued_after_completion,
)
ALL = tuple(dict.fromkeys(EVERYWHERE + SOURCE + DESTINATION + RUNNING))
WHO: dict[str, tuple[Cast, tuple[Play, ...]]] = {
    "held": (HELD, EVERYWHERE),
    "to-held": (TO_HELD, EVERYWHERE + DESTINATION),
    "from-held": (FROM_HELD, EVERYWHERE + SOURCE),
    "own": (OWN, ALL),
    "own-stopped": (OWN_STOPPED, ALL),
    "own-to-stopped": (OWN_TO_STOPPED, ALL),
    "own-stopped-to-stopped": (OWN_STOPPED_TO_STOPPED, ALL),
}
# The words of QEMU's error-desc that ours has, too.
SAME_WORDS = {plays.nobody_listens, plays.no_socket_there, plays.nobody_listens_at_tcp}
# Played with the newest QEMU in each run.
NEWEST = {plays.postcopy_in_the_middle, plays.no_socket_there, plays.another_size_outlived}
NOT_7_2 = {
    plays.another_size_outlived,  # 7.2 has no exit-on-error
    plays.cancel_in_postcopy,  # 7.2 takes it, and the guest is lost: see below
    plays.cancel_paused_postcopy,
}

_seen: dict[tuple[Play, Cast, Compat], Played] = {}


async def _of_qemus(play: Play, cast: Cast, compat: Compat) -> Played:
    """What a pair of QEMUs tells; played once."""
    key = (play, cast.stand_ins(), compat)
    for again in (True, True, True, False):
        if key in _seen:
            break
        try:
            played = await perform(play, cast.stand_ins(), compat, small=_small(play))
        except QmpClosed:
            # Now and then a QEMU 7.2 that is cancelled ends with SIGSEGV in the migration after it.
            if not again or "cancel" not in play.__name__:
                raise
            continue
        # Now and then one that is cancelled says failed (failing): its channel broke before it looked.
        if again and "cancel" in play.__name__ and not {"failed", "failing"}.isdisjoint(played.src.events):
            continue
        _seen[key] = played
    return _seen[key]


def _small(play: Play) -> bool:
    return "another_size" in play.__name__


@pytest.mark.parametrize(
    ("compat", "play", "cast"),
    [
        pytest.param(
            compat,
            play,
            cast,
            id=f"{compat}-{play.__name__}-{who}",
            marks=[] if cast == OWN and (compat in peers.VERSIONS or play in NEWEST) else pytest.mark.long,
        )
        for compat in DIALECTS
        for who, (cast, played) in WHO.items()
        for play in played
        if compat != "7.2" or play not in NOT_7_2
    ],
)
async def test_as_a_pair_of_qemus(compat: Compat, play: Play, cast: Cast) -> None:
    theirs = await _of_qemus(play, cast, compat)
    ours = await perform(play, cast, compat, small=_small(play))
    first = 2 if DIALECTS[compat].precopy_passes_only else 1
    assert plain(ours.src.events, first) == plain(theirs.src.events, first)
    assert plain(ours.dst.events, first) == plain(theirs.dst.events, first)
    for mine, model in ((ours.src, theirs.src), (ours.dst, theirs.dst)):
        assert len(mine.answers) == len(model.answers)
        for answer, wanted in zip(mine.answers, model.answers, strict=True):
            # Ours may go on where QEMU's sentence ends.
            assert answer == wanted or answer.startswith(f"{wanted}: ")
    assert ours.src_fields == theirs.src_fields
    assert ours.dst_fields == theirs.dst_fields
    if play in SAME_WORDS:
        assert ours.errors == theirs.errors


@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_a_held_machine_does_not_run(compat: Compat) -> None:
    """QEMU's would after cont. Ours takes it while the machine is awaited, and refuses it from then on."""
    played = await perform(plays.cont_at_one_that_waits, TO_HELD, compat)
    *early, late = played.dst.answers
    assert early == ["cont: taken", "cont: taken"]
    assert "This machine is held" in late
    assert "RESUME" not in played.dst.events
    assert played.dst.events[-1] == "[paused/completed]"
    played = await perform(plays.continued_after_completion, HELD, compat)
    (answer,) = played.src.answers
    assert "This machine is held" in answer
    assert "RESUME" not in played.src.events
    assert played.src.events[-1] == "[postmigrate/completed]"


async def test_postcopy_is_not_cancelled() -> None:
    """QEMU 7.2 lets it be, and nobody has the guest then. Ours refuses as 10.0 does, and the move goes on."""
    theirs = await _of_qemus(plays.cancel_in_postcopy, FROM_HELD, "7.2")
    assert theirs.src.events[-1] == "[postmigrate/cancelled]"
    assert theirs.dst.events[-1] == "[running/postcopy-paused]"
    ours = await perform(plays.cancel_in_postcopy, FROM_HELD, "7.2")
    assert "Postcopy migration in progress, cannot cancel." in ours.src.answers[-1]
    assert ours.src.events[-1] == "[postmigrate/completed]"
    assert ours.dst.events[-1] == "[running/completed]"


@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_what_has_arrived_is_left_to_a_person(compat: Compat) -> None:
    """QEMU lets the machine run at both ends then. Ours stands still: it does not know what became of it."""
    cast = Cast()
    theirs = await _of_qemus(plays.cancel_at_the_last_word, cast, compat)
    assert theirs.src.events[-1].startswith("[running/")  # cancelled, or seldom failed
    assert theirs.dst.events[-1] == "[running/completed]"
    ours = await perform(plays.cancel_at_the_last_word, FROM_HELD, compat)
    assert ours.src.events[-1].startswith("[paused/failed")
    assert ours.dst.events[-1] == "[paused/completed]"
    own = await perform(plays.cancel_at_the_last_word, OWN, compat)
    assert "RESUME" not in own.src.events
    assert own.src.events[-1].startswith("[paused/failed")
    assert own.dst.events[-1] == "[running/completed]"


async def test_bandwidth_holds_at_once() -> None:
    """Not from the next pass on: this one would take minutes."""

    async def play(stage: Stage) -> None:
        await stage.prepare()
        await stage.src.qmp.command("migrate-set-parameters", max_bandwidth=64 << 10)
        await stage.listen()
        await stage.take("migrate", uri=stage.uri)
        await stage.src.until_status("active")
        await stage.look()
        await stage.fast()
        await stage.ended()

    played = await perform(play, FROM_HELD, "10.0")
    assert played.src.events[-1] == "[postmigrate/completed]"


@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_a_cancel_waits_for_no_connection(compat: Compat) -> None:
    """(QEMU 7.2 does.) The attempt still stands when the migration is cancelled."""

    async def play(stage: Stage) -> None:
        await stage.prepare()
        with deaf(stage.folder, "unix") as (uri, _):
            await stage.take("migrate", uri=uri)
            await stage.src.until_status("setup")
            await stage.take("migrate_cancel")
            await stage.ended(stage.src)

    played = await perform(play, FROM_HELD, compat)
    assert played.src.events == ("setup", "cancelling", "cancelled", "[paused/cancelled]")


# --- the comparison itself


@pytest.mark.parametrize("compat", peers.VERSIONS)
async def test_casts_differ(compat: Compat) -> None:
    """What is compared tells a running machine from a paused one, and one that starts from one that does not."""
    told = [
        (plain(played.src.events), plain(played.dst.events))
        for cast in (TO_HELD, FROM_HELD, HELD)
        for played in [await _of_qemus(plays.precopy, cast, compat)]
    ]
    assert told[0] != told[1]
    assert told[0] != told[2]
    at_once = [
        plain((await _of_qemus(plays.postcopy_at_once, cast, compat)).dst.events)
        for cast in (FROM_HELD, HELD)
    ]
    assert at_once[0] != at_once[1]


def test_plain_leaves_out_passes_that_are_a_matter_of_speed() -> None:
    start = ["setup", "PASS 1", "active"]
    for more in ([], ["PASS 2"], ["PASS 2", "PASS 3"]):
        last = f"PASS {len(more) + 2}"
        assert plain([*start, *more, "STOP", last, "completed"]) == [
            *("setup", "PASS", "active", "STOP", "PASS", "completed")
        ]
        assert plain([*start, *more, "device", last, "completed"]) == [
            *("setup", "PASS", "active", "device", "PASS", "completed")
        ]
    assert plain([*start, "STOP", "[paused/active]", "PASS 2", "device", "PASS 3"]) == plain(
        [*start, "STOP", "[paused/active]", "device", "PASS 2"]
    )
    assert plain([*start, "STOP", "completed"]) != plain([*start, "STOP", "PASS 2", "completed"])
    with pytest.raises(AssertionError):
        plain([*start, "PASS 3"])
