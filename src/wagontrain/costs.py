"""What the parts of a step cost on a cluster, and the parts that steps are made of.

Compute is what the profile measured, at the pace of the host in question; an exchange is what
the probe measured. Strategies put these together in their `step_graph`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from wagontrain.cluster import Cluster, Kind, traffic
from wagontrain.errors import UsageError
from wagontrain.mesh import equal_shares
from wagontrain.profile import Layer, Profile
from wagontrain.simulate import Graph, Interference

_LEAST = 1e-6
"""Seconds that any operation takes: what costs nothing would be done without end."""
_BUCKET = {"cuda": 25 * 2**20, "cpu": 5 * 2**20}
_PIECE = 25 * 2**20
_TRIED = 8
"""Samples of the batch that a model is tried on before training."""


@dataclass(frozen=True)
class Costs:
    """A task on a cluster."""

    profile: Profile
    cluster: Cluster

    def __post_init__(self) -> None:
        kinds = {host.device for host in self.cluster.hosts}
        if kinds != {self.profile.device} and self.profile.device == "cpu" and "cpu" in kinds:
            raise UsageError(
                f"the cluster {self.cluster.name!r} has hosts with {' and '.join(sorted(kinds))}, "
                "which cannot train together: leave some out"
            )

    @property
    def size(self) -> int:
        """Workers in all."""
        return self.cluster.size

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """One worker of each kind of host: those of a kind do the same at the same time."""
        found, rank = [], 0
        for host in self.cluster.hosts:
            found.append(rank)
            rank += host.count * host.workers
        return tuple(found)

    @cached_property
    def interference(self) -> Mapping[int, Interference]:
        """Of every worker."""
        return {rank: self.cluster.host_of(rank).interference for rank in range(self.size)}

    @property
    def bucket(self) -> int:
        """Bytes of gradients that travel together."""
        return _BUCKET["cpu" if self.profile.device == "cpu" else "cuda"]

    def samples(self, rank: int, parts: int | None = None) -> int:
        """Samples of a micro-batch that a worker gets, where so many share it."""
        return equal_shares(self.profile.piece, parts or self.size)[rank if parts is None else 0]

    def pace(self, rank: int) -> float:
        """How many times as long as in the profile a worker computes."""
        return self.profile.speed / self.cluster.host_of(rank).speed

    def forward(self, layer: Layer, samples: float, rank: int, part: float = 1.0) -> float:
        """Seconds of a layer's forward, or of a part of its arithmetic."""
        return max(_LEAST, layer.forward(samples) * part * self.pace(rank))

    def backward(self, layer: Layer, samples: float, rank: int, part: float = 1.0) -> float:
        """Seconds of a layer's backward, or of a part of its arithmetic."""
        return max(_LEAST, layer.backward(samples) * part * self.pace(rank))

    def update(self, nbytes: float, rank: int) -> float:
        """Seconds to update so many bytes of weights."""
        return max(_LEAST, self.profile.update(nbytes) * self.pace(rank))

    def memory(
        self, layers: Sequence[Layer], samples: float, part: float = 1.0, gradients: float = 1.0
    ) -> dict[str, float]:
        """Bytes of what a worker holds of some layers, by what they are for.

        Args:
            layers: that it holds, or computes.
            samples: that it works on at a time.
            part: of their weights and what belongs to them that is held.
            gradients: of their gradients.
        """
        weights = sum(layer.nbytes for layer in layers)
        last = self.profile.layers[-1]
        return {
            "framework": float(self.profile.base),
            "weights": weights * part + self.profile.buffers,
            "gradients": gradients
            * sum(layer.touched(samples) if layer.sparse else layer.nbytes for layer in layers),
            "optimizer": weights * part * self.profile.optimizer,
            "activations": sum(layer.kept for layer in layers) * samples,
            "backward": 2 * max((layer.output for layer in layers), default=0.0) * samples,
            # A softmax works on a copy where classes do not lie side by side.
            "loss": last.output * samples if layers and layers[-1] is last else 0.0,
            "batch": self.profile.sample * samples,
        }

    def trying(self, rank: int) -> float:
        """Bytes while a strategy is set up: a whole model, and a second one that is tried.

        Where a whole copy would not fit, models are built without memory, and nothing is taken.
        """
        copies = 2 + self.profile.optimizer
        whole = self.profile.nbytes
        if self.profile.base + copies * whole > self.cluster.host_of(rank).memory:
            return 0.0
        layers = self.profile.layers
        each = sum(layer.kept for layer in layers) + layers[-1].output
        each += 2 * max(layer.output for layer in layers)
        return self.profile.base + 3 * whole + self.profile.buffers + each * _TRIED

    def exchange(self, kind: Kind, nbytes: float, ranks: Sequence[int]) -> float:
        """Seconds of an exchange."""
        return max(_LEAST, self.cluster.seconds(kind, nbytes, ranks))


