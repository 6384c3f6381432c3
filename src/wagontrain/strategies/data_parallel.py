"""Map-reduce: every worker holds the whole model and takes its share of every batch.

    temp_j^(k) = Σ_{i in share k} ∂ loss_i / ∂ θ_j        each worker k on its own share (map)
    θ_j := θ_j - α / B · Σ_k temp_j^(k)                    the sums added, divided once (reduce)

Phases of a step: forward on the share; backward, in which DistributedDataParallel all-reduces
each bucket of gradients as soon as it is full, while the backward of earlier layers goes on; the
same update on every worker, on the CPU of each bucket as it arrives, while others are on their
way.

Bytes sent per worker and step: 2 (N - 1) / N · P for P bytes of gradients and N workers.

Limits: the whole model has to fit on every worker, and a large one takes long to exchange.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training" (VLDB), section 3.2 (buckets, overlap); Vogels et al. 2019, "PowerSGD" (compression).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from wagontrain.batches import Cut
from wagontrain.building import require_room
from wagontrain.costs import Costs, Step
from wagontrain.errors import UsageError
from wagontrain.mesh import World, balanced_shares, shares
from wagontrain.objective import Objective
from wagontrain.replication import Buckets
from wagontrain.simulate import Graph, simulate
from wagontrain.speed import step_cost
from wagontrain.strategy import Strategy
from wagontrain.synchronous import Synchronous
from wagontrain.task import Task
from wagontrain.transport import Context
from wagontrain.trial import unused_in_trial

_BUCKETS = (1.0, 5.0, 25.0, 100.0)
"""MiB of gradients that are weighed."""
_WORTH_IT = 0.02
"""Part of a step that another size has to save, or it is not told."""


@dataclass(frozen=True)
class DataParallel(Strategy):
    """Settings of map-reduce data parallelism.

    Args:
        shares: one number per worker, to which its share of every batch is proportional; equal
            shares where it is not given.
        balance: find shares with which unequal workers end at the same time, by trying.
        bucket_mb: MiB of gradients that travel together; where not given 25 over NCCL, as torch
            has it, and 5 over Gloo, which sends several buckets at a time.
        compression: what gradients travel as. All but "none" lose digits: relaxed.
        powersgd_rank: rank of the approximation with compression "powersgd".
        find_unused_parameters: whether some step may leave a parameter without gradient. None
            finds out with a trial step before training.
    """

    shares: tuple[float, ...] | None = None
    balance: bool = False
    bucket_mb: float | None = None
    compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    powersgd_rank: int = 1
    find_unused_parameters: bool | None = None

    name: ClassVar[str] = "data-parallel"
    summary: ClassVar[str] = "whole model on every worker, gradients summed (DDP)"

    def __post_init__(self) -> None:
        if self.bucket_mb is not None and not 0 < self.bucket_mb < math.inf:
            raise UsageError(f"bucket_mb is {self.bucket_mb}: give a number above 0")
        if self.balance and self.shares is not None:
            raise UsageError("shares were given and balance finds its own: give one of them")
        if self.powersgd_rank < 1:
            raise UsageError(f"powersgd_rank is {self.powersgd_rank}: give 1 or more")

    @property
    def exact(self) -> bool:
        """True unless gradients are compressed."""
        return self.compression == "none"

    def check(self, task: Task, world: World) -> None:
        """Refuse more workers than samples in a batch, and shares that are not one each.

        Raises:
            UsageError: one of these.
        """
        if world.size > task.batch_size:
            raise UsageError(
                f"{world.size} workers cannot share a batch of {task.batch_size}: some would "
                f"never have a sample; use at most {task.batch_size} workers or a larger "
                "batch_size"
            )
        if self.shares is not None:
            Cut(0, world.size, self.shares).micro_batches(range(task.batch_size), task.accumulate)

    @classmethod
    def candidates(cls, costs: Costs) -> list[DataParallel]:
        """Equal shares; where hosts are unequal, also shares by their speed. With buckets of other
        sizes where those are foretold to be worth it."""
        if costs.size > costs.profile.batch_size:
            return []
        plain = cls()
        found = [plain, *plain.other_buckets(costs)]
        if len(costs.leaders) > 1:
            speeds = tuple(costs.cluster.host_of(rank).speed for rank in range(costs.size))
            found.append(cls(shares=speeds))
        return found

    def other_buckets(self, costs: Costs) -> list[DataParallel]:
        """The same with the bucket that is foretold to be best, if that is another."""
        if costs.size == 1 or costs.profile.nbytes <= min(_BUCKETS) * 2**20:
            return []

        def seconds(strategy: DataParallel) -> float:
            return simulate(strategy.step_graph(costs), costs.interference).seconds

        others = [replace(self, bucket_mb=size) for size in _BUCKETS]
        best = min(others, key=seconds)
        return [best] if seconds(best) < (1 - _WORTH_IT) * seconds(self) else []

    def step_graph(self, costs: Costs) -> Graph:
        """Forward and backward on the own share; each bucket travels when it is full."""
        counts = shares(costs.profile.piece, costs.size, self.shares)
        members = range(costs.size)
        own = {rank: counts[rank] for rank in costs.leaders}
        step = Step(costs, costs.leaders, members, own, self.bucket_mb)
        layers = costs.profile.layers
        for micro in range(costs.profile.accumulate):
            step.forward(layers)
            if micro < costs.profile.accumulate - 1:
                step.backward(layers[::-1])
            else:
                step.backward_summing(layers)
        step.send_bucket()
        step.update()
        return step.graph

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """A whole copy of everything, and the activations of the own share."""
        count = shares(costs.profile.piece, costs.size, self.shares)[rank]
        items = costs.memory(costs.profile.layers, count)
        if costs.size > 1:  # after the first step DDP makes its buckets anew, beside the old ones
            held = items["activations"] + items["backward"]
            dense = sum(layer.nbytes for layer in costs.profile.layers if not layer.sparse)
            items["new buckets"] = max(0.0, dense - held)
        return items

    def setup(self, task: Task, context: Context) -> DataParallelRunner:
        """Build the model on every worker and join the copies with DistributedDataParallel."""
        if self.balance and context.world.size > 1:
            costs = [
                (row[0], row[1]) for row in context.gather(step_cost(task, context.world.device))
            ]
            found = tuple(balanced_shares(task.batch_size, costs))
            return DataParallelRunner(replace(self, balance=False, shares=found), task, context)
        return DataParallelRunner(self, task, context)


class DataParallelRunner(Synchronous):
    """Map-reduce at work on one rank."""

    def __init__(self, strategy: DataParallel, task: Task, context: Context) -> None:
        require_room(task, context)
        model = task.build_model().to(context.world.device)
        super().__init__(task, context, model, shares=strategy.shares)
        if context.group is None:
            return
        unused = strategy.find_unused_parameters
        if unused is None:
            unused = bool(unused_in_trial(task, Objective(task, context.world.device), model))
        hook: Any = None
        if strategy.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                context.group,
                matrix_approximation_rank=strategy.powersgd_rank,
                start_powerSGD_iter=10,
            )
            hook = (state, powerSGD_hook.powerSGD_hook)
        elif strategy.compression != "none":
            hook = (context.group, _COMPRESSION_HOOKS[strategy.compression])
        self.replicate(self.data, Buckets(strategy.bucket_mb, unused, hook=hook))

    def _differs(self, name: str, value: Any, rank: int, other: int) -> str:
        hint = " (then: --set find_unused_parameters=true)"
        return super()._differs(name, value, rank, other) + hint


def _bf16_hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as text
    """torch's hook under another name: by its own, DDP refuses it without NCCL, but Gloo can."""
    return default_hooks.bf16_compress_hook(group, bucket)


_COMPRESSION_HOOKS = {
    "bf16": _bf16_hook,
    "fp16": default_hooks.fp16_compress_hook,
}
