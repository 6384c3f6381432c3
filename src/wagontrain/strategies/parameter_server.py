"""Parameter server (Downpour): parameters on server shards, workers that wait for nobody.

Each worker fetches the parameters, computes the gradient of one batch, and pushes it; the servers
apply gradients in the order in which they come. Nobody waits for a slow worker, a dead one's
samples are given to others, and workers may join at any time. What a gradient was computed from
is older than what it is applied to: its staleness, about N - 1 updates for N equal workers.

    consistency asynchronous     no bound
                ssp:S            no peer more than S + 1 pushes ahead (stale-synchronous)
                synchronous      all workers share every batch: exact
    backup B                     synchronous, but without waiting for the last B workers

Bytes sent per worker and update: P / n_push up, P / n_fetch down for P bytes of parameters; each of
M shards carries 1 / M of what all workers exchange.

Sources: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 4.1 (Downpour,
Adagrad); Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel
Parameter Server"; Chen et al. 2016, "Revisiting Distributed Synchronous SGD" (backup workers);
Zhang et al. 2015, "Staleness-aware Async-SGD"; Zheng et al. 2017, "Asynchronous Stochastic
Gradient Descent with Delay Compensation"; Zhang, Choromanska, LeCun 2015, "Deep learning with
Elastic Averaging SGD".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from wagontrain.convergence import Steps
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.mesh import World
from wagontrain.servers import placing, predict
from wagontrain.servers.client import Client
from wagontrain.servers.contract import Crewed
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.descent import Descent, Gate, Reached
from wagontrain.servers.elastic import ElasticWorker
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.image import Image, refuse_batch_norm
from wagontrain.servers.rates import Rates, with_less_momentum
from wagontrain.servers.record import Record
from wagontrain.servers.site import Site
from wagontrain.servers.work import Habits, Worker
from wagontrain.simulate import Graph
from wagontrain.strategy import Runner
from wagontrain.task import Task
from wagontrain.transport import Context

Rule = Literal[
    "optimizer", "sgd", "momentum", "adam", "adagrad", "staleness-aware", "dc-asgd", "easgd"
]


@dataclass(frozen=True)
class ParameterServer(Crewed):
    """Settings of the parameter server.

    Args:
        servers: server shards, over which parameters are divided.
        rule: how servers apply a gradient; "optimizer" is the task's own.
        consistency: "asynchronous", "ssp:S" with a bound S, or "synchronous".
        backup: of the workers, how many a synchronous step does not wait for.
        n_push: batches whose gradients travel together.
        n_fetch: batches between two fetches of the parameters.
        overlap: whether the next parameters are fetched while a gradient is computed: faster on
            slow links, and one update staler.
        rate: learning rate at the servers, instead of the task's; of "adagrad", instead of ten
            times the task's.
        momentum: "corrected" lowers the task's by what asynchrony adds by itself, "task" leaves it.
        compensation: of rule "dc-asgd": its lambda.
        elasticity: of rule "easgd": its beta; a worker goes beta / N of the way to the servers.
        warm_start: updates that one worker makes alone before the others begin.
        replicas: copies of every shard's state on another shard: 0 or 1.
        placement: "beside" the workers, or "elsewhere": on hosts that run `wagontrain serve`.
        tables: embedding layers whose tables live on the servers only: their names in the model
            with commas between them, or "auto"; "" for none.
    """

    servers: int = 1
    rule: Rule = "optimizer"
    consistency: str = "asynchronous"
    backup: int = 0
    n_push: int = 1
    n_fetch: int = 1
    overlap: bool = False
    rate: float | None = None
    momentum: Literal["corrected", "task"] = "corrected"
    compensation: float = 0.04
    elasticity: float = 0.9
    warm_start: int = 0
    replicas: int = 0
    placement: Literal["beside", "elsewhere"] = "beside"
    tables: str = ""

    name: ClassVar[str] = "parameter-server"
    summary: ClassVar[str] = "weights on servers, workers come and go (Downpour, SSP)"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"asynchronous|synchronous|ssp:\d+", self.consistency):
            raise UsageError(
                f"consistency is {self.consistency!r}: give asynchronous, synchronous, or ssp:S "
                "with a bound such as ssp:2"
            )
        for name, least in (("servers", 1), ("backup", 0), ("n_push", 1), ("n_fetch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.replicas not in (0, 1) or (self.replicas and self.servers < 2):
            raise UsageError(
                f"replicas is {self.replicas} with {self.servers} servers: give 0, or 1 with at "
                "least 2 servers, for a copy is kept on another one"
            )
        if self.tables and self.rule in ("dc-asgd", "easgd"):
            raise UsageError(
                f"rule {self.rule} needs all parameters at the workers, which have only rows of "
                "tables: leave tables out, or use staleness-aware"
            )
        if self.together and max(self.n_push, self.n_fetch) > 1:
            raise UsageError(
                "n_push and n_fetch above 1 are for asynchronous workers: leave them at 1 with "
                "synchronous steps"
            )

    @property
    def together(self) -> bool:
        """Whether workers make every step together."""
        return self.consistency == "synchronous" or self.backup > 0

    @property
    def exact(self) -> bool:
        """Only in synchronous steps that wait for everybody, with the task's own optimizer."""
        return self.together and self.backup == 0 and self.rule == "optimizer"

    @property
    def shards(self) -> int:
        """How many server processes it needs."""
        return self.servers

    @property
    def elsewhere(self) -> bool:
        """Whether they are on hosts of their own."""
        return self.placement == "elsewhere"

    def check(self, task: Task, world: World) -> None:
        """Refuse what cannot be done without all ranks at once.

        Raises:
            UsageError: more workers than samples in a synchronous batch, more backups than
                workers, or batch norm in exact steps.
        """
        if self.together and world.size > task.batch_size:
            raise UsageError(
                f"{world.size} workers cannot share a batch of {task.batch_size}: use at most "
                f"{task.batch_size} workers or a larger batch_size"
            )
        if self.backup and self.backup >= world.size:
            raise UsageError(
                f"{self.backup} of {world.size} workers as backups leave none to wait for: give "
                "fewer"
            )

    @classmethod
    def candidates(cls, costs: Costs) -> list[ParameterServer]:
        """Steps together, which are exact; asynchronous ones, with bounds, rarer pushes, tables.

        With one server and with some; steps that do not wait for the hosts that are slowest.
        """
        size = costs.size
        if size == 1:
            return []
        found: list[ParameterServer] = []
        together = size <= costs.profile.batch_size and not costs.profile.across_samples
        for servers in sorted({1, min(4, size)}):
            if together:
                found.append(cls(servers=servers, consistency="synchronous"))
                if slow := _slow(costs):
                    found.append(cls(servers=servers, consistency="synchronous", backup=slow))
            found.append(cls(servers=servers))
            if len(costs.leaders) > 1:  # a bound holds the quick ones back; here are some
                found.append(cls(servers=servers, consistency="ssp:2"))
            found.append(cls(servers=servers, overlap=True))
            found.append(cls(servers=servers, n_push=4, n_fetch=4))
            if predict.tables(costs):
                found.append(cls(servers=servers, tables="auto"))
        return found

    def _serving(self, costs: Costs) -> predict.Serving:
        bound = int(self.consistency[4:]) if self.consistency.startswith("ssp:") else None
        remote = tuple(predict.tables(costs)) if self.tables else ()
        return predict.Serving(
            costs, self.servers, self.together, self.backup, bound, self.n_push, self.n_fetch,
            self.overlap and not self.together, remote,
        )  # fmt: skip

    def step_graph(self, costs: Costs) -> Graph:
        """A step of all together; or a few batches of each worker, and every one of them a step."""
        return self._serving(costs).step_graph()

    def steps_needed(self, costs: Costs) -> Steps:
        """See `wagontrain.convergence`, late gradients; with backups samples come in another order,
        and each still counts once an epoch."""
        return self._serving(costs).steps_needed()

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """Two copies of parameters and of gradients; the servers are with worker 0."""
        return self._serving(costs).memory(rank, self.rule == "optimizer")

    def setup(self, task: Task, context: Context) -> Runner:
        """Refused: its workers are no group of ranks.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "the workers of parameter-server are no group of ranks: start it with `wagontrain "
            "run` or wt.fit"
        )

    # --- who takes part -------------------------------------------------------------------------

    def coordinator(self, task: Task, site: Site) -> tuple[Coordinator, Record]:
        """Who decides, and who keeps what happens."""
        image = Image(task, self.servers, self.rule, self.tables)
        if self.exact:
            refuse_batch_norm(
                image.model,
                "use data-parallel for exact training, or consistency=asynchronous",
            )
            placing.require_exact(image.optimizer, image.tables.all)
        first_step, reached = site.first_step, None
        if site.source is not None:
            image.restore(site.source)
            first_step = int(site.source.plain["steps"])
            if "reached" in site.source.plain:
                position, gaps = site.source.plain["reached"]
                reached = Reached(position, tuple((start, stop) for start, stop in gaps))
        rates = Rates(image.optimizer, image.scheduler, self._change(site.workers))
        decisions = Descent(site.course(task, first_step), self._gate(), reached)
        files = "" if self.replicas else "servers"
        jobs = image.jobs(rates.now(), {"strength": self.compensation}, files)
        clip = task.clip_grad_norm if self.together else None
        record = Record(task, self, image, site, decisions)
        coordinator = Coordinator(
            site.listener,
            lambda send: Fleet(jobs, image.part, send, first_step, clip, bool(self.replicas)),
            decisions,
            rates,
            record,
            site.terms,
        )
        record.lost = lambda: sum(shard.lost for shard in coordinator.fleet.shards)
        return coordinator, record

    def worker(self, task: Task, client: Client, device: torch.device) -> Worker:
        """One worker."""
        elastic = self.elasticity / client.welcome.workers
        habits = Habits(
            self.n_push, self.n_fetch, self.overlap, self.together, task.clip_grad_norm, elastic,
            tables=self.tables,
        )  # fmt: skip
        kind = ElasticWorker if self.rule == "easgd" else Worker
        return kind(task, client, habits, device)

    def _gate(self) -> Gate:
        if self.together:
            return Gate("synchronous", backups=self.backup)
        if self.consistency.startswith("ssp:"):
            return Gate("stale-synchronous", int(self.consistency[4:]), 0, self.warm_start)
        return Gate("asynchronous", warm_start=self.warm_start)

    def _change(self, workers: int) -> Any:
        def change(group: dict[str, Any]) -> dict[str, Any]:
            changed = dict(group)
            if self.rate is None and self.rule == "adagrad":
                changed["lr"] = _ADAGRAD * group["lr"]
            elif self.rate is not None:
                changed["lr"] = self.rate * group["lr"] / group.get("initial_lr", group["lr"])
            if self.momentum == "corrected" and not self.together:
                changed |= with_less_momentum(group, workers)
            return changed

        return change


def _slow(costs: Costs) -> int:
    """Workers of hosts that are slower than the quickest by more than half; 0 where most are."""
    speeds = [costs.cluster.host_of(rank).speed for rank in range(costs.size)]
    slow = sum(speed < max(speeds) / 1.5 for speed in speeds)
    return slow if slow <= costs.size // 2 else 0


_ADAGRAD = 10.0
"""Times the task's rate for Adagrad at the servers (Dean et al. 2012, section 4.1)."""
