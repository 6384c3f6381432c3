from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pickle
import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang, GangError
from tests.problems import adam, build, classes, numbers, sgd
from wagontrain import building, trainer, verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.stages import cutting
from wagontrain.stages.recording import Blueprint
from wagontrain.transport import Context

SAMPLES, BATCH, STEPS = 26, 12, 5
CPU = torch.device("cpu")


def layers() -> nn.Module:
    """Six layers of different widths, in sequences within a sequence."""
    widths = [5, 9, 7, 8, 6, 10, 3]
    pairs = [
        nn.Sequential(nn.Linear(before, after), nn.ReLU(inplace=True))
        for before, after in itertools.pairwise(widths[:-1])
    ]
    return nn.Sequential(*pairs, nn.Dropout(0.2), nn.Linear(widths[-2], widths[-1]))


def characters() -> nn.Module:
    """The transformer of the example, small."""
    file = Path(__file__).parents[2] / "examples" / "char_lm.py"
    return runpy.run_path(str(file))["CharacterModel"](11, width=8, heads=2, depth=3)


class Skips(nn.Module):
    """What goes around layers has to cross borders, too; so does what gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))
        self.last = nn.Linear(5, 3)
        self.register_buffer("scale", torch.linspace(1, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape
        assert width == 5
        y = torch.relu(self.first(x)) * self.scale
        mask = y.detach() > 0.1
        y += torch.arange(width, device=x.device) / 10
        z = self.second(y).view(n, width)
        z = torch.where(mask, z, y) + self.third(z).tanh() * self.scale
        return self.last(z + x)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def made(problem: str, **changes: Any) -> wt.Task:
    fields: dict[str, Any] = {
        "optimizer": sgd, "batch_size": BATCH, "epochs": 3, "loss": F.cross_entropy,
    }  # fmt: skip
    if problem == "characters":
        codes = classes(SAMPLES * 17, 11).view(SAMPLES, 17)
        data = TensorDataset(codes[:, :-1].contiguous(), codes[:, 1:].contiguous())
        fields |= {"model": characters, "train": data, "loss": token_loss}
    else:
        data = TensorDataset(numbers(SAMPLES, 5), classes(SAMPLES, 3))
        fields |= {"model": {"layers": layers, "skips": Skips}[problem], "train": data}
    return wt.Task(**(fields | changes))


def trained(context: Context, settings: dict[str, Any], problem: str, how: dict[str, Any]) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(made(problem, **how), "float64")
        strategy = wt.make_strategy("pipeline", settings)
        return verify.trace_strategy(task, strategy, context, STEPS)


def require_exact(
    gang: Gang, size: int, settings: dict[str, Any], problem: str, **how: Any
) -> None:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(made(problem, **how), "float64")
        reference = train_plainly(task, CPU, verify.first_step(task, STEPS), STEPS)
    strategy = wt.make_strategy("pipeline", settings)
    for trace in gang.run(size, trained, settings, problem, how):
        verdict = verify.compare(trace, reference, strategy, size, "float64")
        assert verdict.passed, verdict


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "clip": {"clip_grad_norm": 0.05, "optimizer": adam},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("problem", ["layers", "characters"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_every_schedule_trains_as_one_process(
    gang: Gang, schedule: str, problem: str, how: str
) -> None:
    require_exact(gang, 2, {"schedule": schedule}, problem, **HOW[how])


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (4, {"degree": 2}),
        (4, {"degree": 2, "schedule": "1f1b", "micro_batches": 5}),
        (4, {"schedule": "1f1b"}),
        (3, {"schedule": "interleaved", "micro_batches": 7}),
        (4, {"micro_batches": 1}),
        (2, {"schedule": "interleaved", "micro_batches": 5}),
    ],
)
def test_degrees_and_micro_batches_that_do_not_divide(
    gang: Gang, size: int, settings: dict[str, Any]
) -> None:
    """A batch of 12 and a last one of 2, over pipelines of their own share."""
    require_exact(gang, size, settings, "layers", clip_grad_norm=0.05)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_goes_around_layers_crosses_borders(gang: Gang, size: int) -> None:
    require_exact(gang, size, {}, "skips")


def tables() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))


def test_sparse_gradients_are_summed_over_pipelines(gang: Gang) -> None:
    data = TensorDataset(classes(SAMPLES * 3, 11).view(SAMPLES, 3), classes(SAMPLES, 3))
    plain = partial(torch.optim.SGD, lr=0.1)
    require_exact(gang, 4, {"degree": 2}, "layers", model=tables, train=data, optimizer=plain)


# --- what travels -------------------------------------------------------------------------------


def wide() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def sent(context: Context) -> list[int]:
    data = TensorDataset(numbers(512, 64), numbers(512, 64, seed=2))
    task = wt.Task(model=wide, loss=F.mse_loss, optimizer=sgd, train=data, batch_size=256)
    run = wt.Run(task, wt.make_strategy("pipeline", {"micro_batches": 4}), context)
    reports = [run.step(batch) for batch in run.batches()]
    run.close()
    assert all(report.sent is not None for report in reports)
    return [report.sent or 0 for report in reports]


def test_only_activations_travel(gang: Gang) -> None:
    activations = 256 * 64 * 4
    first, middle, last = (steps[1] for steps in gang.run(3, sent))
    for bytes_sent, borders in ((first, 1), (middle, 2), (last, 1)):
        assert borders * activations <= bytes_sent < borders * activations * 1.1


def without_pickle(context: Context, schedule: str) -> int:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    task = made("layers", validation=made("layers").train)
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (pickle, "dumps"), (pickle, "loads"), (dist, "send_object_list"),
            (dist, "recv_object_list"), (dist, "all_gather_object"),
            (dist, "broadcast_object_list"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, refuse))
        for name in ("_tensor_to_object", "_object_to_tensor"):
            stack.enter_context(mock.patch.object(dist.distributed_c10d, name, refuse))
        return int(trainer.train(wt.Run(task, wt.make_strategy("pipeline", {"schedule": schedule}),
                                   context))["steps"])  # fmt: skip


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_no_pickle_travels(gang: Gang, schedule: str) -> None:
    assert gang.run(2, without_pickle, schedule) == [9, 9]


# --- validation and state -----------------------------------------------------------------------


def validated(context: Context, strategy: str, settings: dict[str, Any]) -> dict[str, float]:
    def right(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float()

    data = TensorDataset(numbers(31, 5, seed=7), classes(31, 3, seed=8))
    task = made("layers", validation=data, metrics={"right": right})
    run = wt.Run(task, wt.make_strategy(strategy, settings), context)
    values = run.validate()
    run.close()
    return values


@pytest.mark.parametrize(
    ("size", "settings"), [(2, {}), (4, {"degree": 2}), (2, {"schedule": "interleaved"})]
)
def test_validation_counts_every_sample_once(
    gang: Gang, size: int, settings: dict[str, Any]
) -> None:
    expected = validated(Context(), "data-parallel", {})
    for values in gang.run(size, validated, "pipeline", settings):
        assert values == pytest.approx(expected, rel=1e-5)


def resumed(context: Context, ways: list[tuple[str, dict[str, Any]]], folder: str) -> list[float]:
    """Two steps with each strategy, each going on from the last one's checkpoint."""
    losses: list[float] = []
    for number, (strategy, settings) in enumerate(ways):
        task = made("characters", optimizer=adam, clip_grad_norm=0.5, **SCHEDULED)
        place = Path(folder)
        run = wt.Run(
            task, wt.make_strategy(strategy, settings), context,
            max_steps=2 * (number + 1), resume=place if number else None,
        )  # fmt: skip
        losses += [run.step(batch).loss or 0.0 for batch in run.batches()]
        run.check_replicas()
        run.save(place / "checkpoints")
        run.close()
    return losses


