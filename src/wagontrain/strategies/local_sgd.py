"""Local SGD: every worker trains by itself for H steps; then the weights are averaged.

    x_k := inner optimizer step on worker k's own share of the batch          H times
    x_k := Σ_k w_k x_k                                                         then once

with w_k the part of the samples since the last average that worker k had. With `outer`
"nesterov" the mean is not taken as it is: an outer optimizer moves by it (`fragments.Outer`).

Phases of a step: forward, backward and update on the worker's own share, with its own mean loss,
its own clipping and its own optimizer state, as in the papers; every H-th step the averaging. With
`fragments` the parameters are averaged in parts, at staggered times, each while training goes on.

Whenever others look at the weights (validation, checkpoint, the end), the ranks' mean is taken, so
that there is one state to look at. That is no step of the outer optimizer.

Bytes sent per worker: 2 (N - 1) / N · P in H steps, for P bytes of weights and N workers; nothing
in between. It is relaxed: between averages every worker follows its own samples only.

Source: Stich 2018, "Local SGD Converges Fast and Communicates Little"; Lin et al. 2018, "Don't Use
Large Mini-Batches, Use Local SGD" (post-local SGD: `begin`); Douillard et al. 2023, "DiLoCo", and
2025, "Streaming DiLoCo with overlapping communication" (fragments).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wagontrain.averaging import predict
from wagontrain.averaging.beside import (
    Beside,
    begin_alike,
    counters,
    require_same,
    require_samples,
)
from wagontrain.averaging.fragments import Averaging, Outer
from wagontrain.averaging.tally import Tally
from wagontrain.batches import Batch, Cut, mix
from wagontrain.building import require_room, skeleton
from wagontrain.convergence import Steps, apart
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.layout import Layout
from wagontrain.mesh import World
from wagontrain.objective import Evaluation, Objective, Update, nothing, require_finite
from wagontrain.simulate import Graph
from wagontrain.state import Held, Source, Training
from wagontrain.strategy import Runner, Settled, StepReport, Strategy
from wagontrain.synchronous import Marks, require_weight
from wagontrain.task import Task, trainable
from wagontrain.transport import Context, Stopwatch
from wagontrain.trial import unused_in_trial

_PERIODS = (2, 4, 16, 64)
"""Steps between averages that are weighed."""


@dataclass(frozen=True)
class LocalSGD(Strategy):
    """Settings of local SGD.

    Args:
        steps_between: H, local steps between averages; where not given 16, and 500 with
            "nesterov", as published.
        outer: what becomes of the mean: it is taken as it is, or "nesterov" moves by it.
        outer_lr: of nesterov; where not given 0.7, as published.
        outer_momentum: of nesterov; where not given 0.9, as published.
        fragments: parts in which the parameters are averaged, at times spread over the H steps.
        overlap: local steps taken while an average is under way; where not given none with one
            fragment, and 1 with several.
        begin: steps that are averaged each, before H counts (post-local SGD).
    """

    steps_between: int | None = None
    outer: Literal["mean", "nesterov"] = "mean"
    outer_lr: float | None = None
    outer_momentum: float | None = None
    fragments: int = 1
    overlap: int | None = None
    begin: int = 0

    name: ClassVar[str] = "local-sgd"
    summary: ClassVar[str] = "everybody trains alone, then weights are averaged"

    def __post_init__(self) -> None:
        least = {"steps_between": 1, "fragments": 1, "overlap": 0, "begin": 0}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise UsageError(f"{name} is {value}: give {number} or more")
        if self.fragments > self.period:
            raise UsageError(
                f"{self.fragments} fragments cannot take turns in {self.period} steps: give at "
                "most as many fragments as steps_between"
            )
        if self.delay >= self.period:
            raise UsageError(
                f"overlap is {self.overlap}, but after {self.period} steps the next average "
                "begins: give less than steps_between"
            )
        if self.outer == "mean":
            for name in ("outer_lr", "outer_momentum"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{name} is for outer=nesterov: give that too, or leave it")
            return
        optimizer = self.optimizer
        assert optimizer is not None
        if not 0 < optimizer.lr < math.inf:
            raise UsageError(f"outer_lr is {optimizer.lr}: give a number above 0")
        if not 0 <= optimizer.momentum < 1:
            raise UsageError(f"outer_momentum is {optimizer.momentum}: give 0 or more, below 1")

    @property
    def period(self) -> int:
        """Local steps between averages."""
        if self.steps_between is not None:
            return self.steps_between
        return 500 if self.outer == "nesterov" else 16

    @property
    def delay(self) -> int:
        """Local steps taken while an average is under way."""
        if self.overlap is not None:
            return self.overlap
        return 1 if self.fragments > 1 else 0

    @property
    def optimizer(self) -> Outer | None:
        """The outer optimizer; None where the mean is taken as it is."""
        if self.outer == "mean":
            return None
        return Outer(
            0.7 if self.outer_lr is None else self.outer_lr,
            0.9 if self.outer_momentum is None else self.outer_momentum,
        )

    @property
    def exact(self) -> bool:
        """Never: between averages every worker follows its own samples."""
        return False

    def due(self, step: int) -> int | None:
        """Which fragment is sent after so many steps, if one is.

        They take turns, evenly spread over the H steps; the last one comes with the H-th.
        """
        turn = (step - self.begin) % self.period or self.period
        for index in range(self.fragments):
            if turn == (index + 1) * self.period // self.fragments:
                return index
        return None

    def check(self, task: Task, world: World) -> None:
        """Refuse more workers than samples in a batch, and more fragments than parameters.

        Raises:
            UsageError: one of these.
        """
        if world.size > task.batch_size:
            raise UsageError(
                f"{world.size} workers cannot share a batch of {task.batch_size}: some would "
                f"never have a sample; use at most {task.batch_size} workers or a larger "
                "batch_size"
            )
        if self.fragments > 1 and (model := skeleton(task)) is not None:
            self.check_fragments(model)

    def check_fragments(self, model: nn.Module) -> None:
        """Refuse more fragments than parameters.

        Raises:
            UsageError: some would be empty.
        """
        count = sum(1 for _ in trainable(model))
        if self.fragments > count:
            raise UsageError(
                f"{self.fragments} fragments cannot be made of {count} parameters: give at most "
                f"{count}"
            )

    @classmethod
    def candidates(cls, costs: Costs) -> list[LocalSGD]:
        """Averages after 2, 4, 16 and 64 steps; in four fragments; and as DiLoCo has it."""
        if not 1 < costs.size <= costs.profile.batch_size:
            return []
        found = [cls(steps_between=period) for period in _PERIODS]
        if sum(len(layer.parts) for layer in costs.profile.layers) >= 4:
            found.append(cls(steps_between=16, fragments=4))
        return [*found, cls(outer="nesterov")]

    def step_graph(self, costs: Costs) -> Graph:
        """Local steps, and the averages among them, of one period."""
        return predict.step_graph(costs, self.period, self.fragments, self.due, self.delay)

    def steps_needed(self, costs: Costs) -> Steps:
        """See `wagontrain.convergence`, rare averages."""
        return apart(costs.size, self.period)

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """A whole copy of everything, the average beside it, and what an outer optimizer keeps."""
        return predict.memory(costs, rank, self.fragments, self.optimizer is not None, self.delay)

    def setup(self, task: Task, context: Context) -> Runner:
        """Build the model on every worker, with rank 0's first weights."""
        return LocalRunner(self, task, context)


