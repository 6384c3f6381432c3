"""What belongs to the weights in local SGD: buffers, optimizers' states, and checkpoints of all."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build, classes, numbers
from tests.strategies.local_sgd import small_task
from wagontrain import checkpoint
from wagontrain.strategies.local_sgd import LocalSGD
from wagontrain.transport import Context

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
