"""What to train: one model, its loss, optimizer and data. A task knows nothing of machines."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from wagontrain import data, optimizers
from wagontrain.compiling import compiled_in_place
from wagontrain.errors import TaskError, UsageError, WagontrainError, nearest
from wagontrain.seeding import seeded_numbers

Precision = Literal["float32", "bfloat16"]
Measure = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Task:
    """What to train.

    Args:
        model: zero-argument callable that returns the module; it is called with torch seeded by
            `seed`, on every worker.
        loss: `(output, target) -> scalar tensor`, the **mean** over the samples given.
        optimizer: `parameters -> torch.optim.Optimizer`, for instance a `functools.partial`. A
            function whose first argument is called `model` or `named_parameters` gets that, to
            make groups of parameters. A list of optimizers is stepped one after the other.
        train: map-style dataset of `(input, target)`; an input is a tensor, a tuple
            (`model(*input)`) or a dict (`model(**input)`). A sample that is one dict is both.
            Also an `IterableDataset`, or a `DataLoader`, which is taken apart.
        batch_size: samples of one step over **all** workers together (the global batch); 0 for
            that of the DataLoader given as `train`.
        epochs: passes over `train`.
        validation: map-style dataset like `train`, measured after every epoch, each sample once;
            or a DataLoader of one.
        metrics: name -> `(output, target) -> mean over the samples given`, for validation.
        seed: fixes initial weights and the order of samples.
        scheduler: `optimizer -> LRScheduler`, stepped once per optimizer step; of several
            optimizers each gets one.
        clip_grad_norm: largest 2-norm of the whole gradient; larger ones are scaled down to it.
        precision: "bfloat16" runs forward and loss under `torch.autocast`.
        accumulate: number of micro-batches that a global batch is cut into, one after the other.
        weight: `target -> number`, what the samples given count for when `loss` and `metrics`
            are means over something else than samples (say, the tokens that are not padding).
        collate: list of samples -> batch, as in `torch.utils.data.DataLoader`.
        shuffle: new order of samples every epoch; False keeps the dataset's own.
        loader_workers: data-loading processes per worker; 0 loads in the worker itself.
        sampler: order of samples in place of `shuffle`: iterated anew for every epoch, with
            random numbers seeded by seed and epoch.
        epoch_samples: samples of an epoch, where `train` is a stream.
        ema: decay of a moving average of the weights, which is then what validation measures and
            what is exported: `average = ema * average + (1 - ema) * weights` after every step.
        callbacks: who is told what happens on every rank, and may end the training: see
            `wagontrain.Callback`.

    Raises:
        TaskError: a field cannot be trained with; the message says which and why.
    """

    model: Callable[[], nn.Module]
    loss: Measure
    optimizer: Callable[..., Optimizer | Sequence[Optimizer]]
    train: Dataset[Any] | DataLoader[Any]
    batch_size: int = 0
    epochs: int = 1
    validation: Dataset[Any] | None = None
    metrics: Mapping[str, Measure] = field(default_factory=dict)
    seed: int = 0
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    clip_grad_norm: float | None = None
    precision: Precision = "float32"
    accumulate: int = 1
    weight: Callable[[Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    shuffle: bool = True
    loader_workers: int = 0
    sampler: Any = None
    epoch_samples: int | None = None
    ema: float | None = None
    callbacks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        self._take_loaders_apart()
        for name, expected in _EXPECTED.items():
            value = getattr(self, name)
            if not callable(value) and not (value is None and name in _OPTIONAL):
                raise TaskError(
                    f"Task.{name} is of the type {type(value).__name__}, which cannot be called: "
                    f"give {expected}"
                )
        if isinstance(self.model, nn.Module):
            raise TaskError(
                "Task.model is a module that already exists: give the class or a function that "
                "builds it, so that every worker can build its own from the same seed"
            )
        if isinstance(self.loss, nn.Module) and any(True for _ in self.loss.parameters()):
            raise TaskError(
                "Task.loss is a module with parameters of its own, which would not be trained on "
                "all workers: make it part of the model, and let the model return what it needs"
            )
        if self.sampler is not None:
            data.require_sampler(self.sampler)
        if self.is_stream:
            data.require_streamable(self.shuffle, self.sampler, self.loader_workers)
        if self.validation is not None:
            data.length(self.validation, "validation")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 2**63:
                raise TaskError(f"Task.{name} is {value!r}: give a whole number from {least} on")
        samples = self.samples
        if self.batch_size > samples:
            raise TaskError(
                f"Task.batch_size is {self.batch_size}, but the data set has {samples} samples: "
                f"give at most {samples}"
            )
        if self.accumulate > self.batch_size:
            raise TaskError(
                f"Task.accumulate cuts a batch of {self.batch_size} into {self.accumulate} "
                f"micro-batches: give at most {self.batch_size}"
            )
        clip = self.clip_grad_norm
        if clip is not None and not (isinstance(clip, int | float) and clip > 0):
            raise TaskError(f"Task.clip_grad_norm is {clip!r}: give a number above 0")
        if self.ema is not None and not (isinstance(self.ema, float) and 0 < self.ema < 1):
            raise TaskError(f"Task.ema is {self.ema!r}: give a number between 0 and 1, say 0.999")
        if self.precision not in ("float32", "bfloat16"):
            raise TaskError(f"Task.precision is {self.precision!r}: give 'float32' or 'bfloat16'")
        if not isinstance(self.metrics, Mapping) or not all(map(callable, self.metrics.values())):
            raise TaskError(
                "Task.metrics is not a dict of functions: give name -> (output, target) -> mean"
            )
        if "loss" in self.metrics:
            raise TaskError("Task.metrics has an entry 'loss', which is reported anyway: rename it")
        if not isinstance(self.callbacks, Sequence):
            raise TaskError(
                f"Task.callbacks is {type(self.callbacks).__name__}: give a list of callbacks"
            )
        for callback in self.callbacks:
            if not hasattr(callback, "check") or isinstance(callback, type):
                raise TaskError(
                    f"Task.callbacks holds {callback!r}, which is no wagontrain.Callback: subclass "
                    "that, and give an object of it"
                )
            callback.check(self)

    def _take_loaders_apart(self) -> None:
        """Put what DataLoaders of one's own say into this task's fields."""
        if isinstance(self.train, DataLoader) and self.sampler is not None:
            raise TaskError("Task.sampler was given, and the DataLoader has one, too: leave one")
        fields = data.taken_apart(self.train, self.validation, self.batch_size, self.collate)
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def is_stream(self) -> bool:
        """Whether training data are read from their beginning on."""
        return data.is_stream(self.train)

    @property
    def samples(self) -> int:
        """Number of training samples in one epoch."""
        if self.is_stream:
            return data.stream_length(self.train, self.epoch_samples)
        if self.sampler is not None:
            return len(self.sampler)
        return data.length(self.train, "train")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the last one may have fewer samples."""
        return -(-self.samples // self.batch_size)

    def build_model(self) -> nn.Module:
        """Build the model from the task's seed; the caller's random state is left as it was.

        Raises:
            TaskError: the model is not an `nn.Module`, has lazy or no trainable parameters.
        """
        with seeded_numbers(self.seed), _named_as("Task.model"):
            model = self.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"Task.model returned {type(model).__name__}: return an nn.Module")
        model = compiled_in_place(model)
        parameters = list(model.parameters())
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in parameters):
            raise TaskError(
                "the model has lazy layers whose shapes are not known yet: give their input "
                "sizes, or run one forward in the function that builds the model"
            )
        if not any(parameter.requires_grad for parameter in parameters):
            raise TaskError("the model has no parameter with requires_grad: nothing to train")
        return model

    def build_optimizer(self, model: nn.Module, closures: bool = False) -> Optimizer:
        """Build the optimizer over the model's parameters; several are one, see `optimizers`.

        Args:
            model: whose parameters.
            closures: whether it may be one that evaluates the model by itself: LBFGS.

        Raises:
            TaskError: it is not an optimizer, one that calls the model by itself, or several
                with a parameter in common.
        """
        with _named_as("Task.optimizer"):
            made: Any = self.optimizer(optimizers.argument(self.optimizer, model))
        return optimizers.as_one(made, model, closures)

    def build_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Build the learning-rate scheduler, if the task has one; of several optimizers for each.

        Raises:
            TaskError: it needs a metric to step, as ReduceLROnPlateau does.
        """
        if self.scheduler is None:
            return None
        with _named_as("Task.scheduler"):
            made: Any = [self.scheduler(part) for part in optimizers.parts_of(optimizer)]
        for scheduler in made:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise TaskError(
                    "ReduceLROnPlateau steps on a metric, but schedulers are stepped once per "
                    "optimizer step: use a schedule of the step number, such as OneCycleLR"
                )
            if not isinstance(scheduler, LRScheduler):
                raise TaskError(
                    f"Task.scheduler returned {type(scheduler).__name__}: return a scheduler of "
                    "torch.optim.lr_scheduler"
                )
        return made[0] if len(made) == 1 else optimizers.Schedules(made)


_EXPECTED = {
    "model": "the module's class or a function that builds it",
    "loss": "a function (output, target) -> mean loss",
    "optimizer": "a function of the parameters, such as partial(torch.optim.SGD, lr=0.1)",
    "scheduler": "a function of the optimizer that returns a scheduler",
    "weight": "a function of the target that returns a number",
    "collate": "a function of a list of samples that returns a batch",
}
_OPTIONAL = ("scheduler", "weight", "collate", "epoch_samples")
_LEAST = {
    "batch_size": 1, "epochs": 1, "accumulate": 1, "seed": 0, "loader_workers": 0,
    "epoch_samples": 1,
}  # fmt: skip


@contextlib.contextmanager
def _named_as(what: str) -> Iterator[None]:
    """Within, an exception of the user's own function becomes a TaskError that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WagontrainError | torch.OutOfMemoryError):
            raise
        raise TaskError(f"{what} failed: {origin(error)}") from error


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """`model(inputs)`, `model(*inputs)` or `model(**inputs)`, by what the inputs are."""
    if isinstance(inputs, Tensor | PackedSequence):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def place(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: place(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(place(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(place(item, device) for item in value)
    return value


def describe(value: Any) -> str:
    """Shapes of a nest of tensors, for messages: `[128, 1, 28, 28]`."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return type(value).__name__


TaskSource = Task | Callable[[], Task]


def make_task(source: TaskSource, overrides: Mapping[str, Any] | None = None) -> Task:
    """The task that `source` is or builds, with the given fields replaced.

    A function is called with all random numbers seeded, so that what it makes or splits at
    random is the same on every worker; the caller's random state is left as it was.

    Raises:
        TaskError: `source` builds something else, or a replaced field is not acceptable.
    """
    if callable(source):
        with seeded_numbers(0), _named_as("the function that builds the task"):
            task = source()
    else:
        task = source
    if not isinstance(task, Task):
        raise TaskError(
            f"{getattr(source, '__name__', source)!r} gave {type(task).__name__}: "
            "give a wagontrain.Task, or a function that returns one"
        )
    return dataclasses.replace(task, **overrides) if overrides else task


def load_task(spec: str) -> TaskSource:
    """Load `FILE[:NAME]`: the task or task-building function called NAME (default `task`).

    The file's folder is put first on `sys.path`, as Python does for a script.

    Raises:
        UsageError: no such file, it cannot be imported, or it has no such name.
    """
    file, _, name = spec.partition(":")
    name = name or "task"
    path = Path(file).resolve()
    if not path.is_file():
        raise UsageError(f"task file {file!r} does not exist: give the path of a Python file")
    module_name = f"wagontrain_task_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"task file {file!r} is not a Python file: give one that ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"task file {file!r} could not be imported: {origin(error)}") from error
    if not hasattr(module, name):
        tasks = [
            key
            for key, value in vars(module).items()
            if isinstance(value, Task) or getattr(value, "__annotations__", {}).get("return")
        ]
        raise UsageError(
            f"{file} has no {name!r}: define a function {name}() that returns a wagontrain.Task, "
            f"or name another with FILE:NAME; {nearest(name, tasks)}"
        )
    source: TaskSource = getattr(module, name)
    if not callable(source) and not isinstance(source, Task):
        raise UsageError(
            f"{name!r} in {file} is {type(source).__name__}: make it a wagontrain.Task"
        )
    return source


def origin(error: BaseException) -> str:
    """One line on an exception: its type, its text, and the last place outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(__file__).parent
    users = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and own not in Path(frame.filename).parents
        and not frame.filename.startswith("<frozen")
    ]
    place_ = f" ({users[-1].filename}:{users[-1].lineno})" if users else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{place_}"


def trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained; a tied parameter comes once."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
