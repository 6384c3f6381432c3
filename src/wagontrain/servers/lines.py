"""A worker's lines to all shards: one exchange with each at the same time.

Pushes and pulls may be sent twice without harm, so what a shard did not answer before its
connection broke is asked again when there is a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import zmq
from torch import Tensor

from wagontrain.errors import LossError, WorkerError
from wagontrain.servers.messages import (
    Message,
    Pull,
    PullRows,
    Push,
    Refusal,
    RowBytes,
    Rows,
    Staged,
    Values,
    encode,
)
from wagontrain.servers.staging import GIVEN_UP
from wagontrain.servers.wire import Incoming, Line, Network

_POLL = 200
"""Milliseconds after which to look whether a connection was made anew, or all is over."""


RowsOf = Callable[[int], Mapping[str, tuple[Tensor, Tensor]]]
"""Of a shard, table -> ids as they travel, and what belongs to them: [ids, dim]."""


class ClosingError(WorkerError):
    """The worker ends; nobody waits for an answer any longer."""


class GivenUpError(WorkerError):
    """This worker takes part no longer: it has to say hello again."""


class RefusedError(WorkerError):
    """A shard said why it cannot do what it was asked."""


class Lines:
    """Lines to all shards, for one thread.

    Args:
        network: of this process.
        endpoints: where the shards listen.
        seconds: longest time to wait for an answer.
    """

    def __init__(self, network: Network, endpoints: Sequence[str], seconds: float) -> None:
        self._lines = [network.connect(endpoint) for endpoint in endpoints]
        self._seconds = seconds
        self._number = 0
        self.closing = threading.Event()

    def pull(
        self,
        slices: Callable[[int], Sequence[Tensor]],
        worker: int,
        at_least: int = 0,
        snapshot: int | None = None,
        whole: bool = False,
        own: bool = False,
    ) -> int:
        """Fill each shard's slices; returns the oldest version among them.

        Args:
            slices: of a shard, in the order in which they travel.
            worker: who asks.
            at_least: commits that have to be in it.
            snapshot: to pull, instead of what is there now.
            whole: with what never changes, too.
            own: not before pushes of this worker are settled.

        Raises:
            RefusedError: a shard refused.
            GivenUpError: it does so because this worker takes part no longer.
            WorkerError: a shard did not answer in time.
        """
        self._number += 1
        number = self._number
        versions: list[int] = []

        def take(shard: int, incoming: Incoming) -> bool:
            message = incoming.message
            if not isinstance(message, Values) or message.number != number:
                return False
            incoming.into(slices(shard))
            incoming.end()
            versions.append(message.version)
            return True

        def request(shard: int) -> tuple[Message, Sequence[Tensor]]:
            return Pull(shard, worker, whole, at_least, snapshot, number, own=own), ()

        self._exchange(_Question(request, take, lambda refusal: refusal.number == number))
        return min(versions)

    def pull_rows(
        self, rows: RowsOf, worker: int, at_least: int = 0, snapshot: int | None = None
    ) -> RowBytes:
        """Fill rows of tables; returns what that moved.

        Args:
            rows: of a shard, the ids, and where their rows go; shards without any are not asked.
            worker: who asks.
            at_least: commits that have to be in them.
            snapshot: to pull, instead of what is there now.

        Raises:
            WorkerError: a shard refused, or did not answer in time.
        """
        self._number += 1
        number = self._number
        sent = received = 0

        def take(shard: int, incoming: Incoming) -> bool:
            nonlocal received
            message = incoming.message
            if not isinstance(message, Rows) or message.number != number:
                return False
            places = [place for _, place in rows(shard).values()]
            incoming.into(places)
            incoming.end()
            received += len(encode(message)) + sum(place.nbytes for place in places)
            return True

        def request(shard: int) -> tuple[Message, Sequence[Tensor]]:
            nonlocal sent
            ids = {name: each for name, (each, _) in rows(shard).items()}
            counts = {name: len(each) for name, each in ids.items()}
            pull = PullRows(shard, counts, worker, at_least, snapshot, number)
            sent += len(encode(pull)) + sum(each.nbytes for each in ids.values())
            return pull, list(ids.values())

        asked = [at for at in range(len(self._lines)) if rows(at)]
        question = _Question(request, take, lambda refusal: refusal.number == number)
        self._exchange(question, asked)
        return RowBytes(0, sent, received)

    def push(
        self,
        slices: Callable[[int], Sequence[Tensor]],
        worker: int,
        sequence: int,
        without: Callable[[int], tuple[str, ...]],
        rows: RowsOf = lambda shard: {},
    ) -> None:
        """Leave a gradient on every shard, under this name; returns when all have it.

        Args:
            slices: of a shard, in the order in which they travel.
            worker, sequence: the name.
            without: of a shard, which of its parameters got no gradient.
            rows: of a shard, ids and gradients of rows of tables.

        Raises:
            LossError: it is not finite; names the parameter.
            RefusedError: a shard refused.
            GivenUpError: it does so because this worker takes part no longer.
            WorkerError: a shard did not answer in time.
        """

        def named(message: Staged | Refusal) -> bool:
            return (message.worker, message.sequence) == (worker, sequence)

        def take(shard: int, incoming: Incoming) -> bool:
            return isinstance(incoming.message, Staged) and named(incoming.message)

        def request(shard: int) -> tuple[Message, Sequence[Tensor]]:
            more = rows(shard)
            counts = {name: len(ids) for name, (ids, _) in more.items()}
            pushed = Push(shard, worker, sequence, without(shard), counts)
            return pushed, [*slices(shard), *(part for pair in more.values() for part in pair)]

        self._exchange(_Question(request, take, named))

    def _exchange(self, question: _Question, shards: Collection[int] | None = None) -> None:
        """Ask shards, by default all, and return when all have answered.

        A refusal is raised when the others have answered, too: they may write to memory of this
        process, and what was pushed lies there or not.
        """
        limit = time.monotonic() + self._seconds
        poller = zmq.Poller()
        waiting: dict[zmq.Socket[bytes], tuple[int, Line, int]] = {}
        for shard, line in enumerate(self._lines):
            if shards is not None and shard not in shards:
                continue
            line.send(*question.request(shard))
            waiting[line.socket] = (shard, line, line.connections())
            poller.register(line.socket, zmq.POLLIN)
        while waiting:
            ready = dict(poller.poll(_POLL))
            if self.closing.is_set():
                raise ClosingError("this worker ends")
            for sock in ready:
                shard, line, _ = waiting[sock]
                incoming = line.receive(0)
                if incoming is not None and question.heard(shard, line, incoming):
                    poller.unregister(sock)
                    del waiting[sock]
            for sock, (shard, line, seen) in list(waiting.items()):
                if sock in ready:
                    continue
                now = line.connections()
                if now > seen > 0:
                    line.send(*question.request(shard))
                waiting[sock] = (shard, line, now)
            if waiting and time.monotonic() > limit:
                silent = ", ".join(str(shard) for shard, _, _ in waiting.values())
                raise WorkerError(f"server shard {silent} gave no answer in {self._seconds:.0f} s")
        if question.refused is not None:
            raise question.refused

    def close(self) -> None:
        """Close all lines."""
        for line in self._lines:
            line.close()


@dataclass
class _Question:
    """What all shards are asked at a time.

    Args:
        request: of a shard, the message and its tensors.
        take: takes an answer; whether it is one to this.
        meant: whether a refusal is of this: one may still be on its way of a question before.
        refused: the first refusal of this.
    """

    request: Callable[[int], tuple[Message, Sequence[Tensor]]]
    take: Callable[[int, Incoming], bool]
    meant: Callable[[Refusal], bool]
    refused: Exception | None = None

    def heard(self, shard: int, line: Line, incoming: Incoming) -> bool:
        """Something has come; whether this shard is done with the question.

        Raises:
            GivenUpError: this worker takes part no longer; nothing else matters.
        """
        message = incoming.message
        try:
            if not isinstance(message, Refusal):
                return self.take(shard, incoming)
        finally:
            incoming.drop()
        # What a shard could not read it cannot name.
        if not (self.meant(message) or (message.number < 0 and message.sequence < 0)):
            return False
        if message.then == "ask again":
            line.send(*self.request(shard))
            return False
        reason = f"server shard {shard}: {message.reason}"
        if reason.endswith(GIVEN_UP):
            raise GivenUpError(reason)
        kind = LossError if "finite" in reason else RefusedError
        self.refused = self.refused or kind(reason)
        return True
