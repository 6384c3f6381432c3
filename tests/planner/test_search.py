"""What the planner concludes from costs: that it is the right thing, and for the right reason."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace

import pytest
from rich.console import Console

import wagontrain as wt
from tests.planner.made import cluster, heavy_at_the_end
from wagontrain import plan_view
from wagontrain.cluster import Cluster, Measured, scaled
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.plan import Candidate, Plan
from wagontrain.planner import choosing, search
from wagontrain.simulate import simulate
from wagontrain.strategies.data_parallel import DataParallel


def planned(rate: float, batch: int = 64, relaxed: bool = False, **changes: object) -> Plan:
    costs = Costs(heavy_at_the_end(batch), cluster(rate=rate, **changes))  # type: ignore[arg-type]
    kinds = wt.discover().values()
    return choosing.choose_offline(None, costs.profile, costs.cluster, kinds, relaxed)


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


def test_nothing_feasible_says_what_is_closest_and_what_it_lacks() -> None:
    lacking = (
        r"nothing fits: closest is .* needs .* where 95.0 MB .*too much even if no activations"
    )
    with pytest.raises(UsageError, match=lacking):
        planned(1e9, memory=100e6)


def test_smaller_micro_batches_where_they_would_make_it_fit() -> None:
    """They do for activations what recomputing them would, which no strategy here can."""
    profile = heavy_at_the_end()
    kept = tuple(replace(layer, kept=1.5e7) for layer in profile.layers)
    profile = replace(profile, layers=kept, base=100_000_000)
    costs = Costs(profile, cluster(rate=1e9, memory=1.8e9))
    weighed = search.weigh([DataParallel], costs)
    assert not weighed[0].fits
    said = search.lacking(weighed, costs)
    assert "Task.accumulate=" in said
    parts = int(said.partition("Task.accumulate=")[2].partition(" ")[0])
    for count, fits in [(parts // 2, False), (parts, True)]:
        smaller = replace(costs, profile=replace(profile, accumulate=count))
        assert search.weigh([DataParallel], smaller)[0].fits == fits


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


def test_one_of_which_nothing_is_known_is_weighed_and_never_chosen() -> None:
    costs = Costs(heavy_at_the_end(), cluster())
    found = search.weigh([Compressed], costs, relaxed=True)
    assert [each.strategy.exact for each in found] == [True, False]
    assert found[1].to_loss == math.inf


@pytest.mark.parametrize("rate", [1e4, 2e6, 25e6, 1e9, 1e11])
def test_without_leave_nothing_relaxed_is_weighed(rate: float) -> None:
    plan = planned(rate)
    assert all(each.exact for each in (plan.chosen, *plan.others))
    assert "relaxed" not in " ".join(plan.notes)


def test_with_leave_relaxed_ones_are_told_by_what_they_take_to_a_loss_at_worst() -> None:
    chosen = set()
    for rate in (1e4, 2e6, 25e6, 1e9, 1e11):
        plan = planned(rate, relaxed=True)
        everybody = [plan.chosen, *plan.others]
        assert {"local-sgd", "parameter-server"} <= {each.strategy for each in everybody}
        assert any("nothing was measured here" in note for note in plan.notes)
        worst = [each.to_loss for each in everybody if each.estimate and each.estimate.fits]
        assert worst == sorted(worst)
        for each in everybody:
            assert each.estimate is not None
            assert each.estimate.most_steps >= each.estimate.least_steps == 1
            if each.exact:
                assert each.estimate.most_steps == 1
        chosen.add(plan.chosen.exact)
        assert planned(rate).chosen.exact
    # Where links are so slow that nothing else is left, rare averages win at their worst.
    assert chosen == {True, False}


def test_the_table_has_ranges_where_relaxed_ones_were_weighed() -> None:
    def shown(plan: Plan) -> str:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(plan_view.view(plan), soft_wrap=True)
        return " ".join(console.export_text().split())

    assert "to loss" not in shown(planned(2e6))
    told = shown(planned(2e6, relaxed=True))
    assert "to loss" in told
    assert "1 to 3.98" in told
    assert "4 workers are 500 steps apart" in told


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
