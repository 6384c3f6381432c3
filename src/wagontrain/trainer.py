"""A run: one task, one strategy, one rank's place in the job; and the loop over it.

`train` is the whole loop. Whoever wants a loop of their own drives the same `Run`.
"""

from __future__ import annotations

import platform
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wagontrain import checkpoint
from wagontrain.batches import Batch, Batches
from wagontrain.building import peak_memory
from wagontrain.callbacks import Callbacks
from wagontrain.errors import LossError, ModelError, UsageError
from wagontrain.events import Events, Sink
from wagontrain.folder import RunFolder
from wagontrain.identity import order_of, require_same_data, require_same_order
from wagontrain.objective import not_finite
from wagontrain.plan import Plan
from wagontrain.signs import Signs
from wagontrain.state import Held
from wagontrain.stragglers import RankTimes
from wagontrain.strategy import StepReport, StepTimes, Strategy
from wagontrain.task import Task
from wagontrain.transport import Context
from wagontrain.version import __version__

STEPS_BETWEEN_SAVES = 20


def train(run: Run) -> dict[str, Any]:
    """Train to the end, with a validation after every epoch; returns the summary."""
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            run.step(batch)
        run.validate()
        if run.due(epoch):
            run.check_replicas()
            run.save()
        if run.stopped:
            break
    return run.finish()


