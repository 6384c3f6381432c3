"""Learning rates and momentum for servers: those of the task, and what asynchrony asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Rates:
    """The hyperparameters of each group of parameters, as the task's scheduler has them now.

    Args:
        optimizer: of the task, on a model that is not trained.
        scheduler: of it.
        change: what is made of a group's for servers: another rate or momentum, say.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        change: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._change = change

    def now(self) -> tuple[dict[str, Any], ...]:
        """Each group's, without its parameters."""
        return tuple(
            self._change({key: value for key, value in group.items() if key != "params"})
            for group in self.optimizer.param_groups
        )

    def advance(self) -> None:
        """One update was made."""
        if self.scheduler is not None:
            # Without gradients: moves nothing, but schedulers count it. LBFGS asks for a loss.
            self.optimizer.step(lambda: 0.0)
            self.scheduler.step()


def corrected(momentum: float, workers: int) -> float:
    """The momentum with which asynchronous workers have together what one process has.

    A gradient that comes late acts like momentum of 1 - 1/N for N equal workers (Mitliagkas et
    al. 2016, "Asynchrony begets momentum", theorem 2). With an explicit momentum m beside it the
    whole is 1 - (1 - m)/N, so that for a whole of m*:

        m = max(0, 1 - N (1 - m*))

    The learning rate stays: late gradients bear no higher one.
    """
    return max(0.0, 1 - workers * (1 - momentum))


def with_less_momentum(group: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """What changes in a group's hyperparameters: `momentum` of SGD, the first beta of Adam."""
    changed: dict[str, Any] = {}
    if group.get("momentum"):
        changed["momentum"] = corrected(group["momentum"], workers)
    if "betas" in group:
        first, *others = group["betas"]
        changed["betas"] = (corrected(first, workers), *others)
    return changed
