"""What the decisions of `descent` ask the coordinator to do, in the order in which they stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wagontrain.servers.leases import Reached
from wagontrain.servers.messages import Lease
from wagontrain.servers.operations import Operation


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
class Operate:
    """One commit of operations on vectors, whose numbers all shards tell.

    Args:
        version: of the parameters afterwards.
        operations: in their order.
        pushes: (worker, sequence) of the gradients that come with it, in the order of adding.
        divide: what their sum is to be divided by.
    """

    version: int
    operations: tuple[Operation, ...]
    pushes: tuple[tuple[int, int], ...] = ()
    divide: float = 1.0


@dataclass(frozen=True)
class Stepped:
    """A step that took several commits is made.

    Args:
        version: steps so far.
        epoch, samples: of its batch.
        loss: mean over the batch before the step, weighted.
        divide: what its samples weigh.
        more: further figures for the run's events.
    """

    version: int
    epoch: int
    samples: int
    loss: float
    divide: float
    more: dict[str, Any] = field(default_factory=dict)
    staleness: int = 0


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
        version: steps that the state in it has, however many commits made them.
        reached: to take training up from there.
        final: it is the state that training ends with.
        memory: what the decisions keep beside that, for whoever puts the state together.
    """

    number: int
    epoch: int
    version: int
    reached: Reached
    final: bool = False
    memory: Any = None


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
    "again" (a lease given once more), "mislaid" (pushes that a shard has lost), "too_far" (a trial
    step where the objective is not finite).
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


Command = Give | Apply | Operate | Stepped | Forget | Keep | Drop | Validated | Note | Finish | Fail
