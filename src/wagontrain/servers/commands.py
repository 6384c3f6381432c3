"""What the decisions of `descent` ask the coordinator to do, in the order in which they stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wagontrain.servers.leases import Reached
from wagontrain.servers.messages import Lease


@dataclass(frozen=True)
class Give:
    """Send a lease to a worker: the answer to what it asked."""

    worker: int
    lease: Lease


@dataclass(frozen=True)
class Apply:
    """One update of all shards.

    Args:
        version: of the parameters afterwards.
        pushes: (worker, sequence), in the order in which they are to be added.
        divide: what their sum is to be divided by: the weight of the samples.
        staleness: updates that the oldest of the gradients did not know of.
        step, epoch: of the batch the samples are of; of the first one if they are of several.
        samples: how many they are.
        loss: mean over them, weighted.
    """

    version: int
    pushes: tuple[tuple[int, int], ...]
    divide: float
    staleness: int
    step: int
    epoch: int
    samples: int
    loss: float


@dataclass(frozen=True)
class Forget:
    """Gradients put aside that will not be applied: of a worker, these or all."""

    worker: int
    sequences: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Keep:
    """A snapshot after the updates so far.

    Args:
        number: of the snapshot.
        epoch: that has ended, or in which the limit on steps was met.
        version: of the parameters in it.
        reached: to take training up from there.
        final: it is the state that training ends with.
    """

    number: int
    epoch: int
    version: int
    reached: Reached
    final: bool = False


@dataclass(frozen=True)
class Drop:
    """No lease needs the snapshot any more. Who is still saving it holds it until that is done."""

    snapshot: int


@dataclass(frozen=True)
class Validated:
    """Weighted means over all validation samples, for a snapshot; `weight` is their sum."""

    epoch: int
    snapshot: int
    values: dict[str, float]
    weight: float


@dataclass(frozen=True)
class Note:
    """Something for the run's events, as plain data.

    Kinds: "dropped" (a push that is not applied), "lost" (a worker and its leases), "spoiled",
    "again" (a lease given once more), "mislaid" (pushes that a shard has lost).
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finish:
    """Everything is applied and validated."""


@dataclass(frozen=True)
class Fail:
    """Training cannot go on."""

    reason: str


Command = Give | Apply | Forget | Keep | Drop | Validated | Note | Finish | Fail
