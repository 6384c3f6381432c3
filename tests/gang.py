"""A few processes that tests share: started once, they run one function after another.

Forming a process group takes milliseconds, and so does a start from `forks`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests import forks
from wagontrain import launch
from wagontrain.launch import Place
from wagontrain.transport import Context

SIZE = 4
SECONDS = 60
STARTING = 240  # importing torch in four processes, on a machine that others use


class GangError(AssertionError):
    """A function failed in a process of the gang."""


class Gang:
    """Processes that run `function(context, *arguments)` on worlds of 1 to SIZE ranks."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: dist.TCPStore | None = None
        self._jobs = 0

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank of a world of `size`."""
        if not self._processes:
            self._start()
        self._jobs += 1
        for rank in range(size):
            self._pipes[rank].send((self._jobs, rank, size, function, arguments))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < size:
            waiting = {
                self._pipes[rank]: rank for rank in range(size) if rank not in results | failures
            }
            ready = wait(list(waiting), timeout=SECONDS)
            if not ready:
                self.stop()
                text = "".join(failures.values())
                raise GangError(f"ranks {sorted(waiting.values())} gave no answer\n{text}")
            for pipe in ready:
                good, value = pipe.recv()  # type: ignore[union-attr]
                (results if good else failures)[waiting[pipe]] = value
            if failures and len(failures) + len(results) < size:
                break
        if failures:
            self.stop()
            raise GangError("\n".join(f"rank {rank}:\n{text}" for rank, text in failures.items()))
        return [results[rank] for rank in range(size)]

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = forks.context()
        for _ in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self._store.port), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        for pipe in self._pipes:
            if not pipe.poll(STARTING):
                self.stop()
                raise GangError(f"no process was ready within {STARTING} s")
            pipe.recv()


def _serve(pipe: Connection, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=SECONDS))
    pipe.send("ready")
    while True:
        try:
            job, rank, size, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            context = Context()
            if size > 1:
                here = Place(rank, size, rank, size)
                context = launch.meet(
                    dist.PrefixStore(f"job{job}", store), here, torch.device("cpu")
                )
            result = function(context, *arguments)
            launch.leave(context)
            pipe.send((True, result))
        except Exception:  # noqa: BLE001  sent to the test
            pipe.send((False, traceback.format_exc()))