class LocalRunner(Runner):
    """Local SGD at work on one rank."""

    def __init__(self, strategy: LocalSGD, task: Task, context: Context) -> None:
        require_room(task, context)
        world = context.world
        self.strategy, self.task, self.context = strategy, task, context
        self.cut = Cut(world.rank, world.size)
        self.model = task.build_model().to(world.device)
        strategy.check_fragments(self.model)
        self.objective = Objective(task, world.device)
        self.alone = context.group is None
        if not self.alone:
            unused_in_trial(task, self.objective, self.model)
            require_samples(task, self.objective, self.model, world.size)
            begin_alike(context, self.model)
        self.update = Update(task, self.model)
        self.beside = Beside(context, self.model, self.update.optimizer)
        self.trained = dict(trainable(self.model))
        outer = strategy.optimizer
        self.averaging = Averaging(context, self.trained, strategy.fragments, outer)
        self.averages = not self.alone or outer is not None
        self.clock = Stopwatch(world.device)
        self._forget()
        self.model.train()

    def _forget(self) -> None:
        """Begin to count, with the same state on all ranks."""
        self._marks: Marks | None = None
        self._tally = Tally()
        self._told: Tally | None = None
        self._due: dict[int, int] = {}
        self._news: list[Settled] = []
        self.beside.begin_anew()

    # --- one step -------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepReport:
        """One local step; after every H-th of them the averaging.

        The loss is reported when ranks meet, as the mean over all samples since they last did.

        Raises:
            LossError: this rank's loss is not finite.
            ModelError: the model or the loss failed.
        """
        began = time.perf_counter()
        if not self.model.training:
            self.model.train()
        if self._marks is not None:
            self._tally.add_times(self._marks.seconds())
        self._marks = marks = Marks(self.clock, batch.seconds)
        self.update.begin()
        torch.manual_seed(mix(self.task.seed, "step", batch.step, self.context.world.rank))
        loss, weight = self._passes(batch)
        # A rank without samples has nothing to learn from, but its learning rate goes on.
        self.update.apply()
        self._tally.add_loss(loss, weight, batch.total)
        if not self.alone:
            self.beside.strayed(weight)
        if self.averages:
            self.averaging.took(weight, batch.total)
        marks.ready = self.clock.mark()
        self.context.watch.at(f"in the averaging after step {batch.step}")
        known = self._average(batch.step + 1)
        marks.exchanged = marks.stop = self.clock.mark()
        return StepReport(
            step=batch.step,
            epoch=batch.epoch,
            samples=batch.total,
            loss=known.loss if known else None,
            seconds=time.perf_counter() - began,
            sent=self.context.sent.lap(),
            before=known.times if known else None,
            covers=known.samples if known and known.samples != batch.total else None,
        )

    def _passes(self, batch: Batch) -> tuple[float, float]:
        """Forward and backward on this rank's share: its loss times its weight, and its weight."""
        weights = [self.objective.weight(micro) for micro in batch.micro_batches]
        own = sum(weights)
        if self.alone:
            require_weight(own, batch)
        if own == 0:
            return 0.0, 0.0
        part: list[Tensor] = []
        for micro, weight in zip(batch.micro_batches, weights, strict=True):
            if micro.count == 0:
                continue
            if weight == 0:  # zero times a mean over nothing would not be a number
                with self.objective.precision():
                    loss = nothing(self.objective.forward(self.model, micro))
            else:
                loss = self.objective(self.model, micro)
                part.append(loss.detach().double() * weight)
            loss.backward(loss.new_tensor(weight / own))
        total = float(torch.stack(part).sum())
        # Said by this rank alone, and at once: others have not met it yet, and will not.
        world = self.context.world
        losses = [0.0] * world.size
        losses[world.rank] = total / own
        require_finite(losses, batch, self.cut, self.model, range(world.size))
        return total, own

    # --- averaging ------------------------------------------------------------------------------

    def _average(self, step: int) -> Settled | None:
        """Send and receive what is due after so many steps; returns what became known."""
        if step <= self.strategy.begin:
            known = self._even_out()
            if step == self.strategy.begin:
                self.averaging.begin_anew(momenta=False)
            return known
        known = None
        for index in self.averaging.flying():
            if self._due[index] <= step:
                known = self._receive(index) or known
        index_due = self.strategy.due(step) if self.averages else None
        if index_due is not None:
            known = self._send(index_due, step) or known
        if self.alone:
            told, self._tally = self._tally, Tally()
            known = told.together([told.figures()])
        return known

    def _send(self, index: int, step: int) -> Settled | None:
        figures: list[float] = []
        if index == self.strategy.fragments - 1 and not self.alone:
            figures = self._tally.figures()
            self._told, self._tally = self._tally, Tally()
        self.averaging.send(index, figures, overlapped=self.strategy.delay > 0)
        if self.strategy.delay > 0:
            self._due[index] = step + self.strategy.delay
            return None
        if self.strategy.fragments == 1:
            self.beside.even_out_buffers()
        return self._receive(index)

    def _receive(self, index: int) -> Settled | None:
        rows = self.averaging.receive(index)
        if self._told is None or not rows[0]:
            return None
        told, self._told = self._told, None
        return told.together(rows)

    def _even_out(self) -> Settled | None:
        """Average everything at once; no step of the outer optimizer."""
        rows = self.averaging.even_out(self._tally.figures())
        self.beside.even_out_buffers()
        told, self._tally = self._tally, Tally()
        return told.together(rows) if told.samples else None

    def settle(self, whole: bool = True) -> None:
        """Take the mean of all ranks' weights and buffers; with `whole` of optimizer states, too.

        The optimizers' states stay apart while training, and are averaged for a checkpoint: so
        that a run that is resumed goes on as this one does, and no rank's own state speaks for
        all.
        """
        known = [self._receive(index) for index in self.averaging.flying()]
        if not self.averaging.level:
            known.append(self._even_out())
        self.beside.even_out_buffers()
        if whole:
            self.beside.even_out_optimizer()
        self._news += [settled for settled in known if settled is not None]

    def news(self) -> Sequence[Settled]:
        """Losses and times that ranks told each other in settling."""
        news, self._news = self._news, []
        return news

    # --- the rest of the contract ---------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Evaluation:
        """Loss and metrics on this rank's share."""
        if self.model.training:
            self.model.eval()
        return self.objective.evaluate(self.model, batch)

    @property
    def training(self) -> Training:
        """All that has state here, and the outer optimizer's."""
        first = self.context.world.rank == 0
        layouts = {
            name: Layout.whole(value, owner=first)
            for name, value in self.model.state_dict().items()
        }
        more = Held()
        for name, value in self.averaging.kept().items():
            more.add(name, value, Layout.whole(value, owner=first))
        update = self.update
        return Training(self.model, layouts, update.optimizer, update.scheduler, more=more)

    def restore(self, source: Source) -> None:
        """Take up a saved state; an outer optimizer begins anew where it holds none."""
        self.averaging.begin_anew(anchors=False, momenta=False)
        self.training.restore(source)
        missing = not self.averaging.kept().keys() <= source.shapes().keys()
        self.averaging.begin_anew(anchors=missing, momenta=missing)
        self._forget()

    def check_replicas(self) -> None:
        """Compare what is the same on all ranks: between averages, what is not trained.

        Raises:
            ReplicaError: naming the first tensor that differs and the ranks.
        """
        tensors = self.averaging.kept()
        counting = counters(self.model)
        for name, parameter in self.model.named_parameters():
            if self.averaging.level or name not in self.trained:
                tensors[name] = parameter
        for name, buffer in self.model.named_buffers():
            if self.beside.buffers_even or not (buffer.is_floating_point() or name in counting):
                tensors[name] = buffer
        require_same(self.context, tensors)

    def close(self) -> None:
        """Wait for what is on its way."""
        self.averaging.begin_anew(anchors=False, momenta=False)
