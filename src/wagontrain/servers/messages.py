"""What coordinator, shards and workers say to each other: small typed headers.

A message on the wire is one header of these, as JSON, and any number of raw frames after it. What
does not fit a type is refused. Nothing received is ever executed or unpickled.

    worker -> coordinator   Look, Hello, Ask, Done, Spoiled, Measured, Beat, Bye
    coordinator -> worker   Description, Welcome, Lease, Unknown, Stop, Refusal
    worker -> shard         Push, Pull, PullRows
    shard -> worker         Staged, Values, Rows, Refusal
    coordinator -> shard    Setup, Fill, Commit, Norm, Forget, Snapshot, Release, PullState, Moved,
                            Stop
    shard -> coordinator    Hello, Ready, Applied, Squares, Fill, Beat, Refusal
    shard -> shard          Push, PullState, and their answers
    host -> coordinator     Hello, Beat, Bye: one that offers to hold a shard, see `hosts`
    coordinator -> host     Hold, Unknown, Stop, Refusal
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, TypeAdapter

from wagontrain.errors import WorkerError
from wagontrain.servers.orders import (
    Applied,
    Commit,
    Fill,
    Forget,
    Moved,
    Norm,
    PullState,
    Ready,
    Release,
    Setup,
    Snapshot,
    Squares,
)

PROTOCOL = 1


@dataclass(frozen=True)
class Hello:
    """A process asks to take part.

    Args:
        role: what it wants to be; "host": one that is to hold a shard.
        version: of wagontrain; another one may understand messages differently.
        host: its name.
        process: its number on that host.
        fingerprint: of the task as this process has it: model and some samples.
        endpoint: where a shard listens.
        index: which shard it is, or a host holds.
        applied: the last commit a shard has; None for one that has nothing yet.
        device: that a worker computes on.
        client: a worker's or host's own name, the same whenever it comes back; empty for a shard,
            which its index names.
    """

    role: Literal["worker", "shard", "host"]
    version: str
    host: str
    process: int
    protocol: int = PROTOCOL
    fingerprint: str = ""
    endpoint: str = ""
    index: int = -1
    applied: int | None = None
    device: str = ""
    client: str = ""
    kind: Literal["hello"] = "hello"


@dataclass(frozen=True)
class Welcome:
    """A worker takes part from now on, under this number.

    `shards` says where they listen, `workers` how many were planned.
    """

    worker: int
    shards: tuple[str, ...]
    workers: int = 1
    kind: Literal["welcome"] = "welcome"


@dataclass(frozen=True)
class Hold:
    """A host is to hold this shard from now on; -1: none, and it waits."""

    index: int
    kind: Literal["hold"] = "hold"


@dataclass(frozen=True)
class Look:
    """Somebody who wants to join asks what is trained here."""

    kind: Literal["look"] = "look"


@dataclass(frozen=True)
class Description:
    """What is trained here, and how: plain data."""

    job: dict[str, Any]
    kind: Literal["description"] = "description"


@dataclass(frozen=True)
class Ask:
    """A worker wants a lease."""

    worker: int
    kind: Literal["ask"] = "ask"


@dataclass(frozen=True)
class Lease:
    """Work for one worker, and nobody else until it is done or the worker is lost.

    Args:
        number: of the lease; no two are alike.
        purpose: "train": push the gradient; "validate": send the sums.
        epoch: whose order the positions are of.
        step: number of the global batch the samples belong to.
        start, stop: positions in the epoch's order of the batch that is divided.
        share, shares: which of how many equal shares of that batch this is.
        version: commits that the parameters have to contain at least.
        snapshot: the snapshot to pull parameters of, where not the live ones.
        alone: its gradient is to be pushed by itself, and at once.
    """

    number: int
    purpose: Literal["train", "validate"]
    epoch: int
    step: int
    start: int
    stop: int
    share: int = 0
    shares: int = 1
    version: int = 0
    snapshot: int | None = None
    alone: bool = False
    kind: Literal["lease"] = "lease"


@dataclass(frozen=True)
class RowBytes:
    """Bytes of rows of tables that were moved for some samples.

    Args:
        touched: of the numbers in those rows, each once for each lease.
        sent: to shards: requests, ids, gradients.
        received: rows, and what is said with them.
    """

    touched: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Done:
    """A gradient lies on all shards, put aside under (worker, sequence).

    Args:
        leases: whose samples it is of.
        fetched: the version the gradient was taken at, of the oldest part.
        weight: what its samples count for; the gradient is a sum, to be divided by this.
        samples: how many they are.
        loss: sum of the loss over them, weighted.
        seconds: of computing.
        sent: bytes that its worker has sent to shards so far, those of this push included.
        rows: of tables, what was moved for its leases.
    """

    worker: int
    sequence: int
    leases: tuple[int, ...]
    fetched: int
    weight: float
    samples: int
    loss: float
    seconds: float = 0.0
    sent: int = 0
    rows: RowBytes = RowBytes()
    kind: Literal["done"] = "done"


@dataclass(frozen=True)
class Spoiled:
    """A worker could not give a gradient for a lease.

    Args:
        worker, lease: whose, and which.
        reason: names what is not finite.
        gone: whether it is a validation whose snapshot a shard does not have.
        sequence: of the push that a shard refused, which others may have put aside.
    """

    worker: int
    lease: int
    reason: str
    gone: bool = False
    sequence: int | None = None
    kind: Literal["spoiled"] = "spoiled"


@dataclass(frozen=True)
class Measured:
    """Weighted sums of loss and metrics over a validation lease."""

    worker: int
    lease: int
    weight: float
    sums: dict[str, float]
    kind: Literal["measured"] = "measured"


@dataclass(frozen=True)
class Beat:
    """Still here; bytes sent to shards so far, and the most memory in use."""

    doing: str = ""
    worker: int = -1
    sent: int = 0
    memory: int = 0
    kind: Literal["beat"] = "beat"


@dataclass(frozen=True)
class Bye:
    """A worker leaves of its own will, or a host ends."""

    worker: int = -1
    kind: Literal["bye"] = "bye"


@dataclass(frozen=True)
class Unknown:
    """The worker was given up after too long a silence: say hello again for a new number."""

    kind: Literal["unknown"] = "unknown"


@dataclass(frozen=True)
class Stop:
    """There is nothing more to do; with a reason, because something failed."""

    reason: str = ""
    kind: Literal["stop"] = "stop"


@dataclass(frozen=True)
class Refusal:
    """What was asked cannot be done. It says of what it speaks, as answers do.

    Args:
        reason: why.
        shard: who says so.
        worker, sequence: of which push, if it was one.
        number: of which question, if it was one.
        snapshot: which one it was of that the shard does not have, where the coordinator asked.
        then: "ask again": it may well be answered later; "go on": it is only to be told.
    """

    reason: str
    shard: int = -1
    worker: int = -1
    sequence: int = -1
    number: int = -1
    snapshot: int | None = None
    then: Literal["", "ask again", "go on"] = ""
    kind: Literal["refusal"] = "refusal"


@dataclass(frozen=True)
class Push:
    """A gradient to put aside; frames: this shard's part of it, then rows of tables.

    Args:
        shard: whose part it is.
        shared: of the first tensors so many come as references to memory of the sender.
        worker, sequence: its name; the same one again is acknowledged and not kept twice.
        rows: table -> number of its rows whose gradients follow: for each table, in this order,
            their ids (`Table.id_type`, each once) and the gradients.
        without: parameters that got no gradient; zeros stand in their place.
    """

    shard: int
    worker: int
    sequence: int
    without: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    kind: Literal["push"] = "push"


@dataclass(frozen=True)
class Staged:
    """A gradient is put aside, on the mirror too where there is one."""

    shard: int
    worker: int
    sequence: int
    kind: Literal["staged"] = "staged"


@dataclass(frozen=True)
class Pull:
    """This shard's part of the parameters, with at least so many commits, or of a snapshot.

    With `own`, not before the pushes of this worker that are here count, or never will. `whole`
    asks for what never changes, too; `worker` is who asks; the answer has the same
    `number`, for one that came late must not be taken for another's. With `shared`, frames: so
    many references to memory of the sender, where the parameters are wanted.
    """

    shard: int
    worker: int = -1
    whole: bool = False
    at_least: int = 0
    snapshot: int | None = None
    number: int = 0
    shared: int = 0
    own: bool = False
    kind: Literal["pull"] = "pull"


@dataclass(frozen=True)
class Values:
    """Parameters as of a commit; frames: this shard's part, unless it was `placed` as asked."""

    shard: int
    version: int
    number: int = 0
    placed: bool = False
    kind: Literal["values"] = "values"


