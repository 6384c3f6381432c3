"""What is tried, and what follows from trials. No process is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.planner.made import cluster, heavy_at_the_end
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.plan import Estimate
from wagontrain.planner import choosing
from wagontrain.planner.choosing import Wish
from wagontrain.planner.search import Weighed
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.strategies.hybrid import Hybrid
from wagontrain.strategies.local_sgd import LocalSGD
from wagontrain.strategies.parameter_server import ParameterServer
from wagontrain.strategies.sharded import Sharded
from wagontrain.strategy import Strategy

DATA = DataParallel()
HYBRIDS = [Hybrid(placement={"fc1": "column"}), Hybrid(placement={"fc1": "row"}), Hybrid()]
SHARDED = [Sharded(stage=2), Sharded(stage=3), Sharded(stage=1)]


def weighed(*told: tuple[Strategy, float]) -> list[Weighed]:
    """Candidates with so many seconds a step."""
    return [
        Weighed(strategy, Estimate(seconds, seconds, 0.0, 0.0, {"weights": 1.0}, 0.0, 2.0))
        for strategy, seconds in told
    ]


def tried(
    monkeypatch: pytest.MonkeyPatch, given: list[Weighed], took: dict[int, float | None]
) -> tuple[list[int], dict[int, float]]:
    """Places in the order in which they were tried, and what came of it."""
    places: list[int] = []

    def seconds_of(task: Any, context: Any, strategy: Strategy) -> float | None:
        place = next(n for n, each in enumerate(given) if each.strategy is strategy)
        places.append(place)
        return took[place]

    monkeypatch.setattr(choosing, "_seconds_of", seconds_of)
    measured = choosing._try(None, None, given)  # type: ignore[arg-type]
    return places, measured


def test_the_best_three_and_two_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weighed(
        (HYBRIDS[0], 1.0), (HYBRIDS[1], 1.1), (HYBRIDS[2], 1.2), (DATA, 1.5), (SHARDED[0], 2.5)
    )
    places, measured = tried(monkeypatch, given, {0: 1.0, 1: 1.1, 3: 1.5})
    assert places == [0, 1, 3]  # a third hybrid is none of them, and 2.5 is hopeless
    assert measured == {0: 1.0, 1: 1.1, 3: 1.5}


def test_one_that_turns_out_impossible_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weighed((HYBRIDS[0], 1.0), (SHARDED[0], 1.2), (DATA, 1.3), (SHARDED[1], 1.4))
    places, measured = tried(monkeypatch, given, {0: None, 1: 1.2, 2: 1.1})
    assert places == [0, 1, 2]
    assert measured == {1: 1.2, 2: 1.1}


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from([*HYBRIDS, *SHARDED, DATA]), st.floats(0.5, 2)),
        min_size=4, max_size=7, unique_by=lambda each: str(each[0]),
    ),
    st.lists(st.floats(0.1, 10), min_size=7, max_size=7),
)  # fmt: skip
def test_nobody_untried_is_expected_to_beat_the_best(
    told: list[tuple[Strategy, float]], ratios: list[float]
) -> None:
    given = weighed(*sorted(told, key=lambda each: each[1]))
    places = choosing._promising(given)
    measured = {place: given[place].seconds * ratios[place] for place in places}
    found = choosing._ratios(given, measured)
    for place, each in enumerate(given):
        if place not in places and each.seconds <= 2 * given[0].seconds:
            expected = choosing._corrected(each, found)
            assert expected >= min(measured.values()) * (1 - 1e-9)


def test_untried_candidates_are_told_as_corrected() -> None:
    costs = Costs(heavy_at_the_end(), cluster())
    given = weighed((HYBRIDS[0], 1.0), (SHARDED[0], 1.2), (SHARDED[1], 1.3), (DATA, 1.4))
    plan = choosing.conclude(given, given[0], costs, [], {0: 1.0, 1: 2.4}, "made-up")
    told = {each.title: each for each in plan.others}
    assert told["sharded"].corrected == pytest.approx(2.6)
    assert told["sharded"].why.startswith("2.6× as long")
    assert told["data-parallel"].corrected == pytest.approx(1.4 * 2**0.5)
    assert told["sharded stage=2"].why == "2.4× as long when tried: 2.4 s a step"
    assert plan.chosen.seconds == 1.0


SERVED = ParameterServer(consistency="synchronous")
LOCAL = LocalSGD(steps_between=4)


def relaxed(strategy: Strategy, seconds: float, most: float) -> Weighed:
    (each,) = weighed((strategy, seconds))
    assert each.estimate is not None
    return Weighed(strategy, replace(each.estimate, most_steps=most))


def test_workers_of_no_group_are_chosen_by_plans_only() -> None:
    given = weighed((SERVED, 1.0), (DATA, 2.0))
    assert choosing._winner(given, {}, Wish()).strategy == DATA
    assert choosing._winner(given, {}, Wish(crewed=True)).strategy == SERVED
    # After trials: it could not be tried.
    assert choosing._winner(given, {1: 2.0}, Wish(crewed=True)).strategy == DATA
    with pytest.raises(UsageError, match="name it, with --strategy parameter-server"):
        choosing._winner(weighed((SERVED, 1.0)), {}, Wish())
    assert choosing._promising(given) == [1]


def test_relaxed_ones_are_not_tried_and_compared_at_their_worst() -> None:
    for most, wins in [(1.5, LOCAL), (2.5, DATA)]:
        given = sorted([relaxed(LOCAL, 1.0, most), *weighed((DATA, 2.0))], key=lambda x: x.to_loss)
        data = next(place for place, each in enumerate(given) if each.strategy is DATA)
        assert choosing._promising(given) == [data]
        for measured in ({}, {data: 2.0}):
            assert choosing._winner(given, measured, Wish(relaxed=True)).strategy == wins
        # What was foretold too short was so for both.
        assert choosing._winner(given, {data: 4.0}, Wish(relaxed=True)).strategy == wins
        costs = Costs(heavy_at_the_end(), cluster())
        winner = next(each for each in given if each.strategy is wins)
        plan = choosing.conclude(given, winner, costs, [], {data: 2.0}, "made-up")
        assert any("nothing was measured here" in note for note in plan.notes)
        (loser,) = plan.others
        assert loser.why.startswith(("1.3× as long", "1.2× as long to the same loss"))


class Told:
    """A place in a job whose other rank says something else."""

    def gather_integers(self, integers: list[int]) -> list[list[int]]:
        return [integers, [integers[0] + 1]]


def test_ranks_that_disagree_do_not_wait_for_each_other() -> None:
    with pytest.raises(UsageError, match="workers came to different orders"):
        choosing._require_the_same(weighed((DATA, 1.0)), Told())  # type: ignore[arg-type]
