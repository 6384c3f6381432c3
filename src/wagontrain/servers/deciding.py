"""What a coordinator asks of whoever decides, and what that asks of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from wagontrain.servers.commands import Command, Keep
from wagontrain.servers.messages import Done, Measured, Spoiled


class Decisions(Protocol):
    """What decides: `descent.Descent`, or `minimising.Minimisation`. Events in, commands out."""

    def joined(self, worker: int) -> list[Command]:
        """A worker takes part."""

    def left(self, worker: int) -> list[Command]:
        """A worker is gone."""

    def asked(self, worker: int) -> list[Command]:
        """A worker wants a lease."""

    def done(self, message: Done) -> list[Command]:
        """A gradient lies on all shards."""

    def spoiled(self, message: Spoiled) -> list[Command]:
        """A worker could not give a gradient."""

    def measured(self, message: Measured) -> list[Command]:
        """Sums over validation data."""

    def answered(self, version: int, numbers: tuple[float, ...]) -> list[Command]:
        """What the operations of a commit found out."""

    def mislaid(self) -> list[Command]:
        """A shard was started again without what it had put aside."""

    def retake(self, unsaved: Iterable[Keep] = ()) -> list[Command]:
        """A shard has lost its part of snapshots; `unsaved` were to be saved, and have not been."""

    def staleness(self) -> dict[str, Any]:
        """Of all pushes."""

    def workers(self) -> dict[int, dict[str, Any]]:
        """What each worker has done."""

    def leases(self) -> dict[str, int]:
        """Counts of leases, see `roster.Roster.plain`."""

    def more(self) -> dict[str, Any]:
        """Further figures for the summary."""


class Schedule(Protocol):
    """The optimizer's settings from step to step; `rates.Rates` is one."""

    def now(self) -> tuple[dict[str, Any], ...]:
        """Those of each group of parameters."""

    def advance(self) -> None:
        """A step was made."""
