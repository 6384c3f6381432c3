"""Engines: what starts the worker processes of a job, and where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from wagontrain import launch, ray_engine
from wagontrain.errors import UsageError, nearest
from wagontrain.folder import RunFolder
from wagontrain.launch import Place

if TYPE_CHECKING:
    from wagontrain.hands import Crew
    from wagontrain.servers.wire import Secret

MOST_WORKERS_PER_CORE = 32


class Engine(ABC):
    """A way of starting workers."""

    travels: ClassVar[bool]
    """Whether jobs go to other hosts, which have neither the task's files nor the run's folder."""

    @abstractmethod
    def count(self, workers: int | None, place: Place | None) -> int:
        """How many workers there are to be.

        Args:
            workers: how many were asked for, if so.
            place: this process's place in a job that somebody else started.

        Raises:
            UsageError: this engine cannot start so many.
        """

    @abstractmethod
    def run(self, folder: Path, workers: int, run: RunFolder) -> None:
        """Run the job in a folder in so many workers, until all have ended well.

        Raises:
            UsageError, TrainingError: what the worker that failed first said.
            WorkerError: a worker was killed, or ended without saying why.
            KeyboardInterrupt: Ctrl-C; the workers were ended first.
        """

    @abstractmethod
    def crew(
        self, folder: Path, run: RunFolder, secret: Secret, workers: int, interface: str | None
    ) -> Crew:
        """Who starts the processes of a job whose workers come and go.

        Args:
            folder: of the job.
            run: the run's folder.
            secret: of the job.
            workers: how many there will be.
            interface: network interface to talk to other hosts by, if it was named.

        Raises:
            UsageError: they cannot be started here.
        """


class Local(Engine):
    """Processes on this machine."""

    travels = False

    def count(self, workers: int | None, place: Place | None) -> int:
        """One for each GPU, or one, where not asked for."""
        if place is not None and workers not in (None, place.size):
            raise UsageError(
                f"{workers} workers were asked for in a job of {place.size} that torchrun "
                "started: leave the number out"
            )
        count = place.size if place else max(1, torch.cuda.device_count())
        if workers is not None:
            count = workers
        check_workers(count, place)
        return count

    def run(self, folder: Path, workers: int, run: RunFolder) -> None:
        """Run a job; see `launch.start_workers`."""
        launch.start_workers(launch.worker_command(folder), workers, folder, run.logs)

    def crew(
        self, folder: Path, run: RunFolder, secret: Secret, workers: int, interface: str | None
    ) -> Crew:
        """Processes beside this one, on loopback unless an interface is named."""
        from wagontrain.hands import LocalCrew  # few strategies need what it brings along

        address = launch.named(interface).address if interface else "127.0.0.1"
        return LocalCrew(run.logs, secret, address)


class Ray(Engine):
    """Actors on a Ray cluster.

    Args:
        address: of the cluster; None for the one that Ray finds by itself.
    """

    travels = True

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    def count(self, workers: int | None, place: Place | None) -> int:
        """As many as asked for; the cluster says later whether it has room."""
        if place is not None:
            raise UsageError(
                f"the ray engine was asked for in a job of {place.size} that torchrun or Slurm "
                "started: start one process without them, or leave the engine out"
            )
        if workers is None:
            raise UsageError("the ray engine has to be told how many workers: give --workers")
        if workers < 1:
            raise UsageError(f"{workers} workers were asked for: give at least 1")
        ray_engine.require_ray(self.address)
        return workers

    def run(self, folder: Path, workers: int, run: RunFolder) -> None:
        """Run a job; see `ray_engine.start_workers`."""
        ray_engine.start_workers(folder, workers, run, self.address)

    def crew(
        self, folder: Path, run: RunFolder, secret: Secret, workers: int, interface: str | None
    ) -> Crew:
        """Actors, which Ray restarts when their node is lost."""
        from wagontrain.ray_engine.crewing import RayCrew

        if interface:
            raise UsageError(
                f"--interface {interface}: on a Ray cluster all listen at the addresses that Ray "
                "knows the nodes by; leave it out"
            )
        return RayCrew(folder, run, secret, workers, self.address)


ENGINES = ("local", "ray")


def make_engine(name: str, address: str | None = None) -> Engine:
    """The engine of this name.

    Args:
        name: one of `ENGINES`.
        address: of the Ray cluster.

    Raises:
        UsageError: there is none such, or the address is not for it.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}: {nearest(name, ENGINES)}")
    if name == "ray":
        return Ray(address)
    if address is not None:
        raise UsageError("--address is that of a Ray cluster: give --engine ray with it")
    return Local()


def check_workers(count: int, place: Place | None) -> None:
    """Refuse numbers of workers that make no sense on one machine.

    Raises:
        UsageError: fewer than one, or many more than there are cores.
    """
    if count < 1:
        raise UsageError(f"{count} workers were asked for: give at least 1")
    most = MOST_WORKERS_PER_CORE * launch.cores()
    if place is None and count > most:
        raise UsageError(
            f"{count} workers were asked for on a machine with {launch.cores()} cores: each "
            f"would be starved; use at most {most}, better {launch.cores()}"
        )
