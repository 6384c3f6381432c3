"""States of snapshots on their way to the coordinator, which saves them when they are whole."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from wagontrain.errors import TrainingError, WorkerError
from wagontrain.servers.commands import Keep
from wagontrain.servers.contents import Contents
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.observing import Observer

_TRIES = 5
"""States in a row that shards may not have when they are asked for them."""


@dataclass
class _Pulling:
    """A snapshot whose state is on its way, since when, and whether nobody else needs it."""

    keep: Keep
    since: float
    parts: dict[int, Contents] = field(default_factory=dict)
    dropped: bool = False


class States:
    """Those that were asked for.

    Args:
        fleet: the shards, each of which has a part of them.
        observer: takes those that are whole.
    """

    def __init__(self, fleet: Fleet, observer: Observer) -> None:
        self.fleet = fleet
        self.observer = observer
        self._pulling: dict[int, _Pulling] = {}
        self._in_vain = 0

    def __len__(self) -> int:
        return len(self._pulling)

    def ask(self, keep: Keep) -> None:
        """Ask all shards for their part of a snapshot."""
        self._pulling[keep.number] = _Pulling(keep, time.monotonic())
        self.fleet.pull_state(keep.number)

    def take(self, snapshot: int | None, shard: int, part: Contents) -> None:
        """A shard's part; what is asked for no longer is thrown away."""
        pulling = None if snapshot is None else self._pulling.get(snapshot)
        if pulling is None:
            return
        pulling.parts[shard] = part
        if len(pulling.parts) < len(self.fleet.shards):
            return
        del self._pulling[pulling.keep.number]
        self._in_vain = 0
        self.observer.state(pulling.keep, [pulling.parts[each] for each in sorted(pulling.parts)])
        if pulling.dropped:
            self.fleet.release(pulling.keep.number)

    def drop(self, snapshot: int) -> None:
        """Nobody else needs it: the shards let go of it, once its state is here."""
        if snapshot in self._pulling:
            self._pulling[snapshot].dropped = True
        else:
            self.fleet.release(snapshot)

    def give_up(self) -> list[Keep]:
        """Shards may not have what was asked for: others have to be taken; says of which."""
        given_up = [pulling.keep for pulling in self._pulling.values()]
        self._pulling.clear()
        for keep in given_up:
            self.fleet.release(keep.number)
        return given_up

    def refused(self, snapshot: int, reason: str) -> bool:
        """A shard has not its part of a snapshot; whether anybody still needs it.

        Raises:
            TrainingError: that happens with whatever is taken in its place, too.
        """
        if snapshot not in self._pulling:
            return False
        self._in_vain += 1
        if self._in_vain >= _TRIES:
            raise TrainingError(f"server {reason}, for the {_TRIES}th time in a row")
        return True

    def require(self, seconds: float) -> None:
        """Make sure that none has been on its way for longer.

        Raises:
            WorkerError: names a shard that has not given its part.
        """
        for pulling in self._pulling.values():
            if time.monotonic() - pulling.since > seconds:
                silent = min(set(range(len(self.fleet.shards))) - set(pulling.parts))
                raise WorkerError(
                    f"server shard {silent} did not give its state within {seconds:.0f} s: resume "
                    "from the run's last checkpoint"
                )
