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

import contextlib
import copy
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from wagontrain.batches import Batch, Batches, Cut, MicroBatch, mix
from wagontrain.batchnorm import Participation, global_batch_norm
from wagontrain.errors import LossError, ModelError, ReplicaError, UsageError
from wagontrain.exchange import Exchange
from wagontrain.figures import CarriedFigures, Figures, GatheredFigures, WithSlots
from wagontrain.mesh import World, balanced_shares
from wagontrain.objective import Evaluation, Objective, Update, nothing, require_finite
from wagontrain.speed import step_cost
from wagontrain.strategy import Runner, StepReport, StepTimes, Strategy
from wagontrain.task import Task, trainable
from wagontrain.transport import (
    Context,
    Pending,
    Stopwatch,
    fingerprints,
)

_TRIAL_SAMPLES = 8
# This rank's part of the loss; seconds of computing, of exchange and for data, a step before.
_FIGURES = 4
_BUCKET_MB = {"cuda": 25.0, "cpu": 5.0}

# torch 2.13 renamed the argument and warns about the old name.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


@dataclass(frozen=True)
class DataParallel(Strategy):
    """Settings of map-reduce data parallelism.

    Args:
        shares: one number per worker, to which its share of every batch is proportional; equal
            shares where it is not given.
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
    summary: ClassVar[str] = "whole model on every worker, gradients summed (map-reduce, DDP)"

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

    def setup(self, task: Task, context: Context) -> DataParallelRunner:
        """Build the model on every worker and join the copies with DistributedDataParallel."""
        if self.balance and context.world.size > 1:
            costs = [
                (row[0], row[1]) for row in context.gather(step_cost(task, context.world.device))
            ]
            shares = tuple(balanced_shares(task.batch_size, costs))
            return DataParallelRunner(replace(self, balance=False, shares=shares), task, context)
        return DataParallelRunner(self, task, context)


class DataParallelRunner(Runner):
    """Map-reduce at work on one rank."""

    def __init__(self, strategy: DataParallel, task: Task, context: Context) -> None:
        self.task = task
        self.context = context
        self.cut = Cut(context.world.rank, context.world.size, strategy.shares)
        self.model = task.build_model().to(context.world.device)
        self.update = Update(task, self.model)
        self.objective = Objective(task, context.world.device)
        self._clock = Stopwatch(context.world.device)
        self._before: _Marks | None = None
        self._ready: Any = None
        self._participation = Participation()
        self._open = contextlib.ExitStack()
        self._distributed: DistributedDataParallel | None = None
        self._sums: Exchange | None = None
        self._forward: Callable[..., Any] = self.model
        self._figures: Figures = GatheredFigures(context)
        if context.group is not None:
            self._distribute(strategy, context.group)
        self.model.train()
        # Dropout and the like: repeatable, and not the same numbers on every rank.
        torch.manual_seed(mix(task.seed, "rank", context.world.rank))

    def _distribute(self, strategy: DataParallel, group: dist.ProcessGroup) -> None:
        unused = strategy.find_unused_parameters
        if unused is None:
            unused = bool(self._unused_in_trial())
        device = self.context.world.device
        carry = device.type == "cpu" and strategy.exact
        bucket_mb = strategy.bucket_mb or _BUCKET_MB[device.type]
        distributed = DistributedDataParallel(
            WithSlots(self.model, _FIGURES * self.cut.size) if carry else self.model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=group,
            bucket_cap_mb=bucket_mb,
            find_unused_parameters=unused,
            # Gradients live in the buckets: one copy less per step, and one less in memory.
            gradient_as_bucket_view=True,
            # Batch norm keeps equal running statistics by itself; other buffers are compared
            # (check_replicas) rather than overwritten with those of rank 0.
            **_NO_BUFFER_SYNC,
        )
        if strategy.compression == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                group, matrix_approximation_rank=strategy.powersgd_rank, start_powerSGD_iter=10
            )
            distributed.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif strategy.compression != "none":
            distributed.register_comm_hook(group, _COMPRESSION_HOOKS[strategy.compression])
        side = self.context.side
        assert side is not None
        self._open.enter_context(global_batch_norm(self.model, side, self._participation))
        first = next(value for _, value in trainable(self.model))
        self._open.callback(first.register_post_accumulate_grad_hook(self._note_ready).remove)  # type: ignore[no-untyped-call]
        self._distributed = self._forward = distributed
        if carry:
            size = sum(value.nbytes for _, value in trainable(self.model))
            if size > bucket_mb * 2**20:  # with one bucket there is nothing to do meanwhile
                self._sums = Exchange(distributed, group)
            self._forward = self._figures = CarriedFigures(
                distributed, self._sums, self.cut.rank, self.cut.size
            )

    def _unused_in_trial(self) -> list[str]:
        """Names of parameters without gradient after a backward on a few samples.

        It runs on a second model, so that the first one's buffers and state stay untouched,
        and on every rank: a model that fails does so here, before anything is exchanged.
        """
        device = self.context.world.device
        few = dataclasses.replace(
            self.task,
            batch_size=min(_TRIAL_SAMPLES, self.task.batch_size),
            accumulate=1,
            shuffle=False,
            loader_workers=0,
        )
        batch = next(Batches.of_training(few, device).epoch(0))
        model = self.task.build_model().to(device).train()
        own = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in own for parameter in model.parameters()):
            model = copy.deepcopy(self.model).train()  # the task gives out the same one each time
        objective = Objective(self.task, device)
        with torch.random.fork_rng():
            loss = objective(model, batch.micro_batches[0])
            loss.backward()  # type: ignore[no-untyped-call]
            objective.require_mean(model.eval(), batch.micro_batches[0])
        return [name for name, parameter in trainable(model) if parameter.grad is None]

    def step(self, batch: Batch) -> StepReport:
        """Forward and backward on this rank's share, gradients summed on the way, one update."""
        began = time.perf_counter()
        if not self.model.training:
            self.model.train()
        marks = _Marks(self._clock, batch.seconds)
        self.update.begin()
        weights = [self.objective.weight(micro) for micro in batch.micro_batches]
        # What one sample counts for has to be known before the first backward, not before.
        counted = self._count_later(weights)
        total = float(batch.total)
        part: list[tuple[Tensor, float]] = []
        last = len(weights) - 1
        for number, (micro, weight) in enumerate(zip(batch.micro_batches, weights, strict=True)):
            with self._exchange(number == last):
                loss = self._loss(micro, weight)
                if number == 0 and counted is not None:
                    total = sum(row[0] for row in counted.result())
                    _require_weight(total, batch)
                part.append((loss, weight))
                scale = weight / total
                if self._sums is None:
                    # DistributedDataParallel divides what it sums by the number of workers.
                    scale *= self.cut.size
                if number < last:
                    loss.backward(loss.new_tensor(scale))  # type: ignore[no-untyped-call]
                else:
                    self.context.watch.at(f"in the exchange of step {batch.step}")
                    self._ready = None
                    if self._sums is not None:
                        self._sums.begin()
                    self._figures.backward(loss, scale, part, self._times_before())
        marks.exchanged = self._clock.mark()
        marks.ready = self._ready or marks.exchanged
        rows = self._figures.result()
        try:
            require_finite([row[0] for row in rows], batch, self.cut, self.model)
        except LossError:
            if self._sums is not None:
                self._sums.finish()
            raise
        if self._sums is None:
            self.update.apply()
        else:
            self.update.apply(self._sums.arrivals())
            marks.waited = self._sums.waited
        marks.stop = self._clock.mark()
        before = None
        if self._before is not None:
            compute, exposed, data = list(zip(*rows, strict=True))[1:]
            before = StepTimes(compute, exposed, data)
        self._before = marks
        return StepReport(
            step=batch.step,
            epoch=batch.epoch,
            samples=batch.total,
            loss=sum(row[0] for row in rows) / total,
            seconds=time.perf_counter() - began,
            sent=self.context.sent.lap(),
            before=before,
        )

    def evaluate(self, batch: Batch) -> Evaluation:
        """Loss and metrics on this rank's share.

        Ranks without samples run their stand-in: a batch norm without running statistics takes
        those of the global batch here too.
        """
        if self.model.training:
            self.model.eval()
        self._participation.counts = batch.micro_batches[0].count > 0
        return self.objective.evaluate(self.model, batch)

    def state_dict(self) -> dict[str, Any]:
        """Full state; every rank holds all of it."""
        return {"model": self.model.state_dict(), **self.update.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a full state; to be called on every rank."""
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state)

    def check_replicas(self) -> None:
        """Compare all parameters and buffers of all ranks, bit by bit.

        Raises:
            ReplicaError: naming the first that differs and the ranks.
        """
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        rows = self.context.gather_integers(fingerprints(value for _, value in named))
        for index, (name, value) in enumerate(named):
            differing = [rank for rank, row in enumerate(rows) if row[index] != rows[0][index]]
            if differing:
                kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
                raise ReplicaError(
                    f"{kind} {name!r} of rank {differing[0]} is no longer that of rank 0: the "
                    "model changes it by something that differs between workers (its own samples, "
                    "random numbers, the clock), or a step left it without gradient on some "
                    "(then: --set find_unused_parameters=true)"
                )

    def close(self) -> None:
        """Take batch norm and DistributedDataParallel off the model again."""
        self._open.close()
        self._distributed, self._sums, self._forward = None, None, self.model

    def _note_ready(self, parameter: Tensor) -> None:
        """Mark the time: the first parameter's gradient is the last to be ready."""
        self._ready = self._clock.mark()

    def _loss(self, micro: MicroBatch, weight: float) -> Tensor:
        self._participation.counts = micro.count > 0
        if weight == 0:
            # Zero times the loss would not do: a mean over nothing is not a number.
            with self.objective.precision(), _unused_explained():
                return nothing(self.objective.forward(self._forward, micro))
        with _unused_explained():
            return self.objective(self._forward, micro)

    def _count_later(self, weights: list[float]) -> Pending | None:
        if self.task.weight is None:
            return None
        return self.context.gather_later([sum(weights)])

    def _times_before(self) -> tuple[float, float, float]:
        return (0.0, 0.0, 0.0) if self._before is None else self._before.seconds()

    def _exchange(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients with this backward, or only add them up."""
        if now or self._distributed is None:
            return contextlib.nullcontext()
        return self._distributed.no_sync()


@dataclass
class _Marks:
    """Times of one step on the device: begin, last local gradient, end of exchange, end."""

    clock: Stopwatch
    data: float
    start: Any = None
    ready: Any = None
    exchanged: Any = None
    stop: Any = None
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.start = self.clock.mark()

    def seconds(self) -> tuple[float, float, float]:
        """Seconds of computing, of exchange that computing did not hide, and for data."""
        exposed = self.clock.between(self.ready, self.exchanged) + self.waited
        return self.clock.between(self.start, self.stop) - exposed, exposed, self.data


def _bf16_hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as text
    """torch's hook under another name: by its own, DDP refuses it without NCCL, but Gloo can."""
    return default_hooks.bf16_compress_hook(group, bucket)


_COMPRESSION_HOOKS = {
    "bf16": _bf16_hook,
    "fp16": default_hooks.fp16_compress_hook,
}


@contextlib.contextmanager
def _unused_explained() -> Iterator[None]:
    """Within, DDP's complaint about a parameter without gradient names the setting for it."""
    try:
        yield
    except ModelError as error:
        if "finished reduction" not in str(error):
            raise
        raise ModelError(
            "a parameter got no gradient in the step before, on this or another worker, though "
            "the trial step used it: if that is meant, --set find_unused_parameters=true"
        ) from error


def _require_weight(total: float, batch: Batch) -> None:
    if not total > 0:
        raise ModelError(
            f"the weights of all samples of step {batch.step} add up to {total}: a mean over "
            "them does not exist; leave such samples out or give them a weight"
        )
