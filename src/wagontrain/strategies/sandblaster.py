"""Sandblaster L-BFGS: whole batches minimised by a coordinator that only ever sees numbers.

Parameters, gradients and the history of L-BFGS lie on server shards, which operate on their part
of each vector when the coordinator says so, and tell it scalar products. An evaluation of the
objective is cut into portions much smaller than a worker's share; whoever is free takes the next.
At its end, what slow workers have not brought back is given to idle ones as well, and what comes
first counts.

    evaluation   workers fetch x once, push sums of gradients; shards add them up
    direction    two exchanges of numbers: products with the history, then d and the first trial
    line search  strong Wolfe conditions: one evaluation for each trial, one in most iterations

It is exact: the same iterates as torch.optim.LBFGS on one process, to rounding. One step is one
`LBFGS.step` on one batch.

Bytes for each evaluation, P of parameters: P to each worker; from each P for every n_push portions,
and P for its last one. Memory on the shards: (2 m + 6) P for m pairs of history, and the pushes.

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 4.2 and algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from wagontrain.errors import TaskError, UsageError
from wagontrain.mesh import World
from wagontrain.servers.client import Client
from wagontrain.servers.contract import Crewed
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.history import HistoryImage
from wagontrain.servers.image import refuse_batch_norm
from wagontrain.servers.minimising import Minimisation
from wagontrain.servers.portioned import PortionWorker, habits
from wagontrain.servers.rates import Rates
from wagontrain.servers.record import Record
from wagontrain.servers.site import Site
from wagontrain.servers.work import Worker
from wagontrain.strategy import Runner
from wagontrain.task import Task
from wagontrain.transport import Context


@dataclass(frozen=True)
class Sandblaster(Crewed):
    """Settings of Sandblaster L-BFGS; those of L-BFGS itself are the task's optimizer's.

    Args:
        servers: server shards, over which all vectors are divided.
        portions: of a batch, for each worker that is planned; 1 makes equal shares.
        n_push: portions whose gradients travel together, at most.
        duplicate: whether portions that are late are given to a second worker.
        replicas: copies of every shard's state on another shard: 0 or 1.
        placement: "beside" the workers, or "elsewhere": on hosts that run `wagontrain serve`.
    """

    servers: int = 1
    portions: int = 10
    n_push: int = 5
    duplicate: bool = True
    replicas: int = 0
    placement: Literal["beside", "elsewhere"] = "beside"

    name: ClassVar[str] = "sandblaster"
    summary: ClassVar[str] = "whole batches by L-BFGS, portions for whoever is free"

    def __post_init__(self) -> None:
        for name in ("servers", "portions", "n_push"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.replicas not in (0, 1) or (self.replicas and self.servers < 2):
            raise UsageError(
                f"replicas is {self.replicas} with {self.servers} servers: give 0, or 1 with at "
                "least 2 servers, for a copy is kept on another one"
            )

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    @property
    def shards(self) -> int:
        """How many server processes it needs."""
        return self.servers

    @property
    def elsewhere(self) -> bool:
        """Whether they are on hosts of their own."""
        return self.placement == "elsewhere"

    def check(self, task: Task, world: World) -> None:
        """Refuse what L-BFGS has no place for.

        Raises:
            TaskError: gradients are to be clipped.
        """
        if task.clip_grad_norm is not None:
            raise TaskError(
                "sandblaster cannot clip gradients: L-BFGS learns the curvature from them, and its "
                "line search keeps steps short; leave out Task.clip_grad_norm"
            )

    def setup(self, task: Task, context: Context) -> Runner:
        """Refused: its workers are no group of ranks.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "the workers of sandblaster are no group of ranks: start it with `wagontrain run` or "
            "wt.fit"
        )

    # --- who takes part -------------------------------------------------------------------------

    def coordinator(self, task: Task, site: Site) -> tuple[Coordinator, Record]:
        """Who decides, and who keeps what happens."""
        image = HistoryImage(task, self.servers)
        refuse_batch_norm(image.model, "use another norm, or data-parallel with another optimizer")
        first_step = site.first_step
        if site.source is not None:
            image.restore(site.source)
            first_step = int(site.source.plain["steps"])
        rates = Rates(image.optimizer, image.scheduler, dict)
        portions = self.portions * site.workers
        decisions = Minimisation(
            site.course(task, first_step), portions, rates, image.memory, self.duplicate
        )
        # One worker may come to have all portions; what does not count any more is let go of.
        jobs = image.jobs(({},), {}, most=2 * portions + 64)
        record = Record(task, self, image, site, decisions)
        coordinator = Coordinator(
            site.listener,
            lambda send: Fleet(jobs, image.part, send, mirrored=bool(self.replicas)),
            decisions,
            rates,
            record,
            site.terms,
        )
        return coordinator, record

    def worker(self, task: Task, client: Client, device: torch.device) -> Worker:
        """One worker."""
        return PortionWorker(task, client, habits(self.n_push), device)
