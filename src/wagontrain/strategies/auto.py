"""Chosen by measurement: every other strategy is weighed on the task and cluster at hand.

See docs/auto.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from wagontrain.mesh import World
from wagontrain.plan import Plan
from wagontrain.planner.choosing import Wish, choose
from wagontrain.registry import discover, make_strategy
from wagontrain.strategy import Runner, Strategy
from wagontrain.task import Task
from wagontrain.transport import Context


@dataclass(frozen=True)
class Auto(Strategy):
    """How to choose.

    Args:
        trial: whether the best three are run for a few steps before one is chosen.
        allow: "relaxed" also weighs what is not the same mathematics as one process, by the time
            that it takes to a loss at worst.
    """

    trial: bool = True
    allow: Literal["exact", "relaxed"] = "exact"

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "measures cluster and task, and chooses one of the others"

    @property
    def exact(self) -> bool:
        """Unless it may choose what is not the same mathematics as one process."""
        return self.allow == "exact"

    @property
    def plans_first(self) -> bool:
        """Where relaxed strategies are allowed: workers of some are no group of ranks."""
        return self.allow == "relaxed"

    def check(self, task: Task, world: World) -> None:
        """Everything can be asked; what cannot be is said when all was weighed."""

    def preparing(self, workers: int) -> str:
        """What is measured, and how long that takes."""
        if workers == 1:
            return ""
        return f"auto: measuring {workers} workers and the task, which takes seconds ..."

    def resolved(self, task: Task, context: Context) -> tuple[Strategy, Plan | None]:
        """Measure and choose; with one worker there is nothing to choose."""
        if context.world.size == 1:
            return make_strategy("data-parallel"), None
        wish = Wish(self.trial, self.allow == "relaxed")
        choice = choose(task, context, discover().values(), wish)
        return choice.strategy, choice.plan

    def setup(self, task: Task, context: Context) -> Runner:
        """Choose, and set that up."""
        return self.resolved(task, context)[0].setup(task, context)
