"""The process that leads a crew's actors: `python -m ...ray_engine.crew_leader FOLDER PARENT`.

It never decides that a process is to be started again: it tells the launching process what has
ended, and is told.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wagontrain import launch
from wagontrain.errors import UsageError, WagontrainError
from wagontrain.hands import GRACE, how_it_ended, shard_command
from wagontrain.ray_engine import notes
from wagontrain.ray_engine.lead import Order, Outcome
from wagontrain.ray_engine.leader import NEWS_SECONDS, connect, files_of, report_connected
from wagontrain.ray_engine.mirror import Copy
from wagontrain.ray_engine.notes import Began, Begin, Ended
from wagontrain.ray_engine.placing import (
    PLACED_SECONDS,
    STARTED_SECONDS,
    end_all,
    needs,
    one_line,
    require_alike,
    spread,
    startup_error,
    text_of,
)
from wagontrain.ray_engine.rank import FOLDER, News, Post, Rank, Where

_AGAIN_SECONDS = 1.0
"""Between two attempts to reach an actor whose node was lost, until Ray has restarted it."""


def main() -> None:
    """Lead the crew of the job in the given folder, until told that all is over."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    launch.end_with(parent, folder)
    order = Order.read(folder)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(said,), daemon=True, name="said").start()
    try:
        connect(order)
        needs(order.workers)
        report_connected(folder)
        first = said.get()  # or its parent ends, and so this
        if first != "over":
            _Crew(folder, order, Begin(**json.loads(first))).lead(said)
    except WagontrainError as error:
        Outcome.of(error).write(folder)
        sys.exit(error.exit_status)
    finally:
        ray.shutdown()


def _listen(said: queue.Queue[str]) -> None:
    for line in sys.stdin:
        said.put(line.strip())
    said.put("over")


@dataclass
class _Actor:
    """A process's actor.

    Args:
        name: of the process's log.
        number: among those of its kind.
        serves: whether it is a shard.
        actor: Ray's handle; it stays the same when Ray restarts the actor.
        where: the node it is on.
        lost: whether the actor was lost since its process was started.
        due: when to ask again where it is; None while an answer is awaited or all is well.
    """

    name: str
    number: int
    serves: bool
    actor: Any
    where: Where | None = None
    lost: bool = False
    due: float | None = None


