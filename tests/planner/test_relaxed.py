"""What is foretold of local SGD and parameter servers, from round figures of links and machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.planner.made import cluster, heavy_at_the_end, layer
from wagontrain.cluster import Cluster
from wagontrain.costs import Costs
from wagontrain.planner import search
from wagontrain.simulate import simulate
from wagontrain.strategies.local_sgd import LocalSGD
from wagontrain.strategies.parameter_server import ParameterServer
from wagontrain.strategy import Strategy

BYTES = heavy_at_the_end().nbytes
ONE = 32.7e-3 * 64
"""Seconds of the passes of a whole batch: 10.9 ms a sample forward, twice that backward."""


def costs(rate: float = 25e6, hosts: int = 4, slow: float = 0.0, **changes: Any) -> Costs:
    """A worker on each host; the last at a part of the others' pace, where given."""
    made = cluster(hosts, rate, **changes)
    if slow:
        (host,) = made.hosts
        kinds = (replace(host, count=hosts - 1), replace(host, count=1, speed=host.speed * slow))
        made = Cluster("uneven", kinds, made.between, {})
    return Costs(heavy_at_the_end(), made)


def seconds(strategy: Strategy, given: Costs) -> float:
    graph = strategy.step_graph(given)
    return simulate(graph, given.interference).seconds / graph.steps


# --- local SGD ----------------------------------------------------------------------------------


def test_averages_are_paid_once_in_so_many_steps() -> None:
    given = costs()
    local = ONE / 4 + given.update(BYTES, 0)
    average = 2 * 3 / 4 * BYTES / 25e6
    for period in (1, 4, 64):
        expected = local + average / period
        assert seconds(LocalSGD(steps_between=period), given) == pytest.approx(expected, rel=0.01)
        found = search.estimate(LocalSGD(steps_between=period), given)
        assert found.sent == pytest.approx(2 * 3 / 4 * BYTES / period)


def test_fragments_hide_behind_steps_and_need_less_memory_at_a_time() -> None:
    given = costs(rate=1e9)
    plain, parts = LocalSGD(steps_between=16), LocalSGD(steps_between=16, fragments=4)
    assert seconds(parts, given) < seconds(plain, given)
    assert parts.memory(given, 0)["averaging"] == BYTES / 2
    assert plain.memory(given, 0)["averaging"] == BYTES
    nesterov = LocalSGD(outer="nesterov").memory(given, 0)
    assert nesterov["outer optimizer"] == 2 * BYTES


# --- parameter servers --------------------------------------------------------------------------


def test_with_links_that_cost_nothing_workers_make_updates_at_their_own_pace() -> None:
    given = costs(rate=1e12)
    found = seconds(ParameterServer(), given)
    assert found == pytest.approx(ONE / 4, rel=0.05)
    # One by itself, three times as slow, makes three times fewer of them.
    uneven = costs(rate=1e12, slow=1 / 3)
    assert seconds(ParameterServer(), uneven) == pytest.approx(ONE / (3 + 1 / 3), rel=0.1)


def test_slow_links_are_those_of_the_servers_host() -> None:
    given = costs(rate=25e6)
    # Three of four pushes cross its link, and parameters go back over the other direction.
    floor = 3 / 4 * BYTES / 25e6
    assert floor < seconds(ParameterServer(), given) < 1.15 * floor
    assert floor / 4 < seconds(ParameterServer(n_push=4, n_fetch=4), given) < 1.2 * floor / 4


def test_steps_together_wait_for_fetches_and_pushes_of_all() -> None:
    given = costs(rate=25e6)
    both = 2 * 3 * BYTES / 25e6
    together = ParameterServer(consistency="synchronous")
    assert together.exact
    assert both + ONE / 4 < seconds(together, given) < both + ONE / 4 + 0.3
    assert search.estimate(together, given).sent == BYTES


def test_a_slow_host_holds_up_steps_together_unless_it_is_a_backup() -> None:
    given = costs(rate=1e12, slow=0.1)
    waiting = seconds(ParameterServer(consistency="synchronous"), given)
    backup = ParameterServer(consistency="synchronous", backup=1)
    assert waiting == pytest.approx(10 * ONE / 4, rel=0.1)
    assert seconds(backup, given) == pytest.approx(ONE * 22 / 64, rel=0.1)  # a third, rounded up
    assert backup in ParameterServer.candidates(given)
    assert backup.steps_needed(given).most == 1  # every sample once an epoch, in another order
    assert not any(each.backup for each in ParameterServer.candidates(costs()))


def test_a_bound_holds_the_quick_ones_to_the_pace_of_the_slow_one() -> None:
    given = costs(rate=1e12, slow=0.2)
    free, bound = ParameterServer(), ParameterServer(consistency="ssp:2")
    assert seconds(free, given) < 0.5 * seconds(bound, given)
    assert seconds(bound, given) == pytest.approx(5 * ONE / 4, rel=0.3)
    # In return nobody is later than the bound.
    assert bound.steps_needed(given).most < free.steps_needed(given).most


@pytest.mark.parametrize(
    ("settings", "late"), [({}, 3), ({"overlap": True}, 4), ({"n_push": 2, "n_fetch": 2}, 6.5)]
)
def test_how_late_gradients_are(settings: dict[str, Any], late: float) -> None:
    found = ParameterServer(**settings).steps_needed(costs())
    assert found.least == 1
    assert found.most >= 1 + late
    assert f"{late:.3g} updates late" in found.why


def test_several_servers_share_updating() -> None:
    given = costs(rate=1e12)
    slow = replace(
        given, profile=replace(given.profile, update=replace(given.profile.update, each=1e-8))
    )
    one, four = (seconds(ParameterServer(servers=count), slow) for count in (1, 4))
    assert one == pytest.approx(BYTES * 1e-8, rel=0.3)  # all updates, one after the other
    assert four < 0.5 * one


def test_only_the_rows_of_a_batch_travel() -> None:
    table = replace(layer("table", 25_000_000, 1e-6, (8, 4 * 16)), kind="Embedding", sparse=True)
    given = costs()
    given = replace(given, profile=replace(given.profile, layers=(table, *given.profile.layers)))
    plain, rows = ParameterServer(), ParameterServer(tables="auto")
    assert rows in ParameterServer.candidates(given)
    assert rows not in ParameterServer.candidates(costs())
    found = {each: search.estimate(each, given) for each in (plain, rows)}
    assert 4 * found[plain].sent == BYTES + 100_000_000
    assert 4 * found[rows].sent == BYTES + 64 * (4 * 16 + 8)
    away = rows.memory(given, 1)["weights"] - plain.memory(given, 1)["weights"]
    assert away == -200_000_000  # of two copies


def test_servers_are_beside_the_first_worker() -> None:
    given = costs()
    items = [ParameterServer().memory(given, rank) for rank in range(4)]
    assert items[0]["servers"] > BYTES
    assert not any("servers" in each for each in items[1:])


def test_no_steps_together_with_batch_norm() -> None:
    given = costs()
    norm = replace(layer("norm", 64, 1e-6), kind="BatchNorm2d")
    given = replace(given, profile=replace(given.profile, layers=(norm, *given.profile.layers)))
    assert not any(each.exact for each in ParameterServer.candidates(given))
    assert any(each.exact for each in ParameterServer.candidates(costs()))
