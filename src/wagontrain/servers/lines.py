"""A worker's lines to all shards: one exchange with each at the same time.

Pushes and pulls may be sent twice without harm, so what a shard did not answer before its
connection broke is asked again when there is a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import zmq
from torch import Tensor

from wagontrain.errors import LossError, WorkerError
from wagontrain.servers.messages import Message, Pull, Push, Refusal, Staged, Values
from wagontrain.servers.staging import GIVEN_UP
from wagontrain.servers.wire import Incoming, Line, Network

_POLL = 200
"""Milliseconds after which to look whether a connection was made anew, or all is over."""


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
    ) -> int:
        """Fill each shard's slices; returns the oldest version among them.

        Args:
            slices: of a shard, in the order in which they travel.
            worker: who asks.
            at_least: commits that have to be in it.
            snapshot: to pull, instead of what is there now.
            whole: with what never changes, too.

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
            return Pull(shard, worker, whole, at_least, snapshot, number), ()

        self._exchange(request, take)
        return min(versions)

    def push(
        self,
        slices: Callable[[int], Sequence[Tensor]],
        worker: int,
        sequence: int,
        without: Callable[[int], tuple[str, ...]],
    ) -> None:
        """Leave a gradient on every shard, under this name; returns when all have it.

        Args:
            slices: of a shard, in the order in which they travel.
            worker, sequence: the name.
            without: of a shard, which of its parameters got no gradient.

        Raises:
            LossError: it is not finite; names the parameter.
            RefusedError: a shard refused.
            GivenUpError: it does so because this worker takes part no longer.
            WorkerError: a shard did not answer in time.
        """

        def take(shard: int, incoming: Incoming) -> bool:
            message = incoming.message
            return isinstance(message, Staged) and (message.worker, message.sequence) == (
                worker,
                sequence,
            )

        def request(shard: int) -> tuple[Message, Sequence[Tensor]]:
            return Push(shard, worker, sequence, without(shard)), slices(shard)

        self._exchange(request, take)

    def _exchange(
        self,
        request: Callable[[int], tuple[Message, Sequence[Tensor]]],
        take: Callable[[int, Incoming], bool],
    ) -> None:
        limit = time.monotonic() + self._seconds
        poller = zmq.Poller()
        waiting: dict[zmq.Socket[bytes], tuple[int, Line, int]] = {}
        for shard, line in enumerate(self._lines):
            line.send(*request(shard))
            waiting[line.socket] = (shard, line, line.connections())
            poller.register(line.socket, zmq.POLLIN)
        while waiting:
            ready = dict(poller.poll(_POLL))
            if self.closing.is_set():
                raise ClosingError("this worker ends")
            for sock in ready:
                shard, line, _ = waiting[sock]
                incoming = line.receive(0)
                if incoming is not None and self._taken(shard, incoming, take):
                    poller.unregister(sock)
                    del waiting[sock]
            for sock, (shard, line, seen) in list(waiting.items()):
                if sock in ready:
                    continue
                now = line.connections()
                if now > seen > 0:
                    line.send(*request(shard))
                waiting[sock] = (shard, line, now)
            if time.monotonic() > limit:
                shards = ", ".join(str(shard) for shard, _, _ in waiting.values())
                raise WorkerError(f"server shard {shards} gave no answer in {self._seconds:.0f} s")

    def _taken(self, shard: int, incoming: Incoming, take: Callable[[int, Incoming], bool]) -> bool:
        try:
            if isinstance(incoming.message, Refusal):
                reason = incoming.message.reason
                kind: type[Exception] = LossError if "finite" in reason else RefusedError
                if reason.endswith(GIVEN_UP):
                    kind = GivenUpError
                raise kind(f"server shard {shard}: {reason}")
            return take(shard, incoming)
        finally:
            incoming.drop()

    def close(self) -> None:
        """Close all lines."""
        for line in self._lines:
            line.close()
