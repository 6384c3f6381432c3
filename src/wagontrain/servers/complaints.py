"""Pushes to L-BFGS that cannot count, and samples that spoil one, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wagontrain.servers.messages import Done, Lease
from wagontrain.servers.roster import Held


def what_is_wrong(message: Done, held: Sequence[Held]) -> str:
    """Why a push cannot count; empty where it can.

    Args:
        message: what its worker says of it.
        held: those of its leases that are its worker's.
    """
    training = [each for each in held if each.work.purpose == "train"]
    if not training or len(training) < len(message.leases):
        return "it is of leases that are not its worker's"
    if any(each.lease.version != message.fetched for each in held):
        return f"it was taken at version {message.fetched}, which is not that of its leases"
    if not (math.isfinite(message.loss) and 0 <= message.weight < math.inf):
        return f"its loss is {message.loss}, its weight {message.weight}"
    return ""


def place_of(lease: Lease) -> str:
    """Which samples a lease is of."""
    samples = f"samples {lease.start} to {lease.stop - 1}"
    if lease.purpose == "validate":
        return f"validation after epoch {lease.epoch}, {samples} of its data"
    return f"step {lease.step}, {samples} of the order of epoch {lease.epoch}"
