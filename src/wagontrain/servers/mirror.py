"""A shard's line to the process that mirrors it: nothing is acknowledged that is not there too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wagontrain.servers.messages import Push, Refusal, Staged
from wagontrain.servers.staging import Gradient, Name
from wagontrain.servers.wire import BadMessage, Line


class Mirror:
    """Pushes that are on their way to the mirror, and who waits to hear that they are there.

    Args:
        line: to the process that mirrors.
        shard: which one it mirrors.
        id_types: of each table, how its ids travel.
    """

    def __init__(self, line: Line, shard: int, id_types: Mapping[str, torch.dtype]) -> None:
        self.line = line
        self.shard = shard
        self._id_types = id_types
        self._connections = 0
        self._anew = False
        self._waiting: dict[Name, list[bytes]] = {}

    def forward(self, name: Name, peer: bytes, gradient: Gradient) -> None:
        """Pass a push on; who sent it hears of it by what `heard` returns."""
        self._waiting.setdefault(name, []).append(peer)
        if len(self._waiting[name]) == 1:
            self._send(name, gradient)

    def _send(self, name: Name, gradient: Gradient) -> None:
        rows = {table: len(ids) for table, (ids, _) in gradient.rows.items()}
        push = Push(self.shard, *name, gradient.without, rows)
        travelling = {
            table: (ids.to(self._id_types[table]), values)
            for table, (ids, values) in gradient.rows.items()
        }
        self.line.send(push, [*gradient.buffer.regions, *pairs(travelling)])

    def move(self, line: Line) -> None:
        """The mirror is at the other end of another line now."""
        self.line.close()
        self.line, self._connections, self._anew = line, 0, True

    def heard(self, held: Mapping[Name, Gradient]) -> list[tuple[bytes, Staged | Refusal]]:
        """What the mirror said since, as answers to those who wait.

        What it had not acknowledged when it was started again is sent once more.

        Args:
            held: pushes that are put aside here.
        """
        answers: list[tuple[bytes, Staged | Refusal]] = []
        connections = self.line.connections()
        if connections > self._connections > 0 or self._anew:
            self._anew = False
            for name in list(self._waiting):
                if name in held:
                    self._send(name, held[name])
                else:  # it is over meanwhile
                    over = Staged(self.shard, *name)
                    answers += [(peer, over) for peer in self._waiting.pop(name)]
        self._connections = connections
        while True:
            try:
                incoming = self.line.receive(0)
            except BadMessage:  # of a process that is ours no longer: it will be sent again
                continue
            if incoming is None:
                return answers
            incoming.drop()
            message = incoming.message
            if isinstance(message, Staged | Refusal):
                name = (message.worker, message.sequence)
                answers += [(peer, message) for peer in self._waiting.pop(name, ())]

    def close(self) -> None:
        """Hear no more."""
        self.line.close()


def pairs(rows: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    """Ids and gradients of each table, in the order in which they travel."""
    return [each for pair in rows.values() for each in pair]
