"""What a worker does: a lease after the other, until there is nothing more to do."""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wagontrain.batches import Batch, Batches, Cut, mix
from wagontrain.building import require_uncompiled, skeleton
from wagontrain.errors import LossError
from wagontrain.identity import few_samples
from wagontrain.objective import Objective, nothing
from wagontrain.servers import placing, remote
from wagontrain.servers.client import Client
from wagontrain.servers.lines import RefusedError
from wagontrain.servers.messages import Done, Lease
from wagontrain.servers.model import FlatModel, entries_of
from wagontrain.servers.parts import PUSHED, WHOLE, Whole
from wagontrain.task import Task

_SOON = 0.02
"""Seconds to wait for the next lease before what was collected is pushed."""


@dataclass(frozen=True)
class Habits:
    """How a worker goes about it.

    Args:
        push_every: leases whose gradients travel together.
        fetch_every: leases between two fetches of parameters.
        overlap: whether parameters for the next lease are fetched while this one is computed.
        together: whether leases are shares of a step that all workers make together.
        clip: norm to which the gradient of a lease is clipped here.
        elastic: of EASGD: what part of the way to the servers' parameters a worker goes, and they
            to its; None where gradients are pushed.
        ahead: whether the next lease is asked for before this one is worked on.
        tables: which layers have their tables on the servers, see `placing.chosen`.
    """

    push_every: int = 1
    fetch_every: int = 1
    overlap: bool = False
    together: bool = False
    clip: float | None = None
    elastic: float | None = None
    ahead: bool = True
    tables: str = ""


def fingerprint(task: Task, device: torch.device) -> str:
    """What has to be the same on all workers: shapes of the model, some samples, batch size."""
    model = skeleton(task) or task.build_model()  # which may be larger than this host
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    samples = few_samples(Batches.of_training(task, device))
    what = (shapes, samples, task.batch_size, task.seed, task.accumulate)
    return f"{zlib.crc32(repr(what).encode()):08x}"


@dataclass
class _Collected:
    """What gradients of several leases add up to."""

    leases: tuple[int, ...] = ()
    fetched: int = 0
    weight: float = 0.0
    samples: int = 0
    loss: float = 0.0
    seconds: float = 0.0


