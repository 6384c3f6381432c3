"""Planning takes seconds, for thousands of workers: what they do alike is told once.

Limits are three times those that are promised, on a machine that others use, too.
"""

from __future__ import annotations

import time

import pytest

from wagontrain.cluster import KINDS, Cluster, Host, Kind, Measured
from wagontrain.costs import Costs
from wagontrain.profile import Layer, Line, Part, Profile
from wagontrain.registry import built_in
from wagontrain.simulate import Interference, simulate
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.strategies.pipeline import Pipeline
from wagontrain.strategy import Strategy


def layer(number: int, count: int) -> Layer:
    """Of two, one has weights: pairs of them can be fused."""
    if number % 2:
        line = Line(1e-5, 1e-7)
        return Layer(str(number), "GELU", (), line, line, 1, 4096, 4096, 4096, 0)
    part = Part(f"{number}.weight", (1024, 1024), 4 * 2**20)
    after = str(number + 2) if number % 4 == 0 and number + 2 < count else ""
    return Layer(
        str(number), "Linear", (part,), Line(1e-5, 1e-6), Line(1e-5, 2e-6), 1, 4096, 4096, 8192,
        2.0 * 2**20, ("column", "row"), after,
    )  # fmt: skip


def costs(hosts: int, workers: int, layers: int = 200, interference: float = 1.1) -> Costs:
    pace = Measured(((2, 1024, 2e-5), (2, 2**30, 0.9), (64, 1024, 2e-4), (64, 2**30, 1.8)))
    links: dict[Kind, Measured] = dict.fromkeys(KINDS, pace)
    slowed = Interference(interference, interference)
    host = Host(hosts, workers, "cuda", 80 * 10**9, 1000.0, slowed)
    profile = Profile(
        model="m", batch_size=4096, accumulate=1,
        layers=tuple(layer(number, layers) for number in range(layers)),
        update=Line(1e-5, 1e-10), optimizer=1.0, buffers=0, sample=4096.0, base=0, speed=1000.0,
        device="cuda",
    )  # fmt: skip
    return Costs(profile, Cluster("c", (host,), links, links))


def weigh(strategy: Strategy, given: Costs) -> float:
    """Seconds of a step; also asks all that a plan says of it."""
    timeline = simulate(strategy.step_graph(given), given.interference)
    for rank in timeline.graph.ranks:
        assert timeline.shares(rank).total == timeline.seconds
        assert sum(strategy.memory(given, rank).values()) > 0
        assert timeline.graph.sent_by(rank) >= 0
    return timeline.seconds


@pytest.mark.parametrize(
    "strategy", [DataParallel(), Pipeline(degree=8, micro_batches=32)], ids=lambda each: each.name
)
def test_a_step_on_a_thousand_hosts_takes_under_a_second(strategy: Strategy) -> None:
    given = costs(1000, 1)
    began = time.perf_counter()
    assert weigh(strategy, given) > 0
    assert time.perf_counter() - began < 3 * 1.0


def test_workers_that_do_the_same_cost_nothing() -> None:
    few, many = (DataParallel().step_graph(costs(hosts, 1)) for hosts in (2, 1000))
    assert len(few.operations) == len(many.operations)


@pytest.mark.parametrize(("hosts", "limit"), [(8, 2.0), (125, 30.0)])
def test_everything_that_is_worth_weighing(hosts: int, limit: float) -> None:
    """Every candidate for 200 layers on 64 workers in 2 s, on 1,000 in 30 s."""
    given = costs(hosts, 8)
    began = time.perf_counter()
    found = [
        (weigh(strategy, given), strategy.name)
        for kind in built_in().values()
        for strategy in kind.candidates(given)
    ]
    assert time.perf_counter() - began < 3 * limit
    assert len({name for _, name in found}) >= 4  # on such links a hybrid splits nothing
    assert all(seconds > 0 for seconds, _ in found)
