"""What the coordinator tells shards, and what they say to it: see `messages`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from wagontrain.servers.operations import Operation


@dataclass(frozen=True)
class Setup:
    """What a process is to hold: its own shard, or as a mirror another one.

    Args:
        job: plain data, see `job.Job`.
        mirror: where the process listens that every push is passed on to before it is
            acknowledged; "" for none.
        source: where the first state comes from: "" by a `Fill` that follows, "file" from the
            file that was last written, else from the process that listens there, once it has
            `version` commits. With "file", pushes may be missing that were here before: commits
            of them change nothing, and are told of as lost.
        version: commits that have to be in a state from elsewhere.
        attempt: how often the process was told what to hold; `Ready` says which one it has done.
    """

    job: dict[str, Any]
    mirror: str = ""
    source: str = ""
    version: int = 0
    attempt: int = 0
    kind: Literal["setup"] = "setup"


@dataclass(frozen=True)
class Moved:
    """The process that mirrors this shard was started on another host, and listens there now.

    Args:
        mirror: where.
    """

    mirror: str
    kind: Literal["moved"] = "moved"


@dataclass(frozen=True)
class Fill:
    """The state of a shard as of a commit; frames: its values, then what `state` announces.

    A first one has no more than the values and rows of tables. One of a snapshot names it.
    """

    version: int
    shard: int = -1
    state: dict[str, Any] = field(default_factory=dict)
    snapshot: int | None = None
    kind: Literal["fill"] = "fill"


@dataclass(frozen=True)
class Ready:
    """A process has what it is to hold: its own shard, or the mirror of another."""

    index: int
    version: int
    mirror: bool = False
    attempt: int = 0
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True)
class Commit:
    """Apply gradients that were put aside, as one update, or operations on vectors.

    Args:
        version: of the parameters afterwards: one more than before.
        pushes: (worker, sequence) of each, in the order in which they are added.
        divide: what the sum is divided by.
        staleness: commits between the parameters the gradient was taken at and this one.
        groups: hyperparameters of each group of parameters.
        factor: what the gradient is multiplied by: clipping.
        operations: what is done instead of an update.
    """

    version: int
    pushes: tuple[tuple[int, int], ...]
    divide: float
    staleness: int = 0
    groups: tuple[dict[str, Any], ...] = ()
    factor: float = 1.0
    operations: tuple[Operation, ...] = ()
    kind: Literal["commit"] = "commit"


@dataclass(frozen=True)
class Applied:
    """A shard, or its mirror, has applied a commit.

    Args:
        index, version: of which shard, and of the commit.
        seconds: of work.
        lost: pushes of it that were not there any more; it changed nothing here then.
        mirror: whether it is a mirror that says so.
        numbers: what its operations found out.
    """

    index: int
    version: int
    seconds: float = 0.0
    lost: int = 0
    mirror: bool = False
    numbers: tuple[float, ...] = ()
    kind: Literal["applied"] = "applied"


@dataclass(frozen=True)
class Norm:
    """The sum of squares of the gradient that such a commit would apply is wanted."""

    number: int
    pushes: tuple[tuple[int, int], ...]
    divide: float
    kind: Literal["norm"] = "norm"


@dataclass(frozen=True)
class Squares:
    """A shard's part of it."""

    index: int
    number: int
    value: float
    kind: Literal["squares"] = "squares"


@dataclass(frozen=True)
class Forget:
    """Gradients that will not be applied, also if they come later: of a worker, these or all."""

    worker: int
    sequences: tuple[int, ...] | None = None
    kind: Literal["forget"] = "forget"


@dataclass(frozen=True)
class Snapshot:
    """Keep the state as it is now, after the commits sent before, under a number."""

    number: int
    kind: Literal["snapshot"] = "snapshot"


@dataclass(frozen=True)
class Release:
    """A snapshot is needed no longer."""

    number: int
    kind: Literal["release"] = "release"


@dataclass(frozen=True)
class PullState:
    """All of a snapshot, optimizer state too: what a checkpoint holds. Answered by `Fill`.

    Without a number: the state as it is once it has at least so many commits, with what is put
    aside.
    """

    snapshot: int | None = None
    shard: int = -1
    at_least: int = 0
    kind: Literal["pull-state"] = "pull-state"