class Worker:
    """One worker at work.

    Args:
        task: what is trained.
        client: its lines.
        habits: how it goes about it.
        device: where it computes.
    """

    def __init__(self, task: Task, client: Client, habits: Habits, device: torch.device) -> None:
        self.task = task
        self.client = client
        self.habits = habits
        self.objective = Objective(task, device)
        self.training = Batches.of_training(task, device)
        self.validation = Batches.of_validation(task, device)
        shards = len(client.welcome.shards)
        placed = placing.build(task, habits.tables, whole=False)
        tables = placed.tables()
        self.tables = remote.Tables(tables, shards, client)
        require_uncompiled(placed.model, "exchanges its tensors for the servers'")
        self.model: nn.Module = remote.stand_in(placed, device, self.tables)
        self.optimizer = task.build_optimizer(self.model, closures=True)
        entries = entries_of(self.model, self.optimizer, [table.name for table in tables])
        self.flat = FlatModel(self.model, entries, shards, client.memory)
        self.version = 0
        self.sequence = 0
        self._spare = self.flat.another()
        self._gradients = [self.flat.another(PUSHED) for _ in range(2)]
        self._fetch: Future[int] | None = None
        self._push: Future[None] | None = None
        self._pushed: tuple[int, ...] = ()
        self._since_fetch = 0
        self._fetched = False
        self._collected = _Collected()
        self._touched: set[str] = set()
        self._rows: remote.Rows = {}
        for name, value in self.flat.updated.items():
            value.register_post_accumulate_grad_hook(_Note(self._touched, name))

    def run(self) -> None:
        """Work until the coordinator says that there is nothing more to do.

        Raises:
            OverError: it said so.
            GivenUpError: it has given this worker up.
            ModelError: the user's model, loss or a metric failed.
        """
        client = self.client
        # What never changes is fetched once, into both memories.
        client.await_(client.fetch(self._slices(self.flat.values, WHOLE), whole=True))
        for own, its in zip(self._spare.regions, self.flat.values.regions, strict=True):
            own.copy_(its)
        client.ask()
        while True:
            client.doing = "waiting for work"
            lease = client.lease(_SOON)
            if lease is None:
                self._flush()
                self._await_push()
                lease = client.lease(1.0)
                if lease is None:
                    continue
            if self.habits.ahead:
                client.ask()
            if lease.purpose == "validate":
                self._validate(lease)
            else:
                self._train(lease)
            if not self.habits.ahead:
                client.ask()

    def _slices(self, whole: Whole, regions: int = PUSHED) -> Any:
        return lambda shard: whole.slices(shard, regions)

    # --- parameters -----------------------------------------------------------------------------

    def _refresh(self, lease: Lease) -> None:
        """Have parameters that are new enough for a lease."""
        enough = self._since_fetch < self.habits.fetch_every - 1 and self.version >= lease.version
        if self._fetch is None and self._fetched and enough:
            self._since_fetch += 1
            return
        self._fetched = True
        self._since_fetch = 0
        if self._fetch is not None:
            self._take(self._fetch)
        ahead = self.habits.overlap and not self.habits.together
        if self._fetch is None or self.version < lease.version:
            # With its own last gradient in it: each update less late is worth the wait. Not in
            # steps together, where that counts only when the step is over, and it may have to
            # compute a lost worker's share of the same step first.
            own = not ahead and not self.habits.together
            if own:
                self._await_push()
            self._take(self._begin(lease.version, own))
        self._fetch = None
        if ahead:
            self._fetch = self._begin(0)

    def _begin(self, at_least: int, own: bool = False) -> Future[int]:
        return self.client.fetch(self._slices(self._spare), at_least, own=own)

    def _take(self, fetch: Future[int]) -> None:
        version = self.client.await_(fetch)
        spare = self.flat.values
        self.flat.show(self._spare)
        self._spare = spare
        self.version = version

    # --- a gradient -----------------------------------------------------------------------------

    def _train(self, lease: Lease) -> None:
        client = self.client
        client.doing = f"fetching parameters for step {lease.step}"
        self._refresh(lease)
        client.doing = f"reading the data of step {lease.step}"
        cut = Cut(lease.share, lease.shares)
        step = lease.step % self.task.steps_per_epoch
        batch = self.training.part(lease.epoch, step, range(lease.start, lease.stop), cut)
        client.doing = f"computing step {lease.step}"
        began = time.perf_counter()
        if not self._collected.leases:
            self.flat.collect_in(self._gradients[0])
            self._touched.clear()
            self.tables.forget()
            self._collected = _Collected(fetched=self.version)
        self.tables.begin(self.version)
        try:
            weight, loss = self._backward(batch, lease)
        except LossError as error:
            self._give_back((*self._collected.leases, lease.number), error)
            self._collected = _Collected()
            return
        before = self._collected
        self._collected = replace(
            before,
            leases=(*before.leases, lease.number),
            weight=before.weight + weight,
            samples=before.samples + sum(micro.count for micro in batch.micro_batches),
            loss=before.loss + loss,
            seconds=before.seconds + time.perf_counter() - began,
        )
        self._trained()
        if len(self._collected.leases) >= self.habits.push_every:
            self._flush()

    def _trained(self) -> None:
        """A lease's gradient is there: for workers that make steps of their own."""

    def _backward(self, batch: Batch, lease: Lease) -> tuple[float, float]:
        """Add the gradient of the summed loss; returns what it counts for, and the sum."""
        self.model.train()
        torch.manual_seed(mix(self.task.seed, "step", lease.step, lease.start, lease.share))
        total_weight, total_loss = 0.0, 0.0
        for micro in batch.micro_batches:
            weight = self.objective.weight(micro)
            if weight == 0:
                if micro.count:  # its parameters take part, with nothing
                    nothing(self.objective.forward(self.model, micro)).backward()
                    self.tables.collect(counts=False)
                continue
            loss = self.objective(self.model, micro)
            value = float(loss.detach())
            if not -float("inf") < value < float("inf"):
                raise LossError(f"the loss is {value}")
            loss.backward(loss.new_tensor(weight))
            self.tables.collect()
            total_weight += weight
            total_loss += value * weight
        return total_weight, total_loss

    def _flush(self) -> None:
        """Push what was collected, if anything."""
        collected, client = self._collected, self.client
        if not collected.leases:
            return
        client.doing = "pushing a gradient"
        self._rows = self.tables.gradients()
        self._fill()
        collected, gradients = self._collected, self._gradients[0]
        self.flat.leave_buffers_in(gradients)
        self._await_push()
        self.sequence += 1
        done = Done(
            client.number, self.sequence, collected.leases, collected.fetched,
            collected.weight, collected.samples, collected.loss, collected.seconds,
            rows=self.tables.take_bytes(),
        )  # fmt: skip
        without = self.flat.without(frozenset(self._touched))
        rows = self.tables.slices(self._rows)
        self._push = client.push(self._slices(gradients), done, without, rows)
        self._pushed = collected.leases
        self._gradients.reverse()
        self._collected = _Collected()

    def _await_push(self) -> None:
        """Return when the last push has arrived; a server may have refused it."""
        push, self._push = self._push, None
        if push is None:
            return
        try:
            self.client.await_(push)
        except LossError as error:
            self._give_back(self._pushed, error, self.sequence)

    def _give_back(
        self, leases: tuple[int, ...], error: LossError, sequence: int | None = None
    ) -> None:
        for number in leases:
            self.client.spoiled(number, str(error), sequence=sequence)

    def _fill(self) -> None:
        """What several leases add up to counts as the sum of their means; clip it."""
        gradients, collected = self._gradients[0], self._collected
        factor = float(len(collected.leases))
        clip = self.habits.clip
        if clip is not None and not self.habits.together and collected.weight:
            views = [gradients.views[name] for name in self.flat.updated]
            views += [rows for _, rows in self._rows.values()]
            norm = float(torch.nn.utils.get_total_norm(views)) / collected.weight * factor
            factor *= min(1.0, clip / (norm + 1e-6))
        if factor != 1.0:
            for name in self.flat.updated:
                gradients.views[name].mul_(factor)
            for _, rows in self._rows.values():
                rows.mul_(factor)

    # --- validation -----------------------------------------------------------------------------

    def _validate(self, lease: Lease) -> None:
        assert self.validation is not None
        client = self.client
        client.doing = f"in validation after epoch {lease.epoch}"
        if self._fetch is not None:  # it fills the memory that is needed here
            self._take(self._fetch)
            self._fetch = None
        live = self.flat.values
        batch = self.validation.part(0, lease.step, range(lease.start, lease.stop), Cut())
        try:
            client.await_(client.fetch(self._slices(self._spare), 0, lease.snapshot))
            self.flat.show(self._spare)
            self.tables.begin(0, lease.snapshot)
            self.model.eval()
            found = self.objective.evaluate(self.model, batch)
        except RefusedError as error:  # a shard, or the order to keep it, was lost
            client.spoiled(lease.number, str(error), gone=True)
            return
        finally:
            self.flat.show(live)
        client.measured(lease.number, found.weight, dict(found.sums))


class _Note:
    """Remembers that a parameter got a gradient."""

    def __init__(self, touched: set[str], name: str) -> None:
        self._touched = touched
        self._name = name

    def __call__(self, parameter: Tensor) -> None:
        self._touched.add(self._name)
