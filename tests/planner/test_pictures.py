"""What a plan keeps for pictures. No process is started."""

from __future__ import annotations

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.planner.made import cluster, heavy_at_the_end
from wagontrain.costs import Costs
from wagontrain.plan import Piece, Plan
from wagontrain.planner import pictures
from wagontrain.planner.choosing import choose_offline
from wagontrain.planner.search import with_links
from wagontrain.registry import discover
from wagontrain.simulate import simulate
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.strategies.pipeline import Pipeline


@pytest.fixture(scope="module")
def made() -> Plan:
    return choose_offline(None, heavy_at_the_end(), cluster(), discover().values())


def test_a_curve_goes_through_what_was_estimated_for_today(made: Plan) -> None:
    assert made.bandwidth == pytest.approx(25e6 * 8, rel=0.01)
    best = {made.chosen.strategy: made.chosen.estimate}
    for each in made.others:
        best.setdefault(each.strategy, each.estimate)
    assert made.curves[0].strategy == made.chosen.strategy
    assert len({curve.strategy for curve in made.curves}) == len(made.curves) > 2
    for curve in made.curves:
        assert [rate / made.bandwidth for rate, _ in curve.points] == pytest.approx(
            pictures.FACTORS
        )
        estimate = best[curve.strategy]
        assert estimate is not None
        assert dict(curve.points)[made.bandwidth] == pytest.approx(estimate.seconds)
        times = [seconds for _, seconds in curve.points]
        assert times[0] > times[-1]  # these links are what all of them wait for


def test_a_curve_is_the_simulation_with_other_links(made: Plan) -> None:
    costs = Costs(heavy_at_the_end(), cluster())
    slow = with_links(costs, 1 / 64)
    seconds = simulate(DataParallel().step_graph(slow), slow.interference).seconds
    (curve,) = [each for each in made.curves if each.strategy == "data-parallel"]
    assert curve.points[0][1] == pytest.approx(seconds)


def test_the_timeline_is_the_step_that_was_estimated(made: Plan) -> None:
    assert made.chosen.estimate is not None
    end = max(piece.start + piece.seconds for piece in made.timeline)
    assert end == pytest.approx(made.chosen.estimate.seconds)
    assert {piece.resource for piece in made.timeline} == {"device", "links"}
    assert min(piece.seconds for piece in made.timeline) >= 0


def test_a_pipeline_has_its_stages_and_both_directions() -> None:
    costs = Costs(heavy_at_the_end(), cluster())
    strategy = next(each for each in Pipeline.candidates(costs) if each.exact)
    pieces = pictures.timeline(strategy, costs)
    assert {"device", "out", "in"} <= {piece.resource for piece in pieces}
    assert len({piece.rank for piece in pieces}) > 1


def test_ranks_and_pieces_are_limited() -> None:
    costs = Costs(heavy_at_the_end(2048), cluster(hosts=32))
    deepest = max(
        (each for each in Pipeline.candidates(costs) if each.exact),
        key=lambda each: len(each.step_graph(costs).operations),
    )
    pieces = pictures.timeline(deepest, costs)
    assert len({piece.rank for piece in pieces}) <= pictures.RANKS
    assert 0 < len(pieces) <= pictures.PIECES


LANE = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["device", "links"]), st.floats(0, 1),
              st.floats(1e-6, 0.1)), max_size=60,
)  # fmt: skip


@hypothesis.given(LANE, st.integers(8, 60))
def test_what_is_joined_covers_what_it_was_made_of(
    told: list[tuple[int, str, float, float]], most: int
) -> None:
    pieces = [Piece("x", *each) for each in told]
    kept = pictures.joined(pieces, most)
    assert len(kept) <= max(most, len({(each.rank, each.resource) for each in pieces}))
    for each in pieces:
        assert any(
            one.rank == each.rank and one.resource == each.resource
            and one.start <= each.start
            and one.start + one.seconds >= each.start + each.seconds - 1e-12
            for one in kept
        )  # fmt: skip


def test_one_worker_has_no_links_to_draw() -> None:
    found = choose_offline(None, heavy_at_the_end(), cluster(hosts=1), discover().values())
    assert found.curves == ()


def test_a_plan_comes_back_whole_and_one_of_an_earlier_day_too(made: Plan) -> None:
    content = json.loads(json.dumps(made.to_json()))
    assert Plan.from_json(content) == made
    for name in ("curves", "bandwidth", "timeline"):
        del content[name]
    earlier = Plan.from_json(content)
    assert earlier.chosen == made.chosen
    assert (earlier.curves, earlier.bandwidth, earlier.timeline) == ((), None, ())
