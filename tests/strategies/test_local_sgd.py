"""Local SGD against the same done by hand in one process; what travels, what is kept, refused."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import PROBLEMS, VARIANTS, build, classes, numbers
from tests.test_events import Kept
from wagontrain import checkpoint, verify
from wagontrain.batches import Batch, Batches, Cut
from wagontrain.mesh import World
from wagontrain.reference import Trace, stretch, train_plainly
from wagontrain.strategies.local_sgd import LocalSGD
from wagontrain.task import call_model, trainable
from wagontrain.trainer import train
from wagontrain.transport import Context

STEPS = 6
plain_sgd = partial(torch.optim.SGD, lr=0.1)
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


# --- the mathematics ------------------------------------------------------------------------------


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


# --- what belongs to the weights ------------------------------------------------------------------


class Following(nn.Module):
    """Running statistics, a mask of infinities, a table that a mean would round, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("table", numbers(7, seed=9) / 3, persistent=False)
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.last = x.detach().mean(0)
        return self.head(self.norm(x))


def small_task(**fields: Any) -> wt.Task:
    """18 samples in batches of 8: of the last 2, a third rank has none."""
    data = TensorDataset(numbers(18, 5), classes(18, 3))
    model = partial(nn.Linear, 5, 3)
    made = wt.Task(model, F.cross_entropy, plain_sgd, data, batch_size=8, epochs=2)
    return dataclasses.replace(made, **fields)