@dataclass(frozen=True)
class PullRows:
    """Rows of tables: table -> number of them; frames: the ids (`Table.id_type`), by table."""

    shard: int
    rows: dict[str, int]
    worker: int = -1
    at_least: int = 0
    snapshot: int | None = None
    number: int = 0
    kind: Literal["pull-rows"] = "pull-rows"


@dataclass(frozen=True)
class Rows:
    """The rows asked for, as of a commit; frames: table by table."""

    shard: int
    version: int
    number: int = 0
    kind: Literal["rows"] = "rows"


@dataclass(frozen=True)
class Offer:
    """Memory of the sender, as a reference in hex: can it be reached? See `shared`."""

    reference: str
    kind: Literal["offer"] = "offer"


@dataclass(frozen=True)
class Accepted:
    """Whether it can."""

    yes: bool
    kind: Literal["accepted"] = "accepted"


Message = (
    Hello | Welcome | Look | Description | Hold | Ask | Lease | Done | Spoiled | Measured | Beat
    | Bye | Unknown | Stop | Refusal | Push | Staged | Pull | Values | PullRows | Rows | Setup
    | Fill | Offer | Accepted | Ready | Commit | Applied | Norm | Squares | Forget | Snapshot
    | Release | PullState | Moved
)  # fmt: skip

# A validation loss may well be infinite, which is no reason to refuse what a worker measured.
_ADAPTER: TypeAdapter[Message] = TypeAdapter(
    Annotated[Message, Field(discriminator="kind")],
    config=pydantic.ConfigDict(ser_json_inf_nan="constants"),
)


_ENDLESS = re.compile(rb"[\[:,\s]-?\d{21}")
"""An integer that no counter or seed of ours comes to, and of which no float can be made."""

_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
"""What may well hold such digits: an error of the user's, say."""


def encode(message: Message) -> bytes:
    """A header's bytes."""
    return _ADAPTER.dump_json(message)


def decode(header: bytes) -> Message:
    """The message of a header.

    Raises:
        WorkerError: it is none of ours.
    """
    if _ENDLESS.search(header) and _ENDLESS.search(_TEXT.sub(b"", header)):
        raise WorkerError("a message was refused: a number in it has more than 20 digits")
    try:
        return _ADAPTER.validate_json(header)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise WorkerError(
            f"a message was refused: {first['msg']} at {'.'.join(map(str, first['loc']))}"
        ) from None
