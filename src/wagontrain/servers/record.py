"""What becomes of a job: its events, its checkpoints, its summary."""

from __future__ import annotations

import contextlib
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from wagontrain import checkpoint
from wagontrain.errors import LossError
from wagontrain.identity import order_of
from wagontrain.objective import not_finite
from wagontrain.servers import commands
from wagontrain.servers.contents import Contents
from wagontrain.servers.deciding import Decisions
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.image import Image
from wagontrain.servers.messages import Done, RowBytes
from wagontrain.servers.observing import Member, Observer
from wagontrain.servers.site import Site
from wagontrain.signs import Signs
from wagontrain.strategy import Strategy
from wagontrain.task import Task
from wagontrain.transport import Context
from wagontrain.version import __version__

STEPS_BETWEEN_SAVES = 20


class Record(Observer):
    """Keeps what happens.

    Args:
        task: what is trained.
        strategy: how.
        image: where the state of a snapshot is put together.
        site: the run's folder, and who takes events.
        decisions: know staleness and workers.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        image: Image,
        site: Site,
        decisions: Decisions,
    ) -> None:
        self.task = task
        self.strategy = strategy
        self.image = image
        self.decisions = decisions
        self.lost: Callable[[], int] = lambda: 0
        self.site = site
        self.folder = site.folder
        self.events = site.events
        self._signs = Signs(site.events)
        self.last_step = min(task.epochs * task.steps_per_epoch, site.steps or sys.maxsize)
        self.values: dict[str, float] = {}
        self.steps = self.first_step = 0
        self.samples = 0
        self.rows = asdict(RowBytes())
        self.hosts: set[str] = set()
        self.most_workers = 0
        self._here = 0
        self._versions: dict[int, int] = {}
        self._members: dict[int, tuple[int, int]] = {}
        self._losses: dict[int, list[float]] = {}
        self._told = time.monotonic(), 0, 0  # when, pushes and bytes until then
        self._began = self._last = time.perf_counter()
        self._first: float | None = None

    def committed(self, apply: commands.Apply | commands.Stepped) -> None:
        """An update was decided on."""
        now = time.perf_counter()
        self.steps = apply.version
        self.samples += apply.samples
        sums = self._losses.setdefault(apply.epoch, [0.0, 0.0])
        sums[0] += apply.loss * apply.divide
        sums[1] += apply.divide
        self.events.send(
            "step",
            step=apply.version - 1,
            epoch=apply.epoch,
            samples=apply.samples,
            loss=apply.loss,
            seconds=now - self._last,
            data_seconds=0.0,
            sent=None,
            staleness=apply.staleness,
            **(apply.more if isinstance(apply, commands.Stepped) else {}),
        )
        self._last = now

    def validated(self, result: commands.Validated) -> None:
        """A validation is complete."""
        self.values = dict(result.values)
        self.events.send(
            "validation",
            epoch=result.epoch,
            step=self._versions.pop(result.snapshot),
            values=self.values,
        )

    def pushed(self, message: Done) -> None:
        """A gradient lies on all shards."""
        for key, moved in asdict(message.rows).items():
            self.rows[key] += moved
        sent, memory = self._members.get(message.worker, (0, 0))
        self._members[message.worker] = (max(sent, message.sent), memory)

    def seen(self, member: Member) -> None:
        """A worker has given a sign of life."""
        sent, _ = self._members.get(member.number, (0, 0))
        self._members[member.number] = (max(sent, member.sent), member.memory)

    def looked(self, members: Iterable[Member], fleet: Fleet, now: float) -> None:
        """Say once in a while what everybody is doing."""
        if not self._signs.due():
            return
        there = list(members)
        done = self.decisions.workers()
        work = {
            member.number: [
                *(done.get(member.number, {}).get(key, 0) for key in ("pushes", "samples")),
                round(done.get(member.number, {}).get("seconds", 0.0), 6),
                self._members.get(member.number, (0, 0))[0],
            ]
            for member in there
        }
        (before, pushes, sent), self._told = self._told, (now, *self._moved())
        seconds = max(now - before, 1e-9)
        self._signs.send(
            {member.number: member.doing for member in there},
            {member.number: now - member.seen for member in there},
            work=work,
            shards=fleet.plain(now),
            leases=self.decisions.leases(),
            pushes_per_second=round((self._told[1] - pushes) / seconds, 3),
            bytes_per_second=round((self._told[2] - sent) / seconds),
        )

    def _moved(self) -> tuple[int, int]:
        """Pushes that counted, and bytes that workers have sent, of all there were."""
        pushes = sum(done["pushes"] for done in self.decisions.workers().values())
        return pushes, sum(sent for sent, _ in self._members.values())

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Within, an error is the end of the job, and told as such."""
        try:
            yield
        except BaseException as error:
            self.events.send("failed", message=f"{type(error).__name__}: {error}")
            self.events.close()
            raise

    def kept(self, keep: commands.Keep) -> None:
        """A snapshot is taken."""
        self._versions[keep.number] = keep.version

    def noted(self, kind: str, fields: dict[str, Any]) -> None:
        """Something else that belongs among the run's events."""
        if kind == "joined":
            if self._first is None:  # starting processes is not training
                self._first = self._last = time.perf_counter()
            self.hosts.add(fields["host"])
            self._here += 1
            self._members.setdefault(fields["worker"], (0, 0))  # it may end before its first sign
            self.most_workers = max(self.most_workers, self._here)
        elif kind == "left":
            self._here -= 1
        self.events.send(kind.replace(" ", "_"), **fields)

    def wants_state(self, keep: commands.Keep) -> bool:
        """After the last epoch always; epochs of a few steps are taken together."""
        every = max(1, STEPS_BETWEEN_SAVES // self.task.steps_per_epoch)
        return keep.final or (keep.epoch + 1) % every == 0

    def state(self, keep: commands.Keep, parts: list[Contents]) -> None:
        """Write a checkpoint that any strategy can resume from."""
        held = self.image.take(parts, keep.memory)
        spoiled = not_finite(held.tensors)
        if spoiled:
            raise LossError(
                f"{spoiled.partition('.')[2]!r} is not finite after {keep.version} updates: "
                "nothing was saved over the weights from before; give a lower learning rate"
            )
        task = self.task
        data = order_of(task)
        reached = keep.reached
        notes = {
            "strategy": self.strategy.name, "data": data,
            "reached": [reached.position, [list(gap) for gap in reached.gaps]],
        }  # fmt: skip
        place = self.folder.path / "checkpoints"
        saved = checkpoint.save(Context(), held, place, keep.version, notes)
        checkpoint.export(saved, self.folder.weights)
        self.events.send("checkpoint", step=keep.version)

    def begin(self, workers: int) -> None:
        """Say what is going to be run."""
        task, self.first_step = self.task, self.steps
        description = {
            "strategy": self.strategy.name,
            "settings": self.strategy.settings,
            "exact": self.strategy.exact,
            "world_size": workers,
            "hosts": [socket.gethostname()],
        }
        planned = self.site.plan.to_json() if self.site.plan is not None else {}
        self.folder.write_plan({**description, **planned})
        self.events.send(
            "start",
            **description,
            device="cuda" if torch.cuda.is_available() else "cpu",
            threads=max(1, torch.get_num_threads() // workers),
            epochs=task.epochs,
            steps=self.last_step,
            steps_per_epoch=task.steps_per_epoch,
            batch_size=task.batch_size,
            samples=task.samples,
            first_step=self.first_step,
            join=self.site.listener.endpoint.removeprefix("tcp://"),
            secret=str(self.folder.path / "secret"),
            **({"elsewhere": elsewhere} if (elsewhere := self.site.terms.elsewhere) else {}),
            **({"plan": planned} if planned else {}),
        )

    def end(self, workers: int) -> dict[str, Any]:
        """Keep how it ended, and return that."""
        summary = self.summary(workers)
        self.folder.write_summary(summary)
        self.events.send("end", summary=summary)
        self.events.close()
        return summary

    def summary(self, workers: int) -> dict[str, Any]:
        """How it ended."""
        now = time.perf_counter()
        training = max(now - (self._first or self._began), 1e-9)
        pushes, sent = self._moved()
        last = max(self._losses, default=None)
        sums = self._losses[last] if last is not None else None
        return {
            "strategy": self.strategy.name,
            "settings": self.strategy.settings,
            "exact": self.strategy.exact,
            "world_size": workers,
            "hosts": sorted(self.hosts),
            "first_step": self.first_step,
            "steps": self.steps,
            "samples": self.samples,
            "seconds": now - self._began,
            "samples_per_second": self.samples / training,
            "pushes_per_second": pushes / training,
            "bytes_per_second": sent / training,
            "stopped": None,
            "train_loss": sums[0] / sums[1] if sums else None,
            "validation": self.values,
            "row_bytes": self.rows,
            "bytes_sent_per_rank": [sent for sent, _ in self._members.values()],
            "peak_memory_per_rank": [memory for _, memory in self._members.values()],
            "shares": None,
            "times_per_rank": None,
            "straggler": None,
            "predicted": self.site.plan.foretold(self.task.batch_size) if self.site.plan else None,
            "most_workers": self.most_workers,
            "lost": self.lost(),
            "staleness": self.decisions.staleness(),
            "workers": self.decisions.workers(),
            "leases": self.decisions.leases(),
            **self.decisions.more(),
            "versions": {
                "wagontrain": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