@dataclass
class _Crew:
    """The actors at work."""

    folder: Path
    order: Order
    begin: Begin
    actors: dict[str, _Actor] = field(default_factory=dict)
    asked: dict[Any, tuple[_Actor, str]] = field(default_factory=dict)
    over: bool = False

    def __post_init__(self) -> None:
        self.copy = Copy(Path(self.order.run_dir))
        self.job = ray.put(files_of(self.folder))

    def lead(self, said: queue.Queue[str]) -> None:
        """Start all, and pass on what becomes of them.

        Raises:
            UsageError: the cluster has not the resources, or other versions installed.
            WorkerError: an actor could not start.
        """
        self._place()
        limit = time.monotonic() + STARTED_SECONDS
        try:
            while not self.over or (self.asked and time.monotonic() < limit):
                for line in _all(said):
                    if line == "over":
                        self.over, limit = True, time.monotonic() + GRACE
                    else:
                        self._again(self.actors[line])
                self._ask_the_lost()
                if not self.asked:
                    time.sleep(0.1)
                    continue
                ready, _ = ray.wait(list(self.asked), timeout=NEWS_SECONDS)
                for reference in ready:
                    self._hear(*self.asked.pop(reference), reference)
        finally:
            end_all([each.actor for each in self.actors.values()])

    def _place(self) -> None:
        """Make all actors, and wait until they are there; shards take no CPU of Ray's count.

        A byte of memory instead: an actor that needs nothing at all is put on a node by chance,
        whatever was asked (Ray 2.5x, `GetBestSchedulableNode`).
        """
        each = needs(self.order.workers)
        make = ray.remote(Rank)
        kinds = [(True, n) for n in range(self.begin.shards)]
        kinds += [(False, n) for n in range(self.order.workers)]
        nodes = spread(ray.nodes(), self.begin.shards)
        for serves, number in kinds:
            name = f"{'server' if serves else 'rank'}{number}"
            wanted = {"num_cpus": 0, "memory": 1} if serves else {
                "num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0)
            }  # fmt: skip
            strategy: Any = "SPREAD"
            if serves:  # elsewhere once that node is lost
                strategy = NodeAffinitySchedulingStrategy(nodes[number], soft=True)
            actor = make.options(
                scheduling_strategy=strategy, max_restarts=-1, max_concurrency=1, **wanted
            ).remote()
            self.actors[name] = _Actor(name, number, serves, actor)
            self._ask(self.actors[name], "where")
        seconds = PLACED_SECONDS + STARTED_SECONDS
        limit = time.monotonic() + seconds
        while any(actor.where is None for actor in self.actors.values()):
            ready, _ = ray.wait(list(self.asked), timeout=NEWS_SECONDS)
            for reference in ready:
                actor, _ = self.asked.pop(reference)
                try:
                    actor.where = ray.get(reference)
                except RayError as error:
                    raise startup_error(error) from error
            if time.monotonic() > limit:
                raise UsageError(
                    f"{self.order.workers} workers were asked for, and the Ray cluster did not "
                    f"give {text_of(each)} for each within {seconds} s: wait until other jobs have "
                    "ended, or give fewer --workers"
                )
        require_alike([actor.where for actor in self.actors.values() if actor.where])
        for actor in self.actors.values():
            self._post(actor)

    def _ask(self, actor: _Actor, what: str, *arguments: Any) -> None:
        self.asked[getattr(actor.actor, what).remote(*arguments)] = (actor, what)

    def _hear(self, actor: _Actor, what: str, reference: Any) -> None:
        try:
            answer = ray.get(reference)
        except RayError as error:
            self._lose(actor, one_line(error))
            return
        if what == "where":
            actor.where = answer
            self._post(actor)
        elif what == "port":
            self._begin(actor, answer)
        elif what in ("begin", "again"):
            assert actor.where is not None
            notes.write(Began(actor.name, actor.where.host, answer), self.folder)
            self._ask(actor, "news", NEWS_SECONDS)
        else:
            self._news(actor, answer)

    def _news(self, actor: _Actor, news: News) -> None:
        for piece in news.pieces:
            self.copy.put(piece)
        if news.status is None:
            self._ask(actor, "news", NEWS_SECONDS)
            return
        failure = None if news.failure is None else asdict(news.failure)
        ended = Ended(actor.name, how_it_ended(news.status), news.status, failure)
        notes.write(ended, self.folder)

    def _lose(self, actor: _Actor, how: str) -> None:
        """Its actor is gone; Ray restarts it, where it can."""
        if not actor.lost and not self.over:
            actor.lost = True
            notes.write(Ended(actor.name, f"is gone with its Ray actor ({how})"), self.folder)
        elif not self.over:
            actor.due = time.monotonic() + _AGAIN_SECONDS

    def _again(self, actor: _Actor) -> None:
        if actor.lost:
            actor.due = time.monotonic()
        else:
            self._ask(actor, "again")

    def _ask_the_lost(self) -> None:
        for actor in self.actors.values():
            if actor.due is not None and time.monotonic() >= actor.due and not self.over:
                actor.due = None
                self._ask(actor, "where")

    def _post(self, actor: _Actor) -> None:
        """Have the process started, at the place that the actor has told."""
        assert actor.where is not None
        actor.lost = False
        if actor.serves:
            self._ask(actor, "port", actor.where.address)
        else:
            self._begin(actor, 0)

    def _begin(self, actor: _Actor, port: int) -> None:
        assert actor.where is not None
        beside = [
            each for each in self.actors.values()
            if not each.serves and each.where and each.where.node == actor.where.node
        ]  # fmt: skip
        command: tuple[str, ...] = ()
        if actor.serves:
            place = (actor.where.address, port, Path(FOLDER))
            command = tuple(shard_command(self.begin.coordinator, actor.number, *place))
        variables = {
            "CUDA_VISIBLE_DEVICES": ",".join(actor.where.gpus),
            "OMP_NUM_THREADS": str(max(1, actor.where.cores // max(1, len(beside)))),
        }
        said = self.begin.secret + "\n"
        post = Post(actor.name, variables, self.order.directory, command, said)
        self._ask(actor, "begin", self.job, post)


def _all(said: queue.Queue[str]) -> list[str]:
    lines = []
    while not said.empty():
        lines.append(said.get())
    return lines


if __name__ == "__main__":
    main()
