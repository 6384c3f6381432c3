"""The processes of a job whose workers come and go: who is started, and started again."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from wagontrain import launch
from wagontrain.errors import WorkerError
from wagontrain.launch.failure import last_words, read_failures
from wagontrain.launch.network import free_port
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.wire import Secret

GRACE = 5.0
"""Seconds a process has to end after it was told to, before it is killed."""

_QUICK = 20.0
_TRIES = 3


@dataclass
class Hand:
    """A process of the crew; started again, it keeps its place.

    Args:
        number: its number among those of its kind.
        serves: whether it is a server shard.
        host: where it is.
        process: its number there.
        began: when it was started, by `time.monotonic`.
        quick_ends: how often in a row it ended soon after.
    """

    number: int
    serves: bool
    host: str = ""
    process: int = -1
    began: float = 0.0
    quick_ends: int = 0

    @property
    def name(self) -> str:
        """That of its log."""
        return f"{'server' if self.serves else 'rank'}{self.number}"

    @property
    def what(self) -> str:
        """For a message."""
        return f"{'server shard' if self.serves else 'worker'} {self.number}"

    def ended(self, how: str, logs: Path) -> None:
        """It has ended; how often may that be?

        Raises:
            WorkerError: it ends again and again.
        """
        quick = time.monotonic() - self.began < _QUICK
        self.quick_ends = self.quick_ends + 1 if quick else 0
        if self.quick_ends >= _TRIES:
            raise WorkerError(
                f"{self.what} {how}, {_TRIES} times within {_QUICK:.0f} s of its start; what it "
                f"printed last, from {logs / self.name}.log:\n{last_words(logs, self.name)}"
            )


class Crew(ABC):
    """The processes of a job.

    Args:
        logs: where what they print goes.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs

    travels: ClassVar[bool] = False
    """Whether the job goes to other hosts, which have not the task's files."""

    @property
    @abstractmethod
    def address(self) -> str:
        """At which all of them reach this process."""

    @abstractmethod
    def begin(self, job: Path, coordinator: str, shards: int, workers: int) -> None:
        """Start so many shards and workers.

        Args:
            job: folder of the workers' job.
            coordinator: where it listens.
            shards, workers: how many.
        """

    @abstractmethod
    def look_after(self, coordinator: Coordinator) -> None:
        """Start again what has ended, unless it said that there is no use.

        Raises:
            UsageError, TrainingError: what a worker said.
            WorkerError: a process ends again and again.
        """

    @abstractmethod
    def end(self, coordinator: Coordinator) -> None:
        """Wait until all have ended, which they were told to; kill who does not."""

    @abstractmethod
    def close(self) -> None:
        """End whatever is left."""

    def tell(self, coordinator: Coordinator, hand: Hand, how: str) -> None:
        """A process has ended and is to be started again.

        Raises:
            WorkerError: it ends again and again.
        """
        hand.ended(how, self.logs)
        coordinator.gone(hand.process, how, hand.host)
        fields = {"what": hand.what, "process": hand.process, "why": how}
        coordinator.observer.noted("restarted", fields)


class LocalCrew(Crew):
    """Processes on this host.

    Args:
        logs: where what they print goes.
        secret: of the job; each reads it from its standard input.
        address: of this host, at which all listen.
    """

    def __init__(self, logs: Path, secret: Secret, address: str) -> None:
        super().__init__(logs)
        self._secret = secret
        self._address = address
        self._job = Path()
        self._workers = 0
        self._started: list[tuple[Hand, list[str], subprocess.Popen[bytes]]] = []

    @property
    def address(self) -> str:
        """Loopback, or what other hosts reach this one by."""
        return self._address

    def begin(self, job: Path, coordinator: str, shards: int, workers: int) -> None:
        """Start them; workers share the cores and GPUs."""
        self._job, self._workers = job, workers
        for number in range(shards):  # a port that it keeps when it is started again
            place = (self.address, free_port(self.address), self.logs.parent)
            self._start(Hand(number, serves=True), shard_command(coordinator, number, *place))
        for number in range(workers):
            self._start(Hand(number, serves=False), launch.worker_command(job))

    def _start(self, hand: Hand, command: list[str]) -> None:
        popen = begun(hand, command, self.logs, self._secret, self._workers)
        self._started.append((hand, command, popen))

    def look_after(self, coordinator: Coordinator) -> None:
        """Start again what has ended."""
        for each in list(self._started):
            hand, command, popen = each
            status = popen.poll()
            if status is None or (status == 0 and coordinator.finished):
                continue
            for failure in read_failures(self._job):
                (self.logs / f"rank{failure.rank}.traceback").write_text(failure.traceback)
                raise failure.error("")
            self.tell(coordinator, hand, how_it_ended(status))
            self._started.remove(each)
            self._start(hand, command)

    def end(self, coordinator: Coordinator) -> None:
        """Wait for all, and kill who is late."""
        limit = time.monotonic() + GRACE
        popens = [popen for _, _, popen in self._started]
        while time.monotonic() < limit and any(popen.poll() is None for popen in popens):
            coordinator.say_over(0.1)  # one that was just started has not heard it yet
        for popen in popens:
            if popen.poll() is None:
                popen.kill()
                popen.wait(GRACE)

    def close(self) -> None:
        """All have ended by then."""


def begun(
    hand: Hand, command: list[str], logs: Path, secret: Secret, workers: int = 1
) -> subprocess.Popen[bytes]:
    """Start a process on this host, which is told the job's secret.

    Args:
        hand: its place; what it prints goes to the log of that name.
        command: program and arguments.
        logs: where logs are.
        secret: of the job; the process reads it from its standard input.
        workers: of this host, which share its cores and GPUs.
    """
    environment = launch.environment_of(hand.number, workers)
    with (logs / f"{hand.name}.log").open("ab") as output:
        popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            env=environment,
        )  # fmt: skip
    hand.host, hand.process, hand.began = socket.gethostname(), popen.pid, time.monotonic()
    assert popen.stdin is not None
    with contextlib.suppress(BrokenPipeError), popen.stdin:  # it may have ended already
        popen.stdin.write(secret.text.encode() + b"\n")
    return popen


def how_it_ended(status: int) -> str:
    """What an exit status means."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def shard_command(
    coordinator: str, number: int, address: str, port: int, folder: Path
) -> list[str]:
    """The command of a server shard.

    Args:
        coordinator: where it listens.
        number: which shard it is.
        address, port: where the shard is to listen.
        folder: from which the file that it keeps its state in is named.
    """
    program = [sys.executable, "-u", "-m", "wagontrain.servers.serving"]
    return [*program, coordinator, str(number), address, str(port), str(folder)]
