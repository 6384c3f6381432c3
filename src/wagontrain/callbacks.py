"""What a user's own code is told while training goes on, and how it ends a training early.

Callbacks are called on every rank with the same values, so that they decide alike. A wish to stop
is agreed on all the same: what one rank wishes, all do, after the same step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from wagontrain.errors import ModelError, TaskError, WagontrainError
from wagontrain.strategy import StepReport
from wagontrain.task import Task, origin
from wagontrain.transport import Context


class Callback:
    """Told what happens; to be subclassed, each method as needed.

    Every rank has its own, and all are called at the same places. A method that returns a text
    ends the training, with that as the reason.
    """

    def check(self, task: Task) -> None:
        """Refuse a task that this is of no use for, before anything is started: TaskError."""

    def on_start(self, run: Any) -> None:
        """Training is about to begin; `run` is the `wagontrain.Run`. What was kept is forgotten."""

    def on_step(self, report: StepReport) -> str | None:
        """A step was made. Ranks then agree whether to stop, which takes a small message."""
        return None

    def on_validation(self, epoch: int, values: Mapping[str, float]) -> str | None:
        """Loss and metrics over the validation data are known; the same on every rank."""
        return None

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Training is over; the summary is about to be written."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of this: plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; called after `on_start`."""


class EarlyStopping(Callback):
    """Stop when a metric of the validation data has not become better for a while.

    Args:
        metric: its name: "loss", or one of Task.metrics.
        patience: validations in a row that may be no better than the best one.
        mode: whether smaller ("min") or larger ("max") is better.
        least: by how much it has to be better to count.
    """

    def __init__(
        self,
        metric: str = "loss",
        patience: int = 3,
        mode: Literal["min", "max"] = "min",
        least: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise TaskError(f"EarlyStopping: mode is {mode!r}: give 'min' or 'max'")
        if patience < 1 or not least >= 0:
            raise TaskError(
                f"EarlyStopping: patience is {patience} and least is {least}: give at least 1 and 0"
            )
        self.metric, self.patience, self.mode, self.least = metric, patience, mode, least
        self.best: float | None = None
        self.since = 0

    def check(self, task: Task) -> None:
        """Refuse a task without validation data or without the metric."""
        if task.validation is None:
            raise TaskError("EarlyStopping looks at validation data: give Task.validation some")
        known = ["loss", *task.metrics]
        if self.metric not in known:
            raise TaskError(
                f"EarlyStopping looks at {self.metric!r}, which is no metric of the task: give one "
                f"of {', '.join(known)}"
            )

    def on_start(self, run: Any) -> None:
        """Forget an earlier run."""
        self.best, self.since = None, 0

    def on_validation(self, epoch: int, values: Mapping[str, float]) -> str | None:
        """Count how long it has not become better."""
        value = values[self.metric]
        sign = 1.0 if self.mode == "min" else -1.0
        if not math.isnan(value) and (
            self.best is None or sign * value < sign * self.best - self.least
        ):
            self.best, self.since = value, 0
            return None
        self.since += 1
        if self.since < self.patience:
            return None
        best = "" if self.best is None else f" than {self.best:.6g}"
        return f"{self.metric} has not become better{best} in {self.since} validations"

    def state_dict(self) -> dict[str, Any]:
        """The best value, and how long ago it was."""
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.best, self.since = state["best"], state["since"]


class Callbacks:
    """A task's callbacks on one rank.

    Args:
        each: the callbacks.
        context: this rank's place in the job.

    `every_step` says whether one of them wants to be told of every step.
    """

    def __init__(self, each: Sequence[Callback], context: Context) -> None:
        self._each = list(each)
        self._context = context
        self.every_step = any(type(one).on_step is not Callback.on_step for one in each)

    def start(self, run: Any) -> None:
        """Training is about to begin."""
        self._call("on_start", run)

    def step(self, report: StepReport) -> str:
        """A step was made; returns why to stop, if some rank wants to."""
        wish = self._call("on_step", report)
        if not any(row[0] for row in self._context.gather([float(bool(wish))])):
            return ""
        return self._agreed(wish)

    def validation(self, epoch: int, values: Mapping[str, float]) -> str:
        """Validation is over; returns why to stop, if some rank wants to."""
        if not self._each:
            return ""
        return self._agreed(self._call("on_validation", epoch, dict(values)))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Training is over."""
        self._call("on_end", summary)

    def state(self) -> list[dict[str, Any]]:
        """Of all of them, for a checkpoint."""
        return [{"kind": type(one).__name__, "state": one.state_dict()} for one in self._each]

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Give each what a checkpoint holds of the first of its class that is left."""
        left = [(each["kind"], each["state"]) for each in saved]
        for one in self._each:
            kinds = [kind for kind, _ in left]
            if type(one).__name__ in kinds:
                one.load_state_dict(left.pop(kinds.index(type(one).__name__))[1])

    def _agreed(self, wish: str) -> str:
        return next(filter(None, self._context.gather_text(wish)), "")

    def _call(self, name: str, *arguments: Any) -> str:
        wishes = []
        for one in self._each:
            try:
                wishes.append(getattr(one, name)(*arguments))
            except WagontrainError:
                raise
            except Exception as error:  # whatever the user's callback raises is theirs to read
                raise ModelError(f"{type(one).__name__}.{name} failed: {origin(error)}") from error
        return next((str(wish) for wish in wishes if wish), "")
