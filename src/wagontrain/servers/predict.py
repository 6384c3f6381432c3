"""What steps at parameter servers take: fetch, compute, push, apply, and who waits for whom.

All shards are where the coordinator is, on the host of worker 0: so `wagontrain run` has it on
one machine, and under torchrun and Slurm. What others fetch and push goes through that host's link;
what its own workers do stays on it. On one machine each shard talks to one worker at a time.

Not in it: encryption between hosts (a tenth to a fifth of a link of 1 Gbit/s, docs/log.md), and
Ray, which spreads shards over nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from wagontrain.convergence import EXACT, Steps, late
from wagontrain.costs import Costs
from wagontrain.profile import Layer
from wagontrain.simulate import Graph, Part, Resource

_LARGE = 4
"""Rows for each sample of a batch from which "auto" takes a table to be large; see `placing`."""
_ID = 8
"""Bytes of a row's number, at most."""
_ROUNDS = 4
_OPERATIONS = 40_000
"""Of a graph, about: fewer rounds are told where there are many workers."""


def tables(costs: Costs) -> list[Layer]:
    """Layers whose tables `tables=auto` leaves on the servers."""
    return [
        layer
        for layer in costs.profile.layers
        if layer.kind in ("Embedding", "EmbeddingBag")
        and layer.parts
        and (layer.sparse or layer.parts[0].shape[0] >= _LARGE * costs.profile.batch_size)
    ]


