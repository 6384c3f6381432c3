"""Where a job is coordinated, and on what terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wagontrain.events import Events
from wagontrain.folder import RunFolder
from wagontrain.plan import Plan
from wagontrain.servers.leases import Course
from wagontrain.servers.wire import Listener
from wagontrain.state import Source
from wagontrain.task import Task


@dataclass(frozen=True)
class Terms:
    """On what terms processes take part.

    Args:
        fingerprint: of the task.
        description: of the job, for those who want to join: plain data.
        workers: how many are planned.
        patience: seconds of silence after which a worker is given up.
        start: seconds to wait for shards and for a first worker.
        elsewhere: how many shards are on hosts that offer themselves, see `hosts`.
    """

    fingerprint: str = ""
    description: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    patience: float = 30.0
    start: float = 300.0
    elsewhere: int = 0


@dataclass(frozen=True)
class Site:
    """Where a job is coordinated.

    Args:
        listener: where workers and shards speak to the coordinator.
        folder: of the run.
        events: who takes what happens.
        terms: on what terms processes take part.
        workers: how many are started.
        steps: updates after which to stop, if before the last epoch's end.
        source: of the state to go on from.
        first_step: updates to leave out at the beginning: to compare a stretch of training.
        plan: why it is trained so, where that was decided before.
    """

    listener: Listener
    folder: RunFolder
    events: Events
    terms: Terms
    workers: int
    steps: int | None = None
    source: Source | None = None
    first_step: int = 0
    plan: Plan | None = None

    def course(self, task: Task, first_step: int) -> Course:
        """What there is to train, from a step on."""
        validation = 0 if task.validation is None else len(task.validation)  # type: ignore[arg-type]
        return Course(
            task.samples, task.batch_size, task.epochs, self.steps, validation,
            min(task.batch_size, max(1, validation)), first_step,
        )  # fmt: skip
