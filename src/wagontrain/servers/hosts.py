"""Hosts that offer to hold a server shard, and which of them holds which.

A shard goes to the host that came first, and stays with it. Where neither the host nor its shard
has been heard of for too long, the next one that waits takes it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wagontrain.errors import WorkerError
from wagontrain.servers.fleet import Send, Shard
from wagontrain.servers.messages import Hello, Hold, Stop, Unknown

NONE = -1
"""Instead of a shard's number: wait, until there is one to take up."""


@dataclass
class Host:
    """A host that offers to hold a shard.

    `client`: its own, which stays; two hosts may well have the same `name` and `process`.
    `forgotten`: what it holds was given up while it was silent, and it does not know yet.
    """

    client: str
    name: str
    process: int
    peer: bytes
    seen: float
    shard: int = NONE
    forgotten: bool = False


class Hosts:
    """Those of a job.

    Args:
        shards: of the job, as the fleet sees them.
        send: how to reach a peer of the coordinator's listener.
        noted: who is told what happens: a kind of event, and its fields.
        patience: seconds of silence after which a host is given up.
        wanted: whether shards are to be on such hosts at all.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        send: Send,
        noted: Callable[[str, dict[str, Any]], None],
        patience: float,
        wanted: bool,
    ) -> None:
        self.wanted = wanted
        self._shards = shards
        self._send = send
        self._noted = noted
        self._patience = patience
        self._hosts: list[Host] = []

    def missing(self) -> set[int]:
        """Shards that no host holds."""
        held = {host.shard for host in self._hosts}
        return {number for number in range(len(self._shards)) if number not in held and self.wanted}

    def hello(self, peer: bytes, message: Hello, now: float) -> None:
        """A host is there, or there again: what it says to hold it keeps, unless another does.

        Raises:
            WorkerError: this job's shards are not on such hosts.
        """
        if not self.wanted:
            raise WorkerError(
                "this run's server shards are beside its workers: start it with --set "
                "placement=elsewhere to have them on other hosts"
            )
        self._hosts = [host for host in self._hosts if host.client != message.client]
        host = Host(message.client, message.host, message.process, peer, now)
        self._hosts.append(host)
        if message.index in self.missing():
            host.shard = message.index
        self._place(now)
        if host.shard == NONE:
            self._send(peer, Hold(NONE), ())

    def beat(self, peer: bytes, now: float) -> bool:
        """A sign of life; whether it is one of a host."""
        for host in self._hosts:
            if host.peer == peer:
                host.seen = now
                if host.forgotten:
                    self._send(peer, Unknown(), ())
                return True
        return False

    def bye(self, peer: bytes, now: float) -> None:
        """A host can hold nothing any longer, and ends."""
        for host in [each for each in self._hosts if each.peer == peer]:
            self._hosts.remove(host)
            self._lose(host, "its host has ended", now)

    def look(self, now: float) -> None:
        """Give up who is silent, and let others take up what was there."""
        for host in self._hosts:
            if host.shard == NONE:
                continue
            silent = now - max(host.seen, self._shards[host.shard].seen)
            if silent > self._patience:
                host.forgotten = True
                self._lose(host, f"nothing heard for {silent:.0f} s", now)

    def stop(self, reason: str) -> None:
        """Tell all that there is nothing more to do."""
        for host in self._hosts:
            self._send(host.peer, Stop(reason), ())

    def _lose(self, host: Host, why: str, now: float) -> None:
        if host.shard == NONE:
            return
        self._noted("shard_lost", {"shard": host.shard, "host": host.name, "why": why})
        host.shard = NONE
        self._place(now)

    def _place(self, now: float) -> None:
        """Give what nobody holds to those that wait, in the order in which they came."""
        waiting = [
            host
            for host in self._hosts
            if host.shard == NONE and not host.forgotten and now - host.seen <= self._patience
        ]
        for shard, host in zip(sorted(self.missing()), waiting, strict=False):
            host.shard = shard
            self._send(host.peer, Hold(shard), ())
            fields = {"shard": shard, "host": host.name, "process": host.process}
            self._noted("shard_placed", fields)
