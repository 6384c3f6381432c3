"""The contract of strategies whose workers come and go."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import torch

from wagontrain.errors import UsageError
from wagontrain.servers.client import Client
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.record import Record
from wagontrain.servers.site import Site
from wagontrain.strategy import Strategy
from wagontrain.task import Task


class Workman(Protocol):
    """Something that works until it is told to stop."""

    def run(self) -> None:
        """Work."""


class Crewed(Strategy):
    """A strategy whose workers are no fixed group: they come, go, and are replaced."""

    crewed: ClassVar[bool] = True

    @property
    @abstractmethod
    def shards(self) -> int:
        """How many server processes it needs."""

    @property
    @abstractmethod
    def elsewhere(self) -> bool:
        """Whether they are on hosts of their own, that others start: see `servers.hosts`."""

    @abstractmethod
    def coordinator(self, task: Task, site: Site) -> tuple[Coordinator, Record]:
        """Who decides, and who keeps what happens. Called in the launching process."""

    @abstractmethod
    def worker(self, task: Task, client: Client, device: torch.device) -> Workman:
        """One worker. Called in every worker process."""


def require_leasable(task: Task, name: str) -> None:
    """Refuse what only ranks that make every step together can honour.

    Args:
        task: to be trained.
        name: of the strategy.

    Raises:
        UsageError: says what, and why.
    """
    if task.is_stream:
        raise UsageError(
            f"{name} hands out samples by their places, again where a worker is lost, and a stream "
            "has none: give a map-style dataset, or use data-parallel"
        )
    if task.ema is not None:
        raise UsageError(
            f"{name} keeps no moving average of the weights: leave Task.ema out, or use "
            "data-parallel"
        )
    if task.callbacks:
        raise UsageError(
            f"{name} has no ranks that see every step, for its workers come and go: leave "
            "Task.callbacks out, or use data-parallel"
        )
