"""What a shard's process answers to workers, and to other shards' processes.

Whatever comes is answered, if need be by a refusal that says why; nothing of it ends the process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from wagontrain.errors import WagontrainError, WorkerError
from wagontrain.servers.contents import contents
from wagontrain.servers.messages import Pull, PullRows, Push, Refusal, Rows, Staged, Values
from wagontrain.servers.mirror import Mirror, pairs
from wagontrain.servers.orders import Fill, PullState
from wagontrain.servers.parts import torch_type
from wagontrain.servers.shard import Shard
from wagontrain.servers.shared import copy
from wagontrain.servers.wire import BadMessage, Incoming, Line, Listener

_BYTES = 1 << 32
"""Most that rows of one message may have."""

Question = Pull | PullRows | PullState


@dataclass
class Waiting:
    """A question that asked for a commit which has not come."""

    peer: bytes
    message: Question
    ids: Mapping[str, Tensor]
    places: Sequence[Tensor]
    until: float


class Answers:
    """Answers for the shards of a process.

    Args:
        listener: who asks.
        shards: by index, those that have what they are to hold.
        patience: seconds that a question waits for its commit.
    """

    def __init__(self, listener: Listener, shards: Mapping[int, Shard], patience: float) -> None:
        self.listener = listener
        self.shards = shards
        self.patience = patience
        self.mirror: Mirror | None = None
        self._waiting: list[Waiting] = []

    def answer_one(self) -> None:
        """Take one message and answer it."""
        try:
            incoming = self.listener.receive(0)
        except BadMessage as error:
            self.listener.send(error.peer, Refusal(str(error)))
            return
        if incoming is None:
            return
        message = incoming.message
        try:
            if isinstance(message, Push):
                self._take(incoming, message)
            elif isinstance(message, Question):
                self._ask(incoming, message)
            elif not isinstance(message, Refusal):  # which would go back and forth for ever
                raise WorkerError(f"a shard has no use for a {message.kind} message")
        except Exception as error:  # noqa: BLE001  one peer's message must not end the others' run
            reason = str(error) if isinstance(error, WagontrainError) else repr(error)
            self._refuse(incoming.peer, reason, message)
        finally:
            incoming.drop()

    def _refuse(
        self, peer: bytes, reason: str, message: object, then: Literal["", "ask again"] = ""
    ) -> None:
        refusal = Refusal(reason, getattr(message, "shard", -1), then=then)
        if isinstance(message, Push):
            refusal = replace(refusal, worker=message.worker, sequence=message.sequence)
        elif isinstance(message, Pull | PullRows):
            refusal = replace(refusal, number=message.number)
        self.listener.send(peer, refusal)

    def _shard(self, index: int) -> Shard:
        if index not in self.shards:
            here = " and ".join(map(str, sorted(self.shards)))
            raise WorkerError(f"shard {index} is not here, but shard {here}")
        return self.shards[index]

    # Pushes

    def _take(self, incoming: Incoming, message: Push) -> None:
        shard = self._shard(message.shard)
        name = (message.worker, message.sequence)
        if not shard.staging.knows(message):
            self._receive(incoming, shard, message)
        if self.mirror and message.shard == self.mirror.shard and name in shard.staging.held:
            held = shard.staging.held[name]
            if not held.mirrored:
                self.mirror.forward(name, incoming.peer, held)
                return
        self.listener.send(incoming.peer, Staged(message.shard, *name))

    def _receive(self, incoming: Incoming, shard: Shard, message: Push) -> None:
        rows = {}
        for name, count in message.rows.items():
            table = shard.table(name).table
            values = _room(count, table.dim, torch_type(table.dtype), name)
            rows[name] = (torch.empty(count, dtype=table.id_type), values)
        slot = shard.staging.slot()
        try:
            incoming.into([*slot.regions, *pairs(rows)])
            incoming.end()
        except WorkerError:
            shard.staging.back(slot)
            raise
        shard.stage(message, slot, rows)

    def hear_mirror(self) -> None:
        """Tell workers whose pushes have reached the mirror."""
        if self.mirror is None or self.mirror.shard not in self.shards:
            return
        held = self.shards[self.mirror.shard].staging.held
        for peer, answer in self.mirror.heard(held):
            name = (answer.worker, answer.sequence)
            if isinstance(answer, Staged) and name in held:
                held[name].mirrored = True
            self.listener.send(peer, answer)

    # Questions

    def _ask(self, incoming: Incoming, message: Question) -> None:
        shard = self._shard(message.shard)
        ids: dict[str, Tensor] = {}
        if isinstance(message, PullRows):
            for name, count in message.rows.items():
                table = shard.table(name).table
                ids[name] = _room(count, 1, table.id_type, name).view(-1)
            incoming.into(list(ids.values()))
        places = incoming.places() if isinstance(message, Pull) else ()
        incoming.end()
        if _too_soon(message, shard):
            until = time.monotonic() + self.patience
            self._waiting.append(Waiting(incoming.peer, message, ids, places, until))
        else:
            self._give(incoming.peer, message, ids, places)

    def _give(
        self,
        peer: bytes,
        message: Question,
        ids: Mapping[str, Tensor],
        places: Sequence[Tensor],
    ) -> None:
        shard = self._shard(message.shard)
        if isinstance(message, PullState):
            send_state(self.listener, peer, shard, message)
        elif isinstance(message, PullRows):
            version, rows = shard.pull_rows(ids, message.snapshot)
            self.listener.send(peer, Rows(message.shard, version, message.number), rows)
        else:
            version, values = shard.pull(message.worker, message.whole, message.snapshot)
            answer = Values(message.shard, version, message.number, bool(places))
            if places:
                _place(values, places)
                self.listener.send(peer, answer)
                return
            sent = self.listener.send(peer, answer, values)
            if message.snapshot is None:
                shard.values.lend(sent)

    def go_on(self) -> None:
        """After a commit or a snapshot: answer the questions that waited for it.

        Those of a shard that is being filled anew wait until it is here again.
        """
        due = [
            each
            for each in self._waiting
            if (shard := self.shards.get(each.message.shard)) and not _too_soon(each.message, shard)
        ]
        for waiting in due:
            self._waiting.remove(waiting)
            try:
                self._give(waiting.peer, waiting.message, waiting.ids, waiting.places)
            except WorkerError as error:
                self._refuse(waiting.peer, str(error), waiting.message)

    def expire(self) -> float:
        """Refuse the questions that have waited too long; seconds until the next does."""
        now = time.monotonic()
        for late in [waiting for waiting in self._waiting if waiting.until <= now]:
            self._waiting.remove(late)
            shard, wanted = self.shards.get(late.message.shard), late.message.at_least
            have = "it is being filled" if shard is None else f"there are {shard.version}"
            what = f"commit {wanted}"
            if late.message.snapshot is not None:
                what = f"snapshot {late.message.snapshot}"
            elif shard is not None and wanted <= shard.version and isinstance(late.message, Pull):
                what = f"the end of what worker {late.message.worker} pushed"
            reason = f"{what} did not come within {self.patience:g} s, {have}: ask again"
            self._refuse(late.peer, reason, late.message, "ask again")
        return min((waiting.until - now for waiting in self._waiting), default=self.patience)


def _too_soon(message: Question, shard: Shard) -> bool:
    """Whether the coordinator has yet to say what the question waits for."""
    if message.snapshot is None:
        if isinstance(message, Pull) and message.own:
            waiting = any(worker == message.worker for worker, _ in shard.staging.held)
            return waiting or message.at_least > shard.version
        return message.at_least > shard.version
    return message.snapshot > shard.newest


def send_state(to: Listener | Line, peer: bytes, shard: Shard, message: PullState) -> None:
    """Send all of a shard's state, as it is or was at a snapshot."""
    content = contents(shard, message.snapshot)
    tensors = [*content.values, *content.tensors.values()]
    if message.snapshot is None:  # it changes with the next commit
        tensors = [tensor.clone() for tensor in tensors]
    fill = Fill(content.version, shard.job.index, content.announced(), message.snapshot)
    if isinstance(to, Listener):
        to.send(peer, fill, tensors)
    else:
        to.send(fill, tensors)


def _place(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """Write values to memory of the process that asked for them."""
    have, wanted = [len(value) for value in values], [len(place) for place in places]
    if have != wanted:
        raise WorkerError(f"room for {wanted} bytes was given, the values have {have}")
    for value, place in zip(values, places, strict=True):
        copy(place, value)


def _room(count: int, width: int, dtype: torch.dtype, table: str) -> Tensor:
    if not 0 <= count * width * dtype.itemsize <= _BYTES:
        raise WorkerError(f"{count} rows of table {table!r} cannot be moved at once")
    return torch.empty((count, width), dtype=dtype)
