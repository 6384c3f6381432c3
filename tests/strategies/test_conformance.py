"""Every strategy that calls itself exact trains as one process does.

All discovered strategies × problems × optimizers × variants × world sizes, in float64, for two
epochs with an uneven last batch, against a plain loop on one process.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import wagontrain as wt
from tests.gang import Gang
from tests.problems import OPTIMIZERS, PROBLEMS, VARIANTS, build
from wagontrain import verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.transport import Context

STEPS = 6


@functools.cache
def expected(problem: str, optimizer: str, variant: str) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(problem, optimizer, variant), "float64")
        return train_plainly(task, torch.device("cpu"), 0, STEPS)


def trained(
    context: Context, strategy: str, settings: dict[str, Any], *problem: str
) -> tuple[Trace, bool]:
    """What a strategy makes of a problem; and whether it takes it at all."""
    chosen = wt.make_strategy(strategy, settings)
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(*problem), "float64")
        with wt.Run(task, chosen, context) as run:
            losses = [run.step(batch).loss for batch in run.batches()]
            trace = Trace.of(
                [float("nan") if x is None else x for x in losses],
                run.task.build_model(),
                run.runner.state_dict()["model"],
            )
            run.close()
    return trace, chosen.exact


# Those whose workers come and go have no groups of ranks: tests/servers holds them to the same.
EXACT = sorted(
    name
    for name, strategy in wt.discover().items()
    if strategy().exact and not strategy.crewed and name != "auto"  # tests/planner/test_auto.py
)

# Settings beside the defaults: those that change what travels, or make small problems divide.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "data-parallel": [{}, {"bucket_mb": 0.0001}],
    "sharded": [{"least": 8}, {"stage": 2}, {"stage": 1}],
    "split-weights": [{}, {"degree": 2}],
    "hybrid": [{"placement": "all"}, {}, {"placement": "all", "chunks": 3}],
    "pipeline": [{}, {"degree": 2}],
}
# Problems that a strategy has no way to take: from which size of its groups on, and why.
REFUSED = {
    ("pipeline", "linear-regression"): (2, "parts with weights for 1"),
    ("pipeline", "tied-weights"): (2, "tied weights"),
    ("pipeline", "frozen-unused"): (3, "parts with weights for 2"),
    ("pipeline", "embedding"): (3, "parts with weights for 2"),
    ("pipeline", "dict-inputs"): (3, "parts with weights for 2"),
    ("pipeline", "tuple-inputs"): (3, "parts with weights for 2"),
    ("pipeline", "dropout-off"): (3, "parts with weights for 2"),
    ("pipeline", "padded-tokens"): (3, "parts with weights for 2"),
}
HOW = [("momentum", "plain"), ("adam", "clip"), ("momentum", "accumulate"), ("adam", "scheduler")]


def refusal(strategy: str, settings: dict[str, Any], problem: str, size: int) -> str | None:
    """Words of the message with which a strategy refuses a problem; None where it takes it."""
    least, words = REFUSED.get((strategy, problem), (size + 1, ""))
    return words if settings.get("degree", size) >= least else None


def sizes(defaults: bool, plainly: bool) -> tuple[int, ...]:
    """World sizes: all of them once, an uneven one for each way of stepping."""
    if not defaults:
        return (2, 4)
    return (1, 2, 3, 4) if plainly else (3,)


def ways(name: str, defaults: bool) -> list[tuple[str, str]]:
    """Optimizers with ways of stepping: every pair with data-parallel, each once with others."""
    if not defaults:
        return HOW[:1]
    return list(itertools.product(OPTIMIZERS, VARIANTS)) if name == "data-parallel" else HOW


CASES = [
    pytest.param(
        name,
        settings,
        problem,
        *how,
        size,
        id="-".join([name, *map(str, settings.values()), problem, *how, str(size)]),
    )
    for name in EXACT
    for number, settings in enumerate(SETTINGS.get(name, [{}]))
    for problem in PROBLEMS
    for how in ways(name, number == 0)
    for size in sizes(number == 0, how == HOW[0] or name == "data-parallel")
    if refusal(name, settings, problem, size) is None
]


@pytest.mark.parametrize(("strategy", "settings", "problem", "optimizer", "variant", "size"), CASES)
def test_trains_as_one_process(
    gang: Gang,
    strategy: str,
    settings: dict[str, Any],
    problem: str,
    optimizer: str,
    variant: str,
    size: int,
) -> None:
    reference = expected(problem, optimizer, variant)
    for trace, _ in gang.run(size, trained, strategy, settings, problem, optimizer, variant):
        verdict = verify.compare(trace, reference, wt.make_strategy(strategy), size, "float64")
        assert verdict.passed, verdict


def refused(context: Context, strategy: str, settings: dict[str, Any], problem: str) -> str | None:
    """The message with which a strategy refuses a problem."""
    try:
        wt.Run(build(problem), wt.make_strategy(strategy, settings), context)
    except (wt.UsageError, wt.TaskError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("strategy", "problem", "size"),
    [
        (*both, size)
        for both in REFUSED
        for size in (2, 3, 4)
        if refusal(both[0], {}, both[1], size)
    ],
)
def test_refuses_on_every_rank_with_a_reason(
    gang: Gang, strategy: str, problem: str, size: int
) -> None:
    words = refusal(strategy, {}, problem, size)
    assert words is not None
    for message in gang.run(size, refused, strategy, {}, problem):
        assert message is not None
        assert words in message
        assert message.count("\n") == 0


def test_the_strategies_that_are_there_are_covered() -> None:
    assert "data-parallel" in EXACT


def test_the_reference_moves_every_trained_parameter() -> None:
    """An oracle that stood still would be matched by a strategy that stands still."""
    for problem in PROBLEMS:
        with verify.computing_in("float64"):
            fresh = verify.prepared(build(problem), "float64")[0].build_model()
        after = expected(problem, "adam", "plain").parameters
        still = {name for name, value in fresh.named_parameters() if value.equal(after[name])}
        unmoved = {"frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}
        assert still == (unmoved if problem == "frozen-unused" else set()), problem


def spoiled(context: Context, spoiler: str, *problem: str) -> Trace:
    """What data-parallel makes of a problem with one of the classic mistakes built in."""
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(*problem), "float64")
        with wt.Run(task, DataParallel(), context) as run:
            SPOILERS[spoiler](run.runner)
            losses = [run.step(batch).loss for batch in run.batches()]
            trace = Trace.of(
                [float("nan") if x is None else x for x in losses],
                run.model,
                run.runner.state_dict()["model"],
            )
            run.close()
    return trace


def _mean_of_means(runner: Any) -> None:
    runner.objective.weight = lambda micro: micro.total / runner.cut.size if micro.count else 0


def _counts_stand_ins(runner: Any) -> None:
    runner.objective.weight = lambda micro: max(micro.count, 1)


def _schedules_per_worker(runner: Any) -> None:
    apply = runner.update.apply

    def twice(*arrivals: Any) -> None:
        apply(*arrivals)
        runner.update.scheduler.step()

    runner.update.apply = twice


def _clips_shards(runner: Any) -> None:
    runner.update.clip *= runner.cut.size**0.5


def _norms_per_worker(runner: Any) -> None:
    runner.open.close()
    runner.check_replicas = lambda: None


SPOILERS = {
    function.__name__: function
    for function in (
        _mean_of_means, _counts_stand_ins, _schedules_per_worker, _clips_shards, _norms_per_worker,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("spoiler", "problem", "variant"),
    [
        ("_mean_of_means", "linear-regression", "plain"),
        ("_mean_of_means", "padded-tokens", "plain"),
        ("_counts_stand_ins", "embedding", "plain"),
        ("_schedules_per_worker", "linear-regression", "scheduler"),
        ("_clips_shards", "linear-regression", "clip"),
        ("_norms_per_worker", "conv-batch-norm", "plain"),
    ],
)
def test_a_classic_mistake_is_noticed(gang: Gang, spoiler: str, problem: str, variant: str) -> None:
    """The comparison above can fail, and does so by orders of magnitude."""
    reference = expected(problem, "momentum", variant)
    trace = gang.run(3, spoiled, spoiler, problem, "momentum", variant)[0]
    verdict = verify.compare(trace, reference, DataParallel(), 3, "float64")
    assert not verdict.passed
    assert verdict.max_parameter_deviation > 1000 * verdict.tolerance
