"""Local SGD against the same done by hand in one process; its settings, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wagontrain as wt
from tests.gang import Gang
from tests.problems import PROBLEMS, VARIANTS, build
from tests.strategies.local_sgd import plain_sgd
from tests.test_events import Kept
from wagontrain import verify
from wagontrain.batches import Batch, Batches, Cut
from wagontrain.mesh import World
from wagontrain.reference import Trace, stretch, train_plainly
from wagontrain.strategies.local_sgd import LocalSGD
from wagontrain.task import call_model, trainable
from wagontrain.transport import Context

STEPS = 6
WITHOUT_BATCH_NORM = sorted(PROBLEMS.keys() - {"conv-batch-norm"})


def in_float64(problem: str, optimizer: str = "momentum", variant: str = "plain") -> wt.Task:
    made = build(problem, "momentum" if optimizer == "plain" else optimizer, variant)
    if optimizer == "plain":
        made = dataclasses.replace(made, optimizer=plain_sgd)
    return verify.prepared(made, "float64")[0]


@dataclasses.dataclass
class Outcome:
    """What a run has come to, as one rank sees it."""

    losses: list[tuple[float | None, int | None]]
    state: dict[str, Any]
    train_loss: float | None
    events: list[dict[str, Any]]


def trained(
    context: Context,
    settings: dict[str, Any],
    problem: tuple[str, ...],
    looks: tuple[int, ...] = (),
) -> Outcome:
    kept = Kept()
    with verify.computing_in("float64"):
        strategy = wt.make_strategy("local-sgd", settings)
        with wt.Run(in_float64(*problem), strategy, context, sinks=[kept]) as run:
            reports = []
            for batch in run.batches():
                reports.append(run.step(batch))
                if run.step_count in looks:
                    run.check_replicas()
            state = run.runner.state_dict()
            state["model"] = {name: value.clone() for name, value in state["model"].items()}
            run.check_replicas()
            summary = run.finish()
    losses = [(report.loss, report.covers) for report in reports]
    return Outcome(losses, state, summary["train_loss"], kept.events)


@pytest.mark.parametrize("problem", sorted(PROBLEMS))
@pytest.mark.parametrize(
    ("optimizer", "variant", "settings"),
    [
        *((optimizer, variant, {}) for optimizer in ("momentum", "adam") for variant in VARIANTS),
        ("momentum", "plain", {"steps_between": 2, "fragments": 2}),
        ("adam", "scheduler", {"steps_between": 2, "begin": 3}),
    ],
)
def test_alone_it_is_training_as_usual(
    problem: str, optimizer: str, variant: str, settings: dict[str, Any]
) -> None:
    with verify.computing_in("float64"):
        task = in_float64(problem, optimizer, variant)
        expected = train_plainly(task, torch.device("cpu"), 0, STEPS)
        with wt.Run(task, LocalSGD(**settings), Context()) as run:
            losses = [run.step(batch).loss for batch in run.batches()]
            found = Trace.of([loss or 0.0 for loss in losses], run.model, run.model.state_dict())
    assert None not in losses
    assert verify.compare(found, expected, LocalSGD(), 1, "float64").passed


@pytest.mark.parametrize("problem", WITHOUT_BATCH_NORM)
@pytest.mark.parametrize(("size", "variant"), [(2, "plain"), (3, "scheduler"), (4, "accumulate")])
def test_averaged_after_every_step_sgd_is_data_parallel(
    gang: Gang, problem: str, size: int, variant: str
) -> None:
    """Also where shares are uneven, empty, or of unlike numbers of tokens: means are weighted."""
    with verify.computing_in("float64"):
        task = in_float64(problem, "plain", variant)
        expected = train_plainly(task, torch.device("cpu"), 0, STEPS)
    for found in gang.run(size, trained, {"steps_between": 1}, (problem, "plain", variant)):
        assert [loss for loss, _ in found.losses] == pytest.approx(expected.losses, rel=1e-9)
        assert all(covers is None for _, covers in found.losses)
        for name, value in expected.parameters.items():
            torch.testing.assert_close(found.state["model"][name], value, rtol=1e-9, atol=1e-10)


class Replica:
    """One of the ranks, done by hand."""

    def __init__(self, task: wt.Task, rank: int, size: int) -> None:
        self.task = task
        self.model = task.build_model().train()
        self.optimizer = task.build_optimizer(self.model)
        self.scheduler = task.build_scheduler(self.optimizer)
        data = Batches.of_training(task, torch.device("cpu"), Cut(rank, size))
        self.batches: Iterator[Batch] = stretch(data, 0, STEPS)

    def step(self) -> tuple[float, float, int]:
        """Loss times weight, weight, and samples of all; an ordinary step on the own share."""
        batch = next(self.batches)
        shares = [(micro, self.weight(micro)) for micro in batch.micro_batches if micro.count]
        own = sum(weight for _, weight in shares)
        self.optimizer.zero_grad()
        total = 0.0
        for micro, weight in shares:
            if weight:
                loss = self.task.loss(call_model(self.model, micro.inputs), micro.target)
                (loss * weight / own).backward()
                total += loss.item() * weight
        if self.task.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return total, own, batch.total

    def weight(self, micro: Any) -> float:
        return float(self.task.weight(micro.target)) if self.task.weight else float(micro.count)


class ByHand:
    """Local SGD of several replicas in one process, parameter by parameter."""

    def __init__(self, task: wt.Task, size: int, strategy: LocalSGD) -> None:
        self.strategy = strategy
        self.replicas = [Replica(task, rank, size) for rank in range(size)]
        self.ranks = [dict(trainable(replica.model)) for replica in self.replicas]
        names = list(self.ranks[0])
        filled = [0] * strategy.fragments
        self.fragment = {}
        for name in names:
            self.fragment[name] = filled.index(min(filled))
            filled[self.fragment[name]] += self.ranks[0][name].nbytes
        self.anchor = {name: self.ranks[0][name].detach().clone() for name in names}
        self.momentum = {name: torch.zeros_like(self.anchor[name]) for name in names}
        self.weights = {name: [0.0] * size for name in names}
        self.flying: dict[str, tuple[int, Tensor, list[Tensor]]] = {}

    def mean(self, name: str) -> Tensor:
        weights, total = self.weights[name], sum(self.weights[name])
        self.weights[name] = [0.0] * len(weights)
        parts = [
            rank[name].detach() * (w / total) for rank, w in zip(self.ranks, weights, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def put(self, name: str, new: Tensor, sent: list[Tensor]) -> None:
        for rank, before in zip(self.ranks, sent, strict=True):
            with torch.no_grad():
                rank[name].copy_(new + rank[name] - before)

    def land(self, step: int | None = None) -> None:
        for name, (due, mean, sent) in list(self.flying.items()):
            if step is not None and due > step:
                continue
            del self.flying[name]
            new, outer = mean, self.strategy.optimizer
            if outer is not None:
                moved = self.anchor[name] - mean
                self.momentum[name] = outer.momentum * self.momentum[name] + moved
                new = self.anchor[name] - outer.lr * (moved + outer.momentum * self.momentum[name])
                self.anchor[name] = new.clone()
            self.put(name, new, sent)

    def look(self) -> None:
        """What looking at the state does: everything arrives, and the mean is taken."""
        self.land()
        for name in self.anchor:
            if any(self.weights[name]):
                self.put(
                    name, self.mean(name), [rank[name].detach().clone() for rank in self.ranks]
                )

    def run(self, looks: tuple[int, ...] = ()) -> list[tuple[float, float, int]]:
        """Losses by step: sum, weight, samples."""
        losses = []
        period, count = self.strategy.period, self.strategy.fragments
        for step in range(1, STEPS + 1):
            taken = [replica.step() for replica in self.replicas]
            losses.append((sum(x[0] for x in taken), sum(x[1] for x in taken), taken[0][2]))
            for name in self.anchor:
                for rank, (_, weight, _) in enumerate(taken):
                    self.weights[name][rank] += weight
            if step <= self.strategy.begin:
                self.look()
                if step == self.strategy.begin:
                    self.anchor = {n: self.ranks[0][n].detach().clone() for n in self.anchor}
                continue
            self.land(step)
            for name, part in self.fragment.items():
                turn = (part + 1) * period // count % period
                if (step - self.strategy.begin) % period == turn:
                    sent = [rank[name].detach().clone() for rank in self.ranks]
                    self.flying[name] = (step + self.strategy.delay, self.mean(name), sent)
            self.land(step)
            if step in looks:
                self.look()
        self.look()
        return losses


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_between": 3},
        {"steps_between": 4, "begin": 2},
        {"steps_between": 2, "outer": "nesterov"},
        {"steps_between": 2, "outer": "nesterov", "outer_lr": 0.4, "outer_momentum": 0.5},
        {"steps_between": 3, "overlap": 2},
        {"steps_between": 3, "fragments": 2},
        {"steps_between": 2, "fragments": 2, "overlap": 0},
        {"steps_between": 3, "fragments": 3, "overlap": 2, "outer": "nesterov", "begin": 1},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
@pytest.mark.parametrize(
    ("problem", "size"),
    [
        (("tied-weights", "momentum", "clip"), 3),
        (("padded-tokens", "adam", "scheduler"), 4),
        (("embedding", "adam", "accumulate"), 2),
    ],
)
def test_it_is_what_can_be_done_by_hand(
    gang: Gang, settings: dict[str, Any], problem: tuple[str, ...], size: int
) -> None:
    strategy = LocalSGD(**settings)
    with verify.computing_in("float64"):
        by_hand = ByHand(in_float64(*problem), size, strategy)
        losses = by_hand.run()
    answers = gang.run(size, trained, settings, problem)
    for found in answers:
        for name, value in by_hand.ranks[0].items():
            torch.testing.assert_close(
                found.state["model"][name], value.detach(), rtol=1e-9, atol=1e-11
            )
        for name, value in found.state["model"].items():
            assert value.equal(answers[0].state["model"][name])
    _compare_losses(answers[0], losses)


def _compare_losses(found: Outcome, losses: list[tuple[float, float, int]]) -> None:
    """Each loss told is the mean over what it covers, and none is left out."""
    told = [(loss, covers) for loss, covers in found.losses if loss is not None]
    late = [(event["loss"], event["covers"]) for event in found.events if event["kind"] == "loss"]
    here = iter(losses)
    for loss, covers in [*told, *late]:
        covered = [next(here)]
        while covers is not None and sum(samples for *_, samples in covered) < covers:
            covered.append(next(here))
        assert covers in (None, sum(samples for *_, samples in covered))
        mean = sum(total for total, *_ in covered) / sum(weight for _, weight, _ in covered)
        assert loss == pytest.approx(mean, rel=1e-9)
    assert next(here, None) is None


def test_looking_takes_the_mean_and_no_outer_step(gang: Gang) -> None:
    """In the middle of a round and just before its end: anchor and momentum go on as they were."""
    problem, looks = ("tied-weights", "momentum", "plain"), (1, 3, 5)
    settings = {"steps_between": 4, "outer": "nesterov", "fragments": 2, "overlap": 2}
    with verify.computing_in("float64"):
        by_hand = ByHand(in_float64(*problem), 3, wt.make_strategy("local-sgd", settings))
        losses = by_hand.run(looks)
    answers = gang.run(3, trained, settings, problem, looks)
    for name, value in by_hand.ranks[0].items():
        torch.testing.assert_close(answers[1].state["model"][name], value.detach())
        found = answers[2].state["outer"]
        torch.testing.assert_close(found[f"{name}.anchor"], by_hand.anchor[name])
        torch.testing.assert_close(found[f"{name}.momentum"], by_hand.momentum[name])
    late = [event["covers"] for event in answers[0].events if event["kind"] == "loss"]
    told = [covers or 8 for loss, covers in answers[0].losses if loss is not None]
    assert sum(late) + sum(told) == sum(samples for *_, samples in losses)


def test_losses_are_told_when_ranks_meet_and_at_the_end(gang: Gang) -> None:
    problem = ("linear-regression", "momentum", "plain")
    with verify.computing_in("float64"):
        losses = ByHand(in_float64(*problem), 2, LocalSGD(steps_between=4)).run()
    means = [total / weight for total, weight, _ in losses]
    for found in gang.run(2, trained, {"steps_between": 4}, problem):
        assert [loss is None for loss, _ in found.losses] == [True, True, True, False, True, True]
        assert found.losses[3][1] == 8 + 8 + 2 + 8
        # All of the last epoch is in the summary: steps 3 to 5, though a round began before it.
        first, last = (
            (8 * means[0] + 8 * means[1] + 2 * means[2] + 8 * means[3]) / 26,
            (8 * means[4] + 2 * means[5]) / 10,
        )
        assert found.losses[3][0] == pytest.approx(first, rel=1e-9)
        assert found.train_loss == pytest.approx((26 * first + 10 * last) / 36, rel=1e-9)
    (late,) = [
        event for event in gang.run(2, trained, {"steps_between": 100}, problem)[0].events
        if event["kind"] == "loss"
    ]  # fmt: skip
    assert (late["step"], late["covers"], late["epoch"]) == (5, 36, 1)


def test_an_outer_optimizer_of_rate_1_without_momentum_is_the_mean(gang: Gang) -> None:
    problem = ("dict-inputs", "adam", "plain")
    settings = {"steps_between": 2, "outer": "nesterov", "outer_lr": 1, "outer_momentum": 0}
    found = gang.run(2, trained, settings, problem)[0].state["model"]
    for name, value in (
        gang.run(2, trained, {"steps_between": 2}, problem)[0].state["model"].items()
    ):
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_published_settings() -> None:
    strategy = LocalSGD(outer="nesterov")
    assert strategy.optimizer is not None
    assert (strategy.optimizer.lr, strategy.optimizer.momentum, strategy.period) == (0.7, 0.9, 500)
    assert LocalSGD().optimizer is None
    assert not LocalSGD().exact


def test_fragments_take_turns_spread_over_the_round() -> None:
    strategy = LocalSGD(steps_between=10, fragments=3, begin=5)
    turns = [strategy.due(step) for step in range(6, 26)]
    once = [None, None, 0, None, None, 1, None, None, None, 2]
    assert turns == [*once, *once]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps_between": 0}, "steps_between is 0: give 1 or more"),
        ({"fragments": 0}, "fragments is 0: give 1 or more"),
        ({"begin": -1}, "begin is -1: give 0 or more"),
        ({"overlap": -1}, "overlap is -1: give 0 or more"),
        ({"fragments": 5, "steps_between": 4}, "5 fragments cannot take turns in 4 steps"),
        ({"overlap": 4, "steps_between": 4}, "overlap is 4, but after 4 steps the next"),
        ({"outer_lr": 0.7}, "outer_lr is for outer=nesterov"),
        ({"outer_momentum": 0.9}, "outer_momentum is for outer=nesterov"),
        ({"outer": "nesterov", "outer_lr": 0}, "outer_lr is 0.0: give a number above 0"),
        ({"outer": "nesterov", "outer_momentum": 1}, "outer_momentum is 1.0: give 0 or more"),
        ({"outer": "adam"}, "cannot take outer=adam"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(wt.UsageError, match=said) as refused:
        wt.make_strategy("local-sgd", settings)
    assert "\n" not in str(refused.value)


def test_tasks_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(wt.UsageError, match="9 workers cannot share a batch of 8"):
        LocalSGD().check(build("embedding"), World(size=9))
    with pytest.raises(wt.UsageError, match="3 fragments cannot be made of 2 parameters: give at"):
        LocalSGD(fragments=3).check(build("linear-regression"), World(size=2))
    LocalSGD(fragments=2).check(build("linear-regression"), World(size=2))
