"""What all strategies share in which every step is one update that all ranks make together.

    passes      forward and backward over this rank's micro-batches
    exchange    gradients become those of the global batch
    update      clipping by the global norm, optimizer, scheduler: once

A strategy says how the model is divided and what is exchanged; the order of things, the division
by what the global batch counts for, and the checks are here.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wagontrain.axes import Axis, whole_world
from wagontrain.batches import Batch, Cut, MicroBatch, mix
from wagontrain.batchnorm import Participation, global_batch_norm
from wagontrain.building import require_same_groups, require_uncompiled_norms
from wagontrain.errors import LossError, ModelError, ReplicaError
from wagontrain.figures import Figures, GatheredFigures
from wagontrain.layout import Layout, local
from wagontrain.objective import Evaluation, Objective, Update, nothing, require_finite
from wagontrain.replication import Buckets, Replication
from wagontrain.smoothing import WeightAverage
from wagontrain.state import Held, Source, Training
from wagontrain.strategy import Runner, StepReport, StepTimes
from wagontrain.task import Task, trainable
from wagontrain.transport import Context, Pending, Stopwatch, fingerprints

FIGURES = 4
"""Figures of a step: this rank's part of the loss; seconds of computing, of exchange, for data."""


class Synchronous(Runner):
    """One rank of a strategy whose ranks make every update together.

    Args:
        task: what is trained.
        context: this rank's place in the job.
        model: what this rank has of the model.
        layouts: which part it has of everything in the plain model's `state_dict`.
        data: the axis over which samples are divided; all ranks where not given.
        shares: one number per rank of that axis, to which its samples are proportional.
    """

    def __init__(
        self,
        task: Task,
        context: Context,
        model: nn.Module,
        layouts: Mapping[str, Layout] | None = None,
        data: Axis | None = None,
        shares: tuple[float, ...] | None = None,
    ) -> None:
        world = context.world
        self.task = task
        self.context = context
        self.data = data or whole_world(context)
        self.cut = Cut(self.data.index, self.data.size, shares)
        self.model = model
        first = world.rank == 0
        self.layouts = layouts or {
            name: Layout.whole(value, owner=first) for name, value in model.state_dict().items()
        }
        divided = any(layout.dim is not None for layout in self.layouts.values())
        self.update = Update(task, model, self._norm if divided else None)
        require_same_groups(task, model, self.update.optimizer)
        self._average: WeightAverage | None = None
        self.objective = Objective(task, world.device)
        # Ranks that see the same samples have the same loss: the first of them tells it.
        self.shares = self._shares()
        self.speaks = world.rank == self.shares.index(self.data.index)
        self.figures: Figures = GatheredFigures(context)
        self.forward: Callable[..., Any] = model
        self.replication: Replication | None = None
        self.participation = Participation()
        self.open = contextlib.ExitStack()
        self.clock = Stopwatch(world.device)
        self.ready: Any = None
        self._before: Marks | None = None
        if self.data.side is not None:
            require_uncompiled_norms(model)
            self.open.enter_context(global_batch_norm(model, self.data.side, self.participation))
        model.train()

    def _shares(self) -> list[int]:
        """Which share of a batch each rank sees."""
        size = self.context.world.size
        if self.data.size == size:
            return list(range(size))
        return [row[0] for row in self.context.gather_integers([self.data.index])]

    def replicate(self, axis: Axis, buckets: Buckets) -> None:
        """Sum the gradients of the parameters that the ranks of an axis hold alike."""
        if axis.group is None:
            return
        if axis.size == self.context.world.size:
            buckets = replace(buckets, figures=FIGURES)
        self.replication = Replication(self.model, axis, self.context.world.device, buckets)
        self.forward = self.replication.forward
        self.figures = self.replication.figures or self.figures
        first = next(value for name, value in trainable(self.model) if name not in buckets.apart)
        handle: Any = first.register_post_accumulate_grad_hook(self._note_ready)
        self.open.callback(handle.remove)

    def _note_ready(self, parameter: Tensor) -> None:
        """Mark the time: the first parameter's gradient is the last to be ready."""
        self.ready = self.clock.mark()

    def holding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the passes of a micro-batch: exchange gradients in the last one's only."""
        return self.replication.holding(last) if self.replication else contextlib.nullcontext()

    def passed(self, micro: MicroBatch, total: float) -> None:
        """Called when a micro-batch has gone forward and backward: for strategies to fill in."""

    def exchange(self) -> None:
        """Exchange what the backward pass did not: for strategies to fill in."""

    @property
    def average(self) -> WeightAverage | None:
        """The moving average of the weights, made when it is first asked for."""
        if self._average is None and self.task.ema is not None:
            self._average = WeightAverage(self.model, self.layouts, self.task.ema)
        return self._average

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model computes with the average, if there is one."""
        if (average := self.average) is None:
            yield
            return
        with average.shown():
            try:
                yield
            finally:
                self.settle(whole=False)

    # --- one step -------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepReport:
        """One optimizer step. The loss is reported as a mean over the global batch.

        Raises:
            LossError: some rank's loss is not finite.
            ModelError: the model or the loss failed.
        """
        began = time.perf_counter()
        if not self.model.training:
            self.model.train()
        marks = Marks(self.clock, batch.seconds)
        self.ready, average = None, self.average
        self.update.begin()
        # Dropout and the like: the same in a run that was resumed, but not on every rank.
        torch.manual_seed(mix(self.task.seed, "step", batch.step, self.data.index))
        total = self.passes(batch)
        self.exchange()
        marks.exchanged = self.clock.mark()
        marks.ready = self.ready or marks.exchanged
        rows = self.figures.result()
        try:
            losses = [row[0] for row in rows]
            require_finite(losses, batch, self.cut, self.model, self.shares)
        except LossError:
            if self.replication is not None:
                self.replication.finish()
            raise
        if self.replication is None:
            self.update.apply()
        else:
            self.update.apply(self.replication.arrivals())
            marks.waited = self.replication.waited
        if average is not None:
            average.update()
        marks.stop = self.clock.mark()
        before = None
        if self._before is not None:
            compute, exposed, data = list(zip(*rows, strict=True))[1:]
            before = StepTimes(compute, exposed, data)
        self._before = marks
        return StepReport(
            step=batch.step,
            epoch=batch.epoch,
            samples=batch.total,
            loss=sum(row[0] for row in rows) / total,
            seconds=time.perf_counter() - began,
            sent=self.context.sent.lap(),
            before=before,
        )

    def passes(self, batch: Batch) -> float:
        """Forward and backward over the micro-batches; returns what the batch counts for."""
        weights = [self.objective.weight(micro) for micro in batch.micro_batches]
        # What one sample counts for has to be known before the first backward, not before.
        counted = self.count_later(weights)
        total = float(batch.total)
        part: list[tuple[Tensor, float]] = []
        last = len(weights) - 1
        joined = self.replication
        for number, (micro, weight) in enumerate(zip(batch.micro_batches, weights, strict=True)):
            with self.holding(number == last):
                loss = self._loss(micro, weight)
                if number == 0 and counted is not None:
                    total = sum(row[0] for row in counted.result())
                    require_weight(total, batch)
                if self.speaks:
                    part.append((loss, weight))
                scale = weight / total * (joined.divided_by if joined else 1)
                if number < last:
                    loss.backward(loss.new_tensor(scale))
                else:
                    self.context.watch.at(f"in the exchange of step {batch.step}")
                    if joined:
                        joined.begin()
                    self.figures.backward(loss, scale, part, self.times_before())
            self.passed(micro, total)
        return total

    def _loss(self, micro: MicroBatch, weight: float) -> Tensor:
        self.participation.counts = micro.count > 0
        if weight == 0:
            # Zero times the loss would not do: a mean over nothing is not a number.
            with self.objective.precision():
                return nothing(self.objective.forward(self.forward, micro))
        return self.objective(self.forward, micro)

    def count_later(self, weights: list[float]) -> Pending | None:
        """What the global batch counts for, where that has to be asked."""
        if self.task.weight is None:
            return None
        return self.context.gather_later([sum(weights) if self.speaks else 0.0])

    def times_before(self) -> tuple[float, float, float]:
        """Seconds of the step before: computing, exchange, data."""
        return (0.0, 0.0, 0.0) if self._before is None else self._before.seconds()

    def _norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of the whole gradient, each part of which counts once."""
        names: dict[Tensor, str] = {value: name for name, value in self.model.named_parameters()}
        squares = [
            local(value.grad).double().square().sum()
            for value in parameters
            if value.grad is not None and self.layouts[names[value]].owner
        ]
        own = torch.stack(squares).sum().item() if squares else 0.0
        return torch.tensor(self.context.sum([own])[0]).sqrt()

    # --- the rest of the contract ---------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Evaluation:
        """Loss and metrics on this rank's share.

        Ranks without samples run their stand-in: a batch norm without running statistics takes
        those of the global batch here too.
        """
        if self.model.training:
            self.model.eval()
        self.participation.counts = batch.micro_batches[0].count > 0
        found = self.objective.evaluate(self.model, batch)
        return found if self.speaks else Evaluation(0.0, dict.fromkeys(found.sums, 0.0))

    @property
    def training(self) -> Training:
        """All that has state here."""
        return Training(
            self.model, self.layouts, self.update.optimizer, self.update.scheduler,
            more=self.average.held() if self.average else Held(),
        )  # fmt: skip

    def restore(self, source: Source) -> None:
        """Take up a saved state; an average that it has not begins anew."""
        super().restore(source)
        if self.average is not None:
            self.average.restored(source)

    def check_replicas(self) -> None:
        """Compare, bit by bit, what several ranks hold of the same.

        Raises:
            ReplicaError: naming the first tensor that differs and the ranks.
        """
        state = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        own: dict[str, tuple[int, int]] = {}
        for name, value in state.items():
            layout = self.layouts.get(name, Layout.whole(value))
            place = zlib.crc32(repr((layout.dim, layout.ranges)).encode())
            own[name] = (place, fingerprints([local(value)])[0])
        order = list(self.names) or list(own)
        rows = self.context.gather_integers(
            [number for name in order for number in own.get(name, (-1, 0))]
        )
        for index, name in enumerate(order):
            first: dict[int, tuple[int, int]] = {}
            for rank, row in enumerate(rows):
                place, content = row[2 * index : 2 * index + 2]
                seen, other = first.setdefault(place, (content, rank))
                if content != seen:
                    raise ReplicaError(self._differs(name, state.get(name), rank, other))

    @property
    def names(self) -> Iterable[str]:
        """Names of all that some rank holds, where this one does not know them by itself."""
        return ()

    def _differs(self, name: str, value: Any, rank: int, other: int) -> str:
        kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
        return (
            f"{kind} {name!r} of rank {rank} is no longer that of rank {other}: the model changes "
            "it by something that differs between workers (its own samples, random numbers, the "
            "clock), or a step left it without gradient on some"
        )

    def close(self) -> None:
        """Take off the model what was put on it."""
        self.open.close()
        self.replication, self.forward = None, self.model


@dataclass
class Marks:
    """Times of one step on the device: begin, last local gradient, end of exchange, end."""

    clock: Stopwatch
    data: float
    start: Any = None
    ready: Any = None
    exchanged: Any = None
    stop: Any = None
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.start = self.clock.mark()

    def seconds(self) -> tuple[float, float, float]:
        """Seconds of computing, of exchange that computing did not hide, and for data."""
        exposed = self.clock.between(self.ready, self.exchanged) + self.waited
        return self.clock.between(self.start, self.stop) - exposed, exposed, self.data


def require_weight(total: float, batch: Batch) -> None:
    """Refuse a batch that counts for nothing.

    Raises:
        ModelError: no mean exists.
    """
    if not total > 0:
        raise ModelError(
            f"the weights of all samples of step {batch.step} add up to {total}: a mean over "
            "them does not exist; leave such samples out or give them a weight"
        )
