from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build, numbers
from tests.test_events import Kept
from wagontrain.folder import RunFolder
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.trainer import train
from wagontrain.transport import Context


def validated_task() -> wt.Task:
    """23 samples to validate on, in batches of 8: neither divides by the workers."""
    return dataclasses.replace(
        build("linear-regression"),
        validation=TensorDataset(numbers(23, 5, seed=7), numbers(23, seed=8)),
        metrics={"error": lambda output, target: (output - target).abs()},
    )


def outcome(context: Context, make: Any, folder: Path | None = None, **options: Any) -> Any:
    kept = Kept()
    keep = RunFolder(folder) if folder else None
    with wt.Run(make(), DataParallel(), context, keep, [kept], **options) as run:
        summary = train(run)
    return summary, kept.events


def test_validation_counts_each_sample_once(gang: Gang) -> None:
    alone, _ = outcome(Context(), validated_task)
    task = validated_task()
    model = task.build_model()
    optimizer = task.build_optimizer(model)
    for epoch in range(2):  # the whole training once more, by hand
        order = wt.Run(task, DataParallel(), Context()).training.order
        for step in range(3):
            index = order.epoch(epoch)[list(order.positions(step))]
            x, y = task.train[index]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    x, y = task.validation[:]  # type: ignore[index]
    with torch.no_grad():
        expected = {
            "loss": F.mse_loss(model(x), y).item(),
            "error": (model(x) - y).abs().mean().item(),
        }
    assert alone["validation"] == pytest.approx(expected, rel=1e-5)
    for size in (2, 3, 4):
        for summary, _ in gang.run(size, outcome, validated_task):
            assert summary["validation"] == pytest.approx(expected, rel=1e-5)