SCHEDULED = {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.8)}


def test_state_goes_from_pipeline_to_data_parallel_and_back(gang: Gang, tmp_path: Path) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        ("pipeline", {}), ("data-parallel", {}), ("pipeline", {"schedule": "interleaved"}),
        ("pipeline", {"degree": 1}),
    ]  # fmt: skip
    plain: list[tuple[str, dict[str, Any]]] = [("data-parallel", {})] * 4
    straight = gang.run(1, resumed, plain, str(tmp_path / "straight"))[0]
    for losses in gang.run(2, resumed, ways, str(tmp_path / "mixed")):
        assert losses == pytest.approx(straight, rel=1e-4)


def grouped(parameters: Any) -> torch.optim.Optimizer:
    """A learning rate that depends on where among all a parameter stands."""
    return torch.optim.SGD(
        [{"params": [each], "lr": 0.02 * place} for place, each in enumerate(parameters)]
    )


def test_groups_of_parameters_are_those_of_the_whole(gang: Gang) -> None:
    require_exact(gang, 3, {}, "layers", optimizer=grouped)


def cramped(context: Context) -> tuple[list[float], int]:
    """A model of which no rank can have a whole copy."""
    task = made("layers")
    whole = building.bytes_to_train(task.build_model(), task)
    with mock.patch.object(building, "usable_bytes", return_value=2 * (whole - 1)):
        with mock.patch.object(wt.Task, "build_model", _only_without_memory(wt.Task.build_model)):
            run = wt.Run(task, wt.make_strategy("pipeline"), context)
        losses = [run.step(batch).loss or 0.0 for batch in run.batches()]
        state = run.runner.state_dict()["model"]
        run.close()
    assert all(value.isfinite().all() for value in state.values())
    return losses, sum(value.numel() for value in run.model.parameters())


