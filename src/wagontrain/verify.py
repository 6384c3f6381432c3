"""Whether a strategy trains the user's own task as one process would.

Both train for a few steps from the same weights, on a stretch that crosses the end of an epoch,
so that the last, smaller batch is among them. By default both compute in float64, where
rounding is too small to look like a mistake or to hide one; dropout is off, because no two
ways of dividing a batch draw the same masks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from wagontrain import launch
from wagontrain.engines import Local, check_workers
from wagontrain.errors import TrainingError, UsageError
from wagontrain.events import read
from wagontrain.folder import RunFolder
from wagontrain.job import Job, job_folder, run_job
from wagontrain.launch import Place
from wagontrain.mesh import World
from wagontrain.reference import Trace, stretch, train_plainly
from wagontrain.strategy import Strategy
from wagontrain.task import Task, TaskSource, make_task
from wagontrain.trainer import Run
from wagontrain.transport import Context

Dtype = Literal["float64", "float32", "bfloat16"]

TOLERANCE: Mapping[str, float] = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 1e-1}
"""Largest deviation that rounding explains."""


@dataclass(frozen=True)
class Verdict:
    """How far a strategy strayed from one process.

    Deviations are the largest absolute difference of a tensor, divided by the larger of 1 and
    the tensor's largest absolute value; the largest of all tensors or steps is given. Those of
    parameters are divided by how far training moved any weight, too.
    """

    strategy: str
    settings: Mapping[str, Any]
    exact: bool
    workers: int
    steps: int
    dtype: str
    tolerance: float
    max_loss_deviation: float
    max_parameter_deviation: float
    max_buffer_deviation: float | None
    worst_parameter: str
    passed: bool
    dropout_turned_off: bool
    random_forward: bool

    def to_json(self) -> str:
        """All fields as one JSON object; a deviation that is no number is null."""
        fields = dataclasses.asdict(self)
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in fields.items()
        }
        return json.dumps(clean)


def verify(
    source: TaskSource,
    strategy: Strategy,
    *,
    workers: int,
    steps: int = 10,
    dtype: Dtype = "float64",
    task_file: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Verdict:
    """Train with the strategy on `workers` processes and plainly on one; compare.

    Args:
        source: the task, or a function that returns it.
        strategy: the strategy with its settings.
        workers: number of processes.
        steps: steps to train.
        dtype: what both compute in, whatever the task says.
        task_file: `FILE:NAME` for workers to load the task from, where there is one.
        overrides: fields of the task to replace.

    Raises:
        UsageError: the strategy refuses the task, or the numbers make no sense.
        TrainingError: one of the two trainings failed.
    """
    check_workers(workers, None)
    if steps < 1:
        raise UsageError(f"{steps} steps were asked for: give at least 1")
    task = make_task(source, overrides)
    strategy.check(task, World(size=workers))
    del task
    with job_folder() as folder:
        kept = RunFolder.create(folder, "verify")
        options = {"first_step": None, "steps": steps, "dtype": dtype}

        def trace(name: str, count: int, plainly: bool) -> tuple[Trace, dict[str, bool]]:
            job = Job(
                "trace", strategy.name, strategy.settings, dict(overrides or {}), task_file,
                str(folder), {**options, "name": name, "plainly": plainly},
            )  # fmt: skip
            try:
                run_job(job, source, strategy, count, kept, Local())
            except TrainingError as error:
                if dtype != "float64" or "dtype" not in str(error):
                    raise
                hint = "the model insists on another dtype; give --dtype float32"
                raise TrainingError(f"{error} (computing in float64: {hint})") from error
            return _read_trace(folder / name)

        if strategy.crewed:
            found, notes = _trace_crew(
                source, strategy, workers, folder, options, task_file, overrides
            )
        else:
            found, notes = trace("strategy", workers, False)
        expected, _ = trace("reference", 1, True)
        verdict = compare(found, expected, strategy, workers, dtype, notes["dropout"])
        if not verdict.passed:
            again, _ = trace("again", 1, True)
            repeated = compare(again, expected, strategy, 1, dtype, False)
            verdict = dataclasses.replace(verdict, random_forward=not repeated.passed)
    return verdict


def _trace_crew(
    source: TaskSource,
    strategy: Strategy,
    workers: int,
    folder: Path,
    options: Mapping[str, Any],
    task_file: str | None,
    overrides: Mapping[str, Any] | None,
) -> tuple[Trace, dict[str, bool]]:
    """Train with workers that come and go, and read from the run's files what happened."""
    from wagontrain import crew  # few strategies need what it brings along
    from wagontrain.servers.contract import Crewed

    assert isinstance(strategy, Crewed)
    with computing_in(options["dtype"]):
        task, dropout = prepared(make_task(source, overrides), options["dtype"])
        first = first_step(task, options["steps"])
        last = first + options["steps"]
        task = dataclasses.replace(task, epochs=-(-last // task.steps_per_epoch))
        order = crew.Order(
            source, strategy, {**(overrides or {}), "epochs": task.epochs}, task_file, last, None,
            launch.Terms(), first, options["dtype"],
        )  # fmt: skip
        _, path = crew.start(order, task, workers, None, folder / "crew", "verify", None)
        kept = RunFolder(path)
        losses = [event["loss"] for event, _ in read(kept.events) if event["kind"] == "step"]
        state = safetensors.torch.load_file(kept.weights)
        return Trace.of(losses, task.build_model(), state), {"dropout": dropout}


def compare(
    found: Trace,
    expected: Trace,
    strategy: Strategy,
    workers: int,
    dtype: str,
    dropout_turned_off: bool = False,
) -> Verdict:
    """Hold one trace against another."""
    losses = [
        _deviation(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))
        for one, other in zip(found.losses, expected.losses, strict=True)
    ]
    tolerance = TOLERANCE[dtype]
    travelled = _travelled(expected, floor=100 * torch.finfo(_DTYPES[dtype]).eps / tolerance)
    parameters = _deviations(found.parameters, expected.parameters, travelled)
    buffers = _deviations(found.buffers, expected.buffers)
    worst = max(parameters, key=lambda name: parameters[name])
    every = [*losses, *parameters.values(), *buffers.values()]
    return Verdict(
        strategy=strategy.name,
        settings=strategy.settings,
        exact=strategy.exact,
        workers=workers,
        steps=len(losses),
        dtype=dtype,
        tolerance=tolerance,
        max_loss_deviation=max(losses),
        max_parameter_deviation=parameters[worst],
        max_buffer_deviation=max(buffers.values(), default=None),
        worst_parameter=worst,
        passed=all(value <= tolerance for value in every),
        dropout_turned_off=dropout_turned_off,
        random_forward=False,
    )


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def _travelled(trace: Trace, floor: float) -> float:
    """How far training moved the weights: the scale that a deviation of them is held against.

    With a small learning rate a wrong gradient moves the weights little, but by as much as the
    right one. The floor keeps rounding of the weights themselves from counting.
    """
    moves = [
        float((after.double() - trace.initial[name].double()).abs().max())
        for name, after in trace.parameters.items()
        if name in trace.initial and after.numel()
    ]
    return min(1.0, max(floor, *moves)) if moves else 1.0


def _deviations(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise AssertionError(f"names differ: {sorted(found.keys() ^ expected.keys())}")
    return {name: _deviation(found[name], expected[name], scale) for name in expected}


def _deviation(found: Tensor, expected: Tensor, scale: float = 1.0) -> float:
    if found.numel() == 0:
        return 0.0
    found, expected = found.double(), expected.double()
    size = expected.abs().max().clamp(min=1.0)
    difference = float((found - expected).abs().max() / size) / scale
    # A NaN on either side is as far off as can be, and must not pass a comparison.
    return difference if math.isfinite(difference) else math.inf


# --- the workers' side --------------------------------------------------------------------------


def trace_job(job: Job, folder: Path, place: Place | None) -> None:
    """The worker's side of a job of the kind "trace"."""
    options = job.options
    context = launch.join(place)
    loaded, strategy = job.load(folder)
    with computing_in(options["dtype"]):
        task, dropout = prepared(loaded, options["dtype"])
        if options["plainly"]:
            first = first_step(task, options["steps"])
            trace = train_plainly(task, context.world.device, first, options["steps"])
        else:
            trace = trace_strategy(task, strategy, context, options["steps"])
    if context.world.rank == 0:
        assert job.run_dir is not None
        _write_trace(Path(job.run_dir) / options["name"], trace, {"dropout": dropout})
    launch.leave(context)


def trace_strategy(task: Task, strategy: Strategy, context: Context, steps: int) -> Trace:
    """Train with a strategy and keep what happened; to be called on every rank."""
    with Run(task, strategy, context) as run:
        losses = []
        for batch in stretch(run.training, first_step(task, steps), steps):
            report = run.step(batch)
            loss = report.loss if report.covers is None else None  # not of several steps
            losses.append(math.nan if loss is None else loss)
        trace = Trace.of(losses, task.build_model(), run.runner.state_dict()["model"])
        run.close()
    return trace


def first_step(task: Task, steps: int) -> int:
    """Where to begin so that `steps` steps cross the end of the first epoch."""
    return max(0, task.steps_per_epoch - (steps + 1) // 2)


@contextlib.contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Within, new tensors are of this dtype; bfloat16 is left to autocast.

    In float64 a model that goes to float32 for a part of its computation (a loss, a norm) stays
    where it is: rounding would hide what is looked for.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
    try:
        with _Float64Stays() if dtype == "float64" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class _Float64Stays(TorchFunctionMode):
    """Tensors in float64 are not converted to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = args[0] if args else None
        if not isinstance(value, Tensor) or func not in _CONVERSIONS:
            return func(*args, **kwargs)
        if value.dtype is torch.float64:
            if func is Tensor.float:
                return value
            args = tuple(each for each in args if each is not torch.float32)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {key: each for key, each in kwargs.items() if key != "dtype"}
            if func in _TO and len(args) == 1 and not kwargs.keys() & {"device", "dtype", "other"}:
                return value.clone() if kwargs.get("copy") else value
        return func(*args, **kwargs)


_TO = (Tensor.to, Tensor.type)
_CONVERSIONS = {
    Tensor.float, *_TO, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax,
    Tensor.softmax, Tensor.log_softmax,
}  # fmt: skip


def prepared(task: Task, dtype: str) -> tuple[Task, bool]:
    """The task without dropout and in the given dtype; and whether it had any dropout."""
    had_dropout = [False]

    def model() -> nn.Module:
        built = task.model()
        had_dropout[0] |= turn_off_dropout(built)
        return built.double() if dtype == "float64" else built

    def collate(samples: list[Any]) -> Any:
        batch = (task.collate or default_collate)(samples)
        return pytree.tree_map(_in_float64, batch) if dtype == "float64" else batch

    changed = dataclasses.replace(
        task,
        model=model,
        collate=collate,
        precision="bfloat16" if dtype == "bfloat16" else "float32",
        callbacks=(),  # what they write or stop is for training
    )
    changed.build_model()
    return changed, had_dropout[0]


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def turn_off_dropout(model: nn.Module) -> bool:
    """Set the probability of every dropout layer to 0; returns whether there was one above."""
    found = False
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            found |= module.p > 0
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            found |= module.dropout > 0
            module.dropout = 0.0
        elif isinstance(probability := getattr(module, "attention_dropout", None), float):
            found |= probability > 0  # Hugging Face's
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  nn.Module has no such one
    return found


def _write_trace(folder: Path, trace: Trace, notes: Mapping[str, bool]) -> None:
    folder.mkdir()
    for name in _TENSORS:
        tensors: dict[str, Tensor] = getattr(trace, name)
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / f"{name}.safetensors",
        )
    text = json.dumps({"losses": trace.losses, "notes": dict(notes)})
    (folder / "losses.json").write_text(text)


def _read_trace(folder: Path) -> tuple[Trace, dict[str, bool]]:
    content = json.loads((folder / "losses.json").read_text())
    tensors = (safetensors.torch.load_file(folder / f"{name}.safetensors") for name in _TENSORS)
    return Trace(content["losses"], *tensors), content["notes"]


_TENSORS = ("parameters", "buffers", "initial")