class Counted(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(5), torch.tensor(float(index))


def seen(context: Context) -> list[float]:
    """The validation samples that this rank measured."""
    found: list[float] = []

    def note(output: Tensor, target: Tensor) -> Tensor:
        found.extend(target.tolist())
        return torch.zeros(())

    task = dataclasses.replace(
        build("linear-regression"), validation=Counted(), metrics={"note": note}
    )
    with wt.Run(task, DataParallel(), context) as run:
        run.validate()
        run.close()
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_validation_is_not_padded(gang: Gang, size: int) -> None:
    together = [index for rank in gang.run(size, seen) for index in rank]
    assert sorted(together) == list(range(11))


def test_a_run_leaves_its_files(gang: Gang, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "x").path
    summaries = gang.run(2, outcome, validated_task, folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == summaries[0][0]
    assert set(summary) == {
        "strategy", "settings", "exact", "world_size", "hosts", "steps", "samples", "seconds",
        "first_step",
        "samples_per_second", "stopped", "train_loss", "validation", "bytes_sent_per_rank",
            "bytes_sent_in_steps_per_rank",
        "peak_memory_per_rank", "predicted", "versions", "shares", "times_per_rank", "straggler",
    }  # fmt: skip
    assert (summary["world_size"], summary["steps"], summary["samples"]) == (2, 6, 36)
    assert len(summary["bytes_sent_per_rank"]) == len(summary["peak_memory_per_rank"]) == 2
    assert min(summary["bytes_sent_per_rank"]) > 6 * 6 * 4
    assert min(summary["peak_memory_per_rank"]) > 50e6
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["strategy"] == "data-parallel"
    kinds = [
        json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()
    ]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert (kinds.count("step"), kinds.count("times"), kinds.count("validation")) == (6, 5, 2)
    assert list((folder / "tensorboard").iterdir())


def test_the_weights_kept_are_the_trained_ones(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "x")
    with wt.Run(build("tied-weights"), DataParallel(), Context(), folder) as run:
        train(run)
    kept = wt.Result({}, tmp_path).state_dict()
    fresh = build("tied-weights").build_model()
    fresh.load_state_dict(kept)
    for name, value in run.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_steps_end_a_run_early() -> None:
    summary, events = outcome(Context(), validated_task, max_steps=4)
    assert (summary["steps"], summary["samples"]) == (4, 26)
    assert sum(event["kind"] == "validation" for event in events) == 2
    with pytest.raises(wt.UsageError, match="0 steps were asked for"):
        wt.Run(validated_task(), DataParallel(), Context(), max_steps=0)


def test_a_loop_of_ones_own() -> None:
    task = validated_task()
    with wt.connect(task) as run:
        reports = [run.step(batch) for batch in run.batches()]
        values = run.validate()
        summary = run.finish()
    assert [report.step for report in reports] == list(range(6))
    assert [report.samples for report in reports] == [8, 8, 2, 8, 8, 2]
    assert all(report.loss is not None and report.seconds > 0 for report in reports)
    assert summary["validation"] == values
    assert summary == outcome(Context(), lambda: task)[0] | {
        key: summary[key]
        for key in ("seconds", "samples_per_second", "peak_memory_per_rank", "times_per_rank")
    }


def test_a_loop_that_stops_goes_on_where_it_was() -> None:
    whole = [batch.positions for batch in wt.connect(validated_task()).batches()]
    run = wt.connect(validated_task())
    found = []
    for batch in run.batches():
        run.step(batch)
        found.append(batch.positions)
        if batch.step == 3:
            break
    for batch in run.batches():
        run.step(batch)
        found.append(batch.positions)
    assert found == whole
    assert list(run.batches()) == []


def failing(context: Context) -> list[str]:
    task = dataclasses.replace(
        build("frozen-unused"), loss=lambda output, target: output.sum() * float("nan")
    )
    kept = Kept()
    try:
        with wt.Run(task, DataParallel(), context, sinks=[kept]) as run:
            train(run)
    except wt.LossError:
        return [event["kind"] for event in kept.events]
    return ["no error"]


def test_a_failed_run_says_so_in_its_events() -> None:
    assert failing(Context())[-1] == "failed"


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(3, 7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": Broken}, r"forward failed on the first batch, input \[8, 5\]: RuntimeError"),
        ({"model": partial(nn.Linear, 5, 1)}, "Using a target size"),
        ({"loss": lambda output, target: output - target}, r"the loss is \[8\], not a scalar"),
        ({"loss": lambda output, target: 1.0}, "the loss is float, not a scalar"),
        ({"loss": lambda output, target: output.detach().sum()}, "does not depend on any par"),
        ({"loss": F.nll_loss}, r"the loss failed on output \[8\] and target \[8\]"),
        ({"weight": lambda target: 0}, "the weights of all samples of step 0 add up to 0"),
    ],
)
def test_slips_in_the_task_are_named(fields: dict[str, Any], message: str) -> None:
    task = dataclasses.replace(build("linear-regression"), **fields)
    with (
        pytest.raises(wt.ModelError, match=message),
        wt.Run(task, DataParallel(), Context()) as run,
    ):
        train(run)


def slip(context: Context, name: str) -> str:
    try:
        with wt.Run(
            dataclasses.replace(build("linear-regression"), **SLIPS[name]), DataParallel(), context
        ) as run:
            train(run)
    except wt.ModelError as error:
        return str(error)
    return "no error"


SLIPS: dict[str, dict[str, Any]] = {
    "forward": {"model": Broken},
    "shape": {"model": partial(nn.Linear, 5, 1)},
    "scalar": {"loss": lambda output, target: output - target},
}


@pytest.mark.parametrize(
    ("name", "message"),
    [("forward", "forward failed"), ("shape", "Using a target size"), ("scalar", "not a scalar")],
)
def test_slips_are_named_alike_on_all_ranks(gang: Gang, name: str, message: str) -> None:
    for found in gang.run(2, slip, name):
        assert message in found


def test_a_metric_that_is_no_mean_is_named() -> None:
    task = dataclasses.replace(
        validated_task(), metrics={"odd": lambda output, target: torch.zeros(3)}
    )
    with (
        pytest.raises(wt.ModelError, match=r"metric 'odd' gave \[3\] for 8 samples"),
        wt.Run(task, DataParallel(), Context()) as run,
    ):
        run.validate()


def test_dropout_is_on_in_training_and_off_in_validation() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return self.head(x).squeeze(1)

    modes: list[bool] = []
    outcome(Context(), lambda: dataclasses.replace(validated_task(), model=Both))
    assert modes == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.gpu
def test_one_gpu_trains_as_the_cpu_does() -> None:
    for problem in ("linear-regression", "conv-batch-norm", "embedding"):
        task = build(problem)
        losses = {}
        for device in ("cpu", "cuda"):
            context = Context(wt.World(device=torch.device(device)))
            with wt.Run(task, DataParallel(), context) as run:
                losses[device] = [run.step(batch).loss for batch in run.batches()]
        assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def different_data(context: Context, validation: bool) -> str:
    """Data made at random by each rank for itself, as an unseeded random_split makes it."""
    own = TensorDataset(torch.randn(18, 5), torch.randn(18))
    task = build("linear-regression")
    task = dataclasses.replace(task, **{"validation" if validation else "train": own})
    try:
        wt.Run(task, DataParallel(), context)
    except wt.TaskError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("validation", [False, True])
def test_ranks_with_different_data_are_noticed(gang: Gang, validation: bool) -> None:
    name = "validation" if validation else "train"
    for message in gang.run(2, different_data, validation):
        assert f"the {name} data of rank 1 is not that of rank 0" in message


def test_a_run_that_has_ended_takes_no_more() -> None:
    run = wt.connect(validated_task())
    batch = next(run.batches())
    run.step(batch)
    run.finish()
    for attempt in (lambda: run.step(batch), run.validate, run.finish):
        with pytest.raises(wt.UsageError, match="this run has ended"):
            attempt()


class Torn(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index == 37:
            raise OSError("bad sector")
        return torch.zeros(5), torch.tensor(0.0)


def test_a_sample_that_cannot_be_read_is_narrowed_down() -> None:
    task = dataclasses.replace(build("linear-regression"), train=Torn(), batch_size=2)
    run = wt.connect(task)
    with pytest.raises(wt.ModelError, match=r"one of the samples .*\b37\b.*: OSError: bad sector"):
        for batch in run.batches():
            run.step(batch)


def test_a_target_that_would_be_broadcast_in_validation_is_named() -> None:
    task = dataclasses.replace(
        validated_task(), validation=TensorDataset(numbers(23, 5), numbers(23, 1))
    )
    with pytest.raises(wt.ModelError, match="'loss' failed on validation .*Using a target size"):
        wt.connect(task).validate()
