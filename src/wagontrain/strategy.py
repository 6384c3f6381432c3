"""The contract between a way of distributing and everything around it.

    Strategy    an immutable description: a name and settings
    Runner      a strategy at work on one rank
    StepReport  what one step was
    Evaluation  what one validation batch adds up to

A strategy is one file in `wagontrain/strategies/` (or in another package, announced by an entry
point of the group `wagontrain.strategies`) with one subclass of `Strategy`. The file's name with
dashes is the strategy's name everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import math
import pkgutil
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from wagontrain import strategies as built_in
from wagontrain.batches import Batch, Cut, MicroBatch
from wagontrain.errors import LossError, ModelError, UsageError, WagontrainError, nearest
from wagontrain.mesh import World
from wagontrain.task import Task, call_model, describe, origin
from wagontrain.transport import Context, lost_peer

ENTRY_POINTS = "wagontrain.strategies"


@dataclass(frozen=True)
class StepReport:
    """What one step was.

    Args:
        step: number of the step, from 0 over the whole training.
        epoch: the epoch it belongs to, from 0.
        samples: samples in the global batch.
        loss: mean loss over the global batch; None where a strategy does not know it.
        seconds: duration of the step on this rank.
        sent: bytes this rank sent for the step; None where they cannot be counted.
        staleness: age in updates of the parameters the gradient was taken at; None if exact.
        before: what the ranks spent on the step *before* this one. It travels with this step's
            loss, because it is only known when that step is over.
    """

    step: int
    epoch: int
    samples: int
    loss: float | None
    seconds: float
    sent: int | None = None
    staleness: float | None = None
    before: StepTimes | None = None


@dataclass(frozen=True)
class StepTimes:
    """Seconds that each rank spent on one step: computing, and in exchange not hidden by it.

    The rank that came last waited for nobody, so the shortest exchange is what the exchange
    itself takes, and what the others spent beyond that was waiting for slower ranks.
    """

    compute: tuple[float, ...]
    exposed: tuple[float, ...]

    @property
    def exchange(self) -> float:
        """Seconds of exchange that no computation hid."""
        return min(self.exposed)

    @property
    def waiting(self) -> tuple[float, ...]:
        """Seconds that each rank waited for slower ones."""
        return tuple(exposed - self.exchange for exposed in self.exposed)


@dataclass(frozen=True)
class Evaluation:
    """Weighted sums over this rank's share of a validation batch, and their weight."""

    weight: float = 0.0
    sums: Mapping[str, float] = field(default_factory=dict)


class Runner(ABC):
    """A strategy at work on one rank. Made by `Strategy.setup`.

    `model` is the user's own module; `cut` says which part of every batch this rank takes.
    """

    model: nn.Module
    cut: Cut

    @abstractmethod
    def step(self, batch: Batch) -> StepReport:
        """One optimizer step on this rank's share of the global batch."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> Evaluation:
        """Loss and metrics on this rank's share of a validation batch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """`{"model", "optimizer", "scheduler"}`: full tensors under the plain model's names."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, whichever strategy and world size gave it."""

    @abstractmethod
    def check_replicas(self) -> None:
        """Raise ReplicaError where tensors that must be equal on several ranks are not."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `setup` took; the model is the user's plain one again."""


@dataclass(frozen=True)
class Strategy(ABC):
    """A way of distributing training. A frozen dataclass: its fields are all of its settings.

    The half of the contract that predicts (`candidates`, `step_graph`, `memory`) joins these
    methods with the planner; until then a strategy only runs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether, with these settings, it is the same mathematics as one process."""

    @abstractmethod
    def check(self, task: Task, world: World) -> None:
        """Refuse what it cannot take: UsageError with the reason and what works instead."""

    @abstractmethod
    def setup(self, task: Task, context: Context) -> Runner:
        """Build the model, distribute it, and return the runner. Called on every rank."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)


# --- what every runner does alike --------------------------------------------------------------


class Update:
    """The optimizer, with clipping before it and the scheduler after it: once per step."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self.optimizer = task.build_optimizer(model)
        self.scheduler = task.build_scheduler(self.optimizer)
        self.clip = task.clip_grad_norm
        self.parameters = [value for value in model.parameters() if value.requires_grad]

    def apply(self) -> None:
        """Update the parameters from their gradients, then clear these."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer and scheduler."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of optimizer and scheduler."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


class Objective:
    """The task's forward and loss, with the user's slips turned into messages.

    Raises:
        ModelError: forward or loss raised, or the loss is not a scalar.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self._first = True

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision the task asks for."""
        if self.task.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def __call__(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """Mean loss over the micro-batch, a scalar tensor."""
        with self.precision():
            output = self.forward(model, micro)
            try:
                if self._first:
                    loss = _strictly(self.task.loss, output, micro.target)
                else:
                    loss = self.task.loss(output, micro.target)
            except Exception as error:  # whatever the user's loss raises is theirs to read
                _pass_on(error)
                raise ModelError(
                    f"the loss failed on output {describe(output)} and target "
                    f"{describe(micro.target)}: {origin(error)}"
                ) from error
        if isinstance(loss, Tensor) and loss.dim() == 0 and not loss.requires_grad:
            raise ModelError(
                "the loss does not depend on any parameter: it was detached, or computed "
                "without the model's output"
            )
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ModelError(
                f"the loss is {describe(loss)}, not a scalar tensor: return the mean over the "
                "samples given"
            )
        self._first = False
        return loss

    def forward(self, model: nn.Module, micro: MicroBatch) -> Any:
        """The model's output."""
        try:
            return call_model(model, micro.inputs)
        except Exception as error:  # whatever the user's model raises is theirs to read
            _pass_on(error)
            when = "the first batch" if self._first else "a batch"
            raise ModelError(
                f"the model's forward failed on {when}, input {describe(micro.inputs)}: "
                f"{origin(error)}"
            ) from error

    def weight(self, micro: MicroBatch) -> float:
        """What the micro-batch counts for in a mean; 0 for a stand-in."""
        if micro.count == 0:
            return 0.0
        return float(micro.count if self.task.weight is None else self.task.weight(micro.target))

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Loss and metrics of the task on this rank's share, as weighted sums."""
        weight, sums = 0.0, dict.fromkeys(["loss", *self.task.metrics], 0.0)
        for micro in batch.micro_batches:
            share = self.weight(micro)
            if share == 0:
                continue
            with torch.no_grad(), self.precision():
                output = self.forward(model, micro)
                measures = {"loss": self.task.loss, **self.task.metrics}
                for name, measure in measures.items():
                    value = torch.as_tensor(measure(output, micro.target), dtype=torch.float64)
                    if value.numel() not in (1, micro.count):
                        raise ModelError(
                            f"metric {name!r} gave {describe(value)} for {micro.count} samples: "
                            "return the mean over them, or one number for each"
                        )
                    sums[name] += float(value.mean()) * share
            weight += share
        return Evaluation(weight, sums)


