"""What a coordinator says of pushes that cannot count, and of samples that spoil one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wagontrain.servers.commands import Note
from wagontrain.servers.messages import Done, Lease
from wagontrain.servers.roster import Held


def what_is_wrong(message: Done, held: Sequence[Held]) -> str:
    """Why a push to L-BFGS cannot count; empty where it can.

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


def spoiled(held: Held, reason: str) -> Note:
    """A worker could not do what a lease is of: for the run's events."""
    fields = {"worker": held.worker, "lease": held.lease.number, "of": _place_of(held.lease)}
    return Note("spoiled", {**fields, "reason": reason})


def spoiled_twice(held: Held, reason: str) -> str:
    """Why training ends: another worker could not do it before."""
    return (
        f"{_place_of(held.lease)}: {reason} on worker {held.worker}, after worker "
        f"{held.work.spoiled_by} had failed on them, too; lower the learning rate or look at "
        "these samples"
    )


def no_mean(step: int, weight: float) -> str:
    """Why training ends: the weights of a step's samples do not add up to a positive number."""
    return (
        f"the weights of all samples of step {step} add up to {weight:g}: a mean over them does "
        "not exist; leave such samples out or give them a weight"
    )


def _place_of(lease: Lease) -> str:
    """Which samples a lease is of."""
    samples = f"samples {lease.start} to {lease.stop - 1}"
    if lease.purpose == "validate":
        return f"validation after epoch {lease.epoch}, {samples} of its data"
    share = f" (share {lease.share} of {lease.shares})" if lease.shares > 1 else ""
    return f"step {lease.step}, {samples} of the order of epoch {lease.epoch}{share}"
