"""A worker that computes portions of a batch, whose gradients add up to that of the batch."""

from __future__ import annotations

from wagontrain.servers.messages import Lease
from wagontrain.servers.work import Habits, Worker

_NEVER = 1 << 62


def habits(push_every: int) -> Habits:
    """One fetch for each evaluation; the next portion is asked for when this one is done."""
    return Habits(push_every, fetch_every=_NEVER, together=True, ahead=False)


class PortionWorker(Worker):
    """One worker at work on portions."""

    def _train(self, lease: Lease) -> None:
        """Gradients at other parameters, or of a portion that others have too, do not mix."""
        collected = self._collected
        if collected.leases and (lease.alone or lease.version != collected.fetched):
            self._flush()
        super()._train(lease)
        if lease.alone:
            self._flush()

    def _fill(self) -> None:
        """What portions add up to is a sum, and counts as that."""
