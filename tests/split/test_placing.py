"""That the cheapest placement is found: held against trying them all."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from tests.planner.made import cluster, heavy_at_the_end
from wagontrain.costs import Costs
from wagontrain.profile import Cut
from wagontrain.split import placing
from wagontrain.split.placing import Option, Problem
from wagontrain.split.predict import Border

CUTS: tuple[Cut, ...] = ("whole", "column", "row")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 5))
    numbers = st.integers(0, 20)
    options = {
        str(layer): {cut: Option(draw(numbers), draw(st.integers(1, 9))) for cut in CUTS}
        for layer in range(count)
    }
    saved = {
        (str(layer), str(layer + 1)): float(draw(numbers))
        for layer in range(count - 1)
        if draw(st.booleans())
    }
    return Problem(options, saved)


def all_of(problem: Problem) -> list[dict[str, Cut]]:
    names = list(problem.options)
    return [
        dict(zip(names, cuts, strict=True)) for cuts in itertools.product(CUTS, repeat=len(names))
    ]


@given(problems())
def test_nothing_is_cheaper(problem: Problem) -> None:
    found = placing.cheapest(problem)
    assert found.keys() == problem.options.keys()
    assert problem.seconds(found) == min(map(problem.seconds, all_of(problem)))


@given(problems(), st.integers(1, 40))
def test_nothing_that_fits_is_cheaper(problem: Problem, room: int) -> None:
    found = placing.cheapest(problem, room)
    fitting = [each for each in all_of(problem) if problem.nbytes(each) <= room]
    if not fitting:
        assert problem.nbytes(found) == min(map(problem.nbytes, all_of(problem)))
        return
    assert problem.nbytes(found) <= room
    least = min(map(problem.seconds, fitting))
    assert math.isclose(problem.seconds(found), least, abs_tol=1e-6)


def test_heavy_layers_on_slow_links_are_split_in_a_pair() -> None:
    costs = Costs(heavy_at_the_end(), cluster(rate=25e6))
    border = Border(4, 64, shards=True)
    found = placing.cheapest(placing.problem(costs, border, 16, exposed=1.0))
    assert (found["fc1"], found["fc2"]) in [("column", "row"), ("row", "column")]
    quick = Costs(heavy_at_the_end(), cluster(rate=1e12, memory=8e9))
    found = placing.cheapest(placing.problem(quick, border, 16, exposed=0.0))
    assert set(found) == {"fc1", "fc2", "out"}


def test_memory_that_is_short_splits_what_would_else_be_whole() -> None:
    costs = Costs(heavy_at_the_end(batch=4096), cluster(rate=25e6))
    border = Border(4, 4096, shards=True)
    problem = placing.problem(costs, border, 1024, exposed=0.0)
    free = placing.cheapest(problem)
    assert set(free.values()) == {"whole"}  # nothing is to be gained by splitting
    tight = placing.cheapest(problem, problem.nbytes(free) / 2)
    assert problem.nbytes(tight) <= problem.nbytes(free) / 2
    assert "whole" in tight.values()  # not more than has to be
