"""Pipeline: the model is cut into stages, one behind the other, and micro-batches go through.

Each rank of a row of the mesh holds one stretch of the model, and only the activations at the
borders travel, forward, and their gradients, backward. While a rank works on one micro-batch, the
others work on those before and behind it. What `degree` leaves of the world is data parallel.

    time of a step   (m + d - 1) / m · the slowest stage's      m micro-batches, d stages
    bytes per border and step   2 · B · a · s     B samples of a numbers of s bytes

Limits: at the beginning and the end of a step ranks stand idle (the "bubble"), for the part
(d - 1) / (m + d - 1) of it; the slowest stage sets the pace; batch norm wants m = 1.

Source: Huang et al. 2019, "GPipe" (NeurIPS), section 2; Narayanan et al. 2019, "PipeDream"
(SOSP), section 3.2 (one forward, one backward); Narayanan et al. 2021, "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM" (SC), section 2.2 (interleaved).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from wagontrain.axes import check_degree, lay_out
from wagontrain.batches import Batch, MicroBatch, mix
from wagontrain.building import (
    initialise,
    require_room,
    require_uncompiled,
    skeleton,
    whole_or_skeleton,
)
from wagontrain.costs import Costs
from wagontrain.errors import TaskError, UsageError
from wagontrain.figures import GatheredFigures
from wagontrain.layout import Layout
from wagontrain.mesh import World
from wagontrain.objective import Evaluation, Objective, nothing
from wagontrain.replication import Buckets
from wagontrain.simulate import Graph
from wagontrain.stages import cutting, predict
from wagontrain.stages.cutting import Stage
from wagontrain.stages.holding import give_memory, let_go
from wagontrain.stages.planning import plan
from wagontrain.stages.recording import Blueprint
from wagontrain.stages.running import Kind, Load, pieces, real_samples, schedule
from wagontrain.stages.sums import sum_gradients
from wagontrain.strategy import Strategy
from wagontrain.synchronous import Synchronous, require_weight
from wagontrain.task import Task, trainable
from wagontrain.transport import Context
from wagontrain.trial import unused_in_trial

_PER_STAGE = (1, 2, 4)
"""Micro-batches for each stage to choose among; with 4 a fifth of a step is idle (GPipe)."""


@dataclass(frozen=True)
class Pipeline(Strategy):
    """Settings of the pipeline.

    Args:
        degree: ranks in a pipeline; all where not given. The rest of the world is data parallel.
        micro_batches: that each batch of a pipeline is cut into; where not given, one, two or four
            for each stage, whichever a trial says is quickest, but no more than there are
            samples; one in all where the model has batch norm.
        schedule: "gpipe" goes forward with all micro-batches, then backward; "1f1b" goes backward
            as soon as it can, and so keeps activations of `degree` micro-batches only;
            "interleaved" gives every rank two stages, for a smaller bubble and more traffic.
    """

    degree: int | None = None
    micro_batches: int | None = None
    schedule: Kind = "gpipe"

    name: ClassVar[str] = "pipeline"
    summary: ClassVar[str] = "stages of layers, one behind the other (GPipe, 1F1B)"

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    def check(self, task: Task, world: World) -> None:
        """Refuse a degree that does not divide the world, and too few samples.

        Raises:
            UsageError: one of these.
        """
        check_degree(self.degree, world.size)
        degree = self.degree or world.size
        rows = world.size // degree
        if rows > task.batch_size:
            raise UsageError(
                f"{world.size} workers of degree {self.degree} make {rows} pipelines that cannot "
                f"share a batch of {task.batch_size}: give a higher degree"
            )
        if self.micro_batches is None:
            return
        samples = samples_of(task, rows)
        if not 1 <= self.micro_batches <= samples:
            raise UsageError(
                f"{self.micro_batches} micro-batches were asked for, but a pipeline gets {samples} "
                f"samples at a time: give a number from 1 to {samples}"
            )
        if self.schedule == "1f1b" and self.micro_batches < degree:
            raise UsageError(
                f"1f1b with {degree} stages needs as many micro-batches, not {self.micro_batches}: "
                "give more, or the schedule gpipe"
            )

    @classmethod
    def candidates(cls, costs: Costs) -> list[Pipeline]:
        """Every degree above 1 that divides the world, with the micro-batches that suit it best; of
        the two best degrees every schedule.

        Both by m + d - 1 times the slowest stage: see `stages.planning`.
        """
        layers = [layer for layer in costs.profile.layers if layer.parts]
        found: list[tuple[float, Pipeline]] = []
        for degree in range(2, min(costs.size, len(layers)) + 1):
            if costs.size % degree:
                continue
            samples = predict.samples(costs, degree)
            counts = [factor * degree for factor in _PER_STAGE if factor * degree <= samples]
            if costs.profile.across_samples:
                counts = [1]
            if counts:
                seconds, best = min(
                    (predict.bound(costs, degree, count), count) for count in counts
                )
                found.append((seconds, cls(degree=degree, micro_batches=best)))
        found.sort(key=lambda each: each[0])
        others = [other for _, each in found[:2] for other in each._other_schedules(len(layers))]
        return [*(each for _, each in found), *others]

    def _other_schedules(self, layers: int) -> list[Pipeline]:
        """The same pipeline in another order, for so many layers."""
        assert self.degree is not None
        assert self.micro_batches is not None
        if self.micro_batches < self.degree:
            return []
        kinds: list[Kind] = ["1f1b"]
        if 2 * self.degree <= layers:
            kinds.append("interleaved")
        return [replace(self, schedule=kind) for kind in kinds]

    def step_graph(self, costs: Costs) -> Graph:
        """Micro-batches through the stages; activations and gradients go from one to the next."""
        degree = self.degree or costs.size
        count = self.micro_batches or min(2 * degree, predict.samples(costs, degree))
        return predict.step_graph(costs, degree, count, self.schedule)

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """A stage's weights, and the activations of all micro-batches that are under way."""
        degree = self.degree or costs.size
        count = self.micro_batches or min(2 * degree, predict.samples(costs, degree))
        return predict.memory(costs, degree, count, self.schedule, rank)

    def setup(self, task: Task, context: Context) -> Synchronous:
        """Build the model and leave each rank its stages."""
        degree = self.degree or context.world.size
        if degree > 1:
            return PipelineRunner(self, task, context, degree)
        return _replicas(task, context)


