"""The contract between a way of distributing and everything around it.

    Strategy    an immutable description: a name and settings
    Runner      a strategy at work on one rank
    StepReport  what one step was

A strategy is one file in `wagontrain/strategies/` (or in another package, announced by an entry
point of the group `wagontrain.strategies`) with one subclass of `Strategy`. The file's name with
dashes is the strategy's name everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from wagontrain.batches import Batch, Cut
from wagontrain.convergence import EXACT, Steps
from wagontrain.costs import Costs
from wagontrain.mesh import World
from wagontrain.objective import Evaluation
from wagontrain.plan import Plan
from wagontrain.simulate import Graph
from wagontrain.state import Source, Training, WholeTensors, gathered, shared_plain
from wagontrain.task import Task
from wagontrain.transport import Context


@dataclass(frozen=True)
class StepReport:
    """What one step was.

    Args:
        step: number of the step, from 0 over the whole training.
        epoch: the epoch it belongs to, from 0.
        samples: samples in the global batch.
        loss: mean loss over the global batch; None where a strategy does not know it (yet).
        seconds: duration of the step on this rank.
        sent: bytes this rank sent for the step; None where they cannot be counted.
        staleness: age in updates of the parameters the gradient was taken at; None if exact.
        before: what the ranks spent on the step *before* this one. It travels with this step's
            loss, because it is only known when that step is over.
        covers: samples that `loss` is the mean over, where they are those of several steps, this
            one the last.
    """

    step: int
    epoch: int
    samples: int
    loss: float | None
    seconds: float
    sent: int | None = None
    staleness: float | None = None
    before: StepTimes | None = None
    covers: int | None = None


@dataclass(frozen=True)
class StepTimes:
    """Seconds that each rank spent on one step: on computing, on exchange that computing did not
    hide, and before it on waiting for its data.

    The rank that came last waited for nobody, so the shortest exchange is what the exchange
    itself takes, and what the others spent beyond that was waiting for slower ranks.

    Where ranks meet only once in several steps, these are sums over so many `steps`.
    """

    compute: tuple[float, ...]
    exposed: tuple[float, ...]
    data: tuple[float, ...]
    steps: int = 1

    @property
    def exchange(self) -> float:
        """Seconds of exchange that no computation hid."""
        return min(self.exposed)

    @property
    def waiting(self) -> tuple[float, ...]:
        """Seconds that each rank waited for slower ones."""
        return tuple(exposed - self.exchange for exposed in self.exposed)

    @property
    def each(self) -> StepTimes:
        """The mean of one step."""
        compute, exposed, data = (
            tuple(value / self.steps for value in part)
            for part in (self.compute, self.exposed, self.data)
        )
        return StepTimes(compute, exposed, data)


@dataclass(frozen=True)
class Settled:
    """What ranks that do not meet in every step have told each other of some steps, in settling.

    Args:
        loss: mean loss over the samples of those steps.
        samples: how many they are.
        times: what each rank spent.
    """

    loss: float
    samples: int
    times: StepTimes | None = None


class Runner(ABC):
    """A strategy at work on one rank. Made by `Strategy.setup`.

    `model` is the user's own module, with this rank's part of its weights; `cut` says which part
    of every batch this rank takes, and `context` is its place in the job.
    """

    model: nn.Module
    cut: Cut
    context: Context

    @abstractmethod
    def step(self, batch: Batch) -> StepReport:
        """One optimizer step on this rank's share of the global batch."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> Evaluation:
        """Loss and metrics on this rank's share of a validation batch."""

    @property
    @abstractmethod
    def training(self) -> Training:
        """All that has state on this rank, and which part of the whole it is."""

    def settle(self, whole: bool = True) -> None:  # noqa: B027  most never stray
        """Bring the ranks to one state, where a strategy lets them stray from each other.

        Called on every rank before anybody looks at that state.

        Args:
            whole: also what only a checkpoint needs, and validation does not.
        """

    def news(self) -> Sequence[Settled]:
        """What became known of past steps otherwise than by a step's report, since last asked."""
        return ()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model computes with the moving average of its weights, if it keeps one."""
        return contextlib.nullcontext()

    @property
    def average(self) -> Any:
        """The moving average of the weights (Task.ema), where the strategy keeps one; else None."""
        return None

    def restore(self, source: Source) -> None:
        """Take up a saved state. Called on every rank."""
        self.training.restore(source)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, on every rank; every rank has to call this.

        `{"model": {NAME: tensor}, "optimizer": {NAME.KEY: tensor}, "plain": {...}}` with full
        tensors under the plain model's names, and what is no tensor. Some strategies add tensors
        of their own under further keys.
        """
        self.settle()
        held = self.training.held()
        result: dict[str, Any] = {"model": {}, "optimizer": {}}
        result["plain"] = shared_plain(self.context, held)
        for name, tensor in gathered(self.context, held).items():
            kind, _, rest = name.partition(".")
            result.setdefault(kind, {})[rest] = tensor
        return result

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, whichever strategy and world size gave it.

        To be called on every rank.
        """
        tensors = {
            f"{kind}.{name}": tensor
            for kind in state
            if kind != "plain"
            for name, tensor in state[kind].items()
        }
        self.restore(WholeTensors(tensors, state["plain"]))

    @abstractmethod
    def check_replicas(self) -> None:
        """Raise ReplicaError where tensors that must be equal on several ranks are not."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `setup` took; weights that were divided stay so."""


@dataclass(frozen=True)
class Strategy(ABC):
    """A way of distributing training. A frozen dataclass: its fields are all of its settings.

    `candidates`, `step_graph` and `memory` are what the planner asks. A strategy without them runs,
    but `auto` does not weigh it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    crewed: ClassVar[bool] = False
    """Whether its workers come and go, and are no fixed group of ranks (a `Crewed` strategy)."""

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
    def plans_first(self) -> bool:
        """Whether it has to be resolved before workers are started, for it may choose a strategy
        whose workers come and go."""
        return False

    def preparing(self, workers: int) -> str:
        """What takes a while before training begins, in a line for people; empty where nothing."""
        return ""

    def resolved(self, task: Task, context: Context) -> tuple[Strategy, Plan | None]:
        """The strategy to set up, and the plan behind it where it was chosen by measurement.

        Called on every rank.
        """
        return self, None

    @classmethod
    def candidates(cls, costs: Costs) -> Sequence[Strategy]:
        """The settings of this strategy that are worth weighing for a task on a cluster."""
        return ()

    def step_graph(self, costs: Costs) -> Graph:
        """One step as operations on devices and links, or `Graph.steps` of them.

        Raises:
            UsageError: these settings cannot be, for this task on this cluster.
        """
        raise NotImplementedError(f"{self.name} does not say what a step of it takes")

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """Bytes that a worker takes at the peak, by what they are for."""
        raise NotImplementedError(f"{self.name} does not say what memory it takes")

    def steps_needed(self, costs: Costs) -> Steps:
        """Steps for each of exact training, to the same loss: a range where it is relaxed.

        Those of one that is relaxed and says nothing are not known: it is never chosen by them.
        """
        return EXACT if self.exact else Steps(1.0, math.inf, "nothing is known of it")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)
