"""Where predicted pipelines are cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.made import cluster, heavy_at_the_end, layer
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.simulate import simulate
from wagontrain.stages import predict
from wagontrain.stages.predict import Turn, borders, orders


def test_no_stage_is_empty() -> None:
    assert borders((10.0, 1.0, 1.0), 3) == ((0, 1), (1, 2), (2, 3))
    with pytest.raises(UsageError, match="2 layers cannot be 3 stages: give a lower degree"):
        borders((1.0, 1.0), 3)


@given(st.lists(st.integers(0, 20).map(float), min_size=1, max_size=9), st.data())
def test_the_slowest_stage_is_as_quick_as_can_be(seconds: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(seconds)))
    found = borders(tuple(seconds), stages)
    assert [each for start, end in found for each in range(start, end)] == [*range(len(seconds))]
    assert len(found) == stages
    assert all(start < end for start, end in found)
    best = min(
        max(
            sum(seconds[start:end]) for start, end in itertools.pairwise((0, *places, len(seconds)))
        )
        for places in itertools.combinations(range(1, len(seconds)), stages - 1)
    )
    assert max(sum(seconds[start:end]) for start, end in found) == best


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
@given(st.integers(2, 5), st.integers(1, 12))
def test_every_micro_batch_goes_through_every_stage_once(
    schedule: str, degree: int, count: int
) -> None:
    found = orders(schedule, degree, count)
    stages = predict.total_stages(degree, schedule)
    ways = itertools.product(("forward", "backward"), range(stages), range(count))
    assert sorted(turn for order in found for turn in order) == sorted(Turn(*way) for way in ways)
    for rank, order in enumerate(found):
        assert {turn.stage % degree for turn in order} == {rank}


def even(layers: int, hosts: int = 4) -> Costs:
    """Layers that are all alike, on links that cost next to nothing."""
    profile = heavy_at_the_end()
    alike = tuple(layer(str(number), 1000, 1e-3) for number in range(layers))
    return Costs(replace(profile, layers=alike), cluster(hosts, 1e12, latency=1e-9))


@pytest.mark.parametrize("count", [4, 8, 16])
def test_two_stages_for_each_rank_halve_the_bubble(count: int) -> None:
    """Of m micro-batches through d ranks, (d - 1) / m of what they compute; of two stages half."""
    given = even(16)
    computed = 64 * 3e-3 * 16 / 4
    for schedule, idle in [("gpipe", 3.0), ("1f1b", 3.0), ("interleaved", 1.5)]:
        found = simulate(predict.step_graph(given, 4, count, schedule)).seconds
        assert found == pytest.approx(computed * (1 + idle / count), rel=0.02), schedule


def test_schedules_hold_as_many_activations_as_are_under_way() -> None:
    given = even(16)
    kept = {
        schedule: [predict.memory(given, 4, 8, schedule, rank)["activations"] for rank in range(4)]
        for schedule in ("gpipe", "1f1b", "interleaved")
    }
    each = 64 / 8 * 4 * given.profile.layers[0].kept  # of a stage, one micro-batch
    assert kept["gpipe"] == [8 * each] * 4
    assert kept["1f1b"] == [each * number for number in (4, 3, 2, 1)]
    assert kept["interleaved"][0] == (4 + 2 * 3 + 1) * each / 2