def _only_without_memory(build_model: Callable[[wt.Task], nn.Module]) -> Any:
    def build_it(task: wt.Task) -> nn.Module:
        model = build_model(task)
        assert next(model.parameters()).is_meta
        return model

    return build_it


def test_a_model_larger_than_a_host(gang: Gang) -> None:
    (losses, first), (others, second) = gang.run(2, cramped)
    assert losses == others
    assert sum(losses[-3:]) < sum(losses[:3])
    assert first + second == sum(value.numel() for value in layers().parameters())


# --- what is refused ----------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y if y.sum() > 0 else -y)


class Lion(torch.optim.SGD):
    pass


def refused(context: Context, case: str) -> str:
    task, settings = _bad(case)
    with pytest.raises((wt.UsageError, wt.TaskError)) as caught:
        wt.Run(task, wt.make_strategy("pipeline", settings), context)
    return str(caught.value)


def _bad(case: str) -> tuple[wt.Task, dict[str, Any]]:
    cases: dict[str, tuple[wt.Task, dict[str, Any]]] = {
        "tied": (build("tied-weights"), {}),
        "batch norm": (build("conv-batch-norm"), {"micro_batches": 2}),
        "branches": (made("layers", model=Branches), {}),
        "samples": (made("layers"), {"micro_batches": 13}),
        "accumulated": (made("layers", accumulate=4), {"micro_batches": 4}),
        "degree": (made("layers"), {"degree": 3}),
        "depth": (build("embedding"), {"schedule": "interleaved"}),
        "1f1b": (made("layers"), {"schedule": "1f1b", "micro_batches": 1}),
        "optimizer": (made("layers", optimizer=partial(Lion, lr=0.1)), {}),
        "sum": (made("layers", loss=partial(F.cross_entropy, reduction="sum")), {}),
    }
    return cases[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tied", "head.weight .*tied weights.*split-weights"),
        ("batch norm", "batch norm.*2 micro-batches.*data-parallel"),
        ("branches", "branches hang on values.*sharded"),
        ("samples", "13 micro-batches.*12 samples.*from 1 to 12"),
        ("accumulated", "4 micro-batches.*3 samples"),
        ("degree", "degree 3 does not divide 2 workers: give one of 1, 2"),
        ("depth", "cannot be cut into 4 stages.*for 2"),
        ("1f1b", "2 stages needs as many"),
        ("optimizer", "Lion.*data-parallel"),
        ("sum", "not a mean"),
    ],
)
def test_refuses_with_a_reason(gang: Gang, case: str, words: str) -> None:
    for message in gang.run(2, refused, case):
        assert re.search(words, message), message
        assert "\n" not in message


