from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wagontrain.errors import UsageError
from wagontrain.mesh import balanced_shares, equal_shares, proportional_shares, ranges, shares


@given(st.integers(1, 500), st.integers(1, 40))
def test_equal_shares_are_torch_chunk_sizes_with_zeros_behind(count: int, parts: int) -> None:
    sizes = equal_shares(count, parts)
    chunks = [len(chunk) for chunk in torch.arange(count).chunk(parts)]
    assert sizes == chunks + [0] * (parts - len(chunks))


@given(
    st.integers(0, 10_000),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda weights: any(weights)),
)
def test_proportional_shares_add_up_and_are_near_their_due(
    count: int, weights: list[float]
) -> None:
    sizes = proportional_shares(count, weights)
    assert sum(sizes) == count
    assert len(sizes) == len(weights)
    for size, weight in zip(sizes, weights, strict=True):
        assert abs(size - count * weight / sum(weights)) <= 1 + 1e-6
        assert weight > 0 or size <= 1


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="give one number per worker"):
        proportional_shares(10, weights)


def test_as_many_weights_as_workers() -> None:
    assert shares(10, 2, [3, 1]) == [8, 2]
    with pytest.raises(UsageError, match="2 weights were given for 3 workers"):
        shares(10, 3, [3, 1])


def test_ranges_follow_each_other() -> None:
    assert ranges([2, 0, 3], 4) == [range(4, 6), range(6, 6), range(6, 9)]


@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.floats(0, 10), st.floats(1e-5, 10)), min_size=1, max_size=20),
)
def test_balanced_shares_let_all_end_together(count: int, costs: list[tuple[float, float]]) -> None:
    found = balanced_shares(count, costs)
    assert sum(found) == pytest.approx(count)
    ends = [
        fixed + each * share for share, (fixed, each) in zip(found, costs, strict=True) if share
    ]
    assert max(ends) == pytest.approx(min(ends))
    idle = [fixed for share, (fixed, _) in zip(found, costs, strict=True) if not share]
    assert all(fixed >= max(ends) * (1 - 1e-9) for fixed in idle)


def test_a_rank_at_a_quarter_of_the_speed_gets_a_quarter() -> None:
    assert balanced_shares(130, [(0, 1.0)] * 3 + [(0, 4.0)]) == pytest.approx([40, 40, 40, 10])
