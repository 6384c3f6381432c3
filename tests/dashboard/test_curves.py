from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wagontrain.dashboard.curves import Curve

POINTS = st.lists(
    st.tuples(st.floats(-1e6, 1e6), st.floats(0.1, 1e3)), min_size=1, max_size=400
)  # fmt: skip


@given(points=POINTS, room=st.sampled_from([2, 4, 16]))
def test_nothing_is_lost_but_detail(points: list[tuple[float, float]], room: int) -> None:
    curve = Curve(room)
    for step, (value, weight) in enumerate(points):
        curve.add(step, step / 10, value * weight, weight)
    buckets = curve.buckets
    assert len(buckets) <= room
    assert sum(bucket.count for bucket in buckets) == len(points)
    assert min(bucket.low for bucket in buckets) == pytest.approx(min(v for v, _ in points))
    assert max(bucket.high for bucket in buckets) == pytest.approx(max(v for v, _ in points))
    mean = sum(v * w for v, w in points) / sum(w for _, w in points)
    ours = sum(bucket.above for bucket in buckets) / sum(bucket.below for bucket in buckets)
    assert ours == pytest.approx(mean, rel=1e-9, abs=1e-6)
    assert buckets[-1].step == len(points) - 1
    assert [bucket.step for bucket in buckets] == sorted({bucket.step for bucket in buckets})


@given(points=POINTS, looks=st.sets(st.integers(0, 399)))
def test_who_looks_now_and_then_has_what_there_is(
    points: list[tuple[float, float]], looks: set[int]
) -> None:
    curve = Curve(8)
    rows: list[list[float]] = []
    seen = (0, 0)
    for step, (value, weight) in enumerate(points):
        curve.add(step, step / 10, value * weight, weight)
        if step in looks or step == len(points) - 1:
            start, news = curve.since(*seen)
            assert start <= len(rows)
            rows = [*rows[:start], *news]
            seen = curve.generation, len(curve.buckets)
            assert rows == [bucket.plain() for bucket in curve.buckets]


@pytest.mark.parametrize(("above", "below"), [(math.nan, 1), (math.inf, 1), (1, 0), (1, math.nan)])
def test_what_is_not_finite_is_left_out(above: float, below: float) -> None:
    curve = Curve()
    curve.add(0, 0.0, above, below)
    assert not curve.buckets