def fails(context: Context) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if len(output) == 3:  # not in the trial step
            raise KeyError("of the user's")
        return F.cross_entropy(output, target)

    strategy = wt.make_strategy("pipeline", {"micro_batches": 4})
    run = wt.Run(made("layers", loss=loss), strategy, context)
    for batch in run.batches():
        run.step(batch)


def test_an_error_of_the_user_comes_out_as_it_is(gang: Gang) -> None:
    words = r"ModelError: the loss failed on output \[3, 3\] and target \[3\]: KeyError: "
    with pytest.raises(GangError, match=words):
        gang.run(2, fails)


def spoiled(context: Context) -> str:
    data = TensorDataset(numbers(SAMPLES, 5) + torch.nan, classes(SAMPLES, 3))
    task = dataclasses.replace(made("layers"), train=data)
    run = wt.Run(task, wt.make_strategy("pipeline", {"degree": 2}), context)
    with pytest.raises(wt.LossError) as caught:
        for batch in run.batches():
            run.step(batch)
    return str(caught.value)


def test_a_loss_that_is_not_finite_is_told_with_its_samples(gang: Gang) -> None:
    for message in gang.run(4, spoiled):
        assert "on rank 1, samples 0 to 5" in message


# --- balance ------------------------------------------------------------------------------------


def test_borders_make_the_slowest_stage_as_quick_as_can_be() -> None:
    seconds = [3.0, 1.0, 1.0, 4.0, 2.0, 1.0]
    weighty = [True] * 6
    free = [True] * 7
    for stages in (1, 2, 3, 4):
        borders = cutting.balance(seconds, [0.0] * 7, free, weighty, stages)
        assert borders is not None
        slowest = max(sum(seconds[a:b]) for a, b in itertools.pairwise(borders))
        ways = ((0, *inner, 6) for inner in itertools.combinations(range(1, 6), stages - 1))
        assert slowest == min(
            max(sum(seconds[a:b]) for a, b in itertools.pairwise(way)) for way in ways
        )


def test_a_border_that_is_slow_to_cross_is_left_out() -> None:
    crossing = [0.0, 5.0, 0.5, 5.0, 0.0]
    assert cutting.balance([1.0] * 4, crossing, [True] * 5, [True] * 4, 2) == [0, 2, 4]
    crossing = [0.0, 5.0, 9.0, 0.5, 0.0]
    assert cutting.balance([1.0] * 4, crossing, [True] * 5, [True] * 4, 2) == [0, 3, 4]


def test_every_stage_needs_weights() -> None:
    weighty = [True, False, False, True]
    borders = cutting.balance([0.0, 9.0, 9.0, 0.0], [0.0] * 5, [True] * 5, weighty, 2)
    assert borders == [0, 2, 4]
    assert cutting.balance([1.0] * 4, [0.0] * 5, [True] * 5, weighty, 3) is None


def test_a_recording_runs_in_pieces_as_the_model_does() -> None:
    torch.manual_seed(0)
    model, inputs = Skips(), numbers(4, 5)
    recording = Blueprint(model, CPU).record(inputs, training=True)
    stages = cutting.stages_of(recording, range(len(recording.calls) + 1))
    received: list[Tensor] = []
    for stage in stages:
        values = stage.run(model, inputs, received)
        received = [values[number] for number in stage.sends]
    assert torch.equal(recording.result(model, values), model(inputs))
