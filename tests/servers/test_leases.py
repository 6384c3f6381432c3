from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wagontrain.batches import Order
from wagontrain.errors import UsageError
from wagontrain.mesh import equal_shares
from wagontrain.servers.leases import Course, Reached, Supply, Work


def anything(work: Work) -> bool:
    return True


def everything(supply: Supply) -> list[Work]:
    works = []
    while (work := supply.take(anything)) is not None:
        works.append(work)
    return works


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 3))
def test_batches_are_those_of_one_process(samples: int, batch_size: int, epochs: int) -> None:
    course = Course(samples, batch_size, epochs)
    order = Order(samples, batch_size)
    works = everything(Supply(course, Reached()))
    assert len(works) == epochs * order.steps
    for step, work in enumerate(works):
        epoch, within = divmod(step, order.steps)
        positions = order.positions(within)
        assert work.start - epoch * samples == positions.start
        assert work.stop - epoch * samples == positions.stop
        assert course.step_at(work.start) == step == course.step_at(work.stop - 1)
        assert Course(samples, batch_size, epochs, first_step=step).reached().position == work.start


@given(st.integers(0, 30), st.integers(1, 8))
def test_shares_are_cut_as_ranks_cut_them(samples: int, shares: int) -> None:
    sizes = [Work(5, 5 + samples, share, shares).samples for share in range(shares)]
    assert sizes == equal_shares(samples, shares)


@given(st.data())
@settings(deadline=None)
def test_what_is_reached_says_what_is_left(data: st.DataObject) -> None:
    course = Course(data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9)), 3)
    borders = sorted(data.draw(st.sets(st.integers(0, course.end), min_size=1)))
    gaps = tuple(zip(borders[:-1:2], borders[1::2], strict=False))
    reached = Reached(borders[-1], tuple(gap for gap in gaps if gap[1] <= borders[-1]))
    supply = Supply(course, reached)
    left = [*(place for gap in reached.gaps for place in range(*gap))]
    left += range(reached.position, course.end)
    assert supply.epoch == (left[0] // course.samples if left else course.epochs)
    works = everything(supply)
    assert [place for work in works for place in range(work.start, work.stop)] == left
    for work in works:  # none looks across an epoch's or a batch's border
        assert course.step_at(work.start) == course.step_at(work.stop - 1)
    again = Supply(course, supply.reached())  # what is out is not applied
    assert [place for work in everything(again) for place in range(work.start, work.stop)] == left
    for work in data.draw(st.permutations(works)):
        supply.apply(work)
    assert supply.exhausted
    assert supply.reached() == Reached(course.end)


def test_numbers_that_cannot_be_trained_with() -> None:
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1, -1)):
        with pytest.raises(UsageError, match="cannot be trained: give at least one sample"):
            Course(*numbers)
