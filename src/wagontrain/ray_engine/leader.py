"""The process that leads the actors: `python -m wagontrain.ray_engine.leader JOB_FOLDER PARENT`.

What it has to say at its end is in the job's folder; all else that it prints is Ray's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import AuthenticationError, RayError

from wagontrain import launch
from wagontrain.errors import UsageError, WagontrainError, WorkerError
from wagontrain.folder import RunFolder
from wagontrain.launch import Failure
from wagontrain.ray_engine.lead import CONNECTED, NO_TOKEN, Order, Outcome
from wagontrain.ray_engine.mirror import Copy
from wagontrain.ray_engine.placing import Member, one_line, placed
from wagontrain.ray_engine.rank import News, Post

NEWS_SECONDS = 1.0
"""How long an actor waits for something to tell before it says that there is nothing."""

SETTLE_SECONDS = 3.0
"""Time that the other ranks have to say why they ended, after one has."""

LOST_SECONDS = 20.0
"""Time to find out which rank is gone, after others have lost contact with it."""

SILENT_SECONDS = 10.0
"""A rank whose actor has not answered for so long while others lost one is the one."""


def main() -> None:
    """Lead the job in the given folder to its end; the exit status is that of its outcome."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    launch.end_with(parent, folder)
    order = Order.read(folder)
    try:
        connect(order)
        report_connected(folder)
        with placed(order.workers) as members:
            _Job(members, RunFolder(Path(order.run_dir))).lead(files_of(folder), order.directory)
    except WagontrainError as error:
        Outcome.of(error).write(folder)
        sys.exit(error.exit_status)
    finally:
        ray.shutdown()


def connect(order: Order) -> None:
    """Join the cluster.

    Raises:
        UsageError: it cannot be joined.
    """
    try:
        ray.init(address=order.address or "auto", log_to_driver=False, logging_level="ERROR")
    except AuthenticationError as error:
        raise UsageError(f"{NO_TOKEN} ({one_line(error).split('. ')[0]})") from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise UsageError(
            f"the Ray cluster {order.place} cannot be joined ({one_line(error)}): start one with "
            "`ray start --head`, run this on a machine of the cluster, or give another --address"
        ) from error


def report_connected(folder: Path) -> None:
    """Leave word of it in the job's folder: this node's address in the cluster."""
    part = folder / f"{CONNECTED}.part"
    part.write_text(ray.util.get_node_ip_address())
    part.rename(folder / CONNECTED)


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a job's folder, save what is between the launching process and this."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (Order.FILE, CONNECTED)
    }


@dataclass
class _Job:
    """The ranks at work, and what is known of how they ended."""

    members: Sequence[Member]
    run: RunFolder
    statuses: dict[int, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    gone: dict[int, str] = field(default_factory=dict)
    asked: dict[Any, int] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)

    def lead(self, files: dict[str, bytes], directory: str) -> None:
        """Start the workers, and copy the run's files until all have ended well.

        Raises:
            UsageError, TrainingError: why they did not.
        """
        self._begin(files, directory)
        copy = Copy(self.run.path)
        for rank in range(len(self.members)):
            self._ask(rank)
        limit: float | None = None
        while self.asked and (limit is None or time.monotonic() < limit):
            ready, _ = ray.wait(list(self.asked), timeout=NEWS_SECONDS)
            for reference in ready:
                self._hear(self.asked.pop(reference), reference, copy)
            limit = self._limit(limit)
            if limit is not None and self._missing():
                break
        if limit is not None:
            self._fail()

    def _begin(self, files: dict[str, bytes], directory: str) -> None:
        address = self.members[0].where.address
        job = ray.put(files)
        try:
            port = ray.get(
                self.members[0].actor.hold_store.remote(address), timeout=launch.WAIT.seconds
            )
            begun = [
                member.actor.begin.remote(
                    job,
                    Post(
                        f"rank{rank}",
                        variables(member, rank, len(self.members), address, port),
                        directory,
                    ),
                )
                for rank, member in enumerate(self.members)
            ]
            ray.get(begun, timeout=launch.WAIT.seconds)
        except RayError as error:
            raise WorkerError(f"the workers could not be started: {one_line(error)}") from error

    def _ask(self, rank: int) -> None:
        self.asked[self.members[rank].actor.news.remote(NEWS_SECONDS)] = rank
        self.since[rank] = time.monotonic()

    def _hear(self, rank: int, reference: Any, copy: Copy) -> None:
        try:
            news: News = ray.get(reference)
        except RayError as error:
            self.gone[rank] = one_line(error)
            return
        for piece in news.pieces:
            copy.put(piece)
        if news.status is None:
            self._ask(rank)
            return
        self.statuses[rank] = news.status
        if news.failure is not None:
            self.failures.append(news.failure)

    def _limit(self, before: float | None) -> float | None:
        """When to stop asking; None as long as no rank has failed."""
        failed = {rank for rank, status in self.statuses.items() if status}
        if not failed and not self.gone:
            return None
        now = time.monotonic()
        lost_others = {failure.rank for failure in self.failures if failure.follows}
        known = bool(self.gone or failed - lost_others)
        wait = SETTLE_SECONDS if known else LOST_SECONDS
        return now + wait if before is None else min(before, now + wait)

    def _missing(self) -> list[int]:
        """Ranks whose actors should have answered long ago."""
        now = time.monotonic()
        return [rank for rank in self.asked.values() if now - self.since[rank] > SILENT_SECONDS]

    def _fail(self) -> NoReturn:
        for failure in self.failures:
            self.run.write_traceback(failure.rank, failure.traceback)
        causes = [failure for failure in self.failures if not failure.follows]
        gone = [*self.gone, *self._missing()]
        if gone and not causes:
            raise self._lost(gone[0])
        codes = {rank: status for rank, status in self.statuses.items() if status}
        early = [rank for rank, status in self.statuses.items() if not status]
        hosts = {rank: member.where.host for rank, member in enumerate(self.members)}
        raise launch.cause(codes, self.failures, self.run.logs, early, hosts)

    def _lost(self, rank: int) -> WorkerError:
        host = self.members[rank].where.host
        how = self.gone.get(rank, f"no answer for {SILENT_SECONDS:.0f} s")
        return WorkerError(
            f"the Ray actor of worker rank {rank} on {host} is gone ({how}); the other workers "
            f"were stopped. What it printed is in {self.run.logs / f'rank{rank}.log'}"
        )


def variables(member: Member, rank: int, size: int, address: str, port: int) -> dict[str, str]:
    """The environment of a worker: what torchrun would set, and the GPUs of its node's ranks."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(member.local_rank),
        "LOCAL_WORLD_SIZE": str(member.local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # The store is the first actor's, as it would be the agent's under torchrun.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # All of them, as local_rank counts on; none where Ray gave none, though there may be some.
        "CUDA_VISIBLE_DEVICES": ",".join(member.gpus),
    }


if __name__ == "__main__":
    main()