def samples_of(task: Task, rows: int) -> int:
    """Most samples that a pipeline gets at a time."""
    piece = -(-task.batch_size // task.accumulate)
    return -(-piece // rows)


def _replicas(task: Task, context: Context) -> Synchronous:
    """Pipelines of one stage each: data parallel."""
    require_room(task, context)
    device = context.world.device
    model = task.build_model().to(device)
    unused = bool(unused_in_trial(task, Objective(task, device), model))
    runner = Synchronous(task, context, model)
    runner.replicate(runner.data, Buckets(unused=unused))
    return runner


class PipelineRunner(Synchronous):
    """A pipeline at work on one rank."""

    def __init__(self, strategy: Pipeline, task: Task, context: Context, degree: int) -> None:
        world = context.world
        model = whole_or_skeleton(task, context)
        require_uncompiled(model, "cuts the model into stages")
        bare = next(model.parameters()).is_meta
        self.kind = strategy.schedule
        self.total = degree * (2 if self.kind == "interleaved" else 1)
        samples = samples_of(task, world.size // degree)
        counts = _micro_batches(strategy, model, samples, self.total)
        if not bare:
            model = model.to(world.device)
            unused_in_trial(task, Objective(task, world.device), model)
        self.blueprint = Blueprint(model, world.device, share=1 / (2 * self.total))
        self.plan = plan(task, context, model, self.blueprint, counts, samples, self.total)
        self.micro_batches, uses = self.plan.micro_batches, self.plan.uses
        self.even = self.plan.recording.has_figures  # a loss of its own, over all that it was given
        self.axes = axes = lay_out(context, degree)
        self.numbers = range(axes.model.index, self.total, degree)
        held = uses.held(self.plan.borders)
        own = set().union(*(held[number] for number in self.numbers))
        first = {name: number for number in reversed(range(self.total)) for name in held[number]}
        layouts = {
            name: Layout.whole(value, owner=axes.data.index == 0 and first[name] in self.numbers)
            for name, value in model.state_dict().items()
            if name in own
        }
        self._names = list(uses.state)
        if bare:
            give_memory(model, own, world.device)
            plain = skeleton(task)
            assert plain is not None
            initialise(model, plain, layouts, task.seed)
        # The optimizer is built over all parameters, so that it groups them as the task means it.
        super().__init__(task, context, model, layouts, data=axes.data)
        let_go(model, self.update.optimizer, own)
        self.update.norm = self._norm
        self.update.parameters = [value for _, value in trainable(model)]
        self.speaks = self.total - 1 in self.numbers
        self.load = Load()
        self._runs: dict[Any, Any] = {}

    # --- one step -------------------------------------------------------------------------------

    def passes(self, batch: Batch) -> float:
        """All micro-batches through the stages; returns what the batch counts for."""
        stage = self.axes.model.index
        torch.manual_seed(mix(self.task.seed, "step", batch.step, self.data.index, "stage", stage))
        loads = [pieces(micro, self.micro_batches, self.even) for micro in batch.micro_batches]
        weights = [[self.objective.weight(piece) for piece in load] for load in loads]
        counted = self.count_later([sum(map(sum, weights))])
        total = float(batch.total)
        if counted is not None:
            total = sum(row[0] for row in counted.result())
            require_weight(total, batch)
        losses: list[Tensor] = []
        for micro, load, counts in zip(batch.micro_batches, loads, weights, strict=True):
            self.participation.counts = micro.count > 0

            def loss(output: Any, number: int, load: Any = load, counts: Any = counts) -> Tensor:
                piece, weight = load[number], counts[number]
                output = real_samples(output, piece)
                if weight == 0:
                    # Zero times the loss would not do: a mean over nothing is not a number.
                    return nothing(output)
                value = self.objective(lambda *_, **__: output, piece)
                losses.append(value.detach() * weight)
                scaled: Tensor = value * (weight / total)
                return scaled

            self._through(load, training=True, conclude=loss)
        self.context.watch.at(f"in the exchange of step {batch.step}")
        self.ready = self.clock.mark()
        assert isinstance(self.figures, GatheredFigures)
        part = torch.stack(losses).sum() if losses else torch.zeros((), device=self._device)
        self.figures.tell(part, self.times_before())
        return total

    def _through(self, load: list[MicroBatch], training: bool, conclude: Any) -> None:
        """Run a load through the stages; `conclude` makes a loss of (output, number)."""

        def compute(stage: Stage, number: int, received: Sequence[Tensor]) -> Any:
            piece = load[number]
            with self.objective.precision():

                def run(*_: Any, **__: Any) -> Any:
                    values = stage.run(self.model, piece.inputs, received)
                    if stage.sends:
                        return tuple(values[each].contiguous() for each in stage.sends)
                    return stage.recording.result(self.model, values)

                output = self.objective.forward(run, piece)
                return output if stage.sends else conclude(output, number)

        self.load.pieces, self.load.compute = load, compute
        self._run_for(load, training)()

    def _run_for(self, load: list[MicroBatch], training: bool) -> Any:
        """The schedule for loads of this shape."""
        leaves = pytree.tree_leaves(load[0].inputs)
        key = (training, len(load), *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._runs:
            with self.objective.precision():
                recording = self.blueprint.record(load[0].inputs, training)
            if recording.path != self.plan.recording.path:
                raise UsageError(
                    "the model cannot be cut into stages: its forward calls other layers in "
                    "validation, or for other shapes, than in the trial step; use the strategy "
                    "sharded"
                )
            every = cutting.stages_of(recording, self.plan.borders)
            self._runs[key] = schedule(
                self.kind, [(number, every[number]) for number in self.numbers], self.total,
                len(load), self.axes.model, self._device, self.load, training,
            )  # fmt: skip
        return self._runs[key]

    @property
    def _device(self) -> torch.device:
        return self.context.world.device

    def exchange(self) -> None:
        """Sum the gradients over the ranks that hold the same stages."""
        if self.data.group is not None:
            sum_gradients([value for _, value in trainable(self.model)], self.data.group)

    # --- the rest of the contract ---------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Evaluation:
        """Loss and metrics on the samples of this rank's pipeline, known to its last rank."""
        if self.model.training:
            self.model.eval()
        names = ["loss", *self.task.metrics]
        weight, sums = 0.0, dict.fromkeys(names, 0.0)
        for micro in batch.micro_batches:
            self.participation.counts = micro.count > 0
            load = pieces(micro, self.micro_batches, self.even)

            def measure(output: Any, number: int, load: Any = load) -> Tensor:
                nonlocal weight
                given, piece = real_samples(output, load[number]), load[number]
                found = self.objective.evaluate(
                    lambda *_, **__: given, replace(batch, micro_batches=(piece,))
                )
                weight += found.weight
                for name, value in found.sums.items():
                    sums[name] += value
                return torch.zeros((), device=self._device)

            self._through(load, training=False, conclude=measure)
        return Evaluation(weight, sums)

    @property
    def names(self) -> Iterable[str]:
        """Names of all parameters and buffers."""
        return self._names

    def close(self) -> None:
        """Let go of the schedules and groups; each rank keeps its stages of the model."""
        super().close()
        self._runs.clear()
        self.axes.close()


def _micro_batches(strategy: Pipeline, model: nn.Module, samples: int, stages: int) -> list[int]:
    """How many micro-batches each batch of a pipeline may be cut into.

    Raises:
        TaskError: several were asked for, and the model has batch norm.
    """
    looks_across = [
        name for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        or (isinstance(module, _NormBase) and module.track_running_stats)
    ]  # fmt: skip
    if not looks_across:
        given = strategy.micro_batches
        several = sorted({min(samples, factor * stages) for factor in _PER_STAGE})
        return several if given is None else [given]
    if (strategy.micro_batches or 1) > 1:
        raise TaskError(
            f"layer {looks_across[0]!r} is a batch norm, which looks across the samples of a "
            f"batch, and {strategy.micro_batches} micro-batches would each be normalised by "
            "themselves: leave out micro_batches, use Task.accumulate, or the strategy "
            "data-parallel"
        )
    return [1]