class Run:
    """One rank's side of a training run.

    Args:
        task: what to train.
        strategy: how to distribute it.
        context: this rank's place in the job.
        folder: where rank 0 keeps the run's files; None keeps nothing.
        sinks: who else takes events on rank 0.
        max_steps: stop after so many steps even if epochs are left.
        resume: a checkpoint, or the directory of a run, to go on from.
        plan: why it is distributed so, where that was decided before.

    Raises:
        UsageError: the strategy refuses the task or the world, or the checkpoint does not fit.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        context: Context,
        folder: RunFolder | None = None,
        sinks: Sequence[Sink] = (),
        max_steps: int | None = None,
        resume: Path | None = None,
        plan: Plan | None = None,
    ) -> None:
        if max_steps is not None and max_steps < 1:
            raise UsageError(f"{max_steps} steps were asked for: give at least 1")
        strategy.check(task, context.world)
        self.folder = folder if context.world.rank == 0 else None
        self.path = context.gather_text(str(self.folder.path.resolve()) if self.folder else "")[0]
        if self.path:
            context.watch.stacks = Path(self.path) / "stacks"
        strategy, found = strategy.resolved(task, context)
        self.plan = found or plan
        with context.watch.doing("setting up", patient=True):
            self._set_up(task, strategy, context, max_steps)
            self.callbacks.start(self)
            if resume is not None:
                self._resume(resume)
            self._announce(sinks)

    def _set_up(
        self,
        task: Task,
        strategy: Strategy,
        context: Context,
        max_steps: int | None,
    ) -> None:
        self.task = task
        self.strategy = strategy
        self.context = context
        self.runner = strategy.setup(task, context)
        if task.ema is not None and self.runner.average is None:
            raise UsageError(
                f"{strategy.name} keeps no moving average of the weights: leave Task.ema out, or "
                "use a strategy whose workers make every update together, such as data-parallel"
            )
        device, cut = context.world.device, self.runner.cut
        self.training = Batches.of_training(task, device, cut)
        self.validation = Batches.of_validation(task, device, cut)
        self._closed = False
        require_same_data(context, {"train": self.training, "validation": self.validation})
        self.steps = min(task.epochs * task.steps_per_epoch, max_steps or sys.maxsize)
        self.step_count = self.first_step = 0
        self.values: dict[str, float] = {}
        self.callbacks = Callbacks(task.callbacks, context)
        self.stopped = ""
        places = context.gather_text(f"{socket.gethostname()} {device}")
        self._places = [place.split(" ") for place in places]
        self._hosts = [host for host, _ in self._places]
        if self.plan is not None:
            self.plan.require(context.world.size, len(set(self._hosts)), device.type)
        self._data_seconds = 0.0
        self._training_seconds = 0.0
        self._samples = self._sent = 0
        self._epoch_loss = _Mean()
        self._times = RankTimes(self._hosts)
        self._began = time.perf_counter()

    @property
    def model(self) -> nn.Module:
        """The user's own module, as trained so far."""
        return self.runner.model

    def epochs(self) -> range:
        """Numbers of the epochs that are left, the one under way included."""
        per_epoch = self.task.steps_per_epoch
        return range(self.step_count // per_epoch, -(-self.steps // per_epoch))

    def batches(self, epoch: int | None = None) -> Iterator[Batch]:
        """This rank's batches that are left: of one epoch, or of all."""
        if epoch is None:
            for number in self.epochs():
                yield from self.batches(number)
            return
        if self.stopped:
            return
        start = epoch * self.task.steps_per_epoch
        loaded = self.training.epoch(epoch, max(0, self.step_count - start))
        self._epoch_loss = _Mean()
        while not self.stopped:
            began = time.perf_counter()
            with self.context.watch.doing(f"reading the data of step {self.step_count}"):
                batch = next(loaded, None)
            self._data_seconds = time.perf_counter() - began
            if batch is None or batch.step >= self.steps:
                return
            yield batch

    def step(self, batch: Batch) -> StepReport:
        """One optimizer step; returns what it was.

        Raises:
            TrainingError: the model failed, or the loss is not finite.
        """
        self._require_open()
        with self.context.watch.doing(f"in step {batch.step}"):
            report = self.runner.step(batch)
        self.context.watch.at(f"after step {batch.step}")
        self.step_count = batch.step + 1
        self._samples += report.samples
        self._sent += report.sent or 0
        self._training_seconds += report.seconds + self._data_seconds
        if report.loss is not None:
            self._epoch_loss.add(report.loss, report.covers or report.samples)
        self._events.send(
            "step",
            step=report.step,
            epoch=report.epoch,
            samples=report.samples,
            loss=report.loss,
            seconds=report.seconds,
            data_seconds=self._data_seconds,
            sent=report.sent,
            **({} if report.staleness is None else {"staleness": report.staleness}),
            **({} if report.covers is None else {"covers": report.covers}),
        )
        if report.before is not None:
            self._note_times(report.before, report.step - 1)
        if self.step_count == self.first_step + 1:
            self._compare_replicas()
        if self.callbacks.every_step:
            self._stop(self.callbacks.step(report))
        return report

    def _stop(self, reason: str) -> None:
        """End training after this step, if there is a reason; all ranks have the same."""
        self.context.sent.lap()  # what was agreed on is not what a step sends
        if reason and not self.stopped:
            self.stopped = reason
            self._events.send("stopped", step=self.step_count, reason=reason)

    def _note_times(self, times: StepTimes, step: int) -> None:
        self._times.add(times)
        each = times.each
        self._events.send(
            "times", step=step, compute=each.compute, exchange=each.exchange,
            waiting=each.waiting, data=each.data,
        )  # fmt: skip

    def _settle(self, whole: bool = False) -> None:
        """Have the ranks come to one state before somebody looks at it."""
        with self.context.watch.doing("coming to one state with the others"):
            self.runner.settle(whole)
        step = self.step_count - 1
        for settled in self.runner.news():
            self._epoch_loss.add(settled.loss, settled.samples)
            epoch = step // self.task.steps_per_epoch
            fields = {"loss": settled.loss, "covers": settled.samples}
            self._events.send("loss", step=step, epoch=epoch, **fields)
            if settled.times is not None:
                self._note_times(settled.times, step)
        self.context.sent.lap()  # not what a step sends

    def validate(self) -> dict[str, float]:
        """Loss and metrics over the validation data, each sample counted once on some rank."""
        if self.validation is None:
            return {}
        self._require_open()
        self._settle()
        with self.context.watch.doing("in validation"), self.runner.averaged():
            self.values = self._measure(self.validation)
        self.context.sent.lap()  # not what a step sends
        epoch = max(0, self.step_count - 1) // self.task.steps_per_epoch
        self._events.send("validation", epoch=epoch, step=self.step_count, values=self.values)
        self._stop(self.callbacks.validation(epoch, self.values))
        return self.values

    def _measure(self, validation: Batches) -> dict[str, float]:
        names = ["loss", *self.task.metrics]
        weight, sums = 0.0, dict.fromkeys(names, 0.0)
        for batch in validation.epoch(0):
            evaluation = self.runner.evaluate(batch)
            weight += evaluation.weight
            for name, value in evaluation.sums.items():
                sums[name] += value
        total, *totals = self.context.sum([weight, *(sums[name] for name in names)])
        if total == 0:
            raise ModelError("Task.weight is 0 for all validation data: a mean does not exist")
        return {name: value / total for name, value in zip(names, totals, strict=True)}

    def due(self, epoch: int) -> bool:
        """Whether to check and save after this epoch: always after the last one, or a stop.

        Epochs of a few steps are taken together; every rank has to decide alike, so it goes by
        steps and not by the clock.
        """
        every = max(1, STEPS_BETWEEN_SAVES // self.task.steps_per_epoch)
        return bool(self.stopped) or self.step_count >= self.steps or (epoch + 1) % every == 0

    def check_replicas(self) -> None:
        """Raise ReplicaError where tensors that must be equal on several ranks are not."""
        self._settle()
        self._compare_replicas()

    def _compare_replicas(self) -> None:
        with self.context.watch.doing("comparing its copy of the weights"):
            self.runner.check_replicas()
        self.context.sent.lap()  # not what a step sends

    def save(self, folder: str | Path | None = None) -> Path | None:
        """Write a checkpoint that any strategy can resume from; every rank has to call this.

        Args:
            folder: where `step-N` is put; the run directory's own where not given.

        Returns:
            The checkpoint; None where there is no folder to keep it in.

        Raises:
            LossError: weights or optimizer state are not finite; nothing is written.
        """
        self._require_open()
        self._settle(whole=True)
        with self.context.watch.doing("writing the checkpoint"):
            held = self.runner.training.held()
            self._require_finite(held)
            if folder is None and not self.path:
                return None
            place = Path(folder) if folder is not None else Path(self.path) / "checkpoints"
            notes: dict[str, Any] = {"strategy": self.strategy.name, "data": order_of(self.task)}
            notes["callbacks"] = self.callbacks.state()
            saved = checkpoint.save(self.context, held, place, self.step_count, notes)
        self.context.sent.refresh()
        self.context.sent.lap()  # not what a step sends
        self._events.send("checkpoint", step=self.step_count)
        return saved.path

    def _require_finite(self, held: Held) -> None:
        names = self.context.gather_text(not_finite(held.tensors) or "")
        spoiled = next(filter(None, names), None)
        if spoiled:
            raise LossError(
                f"{spoiled.partition('.')[2]!r} is not finite after step {self.step_count - 1}, "
                "though the loss was: the gradient is not. Nothing was saved over the weights "
                "from before; clip the gradient, or avoid operations such as √0 whose gradient is "
                "infinite"
            )

    def _resume(self, place: Path) -> None:
        """Go on where a checkpoint was written.

        Raises:
            UsageError: there is none, it is damaged, of another model or of other data.
        """
        source = checkpoint.restored(self.context, place)
        require_same_order(source.plain["data"], self.task)
        self.runner.restore(source)
        self.callbacks.restore(source.plain.get("callbacks", ()))
        self.step_count = self.first_step = int(source.plain["steps"])
        if self.step_count >= self.steps:
            raise UsageError(
                f"the checkpoint has {self.step_count} steps, and {self.steps} were asked for: "
                "give more --epochs or --steps"
            )

    def finish(self) -> dict[str, Any]:
        """End the run: gather, write and return the summary, and let go of everything."""
        self._require_open()
        self._settle()
        with self.context.watch.doing("ending"):
            summary = self._summary()
            self.callbacks.end(summary)
        if self.folder is not None:
            saved = self.folder.path / "checkpoints" / f"step-{self.step_count}"
            if saved.exists():
                checkpoint.export(checkpoint.Checkpoint(saved), self.folder.weights)
            self.folder.write_summary(summary)
        self._events.send("end", summary=summary)
        self.close()
        return summary

    def close(self) -> None:
        """Let go of everything without a summary."""
        self._closed = True
        self._events.close()
        self.runner.close()
        self.context.watch.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            self._events.send("failed", message=f"{kind.__name__}: {details[0]}")
            self._events.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this run has ended: connect again for another")

    def _announce(self, sinks: Sequence[Sink]) -> None:
        world = self.context.world
        own = self.folder.sinks() if self.folder else []
        self.context.watch.signs = Signs(Events(own)) if own else None
        self._events = Events([*own, *sinks] if world.rank == 0 else [])
        description = {
            "strategy": self.strategy.name,
            "settings": self.strategy.settings,
            "exact": self.strategy.exact,
            "world_size": world.size,
            "hosts": sorted(set(self._hosts)),
        }
        planned = self.plan.to_json() if self.plan is not None else {}
        if self.folder is not None:
            self.folder.write_plan({**description, **planned})
        self._events.send(
            "start",
            **description,
            device=world.device.type, threads=world.threads, ranks=self._places,
            epochs=self.task.epochs, steps=self.steps, first_step=self.first_step,
            steps_per_epoch=self.task.steps_per_epoch, batch_size=self.task.batch_size,
            samples=self.task.samples, **({"plan": planned} if planned else {}),
        )  # fmt: skip
        self.context.sent.refresh()
        self.context.sent.lap()

    def _summary(self) -> dict[str, Any]:
        sent, peak = self.context.sent.total(), peak_memory(self.context.world.device)
        rows = self.context.gather_integers([-1 if sent is None else sent, peak, self._sent])
        counted = all(row[0] >= 0 for row in rows)
        straggler = self._times.straggler()
        return {
            "strategy": self.strategy.name,
            "settings": self.strategy.settings,
            "exact": self.strategy.exact,
            "world_size": self.context.world.size,
            "hosts": sorted(set(self._hosts)),
            "first_step": self.first_step,
            "steps": self.step_count,
            "samples": self._samples,
            "seconds": time.perf_counter() - self._began,
            "samples_per_second": self._samples / max(self._training_seconds, 1e-9),
            "stopped": self.stopped or None,
            "train_loss": self._epoch_loss.value,
            "validation": self.values,
            "bytes_sent_per_rank": [row[0] for row in rows] if counted else None,
            "bytes_sent_in_steps_per_rank": [row[2] for row in rows] if counted else None,
            "peak_memory_per_rank": [row[1] for row in rows],
            "shares": self.runner.cut.weights,
            "times_per_rank": self._times.summary(),
            "straggler": None if straggler is None else str(straggler),
            "predicted": self.plan.foretold(self.task.batch_size) if self.plan else None,
            "versions": {
                "wagontrain": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


class _Mean:
    """A running mean over samples."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0

    def add(self, value: float, weight: int) -> None:
        self._sum += value * weight
        self._weight += weight

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None