class Step:
    """Puts the graph of a step together, for one worker of each kind of host.

    Args:
        costs: of the task on the cluster.
        leaders: the workers that are told.
        members: all that exchange with each other.
        samples: that each leader works on at a time.
        bucket_mb: MiB of gradients that travel together, where a strategy says it.
    """

    def __init__(
        self,
        costs: Costs,
        leaders: Sequence[int],
        members: Sequence[int],
        samples: Mapping[int, float],
        bucket_mb: float | None = None,
    ) -> None:
        self.costs = costs
        self.limit = costs.bucket if bucket_mb is None else bucket_mb * 2**20
        self.leaders = leaders
        self.members = members
        self.samples = samples
        self.graph = Graph()
        self._last: dict[int, list[int]] = {rank: [] for rank in leaders}
        self._bucket = 0.0
        self._sent: list[tuple[int | None, float]] = []

    # --- what every leader does, one after the other --------------------------------------------

    def forward(self, layers: Sequence[Layer], part: float = 1.0, samples: float = 0) -> None:
        """Layers, or a part of their arithmetic; on other samples than usual where given."""
        self._stretch("forward", layers, part, samples)

    def backward(self, layers: Sequence[Layer], part: float = 1.0, samples: float = 0) -> None:
        """Layers, or a part of their arithmetic; on other samples than usual where given."""
        self._stretch("backward", layers, part, samples)

    def _stretch(self, way: str, layers: Sequence[Layer], part: float, samples: float) -> None:
        if not layers:
            return
        cost = self.costs.forward if way == "forward" else self.costs.backward
        name = layers[0].name if len(layers) == 1 else f"{layers[0].name} to {layers[-1].name}"
        self._compute(
            f"{way} {name}",
            {
                rank: sum(
                    cost(layer, samples or self.samples[rank], rank, part) for layer in layers
                )
                for rank in self.leaders
            },
        )

    def _compute(self, label: str, seconds: Mapping[int, float]) -> None:
        for rank, taken in seconds.items():
            self._last[rank] = [self.graph.compute(label, taken, rank, self._last[rank])]

    # --- what they do together ------------------------------------------------------------------

    def start(self, label: str, kind: Kind, nbytes: float) -> int | None:
        """An exchange that begins when all are here; its number, to wait for."""
        if len(self.members) == 1:
            return None
        after = [number for rank in self.leaders for number in self._last[rank]]
        seconds = self.costs.exchange(kind, nbytes, self.members)
        count = len(self.members)
        # Of broadcasts each member begins its part: what a tree sends is shared by all.
        sent = nbytes * ((count - 1) / count if kind == "broadcast" else traffic(kind, count))
        return self.graph.exchange(label, seconds, self.leaders, after, sent)

    def wait(self, number: int | None) -> None:
        """Nobody goes on before an operation is over."""
        if number is not None:
            for rank in self.leaders:
                self._last[rank] = [*self._last[rank], number]

    def exchange(self, label: str, kind: Kind, nbytes: float) -> None:
        """An exchange that everybody waits for."""
        self.wait(self.start(label, kind, nbytes))

    # --- gradients and weights ------------------------------------------------------------------

    def backward_summing(self, layers: Sequence[Layer], kind: Kind = "all_reduce") -> None:
        """Backward through layers; their gradients travel, each bucket as soon as it is full."""
        stretch: list[Layer] = []
        for layer in reversed(layers):
            stretch.append(layer)
            if layer.parts:
                self.backward(stretch)
                stretch = []
                if layer.sparse:  # everybody's rows go to all
                    samples = len(self.members) * max(self.samples.values())
                    self.leave(self.start("rows of gradients", "exchange", layer.touched(samples)))
                else:
                    self.add_to_bucket(layer.nbytes, kind)
        self.backward(stretch)

    def add_to_bucket(self, nbytes: float, kind: Kind = "all_reduce") -> None:
        """Gradients that are ready to travel."""
        self._bucket += nbytes
        if self._bucket >= self.limit:
            self.send_bucket(kind)

    def send_bucket(self, kind: Kind = "all_reduce") -> None:
        """Send what is in the bucket."""
        while self._bucket > 0:
            piece = min(self._bucket, _PIECE)
            self._sent.append((self.start("sum of gradients", kind, piece), piece))
            self._bucket -= piece

    def leave(self, number: int | None) -> None:
        """What is waited for at the end of the step only."""
        self._sent.append((number, 0.0))

    def update_rest(self, nbytes: float) -> None:
        """Update so many bytes of weights when all that is on its way has come."""
        for number, _ in self._sent:
            self.wait(number)
        self._sent = []
        self._compute("update", {r: self.costs.update(nbytes, r) for r in self.leaders})

    def update(self, others: float = 0.0) -> None:
        """Update what each bucket is for when it has come, and other weights of so many bytes."""
        left: tuple[int | None, float] = (None, others)
        for number, nbytes in [left, *self._sent]:
            if nbytes:
                self.wait(number)
                self._compute("update", {r: self.costs.update(nbytes, r) for r in self.leaders})
        self._sent = []
