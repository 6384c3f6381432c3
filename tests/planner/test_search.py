"""What the planner concludes from costs: that it is the right thing, and for the right reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

import wagontrain as wt
from tests.planner.made import cluster, heavy_at_the_end
from wagontrain.cluster import Cluster, Measured, scaled
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.plan import Candidate, Plan
from wagontrain.planner import choosing, search
from wagontrain.simulate import simulate
from wagontrain.strategies.data_parallel import DataParallel


def planned(rate: float, batch: int = 64, **changes: object) -> Plan:
    costs = Costs(heavy_at_the_end(batch), cluster(rate=rate, **changes))  # type: ignore[arg-type]
    return choosing.choose_offline(None, costs.profile, costs.cluster, wt.discover().values())


def test_slow_links_choose_the_hybrid_with_its_heavy_layers_split() -> None:
    plan = planned(25e6)
    assert plan.chosen.strategy == "hybrid"
    placement = plan.chosen.settings["placement"]
    assert {placement["fc1"], placement["fc2"]} <= {"column", "row"}
    assert not {name for name, cut in placement.items() if cut != "whole"} - {"fc1", "fc2", "out"}
    plain = next(each for each in plan.others if each.strategy == "data-parallel")
    assert "cross the link every step" in plain.why


def test_a_loser_says_what_would_have_to_change_and_it_is_true() -> None:
    checked: list[str] = []
    for rate in (2e6, 25e6, 1e9):
        plan = planned(rate)
        for loser in plan.others:
            for flip in filter(None, loser.flip.split(" or ")):
                words = flip.split()
                value = float(words[-2] if words[-1] == "Gbit/s" else words[-1])
                more = "above" in words
                checked.append(("link " if words[-1] == "Gbit/s" else "batch ") + str(more))
                for factor in (0.9, 1.1):
                    quicker = wins(loser, plan.chosen, rate, words[-1], value * factor)
                    assert quicker == (more == (factor > 1)), (loser.title, flip)
    assert {"link True", "link False", "batch True"} <= set(checked)


def wins(loser: Candidate, chosen: Candidate, rate: float, unit: str, value: float) -> bool:
    """Whether the loser is quicker with links of so many Gbit/s, or with such a batch."""
    costs = Costs(heavy_at_the_end(), cluster(rate=rate))
    if unit == "Gbit/s":
        factor = value / search.link_rate(costs.cluster)
        costs = replace(costs, cluster=scaled(costs.cluster, factor))
    else:
        costs = replace(costs, profile=heavy_at_the_end(round(value)))
    one, other = (
        simulate(strategy.step_graph(costs), costs.interference).seconds
        for strategy in (wt.make_strategy(each.strategy, each.settings) for each in (loser, chosen))
    )
    return one < other


def test_quick_links_make_plain_data_parallel_as_good_as_any() -> None:
    plan = planned(1e11)
    plain = [each for each in (plan.chosen, *plan.others) if each.strategy == "data-parallel"]
    assert plan.chosen.seconds is not None
    assert plain[0].seconds is not None
    assert plain[0].seconds < 1.05 * plan.chosen.seconds


def test_what_does_not_fit_is_not_chosen_and_says_what_it_needs() -> None:
    plan = planned(1e9, memory=0.9e9)
    assert plan.chosen.estimate is not None
    assert plan.chosen.estimate.fits
    plain = next(each for each in plan.others if each.strategy == "data-parallel")
    assert plain.why.startswith("does not fit: needs ")
    assert "a worker may take 855.0 MB" in plain.why
    assert plan.chosen.strategy in ("sharded", "hybrid", "split-weights", "pipeline")


def test_nothing_feasible_says_what_is_closest() -> None:
    with pytest.raises(UsageError, match=r"nothing fits: closest is .* needs .* where 95.0 MB"):
        planned(1e9, memory=100e6)


def test_a_missing_measurement_is_an_error_and_no_default() -> None:
    bare = replace(cluster(), between={"send": Measured(((2, 1024, 1e-3),))})
    with pytest.raises(UsageError, match=r"no figures for .* between hosts: measure it"):
        choosing.choose_offline(None, heavy_at_the_end(), bare, wt.discover().values())


def test_one_worker_that_is_quicker_than_all_is_said() -> None:
    notes = planned(1e5).notes
    assert any("one worker alone would take" in note for note in notes)
    assert not planned(1e10).notes


def test_unequal_hosts_get_unequal_shares() -> None:
    even = cluster(2, 1e10)
    slow = replace(even.hosts[0], count=1, speed=2.5)
    fast = replace(even.hosts[0], count=3)
    unequal = Cluster("uneven", (fast, slow), even.between, {})
    costs = Costs(heavy_at_the_end(), unequal)
    plain, shared = DataParallel.candidates(costs)
    assert shared.shares is not None
    one, other = (simulate(each.step_graph(costs), costs.interference) for each in (plain, shared))
    assert other.seconds < 0.6 * one.seconds
    # Nobody waits for the slow one any longer.
    assert one.shares(0).compute < 0.5 * one.seconds
    assert other.shares(0).compute > 0.8 * other.seconds


@dataclass(frozen=True)
class Compressed(DataParallel):
    """Weighed with exact and with relaxed settings."""

    @classmethod
    def candidates(cls, costs: Costs) -> list[DataParallel]:
        return [cls(), cls(compression="bf16")]


def test_what_is_not_the_same_mathematics_is_not_weighed() -> None:
    costs = Costs(heavy_at_the_end(), cluster())
    assert not Compressed(compression="bf16").exact
    assert [each.strategy for each in search.weigh([Compressed], costs)] == [Compressed()]


def test_a_plan_survives_its_file() -> None:
    plan = planned(25e6)
    assert Plan.parse(json.dumps(plan.to_json()), "it") == plan


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"),
        ("[]", "is no plan of this version"),
        ("{}", "is no plan of this version"),
        ('{"format": 1, "chosen": {}}', "is no plan of this version"),
    ],
)
def test_files_that_are_no_plans(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Plan.parse(text, "plan.json")


def test_a_plan_for_other_workers_is_refused() -> None:
    plan = planned(25e6)
    plan.require(4, 4, "cpu")
    for given in [(2, 4, "cpu"), (4, 1, "cpu"), (4, 4, "cuda")]:
        with pytest.raises(UsageError, match="the plan is for 4 workers"):
            plan.require(*given)