def _pass_on(error: Exception) -> None:
    """Let errors through that are about the machines and not about the user's model."""
    if isinstance(error, torch.OutOfMemoryError | WagontrainError) or lost_peer(error):
        raise error


def _strictly(loss: Any, output: Any, target: Any) -> Any:
    """The loss, with torch's warning of a silent broadcast turned into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")
        return loss(output, target)


def require_finite(losses: Sequence[float], batch: Batch, cut: Cut) -> None:
    """Check each rank's part of the loss of a step.

    Raises:
        LossError: one is not finite; the message says which step, rank and samples.
    """
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad:
        return
    rank = bad[0]
    pieces = dataclasses.replace(cut, rank=rank).micro_batches(
        batch.positions, len(batch.micro_batches)
    )
    samples = ", ".join(f"{mine.start} to {mine.stop - 1}" for _, mine in pieces if len(mine))
    raise LossError(
        f"the loss is {losses[rank]} at step {batch.step} (epoch {batch.epoch}) on rank {rank}, "
        f"samples {samples} in the epoch's order; the weights are still those before this step. "
        "Lower the learning rate, clip the gradient (clip_grad_norm) or look at these samples"
    )


# --- discovery ---------------------------------------------------------------------------------


def discover() -> dict[str, type[Strategy]]:
    """All strategies by name: the files of `wagontrain.strategies`, then entry points.

    Raises:
        UsageError: an entry point that cannot be loaded, is no strategy or takes a name twice.
    """
    found: dict[str, type[Strategy]] = {}
    for module in pkgutil.iter_modules(built_in.__path__):
        found |= dict(_strategies_in(f"{built_in.__name__}.{module.name}"))
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"strategy {entry.name!r} of package {_package(entry)} cannot be loaded: "
                f"{origin(error)}"
            ) from error
        if not (inspect.isclass(loaded) and issubclass(loaded, Strategy)):
            raise UsageError(
                f"strategy {entry.name!r} of package {_package(entry)} is {loaded!r}: an entry "
                f"point of {ENTRY_POINTS} has to name a subclass of wagontrain.Strategy"
            )
        if found.setdefault(loaded.name, loaded) is not loaded:
            raise UsageError(
                f"strategy {loaded.name!r} of package {_package(entry)} has the name of another: "
                "rename it"
            )
    return found


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _strategies_in(module: str) -> Iterator[tuple[str, type[Strategy]]]:
    for value in vars(importlib.import_module(module)).values():
        if inspect.isclass(value) and issubclass(value, Strategy) and value.__module__ == module:
            if not inspect.isabstract(value):
                yield value.name, value


def find(name: str) -> type[Strategy]:
    """The strategy called `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    known = discover()
    if name not in known:
        raise UsageError(f"there is no strategy {name!r}; {nearest(name, known)}")
    return known[name]


def make_strategy(name: str, settings: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name` with the given settings, as values or as text.

    Raises:
        UsageError: no such strategy or setting, or a value it does not take.
    """
    strategy = find(name)
    known = [item.name for item in dataclasses.fields(strategy)]
    kinds = typing.get_type_hints(strategy)
    values = {}
    for key, value in (settings or {}).items():
        if key not in known:
            raise UsageError(f"strategy {name!r} has no setting {key!r}; {nearest(key, known)}")
        try:
            values[key] = _as_kind(kinds[key], value)
        except pydantic.ValidationError as error:
            raise UsageError(
                f"strategy {name!r} cannot take {key}={value}: {error.errors()[0]['msg']}"
            ) from error
    return strategy(**values)


def _as_kind(kind: Any, value: Any) -> Any:
    """`value` as the type `kind`; text is read as JSON where that fits, else as it stands."""
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(kind)
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError, pydantic.ValidationError):
            return adapter.validate_python(json.loads(value))
    return adapter.validate_python(value)
