from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from wagontrain.roll import Limits, Pulse, Roll

LIMITS = Limits(usual=30, hasty=5, patient=300)


def pulse(rank: int, beats: int, doing: str = "in step 3", patient: bool = False) -> Pulse:
    return Pulse(rank, f"tb{rank}", beats, doing, 1.0, patient)


def test_a_pulse_travels_as_text() -> None:
    assert Pulse.decode(pulse(3, 7).encode().encode()) == pulse(3, 7)


def test_who_beats_is_there_and_who_stands_still_is_lost() -> None:
    roll = Roll(LIMITS)
    for now in range(100):
        roll.hear(pulse(0, now), now)
        roll.hear(pulse(1, min(now, 40)), now)  # the same pulse read again says nothing new
        if now <= 70:
            assert roll.lost(now) is None
    assert (
        roll.lost(99) == "rank 1 on host tb1 has not been heard of for 59 s (last seen in step 3)"
    )


def test_a_broken_connection_makes_hasty_with_those_at_work_first() -> None:
    roll = Roll(LIMITS)
    roll.hear(pulse(1, 1), 0)
    roll.hear(pulse(2, 1, "setting up", patient=True), 0)
    assert roll.lost(6) is None
    said = roll.lost(6, broken=1) or ""
    assert "rank 1" in said
    assert "rank 2" not in said
    assert "rank 2 on host tb2" not in (roll.lost(299) or "")
    assert "rank 2 on host tb2" in (roll.lost(301) or "")


def test_a_broken_connection_ends_patience_if_it_was_none_of_those_at_work() -> None:
    roll = Roll(LIMITS)
    roll.hear(pulse(1, 1), 40)
    roll.hear(pulse(2, 1, "setting up", patient=True), 0)
    assert roll.lost(44, broken=4) is None
    assert "rank 2 on host tb2" in (roll.lost(44.5, broken=5.5) or "")


def test_who_has_left_is_not_lost() -> None:
    roll = Roll(LIMITS)
    roll.hear(pulse(1, 1), 0)
    assert not roll.all_others_left
    roll.hear(dataclasses.replace(pulse(1, 2), left=True), 1)
    assert roll.all_others_left
    assert roll.lost(1000) is None


def test_long_lists_are_cut() -> None:
    roll = Roll(LIMITS)
    for rank in range(10):
        roll.hear(pulse(rank, 1), 0)
    said = roll.lost(31) or ""
    assert said.count("has not been heard of") == 3
    assert said.endswith(", and 7 more")


def test_phases_name_the_odd_one_first() -> None:
    roll = Roll(LIMITS)
    for rank in range(4):
        doing = "reading the data of step 5" if rank == 2 else "in the exchange of step 4"
        roll.hear(dataclasses.replace(pulse(rank, 1, doing), seconds=40.0 + rank), 0)
    assert roll.phases() == (
        "rank 2 on host tb2 reading the data of step 5 for 42 s; "
        "ranks 0, 1, 3 in the exchange of step 4 for 40 s"
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 20)), max_size=60), st.booleans())
def test_nobody_is_lost_who_was_heard_within_the_limit(
    heard: list[tuple[int, float]], hasty: bool
) -> None:
    roll, now, last = Roll(LIMITS), 0.0, {}
    for beats, (rank, pause) in enumerate(heard):
        now += pause
        roll.hear(pulse(rank, beats), now)
        last[rank] = now
        limit = LIMITS.hasty if hasty else LIMITS.usual
        silent = [rank for rank, when in last.items() if now - when > limit]
        said = roll.lost(now, 1.0 if hasty else None)
        assert (said is None) == (not silent)
        for rank in silent[:3]:
            assert f"rank {rank} on host tb{rank}" in (said or "")