def with_buffers(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    data = TensorDataset(numbers(13, 5), classes(13, 3))
    task = small_task(model=Following, batch_size=9, train=data)
    with wt.Run(task, LocalSGD(steps_between=100), context, max_steps=2) as run:
        taken = 0
        for batch in run.batches():
            run.step(batch)
            taken += sum(micro.count for micro in batch.micro_batches)
        own = {name: value.clone() for name, value in run.model.named_buffers()}
        run.check_replicas()
        shared = {name: value.clone() for name, value in run.model.named_buffers()}
        run.close()
    return own, shared, taken


def test_buffers_are_averaged_where_they_differ(gang: Gang) -> None:
    """13 samples as 9 and 4 over three ranks: 5, 5 and 3 samples, one of them in a single step."""
    answers = gang.run(3, with_buffers)
    assert [taken for *_, taken in answers] == [5, 5, 3]
    for name in ("norm.running_mean", "norm.running_var", "last"):
        expected = sum(own[name] * taken for own, _, taken in answers) / 13
        assert not answers[0][0][name].equal(answers[1][0][name])
        for _, shared, _ in answers:
            torch.testing.assert_close(shared[name], expected)
    assert [int(own["norm.num_batches_tracked"]) for own, *_ in answers] == [2, 2, 1]
    for own, shared, _ in answers:
        assert int(shared["norm.num_batches_tracked"]) == 2
        assert shared["mask"].equal(own["mask"])
        assert shared["table"].equal(own["table"])


def test_batch_norms_that_would_see_one_sample_are_refused_before_training(gang: Gang) -> None:
    for message in gang.run(2, crowded, 2):
        assert message.startswith("of a batch of 2 some of 2 workers have one sample")
    assert gang.run(2, crowded, 4) == ["no error"] * 2


def crowded(context: Context, last: int) -> str:
    data = TensorDataset(numbers(16 + last, 5), classes(16 + last, 3))
    try:
        with wt.Run(small_task(model=Following, train=data), LocalSGD(), context) as run:
            for batch in run.batches():
                run.step(batch)
            run.finish()
    except wt.TaskError as error:
        return str(error)
    return "no error"


class Restless(nn.Module):
    """A buffer of whole numbers, or a weight that is not trained, follows the own samples."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.head = nn.Linear(5, 3)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.register_buffer("place", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                getattr(self, self.which).add_(int(1000 * float(x[0, 0])))
        return self.head(x) + self.frozen(x)

    @property
    def weight(self) -> Tensor:
        return self.frozen.weight


def restless(context: Context, which: str) -> str:
    task = small_task(model=partial(Restless, which))
    try:
        with wt.Run(task, LocalSGD(steps_between=100), context) as run:
            run.step(next(run.batches()))
    except wt.ReplicaError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("which", "name"), [("place", "place"), ("weight", "frozen.weight")])
def test_what_is_not_averaged_and_differs_is_named(gang: Gang, which: str, name: str) -> None:
    for message in gang.run(2, restless, which):
        assert f"{name!r} of rank 1 is no longer that of rank 0" in message


def unlike(context: Context) -> tuple[Tensor, Tensor]:
    """A model that each rank builds from something of its own."""

    def build_own() -> nn.Module:
        model = nn.Linear(5, 3)
        with torch.no_grad():
            model.weight.fill_(context.world.rank + 1.0)
        return model

    with wt.Run(small_task(model=build_own), LocalSGD(), context) as run:
        weight = run.model.weight.detach().clone()
        run.step(next(run.batches()))
        run.finish()
    return weight, run.model.weight.detach()


def test_all_begin_with_the_weights_of_the_first_rank(gang: Gang) -> None:
    answers = gang.run(3, unlike)
    for first, last in answers:
        assert first.equal(torch.ones(3, 5))
        assert last.equal(answers[0][1])
        assert not last.equal(first)


# --- what travels, and who waits ------------------------------------------------------------------

WIDE = 20_000


def wide_task() -> wt.Task:
    return wt.Task(
        model=partial(nn.Linear, 5, WIDE // 5), loss=F.mse_loss, optimizer=plain_sgd, batch_size=8,
        train=TensorDataset(numbers(160, 5), numbers(160, WIDE // 5)),
    )  # fmt: skip


def sent(context: Context, settings: dict[str, Any]) -> list[int]:
    with wt.Run(wide_task(), wt.make_strategy("local-sgd", settings), context) as run:
        found = []
        for batch in run.batches():
            count = run.step(batch).sent
            assert count is not None
            found.append(count)
        run.close()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_sent_between_averages(gang: Gang, size: int) -> None:
    weights = (WIDE + WIDE // 5) * 4
    for found in gang.run(size, sent, {"steps_between": 5}):
        assert len(found) == 20
        for step, count in enumerate(found, start=1):
            if step % 5:
                assert count == 0
            else:
                expected = 2 * (size - 1) / size * weights
                assert expected <= count < 1.05 * expected + 1000 * size


def test_fragments_send_as_much_at_other_times(gang: Gang) -> None:
    """Weight and bias, each when it is its turn, and on its way in the step after."""
    for found in gang.run(2, sent, {"steps_between": 5, "fragments": 2}):
        for start in (6, 11):
            weight, bias = sum(found[start : start + 2]), sum(found[start + 3 : start + 5])
            assert WIDE * 4 <= weight < 1.05 * WIDE * 4 + 2000
            assert WIDE // 5 * 4 <= bias < 1.05 * WIDE // 5 * 4 + 2000
            assert found[start + 2] == 0


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < limit, f"{file} did not come"
        time.sleep(0.01)


def ahead(context: Context, folder: Path) -> list[float | None]:
    """Rank 1 takes its second step when rank 0 has taken all but the last of the round."""
    with wt.Run(small_task(epochs=3), LocalSGD(steps_between=9), context) as run:
        reports = []
        for batch in run.batches():
            if batch.step == 1 and context.world.rank == 1:
                wait_for(folder / "ahead")
            reports.append(run.step(batch))
            if batch.step == 7 and context.world.rank == 0:
                (folder / "ahead").touch()
        run.close()
    return [report.loss for report in reports]


def test_nobody_waits_between_averages(gang: Gang, tmp_path: Path) -> None:
    """With an exchange in any of these steps, this would not end."""
    for losses in gang.run(2, ahead, tmp_path):
        assert [loss is None for loss in losses] == [True] * 8 + [False]


def overlapping(context: Context, folder: Path) -> None:
    """Rank 0 sends its average and trains on, though rank 1 has not even sent its own."""
    strategy = LocalSGD(steps_between=4, overlap=3)
    with wt.Run(small_task(epochs=3), strategy, context) as run:
        for batch in run.batches():
            if batch.step == 1 and context.world.rank == 1:
                wait_for(folder / "ahead")
            run.step(batch)
            if batch.step == 5 and context.world.rank == 0:
                (folder / "ahead").touch()
        run.finish()


def test_an_overlapped_average_is_not_waited_for(gang: Gang, tmp_path: Path) -> None:
    gang.run(2, overlapping, tmp_path)


def straggling(context: Context) -> dict[str, Any]:
    class Slow(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            time.sleep(0.03 if context.world.rank == 1 else 0.01)
            return super().forward(inputs)

    task = small_task(model=partial(Slow, 5, 3), epochs=8)
    with wt.Run(task, LocalSGD(steps_between=4), context) as run:
        for batch in run.batches():
            run.step(batch)
    return run.finish()


def test_who_is_always_slower_is_still_waited_for_and_named(gang: Gang) -> None:
    for summary in gang.run(2, straggling):
        assert summary["straggler"].startswith("rank 1 on host")
        slow = summary["times_per_rank"][1]["own_seconds"]
        assert 24 * 0.03 <= slow < 24 * 0.06  # of all steps, though told only now and then


# --- errors ---------------------------------------------------------------------------------------


def spoiled(context: Context, folder: Path) -> str:
    """A loss that is no number on rank 1 only, in the fourth step; saved before and after."""
    taken = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        taken[0] += output.requires_grad and len(output) < 8  # not the trial's
        bad = context.world.rank == 1 and taken[0] == 4
        return F.cross_entropy(output, target) * (float("nan") if bad else 1.0)

    task = small_task(loss=loss, epochs=8)
    with wt.Run(task, LocalSGD(steps_between=6), context) as run:
        try:
            for batch in run.batches():
                run.step(batch)
                if run.step_count == 2:
                    run.save(folder)
                if run.step_count == 5:
                    break
        except wt.LossError as error:
            finite = all(bool(value.isfinite().all()) for value in run.model.parameters())
            return f"{error} {finite}"
    return "no error"


def test_a_loss_that_is_no_number_is_named_where_it_is(gang: Gang, tmp_path: Path) -> None:
    well, message = gang.run(2, spoiled, tmp_path)
    assert well == "no error"
    assert message.startswith("the loss is nan at step 3 (epoch 1) on rank 1, samples 4 to 7 in")
    assert message.endswith(" True")
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_samples_that_count_for_nothing_are_named(gang: Gang) -> None:
    for message in [*gang.run(2, weightless), weightless(Context())]:
        assert "add up to 0" in message


def weightless(context: Context) -> str:
    task = dataclasses.replace(build("linear-regression"), weight=lambda target: 0)
    try:
        with wt.Run(task, LocalSGD(steps_between=2), context) as run:
            for batch in run.batches():
                run.step(batch)
    except wt.ModelError as error:
        return str(error)
    return "no error"


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


# --- checkpoints ----------------------------------------------------------------------------------


def saving(
    context: Context, way: tuple[str, dict[str, Any]], folder: Path, upto: int, resume: bool
) -> dict[str, Any]:
    """Train up to a step, saving after the fourth and there; go on from what is in the folder."""
    task = dataclasses.replace(build("conv-batch-norm", "adam", "scheduler"), epochs=4)
    strategy = wt.make_strategy(*way)
    ahead = folder if resume else None
    with wt.Run(task, strategy, context, max_steps=upto, resume=ahead) as run:
        for batch in run.batches():
            run.step(batch)
            if run.step_count in (4, upto):
                run.save(folder / "checkpoints")
        run.check_replicas()
        state: dict[str, Any] = run.runner.state_dict()
        run.finish()
    kinds = {kind: values for kind, values in state.items() if kind != "plain"}
    return {
        f"{kind}.{name}": value.detach().clone()
        for kind, values in kinds.items()
        for name, value in values.items()
    }


NESTEROV: dict[str, Any] = {"steps_between": 3, "outer": "nesterov", "fragments": 2}


@pytest.mark.parametrize("settings", [{"steps_between": 3}, NESTEROV], ids=["mean", "nesterov"])
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(
    gang: Gang, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Saved in the middle of a round: bit for bit, anchors, momenta and all."""
    way = ("local-sgd", settings)
    whole = gang.run(3, saving, way, tmp_path / "whole", 9, False)
    gang.run(3, saving, way, tmp_path / "parts", 4, False)
    resumed = gang.run(3, saving, way, tmp_path / "parts", 9, True)
    outer = [name for name in whole[0] if name.startswith("outer.")]
    assert bool(outer) == ("outer" in settings)
    for state in [*whole, *resumed]:
        assert state.keys() == whole[0].keys()
        for name, value in state.items():
            assert value.equal(whole[0][name]), name


@pytest.mark.parametrize("other", [("data-parallel", {}), ("sharded", {"least": 8})])
def test_other_strategies_go_on_from_it_and_it_from_them(
    gang: Gang, tmp_path: Path, other: tuple[str, dict[str, Any]]
) -> None:
    local = ("local-sgd", NESTEROV)
    kept = gang.run(3, saving, local, tmp_path, 4, False)[0]
    found = checkpoint.latest(tmp_path).reader().tensors
    assert {"model.0.weight", "optimizer.0.weight.exp_avg", "outer.0.weight.anchor"} <= found.keys()
    began = gang.run(2, weights_after, other, tmp_path, 0)[0]
    for name, value in began.items():
        torch.testing.assert_close(value, kept[name])
    gang.run(2, saving, other, tmp_path, 6, True)
    assert not any(
        name.startswith("outer") for name in checkpoint.latest(tmp_path).reader().tensors
    )
    theirs = gang.run(2, weights_after, other, tmp_path, 0)[0]
    ours = gang.run(3, weights_after, local, tmp_path, 0)[0]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    for name in ours:
        if name.startswith("outer.") and name.endswith(".anchor"):
            assert ours[name].equal(ours[f"model.{name[6:-7]}"])
        elif name.startswith("outer."):
            assert not ours[name].any()
    last = gang.run(3, saving, local, tmp_path, 9, True)
    for state in last:
        assert all(bool(value.isfinite().all()) for value in state.values())
        assert not state["model.0.weight"].equal(ours["model.0.weight"])


def weights_after(
    context: Context, way: tuple[str, dict[str, Any]], folder: Path, steps: int
) -> dict[str, Tensor]:
    task = dataclasses.replace(build("conv-batch-norm", "adam", "scheduler"), epochs=4)
    with wt.Run(task, wt.make_strategy(*way), context, resume=folder) as run:
        state: dict[str, Any] = run.runner.state_dict()
        run.close()
    return {
        f"{kind}.{name}": value.detach().clone()
        for kind in state
        if kind != "plain"
        for name, value in state[kind].items()
    }


def with_and_without_samples(context: Context) -> tuple[dict[str, Any], bool]:
    """Five ranks' worth of a batch of 5 over 4: the last rank never has a sample."""
    data = TensorDataset(numbers(15, 5), classes(15, 3))
    task = small_task(train=data, batch_size=5,
                          optimizer=partial(torch.optim.Adam, lr=0.01))  # fmt: skip
    with wt.Run(task, LocalSGD(steps_between=2), context) as run:
        for batch in run.batches():
            run.step(batch)
        empty = not run.runner.training.optimizer.state
        state = run.runner.state_dict()["optimizer"]
        run.finish()
    return {name: value.clone() for name, value in state.items()}, empty


def test_optimizer_states_are_averaged_over_those_who_have_one(gang: Gang) -> None:
    answers = gang.run(4, with_and_without_samples)
    assert [empty for _, empty in answers] == [False, False, False, True]
    for state, _ in answers:
        assert state.keys() == answers[0][0].keys()
        assert len(state) == 6
        for name, value in state.items():
            assert value.equal(answers[0][0][name])
    assert float(answers[3][0]["weight.step"]) == 6


# --- a whole run ----------------------------------------------------------------------------------


def whole_run(context: Context, settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Any]:
    kept = Kept()
    task = small_task(
        epochs=12,
        validation=TensorDataset(numbers(11, 5, seed=4), classes(11, 3)),
    )  # fmt: skip
    with wt.Run(task, wt.make_strategy("local-sgd", settings), context, sinks=[kept]) as run:
        summary = train(run)
    with torch.no_grad():
        inputs, target = task.validation[:]  # type: ignore[index]
        own = F.cross_entropy(run.model(inputs), target)
    return summary, own, kept.events


@pytest.mark.parametrize("settings", [{"steps_between": 5}, {"outer": "nesterov"}])
def test_what_is_validated_is_what_is_left_at_the_end(gang: Gang, settings: dict[str, Any]) -> None:
    answers = gang.run(3, whole_run, settings)
    for summary, own, _ in answers:
        assert summary["validation"]["loss"] == pytest.approx(own.item(), rel=1e-5)
        assert summary["exact"] is False
        assert summary["train_loss"] is not None
    events = answers[0][2]
    covered = sum(
        event.get("covers", event.get("samples", 0))
        for event in events
        if event["kind"] in ("step", "loss") and event["loss"] is not None
    )
    assert covered == 12 * 18  # every sample is in some loss
