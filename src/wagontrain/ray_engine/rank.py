"""What an actor does on its node: it starts one worker process, and tells what becomes of it.

The worker is the same as under the local engine. It is not the actor's own process, because
PyTorch's data loading forks, which a process with Ray's threads in it does not survive unharmed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
from torch.distributed import TCPStore

from wagontrain import launch
from wagontrain.folder import RunFolder
from wagontrain.launch import Failure
from wagontrain.launch.network import free_port
from wagontrain.launch.rendezvous import store_at
from wagontrain.ray_engine.mirror import Original, Piece
from wagontrain.ray_engine.scratch import Scratch, sweep
from wagontrain.ray_engine.sources import RUN
from wagontrain.version import __version__

_TICK = 0.1


def versions() -> dict[str, str]:
    """The versions that have to be alike on all nodes."""
    return {"wagontrain": __version__, "torch": torch.__version__.partition("+")[0]}


@dataclass(frozen=True)
class Where:
    """Where an actor is.

    Args:
        node: Ray's name of the node.
        host: the node's own name.
        address: by which the other nodes reach it.
        gpus: the numbers or names of the GPUs that Ray gave the actor.
        versions: of what is installed there.
        cores: of the node, as far as they are for it.
    """

    node: str
    host: str
    address: str
    gpus: list[str]
    versions: dict[str, str]
    cores: int


@dataclass(frozen=True)
class News:
    """What has happened since the last time.

    Args:
        pieces: of the run's files.
        status: the worker's exit status once it has ended and all its files have been sent,
            negative for a signal; None before.
        failure: what the worker said about its end.
    """

    pieces: list[Piece]
    status: int | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Post:
    """What an actor's process is to do.

    Args:
        name: of its log.
        variables: of its environment, beside the node's.
        directory: the launching process's own, which the process takes if it is here too.
        command: program and arguments, "FOLDER" for the job's folder; none for a worker's.
        said: what it reads from its standard input.
    """

    name: str
    variables: Mapping[str, str]
    directory: str
    command: tuple[str, ...] = ()
    said: str = field(default="", repr=False)


FOLDER = "FOLDER"
"""In a command: the job's folder, whose place is known on the node only."""


class Rank:
    """The actor of one rank, or of one server shard."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._scratch: Scratch | None = None
        self._original: Original | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._post: Post | None = None

    def where(self) -> Where:
        """Where this is."""
        return Where(
            ray.get_runtime_context().get_node_id(),
            socket.gethostname(),
            ray.util.get_node_ip_address(),
            [str(gpu) for gpu in ray.get_gpu_ids()],
            versions(),
            launch.cores(),
        )

    def hold_store(self, address: str) -> int:
        """Hold the store where the ranks meet, at one address of this node; returns the port."""
        self._store = store_at(address, 0, launch.WAIT, host=True)
        return self._store.port

    def port(self, address: str) -> int:
        """A port of this node that nothing listens on now."""
        return free_port(address)

    def begin(self, job: Mapping[str, bytes], post: Post) -> int:
        """Start the process; returns its number.

        Args:
            job: the job's files.
            post: what it is to do.
        """
        sweep()
        self._scratch = Scratch()
        folder = self._scratch.path
        for name, content in job.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self._original = Original(RunFolder.create(folder / RUN, "ray").path)
        self._post = post
        return self.again()

    def again(self) -> int:
        """Start the process once more, where it has ended; returns its number."""
        assert self._scratch is not None
        assert self._post is not None
        folder, post = self._scratch.path, self._post
        settings = [f"{name}={value}" for name, value in post.variables.items()]
        command = [word.replace(FOLDER, str(folder)) for word in post.command]
        with (RunFolder(folder / RUN).logs / f"{post.name}.log").open("ab") as log:
            self._worker = subprocess.Popen(
                ["env", *settings, *(command or launch.worker_command(folder))],
                cwd=post.directory if Path(post.directory).is_dir() else folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._worker.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._worker.stdin:
            self._worker.stdin.write(post.said.encode())
        return self._worker.pid

    def news(self, patience: float) -> News:
        """What has happened since the last call; waits up to so many seconds for something."""
        assert self._scratch is not None
        assert self._original is not None
        assert self._worker is not None
        limit = time.monotonic() + patience
        while True:
            status = self._worker.poll()  # before looking: it writes nothing afterwards
            pieces = self._original.pieces()
            if pieces:
                return News(pieces)
            if status is not None:
                failures = launch.read_failures(self._scratch.path)
                return News([], status, failures[0] if failures else None)
            if time.monotonic() > limit:
                return News([])
            time.sleep(_TICK)

    def end(self) -> None:
        """End the worker, if it has not ended, and remove what was put here."""
        if self._worker is not None:
            if self._worker.poll() is None:
                os.killpg(self._worker.pid, signal.SIGKILL)  # with its data loaders
            self._worker.wait()
        if self._original is not None:
            self._original.close()
        if self._scratch is not None:
            self._scratch.remove()
        self._store = None
