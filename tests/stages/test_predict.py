"""Where predicted pipelines are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wagontrain.errors import UsageError
from wagontrain.stages.predict import borders


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
