"""The launching end: a process that leads the actors, its time bounded, its outcome raised."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from wagontrain.errors import TrainingError, UsageError, WagontrainError, WorkerError
from wagontrain.folder import RunFolder

CONNECT_SECONDS = 30.0
"""Longest wait for an answer from the cluster."""

END_SECONDS = 20.0
"""Time that the leader has to end the actors before it is ended itself."""

CONNECTED = "connected"
"""The file that says that the cluster has answered."""

NO_TOKEN = (
    "the Ray cluster does not take this user's token: set RAY_AUTH_MODE=token, and put the token "
    "that the cluster was started with into ~/.ray/auth_token or RAY_AUTH_TOKEN"
)

_REFUSED = "InvalidAuthToken"
_TICK = 0.1
_LAST_LINES = 10


@dataclass(frozen=True)
class Order:
    """What the leader has to know beside the job.

    Args:
        address: of the cluster; None for the one that Ray finds by itself.
        workers: how many ranks.
        run_dir: where the run's files go on this machine.
        directory: the launching process's own.
    """

    FILE: ClassVar[str] = "ray.json"

    address: str | None
    workers: int
    run_dir: str
    directory: str

    def write(self, folder: Path) -> None:
        """Leave it in the job's folder."""
        (folder / self.FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Order:
        """The order in a folder."""
        return cls(**json.loads((folder / cls.FILE).read_text()))

    @property
    def place(self) -> str:
        """Which cluster it is, for a message."""
        return f"at {self.address}" if self.address else "that RAY_ADDRESS or this machine names"


@dataclass(frozen=True)
class Outcome:
    """The error that a job ended with, in a file."""

    FILE: ClassVar[str] = "outcome.json"

    kind: str
    message: str

    @classmethod
    def of(cls, error: WagontrainError) -> Outcome:
        """What is to be raised for `error` in the launching process."""
        kinds = (UsageError, WorkerError, TrainingError, WagontrainError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        return cls(kind.__name__, str(error))

    def write(self, folder: Path) -> None:
        """Leave it in the job's folder."""
        part = folder / "outcome.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(folder / self.FILE)

    @classmethod
    def read(cls, folder: Path) -> WagontrainError | None:
        """The error in a folder; None where none was left."""
        file = folder / cls.FILE
        if not file.exists():
            return None
        found = cls(**json.loads(file.read_text()))
        kinds = (UsageError, WorkerError, TrainingError, WagontrainError)
        kind = next(kind for kind in kinds if kind.__name__ == found.kind)
        return kind(found.message)


class Leader:
    """The process that leads actors, as the launching process sees it.

    Args:
        program: which one, a module of this package.
        folder: of the job.
        order: what it has to know.
        log: where what it prints goes.
    """

    def __init__(self, program: str, folder: Path, order: Order, log: Path) -> None:
        self.folder, self.order, self.log = folder, order, log
        order.write(folder)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", f"wagontrain.ray_engine.{program}", str(folder),
                 str(os.getpid())],
                stdin=subprocess.PIPE, stdout=out, stderr=out,
                start_new_session=True,  # Ctrl-C goes to this process, which passes it on once
            )  # fmt: skip

    def connect(self) -> str:
        """Wait until the cluster has answered; returns this node's address there, if it did.

        Raises:
            UsageError: it does not answer, or refuses.
        """
        limit = time.monotonic() + CONNECT_SECONDS
        while not self.connected and self.process.poll() is None:
            # Ray tries a token that was refused again and again, and does not say why at the end.
            if _REFUSED in self.log.read_text(errors="replace"):
                raise UsageError(NO_TOKEN)
            if time.monotonic() > limit:
                raise UsageError(
                    f"the Ray cluster {self.order.place} did not answer within "
                    f"{CONNECT_SECONDS:.0f} s: check the address with `ray status`, or start a "
                    "cluster with `ray start --head`"
                )
            time.sleep(_TICK)
        return (self.folder / CONNECTED).read_text() if self.connected else ""

    @property
    def connected(self) -> bool:
        """Whether the cluster has answered."""
        return (self.folder / CONNECTED).exists()

    def end(self) -> None:
        """End it, and so the actors; where it does not end them, Ray does."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.poll() is not None:
            return
        if self.connected:
            self.process.terminate()
        else:
            self.process.kill()  # it has made nothing yet, and Ray does not listen while it tries
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def settle(self) -> None:
        """It has ended: raise what it ended with, if not well."""
        error = Outcome.read(self.folder)
        if error is not None:
            raise error
        if self.process.returncode and not self.connected:
            raise UsageError(
                f"Ray could not connect to the cluster {self.order.place} ({_reason(self.log)}): "
                "this machine has to be a node of it; make it one by `ray start --address`, or go "
                "to one"
            )
        if self.process.returncode:
            raise WorkerError(
                "the process that leads the Ray actors ended with status "
                f"{self.process.returncode}: the connection to the cluster was lost, or the like. "
                f"What it printed last, from {self.log}:\n"
                + "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            )
        if not self.log.stat().st_size:
            self.log.unlink()


def start_workers(folder: Path, workers: int, run: RunFolder, address: str | None) -> None:
    """Run the job in a folder on a Ray cluster, until all workers have ended well.

    Args:
        folder: of the job, which is sent to the nodes.
        workers: how many, one actor for each.
        run: where the run's files are copied to while they grow.
        address: of the cluster; None for the one that Ray finds by itself.

    Raises:
        UsageError: no cluster answers, or it has not the resources; or what the worker that
            failed first said.
        TrainingError: likewise, or a worker is gone.
        KeyboardInterrupt: Ctrl-C; the actors were ended first.
    """
    order = Order(address, workers, str(run.path.absolute()), str(Path.cwd()))
    leader = Leader("leader", folder, order, run.logs / "ray.log")
    try:
        leader.connect()
        leader.process.wait()
    finally:
        leader.end()
    leader.settle()


def _reason(log: Path) -> str:
    """What Ray's own code said before it ended the process."""
    fatal = re.search(r"^\[[^\]]* C [^\]]*\] \S+ (.*)$", log.read_text(errors="replace"), re.M)
    return fatal[1].strip() if fatal else "it did not say why"


def require_ray(address: str | None) -> None:
    """Check what can be checked without a cluster.

    Raises:
        UsageError: Ray is not installed, or the address is one of Ray Client.
    """
    if address is not None and "://" in address:
        raise UsageError(
            f"--address {address}: Ray Client is not supported; start this on a machine of the "
            "cluster, and give the address of its head, such as 10.0.0.1:6379"
        )
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs Ray, which is not installed: pip install 'wagontrain[ray]', here "
            "and on all nodes"
        )
