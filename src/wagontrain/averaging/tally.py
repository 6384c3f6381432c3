"""What ranks that do not meet in every step tell each other when they do: losses and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wagontrain.strategy import Settled, StepTimes


@dataclass
class Tally:
    """What this rank has to tell of the steps since it last told."""

    loss: float = 0.0
    weight: float = 0.0
    samples: int = 0
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)
    timed: int = 0

    def add_loss(self, loss: float, weight: float, samples: int) -> None:
        """Count a step: this rank's loss times its weight, its weight, samples of all ranks."""
        self.loss += loss
        self.weight += weight
        self.samples += samples

    def add_times(self, seconds: tuple[float, float, float]) -> None:
        """Count the times of a step that is over: of computing, of exchange, for data."""
        compute, exchange, data = self.times
        self.times = (compute + seconds[0], exchange + seconds[1], data + seconds[2])
        self.timed += 1

    def figures(self) -> list[float]:
        """For the other ranks."""
        return [self.loss, self.weight, *self.times]

    def together(self, rows: Sequence[Sequence[float]]) -> Settled:
        """What the figures of all ranks say, this rank's among them."""
        losses, weights, compute, exposed, data = zip(*rows, strict=True)
        spent = StepTimes(compute, exposed, data, self.timed) if self.timed else None
        return Settled(sum(losses) / sum(weights), self.samples, spent)