@dataclass(frozen=True)
class Serving:
    """A parameter server on a cluster.

    Args:
        costs: of the task on the cluster.
        servers: shards.
        together: whether workers share every batch.
        backup: of them, how many a step does not wait for.
        bound: clocks that a worker may be ahead; None for any number.
        push, fetch: batches between two pushes, and between two fetches.
        overlap: whether the next parameters are fetched while a gradient is computed.
        remote: layers whose tables are on the servers only.
    """

    costs: Costs
    servers: int
    together: bool
    backup: int = 0
    bound: int | None = None
    push: int = 1
    fetch: int = 1
    overlap: bool = False
    remote: tuple[Layer, ...] = ()

    # --- what a worker moves and computes -------------------------------------------------------

    @property
    def workers(self) -> range:
        """All of them: they share a link, so none stands for others."""
        return range(self.costs.size)

    @cached_property
    def dense(self) -> float:
        """Bytes of parameters that every worker has."""
        away = {layer.name for layer in self.remote}
        return float(
            sum(layer.nbytes for layer in self.costs.profile.layers if layer.name not in away)
        )

    @property
    def samples(self) -> float:
        """Of a lease."""
        if not self.together:
            return self.costs.profile.batch_size
        return -(-self.costs.profile.batch_size // (self.costs.size - self.backup))

    @property
    def rows(self) -> float:
        """Bytes of rows of tables for a lease, fetched as well as pushed, each row once at most."""
        return sum(self.samples * (layer.output + _ID * layer.rows) for layer in self.remote)

    def computing(self, rank: int) -> float:
        """Seconds of the passes of a lease."""
        speed = self.costs.cluster.host_of(rank).speed
        if speed not in self._computing:
            self._computing[speed] = self._passes(rank)
        return self._computing[speed]

    @cached_property
    def _computing(self) -> dict[float, float]:
        return {}

    def _passes(self, rank: int) -> float:
        costs = self.costs
        parts = costs.profile.accumulate
        each = self.samples / parts
        return parts * sum(
            costs.forward(layer, each, rank) + costs.backward(layer, each, rank)
            for layer in costs.profile.layers
        )

    # --- between a worker and the shards --------------------------------------------------------

    @cached_property
    def latency(self) -> float:
        """Seconds of a message between a worker and the coordinator."""
        return self.costs.exchange("send", 1, (0, self.costs.size - 1))

    def _seconds(self, nbytes: float, rank: int) -> float:
        """Of bytes from or to all shards."""
        costs = self.costs
        if not self._near(rank):
            return costs.exchange("send", nbytes, (0, rank))
        host = costs.cluster.host_of(0)
        if host.workers == 1:  # it stays within the host, whose memory is quicker than any link
            return costs.exchange("send", 1, (0, costs.size - 1))
        return costs.exchange("send", nbytes, (0, 1))

    def _move(
        self, graph: Graph, label: str, nbytes: float, rank: int, after: Sequence[int]
    ) -> list[int]:
        """A push (to the shards) or a fetch (from them); numbers of what has to be over."""
        push = label == "push"
        ends: tuple[Part, Part] = ("out", "in") if push else ("in", "out")
        own = Resource(ends[0], rank)
        source = rank if push else None
        seconds = self._seconds(nbytes, rank)
        if not self._near(rank):
            over = (own, Resource(ends[1], 0))
            return [graph.carry(label, seconds, over, after, source, nbytes)]
        return [
            graph.carry(
                label, seconds / self.servers, (own, Resource("server", shard)), after, source,
                nbytes / self.servers,
            )
            for shard in range(self.servers)
        ]  # fmt: skip

    def _apply(self, graph: Graph, label: str, seconds: float, after: Sequence[int]) -> list[int]:
        """All shards do something with their part."""
        each = seconds / self.servers
        return [graph.serve(label, each, shard, after) for shard in range(self.servers)]

    @cached_property
    def _updating(self) -> float:
        return self.costs.update(self.dense, 0)

    @cached_property
    def _adding(self) -> float:
        """Seconds to add a gradient to others: as an update without any state."""
        return self._updating * 3 / (3 + 2 * self.costs.profile.optimizer)

    # --- a step ---------------------------------------------------------------------------------

    def step_graph(self) -> Graph:
        """One step of all workers together; or some batches of each, every one a step."""
        return self._one() if self.together else self._many()

    def _one(self) -> Graph:
        """All fetch, compute their share and push; the shards add up and update.

        Fetches begin together and share the servers' link, so that they end together. Whom the
        step does not wait for fetches as well, and is not heard of again.
        """
        graph = Graph()
        size = self.dense + self.rows
        far = [rank for rank in self.workers if not self._near(rank)]
        begun = graph.serve("ask", self.latency, self.servers + 1)
        have = {
            rank: self._move(graph, "fetch", size, rank, [begun])
            for rank in self.workers
            if self._near(rank)
        }
        if far:
            seconds = sum(self._seconds(size, rank) for rank in far)
            over = (Resource("out", 0), *(Resource("in", rank) for rank in far))
            fetched = [graph.carry("fetch", seconds, over, [begun])]
            have |= dict.fromkeys(far, fetched)
        prompt = sorted(self.workers, key=self.computing)[: self.costs.size - self.backup]
        after: list[int] = []
        for rank in prompt:
            done = graph.compute("gradient", self.computing(rank), rank, have[rank])
            arrived = self._move(graph, "push", size, rank, [done])
            after += self._apply(graph, "add", self._adding, arrived)
        told = graph.serve("commit", self.latency, self.servers, after)
        self._apply(graph, "update", self._updating, [told])
        return graph

    def _near(self, rank: int) -> bool:
        """Whether a worker is on the host of the shards."""
        return self.costs.cluster.node_of(rank) == self.costs.cluster.node_of(0)

    def _many(self) -> Graph:
        """Every worker by itself for a while, the quick ones more often."""
        counts = self._batches()
        graph = Graph(steps=float(sum(counts.values())))
        ready: dict[int, list[int]] = {rank: [] for rank in self.workers}
        held: dict[int, list[int]] = {}
        ahead: dict[int, list[int]] = {}
        over: dict[tuple[int, int], list[int]] = {}
        turns = sorted(
            (number / counts[rank], number, rank)
            for rank in self.workers
            for number in range(counts[rank])
        )
        for _, number, rank in turns:
            after = [*ready[rank], *self._gate(over, number, rank)]
            if number % self.fetch == 0:
                size = self.dense + self.rows
                if rank in ahead:
                    held[rank] = ahead.pop(rank)
                else:
                    held[rank] = self._move(graph, "fetch", size, rank, after)
                if self.overlap:
                    ahead[rank] = self._move(graph, "fetch", size, rank, held[rank])
            done = graph.compute("gradient", self.computing(rank), rank, [*after, *held[rank]])
            ready[rank] = [done]
            if (number + 1) % self.push == 0:
                size = self.dense + self.rows
                arrived = self._move(graph, "push", size, rank, [done])
                told = graph.serve("commit", self.latency, self.servers + rank, arrived)
                applied = self._apply(graph, "update", self._updating, [told])
                over[rank, number] = applied
                if not self.overlap:  # it waits until its own gradient counts
                    ready[rank] = [done, *applied]
        return graph

    def _gate(self, over: dict[tuple[int, int], list[int]], number: int, rank: int) -> list[int]:
        """What a bound of staleness waits for: nobody more than so many clocks behind."""
        if self.bound is None:
            return []
        least = number - self.bound - 1
        return [
            each for other in self.workers if other != rank for each in over.get((other, least), [])
        ]

    def _batches(self) -> dict[int, int]:
        """Batches of each worker in about the same time."""
        each = {rank: self.computing(rank) for rank in self.workers}
        slowest = max(each.values())
        length = max(self.push, self.fetch)
        size = self.costs.size * (2 + 3 * self.servers)
        rounds = max(1, min(_ROUNDS, _OPERATIONS // (size * length)))
        if self.bound is not None:
            return dict.fromkeys(self.workers, length * max(rounds, self.bound + 2))
        return {
            rank: length * max(1, round(rounds * slowest / seconds))
            for rank, seconds in each.items()
        }

    # --- how many steps, and what memory --------------------------------------------------------

    def steps_needed(self) -> Steps:
        """See `wagontrain.convergence`, late gradients. Steps together are late by none."""
        if self.together:
            return EXACT
        peers = self.costs.size - 1
        length = max(self.push, self.fetch)
        # Everybody's gradients in the making, and one's own of the same push; a fetch ahead is
        # one older.
        mean = peers * length + (length - 1) / 2 + self.overlap
        seconds = [self.computing(rank) for rank in self.workers]
        most = peers * length * max(seconds) / min(seconds) + length - 1 + self.overlap
        if self.bound is not None:
            most = min(most, float(peers * length * (self.bound + 1)))
        return late(mean, max(mean, most))

    def memory(self, rank: int, optimizer: bool) -> dict[str, float]:
        """Of a worker: two copies of parameters and two of gradients. With worker 0 are the shards
        and the coordinator."""
        costs = self.costs
        away = {layer.name for layer in self.remote}
        held = [layer for layer in costs.profile.layers if layer.name not in away]
        each = self.samples / costs.profile.accumulate
        items = costs.memory(costs.profile.layers, each)
        items |= {
            "weights": 2 * (self.dense + costs.profile.buffers),
            "gradients": 2 * sum(float(layer.nbytes) for layer in held),
            "optimizer": 0.0,
            "rows": 2 * self.rows,
        }
        if self._near(rank):
            state = costs.profile.optimizer if optimizer else 0.0
            whole = costs.profile.nbytes * (1 + state)
            put_aside = costs.size * (self.dense + self.rows)
            share = costs.cluster.host_of(rank).workers
            framework = (1 + self.servers) * costs.profile.base
            items["servers"] = (2 * whole + put_aside + framework) / share
        return items
