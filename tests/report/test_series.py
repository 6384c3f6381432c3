"""Long curves are made short without losing what stands out."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.report.made import whole
from wagontrain.plan import Curve as PlanCurve
from wagontrain.report import series
from wagontrain.report.reading import Steps, read_run
from wagontrain.report.steps import apart, crossings

VALUES = st.lists(
    st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=200
)


@hypothesis.given(VALUES, st.integers(1, 50))
def test_thinning_keeps_the_extremes_and_counts_what_it_leaves_out(
    values: list[float], most: int
) -> None:
    curve = series.thin(list(range(len(values))), values, most)
    finite = [value for value in values if math.isfinite(value)]
    assert len(curve.x) == len(curve.y) <= most
    assert curve.left_out == len(values) - len(finite)
    assert curve.x == sorted(curve.x)
    if curve.low is None or curve.high is None:
        assert curve.y == finite
    else:
        assert min(curve.low) == min(finite)
        assert max(curve.high) == max(finite)
        assert all(
            low - 1e-6 <= y <= high + 1e-6
            for low, y, high in zip(curve.low, curve.y, curve.high, strict=True)
        )


def test_one_spike_among_a_hundred_thousand_steps_is_seen() -> None:
    values = np.ones(100_000)
    values[77_777] = 50.0
    curve = series.thin(range(100_000), values)
    assert len(curve.x) == series.POINTS
    assert curve.each == 100
    assert curve.high is not None
    assert max(curve.high) == 50.0


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(1e-3, 10)), min_size=1, max_size=300),
    st.integers(1, 50),
)
def test_throughput_says_what_the_whole_says(told: list[tuple[int, float]], most: int) -> None:
    counts, seconds = (list(map(float, each)) for each in zip(*told, strict=True))
    steps = Steps(time=np.cumsum(seconds).tolist(), count=counts, seconds=seconds)
    curve = series.throughput(steps, most)
    assert 1 <= len(curve.x) <= most
    assert curve.x[-1] == steps.time[-1]
    # Weighted by the seconds that each point stands for, its rates are all samples.
    ends = [0, *(steps.time.index(x) + 1 for x in curve.x)]
    spent = [sum(seconds[a:b]) for a, b in itertools.pairwise(ends)]
    made = sum(rate * length for rate, length in zip(curve.y, spent, strict=True))
    assert made == pytest.approx(sum(counts))


def test_throughput_of_a_run_is_that_of_its_summary(tmp_path: Path) -> None:
    run = read_run(whole(tmp_path / "run"))
    curve = series.throughput(run.steps, most=1)
    assert run.summary is not None
    assert curve.y == [pytest.approx(run.summary["samples_per_second"])]


def test_nothing_gives_nothing() -> None:
    assert series.throughput(Steps()).x == []
    assert series.thin([], []).x == []


@hypothesis.given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0.01, 2))
def test_labels_stand_apart_in_their_order(values: list[float], least: float) -> None:
    moved = apart(values, least)
    order = sorted(range(len(values)), key=lambda each: (values[each], moved[each]))
    placed = [moved[each] for each in order]
    assert all(b - a >= least - 1e-9 for a, b in itertools.pairwise(placed))
    if all(
        b - a > least for a, b in zip(sorted(values), sorted(values)[1:], strict=False)
    ):  # nothing was in the way
        assert moved == pytest.approx(values)


def test_where_the_quickest_changes() -> None:
    # One takes 1/rate, the other 0.1 always: they meet at a rate of 10.
    rates = [1.0, 4.0, 16.0, 64.0]
    falling = PlanCurve("a", "falling", tuple((rate, 1 / rate) for rate in rates))
    level = PlanCurve("b", "level", tuple((rate, 0.1) for rate in rates))
    ((rate, seconds, title),) = crossings([falling, level])
    assert (rate, seconds, title) == (pytest.approx(10), pytest.approx(0.1), "falling")
    assert crossings([level, PlanCurve("c", "slow", tuple((r, 1.0) for r in rates))]) == []
