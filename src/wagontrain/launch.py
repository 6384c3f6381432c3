"""Starting processes, finding one's place among them, and ending all when one ends.

The one module that reads environment variables. Processes on this machine are started and
watched by torch.distributed.run's agent; under torchrun (or anything that sets the same
variables) a process finds its place in the environment.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from wagontrain.errors import TrainingError, UsageError, WagontrainError, WorkerError
from wagontrain.mesh import World
from wagontrain.rendezvous import LoopbackRendezvous, NoLogs, store_at
from wagontrain.transport import Context, SentBytes, lost_peer

WAIT = timedelta(seconds=300)
"""Longest time any rank waits for another, at start and in an exchange."""

GRACE_SECONDS = 5
"""Time a worker has to end after it was asked to, before it is killed."""


@dataclass(frozen=True)
class Place:
    """This process's place in a job that somebody has launched."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun's variables give; None if they are not there.

    Raises:
        UsageError: some are there and others missing, or they contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UsageError(
            f"the environment sets some of torchrun's variables but not {', '.join(missing)}: "
            "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    try:
        size, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
        place = Place(
            rank,
            size,
            int(environment.get("LOCAL_RANK", rank)),
            int(environment.get("LOCAL_WORLD_SIZE", size)),
        )
        port = int(environment["MASTER_PORT"])
    except ValueError as error:
        raise UsageError(f"torchrun's variables in the environment are wrong: {error}") from error
    if not 0 <= rank < size or not 0 <= place.local_rank < place.local_size:
        raise UsageError(
            f"RANK={rank} is not among WORLD_SIZE={size} ranks, or LOCAL_RANK={place.local_rank} "
            f"not among LOCAL_WORLD_SIZE={place.local_size}: count from 0"
        )
    if not 0 < port < 65536:
        raise UsageError(f"MASTER_PORT={port} is not a port: give a number from 1 to 65535")
    return place


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_worker(place: Place, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads for each worker: the cores divided among this machine's workers.

    OMP_NUM_THREADS is heeded, save for the 1 that torchrun sets for whoever did not set it.
    """
    given = environment.get("OMP_NUM_THREADS", "")
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in environment and place.local_size > 1
    if given.isdigit() and int(given) > 0 and not by_torchrun:
        return int(given)
    return max(1, cores() // place.local_size)


def device_for(place: Place) -> torch.device:
    """One GPU for each local rank where there are GPUs, the CPU otherwise.

    Raises:
        UsageError: there are GPUs, but fewer than local ranks.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu")
    if place.local_size > gpus:
        raise UsageError(
            f"{place.local_size} workers were asked for on a machine with {gpus} GPU(s): use at "
            f"most {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", place.local_rank)


def join(place: Place | None) -> Context:
    """Take one's place: choose device and threads, and meet the other ranks.

    Raises:
        UsageError: the port to meet at is in use, or the devices do not suffice.
        WorkerError: not all ranks came in time.
    """
    if place is None or place.size == 1:
        return Context(World(device=device_for(Place()), threads=torch.get_num_threads()))
    device = device_for(place)
    torch.set_num_threads(threads_per_worker(place))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent holds the store already; without it, rank 0 does.
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = store_at(address, port, WAIT, host=place.rank == 0 and not held)
        return meet(store, place, device)
    except (dist.DistError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} is in use by another program: give a free MASTER_PORT "
                "(torchrun --master-port)"
            ) from error
        raise WorkerError(
            f"rank {place.rank} could not meet the other {place.size - 1} at {address}:{port} "
            f"within {WAIT.total_seconds():.0f} s: start all of them, and check that they reach "
            f"this address ({str(error).splitlines()[0]})"
        ) from error


def meet(store: Store, place: Place, device: torch.device) -> Context:
    """Form the process groups with the ranks that come to the same store."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sent = SentBytes()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=WAIT,
    )
    side = dist.new_group(timeout=WAIT)
    world = World(
        place.rank, place.size, place.local_rank, place.local_size, device, torch.get_num_threads()
    )
    return Context(world, dist.group.WORLD, side, sent, store)


def leave(context: Context) -> None:
    """Part from the other ranks in good order."""
    context.sent.close()
    if context.group is not None:
        context.barrier()
        dist.destroy_process_group()


# --- the worker's end of a local launch ---------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why a worker ended, as it says itself.

    kind: "usage", "training" (a message for the user), "crash" (an unexpected exception) or
    "peer" (it lost contact with another rank, which is a consequence and not a cause).
    """

    rank: int
    kind: str
    message: str
    traceback: str
    time: float

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What `error` means for the job."""
        if lost_peer(error):
            kind = "peer"
        elif isinstance(error, UsageError):
            kind = "usage"
        elif isinstance(error, WagontrainError | SystemExit):
            kind = "training"
        else:
            kind = "crash"
        message = str(error) or type(error).__name__
        if isinstance(error, SystemExit):
            message = f"the task ended the process by sys.exit({error.code!r})"
        if kind == "peer":
            message = f"lost contact with another worker ({brief(message)})"
        trace = "".join(traceback.format_exception(error))
        return cls(rank, kind, message, trace, time.time())

    @property
    def exit_status(self) -> int:
        """The exit status of a process that ends with this."""
        return UsageError.exit_status if self.kind == "usage" else WagontrainError.exit_status

    def error(self, prefix: str = "") -> WagontrainError:
        """The error to raise in the launching process."""
        if self.kind == "usage":
            return UsageError(prefix + self.message)
        if self.kind == "training":
            return TrainingError(prefix + self.message)
        return TrainingError(f"worker rank {self.rank} failed:\n{self.traceback.rstrip()}")


def brief(text: str) -> str:
    """The first line of an error of Gloo or a store, without where in its source it arose."""
    line = text.splitlines()[0] if text else "no reason given"
    return re.sub(r"^(\[[^\]]*\]\s*)+", "", line).split(". ")[0]


def work(folder: Path, job: Callable[[Place | None], None]) -> int:
    """Run `job` as a worker that the agent started; returns the exit status.

    The failure, if there is one, is left in `folder` for the launching process, which shows the
    one that caused the others.
    """
    place = place_from_environment()
    _end_with(os.getppid(), folder)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", _loopback())
    try:
        job(place)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the launching process reports it
        failure = Failure.of(place.rank if place else 0, error)
        part = folder / f"failure-{failure.rank}.part"
        part.write_text(json.dumps(asdict(failure)))
        part.rename(part.with_suffix(".json"))
        return failure.exit_status
    return 0


def _end_with(parent: int, folder: Path | None = None) -> None:
    """End this process at once when its parent has ended, however that happened.

    `folder`, which the parent can no longer remove, is removed.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


# --- the launching end --------------------------------------------------------------------------


def start_workers(command: Sequence[str], workers: int, folder: Path, logs: Path) -> None:
    """Run `command` in so many processes on this machine until all have ended well.

    Args:
        command: program and arguments, the same for each.
        workers: number of processes.
        folder: where they leave their failures.
        logs: where what they print goes, a file for each rank.

    Raises:
        UsageError, TrainingError: what the worker that failed first said.
        WorkerError: a worker was killed, or ended without saying why.
        KeyboardInterrupt: Ctrl-C; the workers were ended first.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import SignalException

    rendezvous = LoopbackRendezvous(WAIT)
    spec = WorkerSpec(
        role="worker",
        local_world_size=workers,
        entrypoint="/bin/sh",
        args=("-c", _INTO_OWN_LOG, str(logs), *command),
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=0.1,
    )
    agent = LocalElasticAgent(
        spec,
        logs_specs=NoLogs(),
        exit_barrier_timeout=GRACE_SECONDS,
        shutdown_timeout=GRACE_SECONDS,
    )
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with _quiet_agent():
            result = agent.run()
    except SignalException as stop:
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise WorkerError(f"ended by {stop.sigval.name}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        rendezvous.shutdown()
    if result.is_failed():
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        early = [rank for rank in range(workers) if rank not in codes]
        failures = read_failures(folder)
        for failure in failures:
            (logs / f"rank{failure.rank}.traceback").write_text(failure.traceback)
        raise cause(codes, failures, logs, early)


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Within, the agent does not log: it reports at length what is said once by `cause`."""
    prefix = "torch.distributed.elastic"
    names = [name for name in logging.root.manager.loggerDict if name.startswith(prefix)]
    before = {name: logging.getLogger(name).disabled for name in names}
    try:
        for name in names:
            logging.getLogger(name).disabled = True
        yield
    finally:
        for name, disabled in before.items():
            logging.getLogger(name).disabled = disabled


# The shell becomes the command; torch's agent would leave the files open in this process.
_INTO_OWN_LOG = 'exec "$@" >"$0/rank$RANK.log" 2>&1'

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def read_failures(folder: Path) -> list[Failure]:
    """What workers left about their ends."""
    return [Failure(**json.loads(path.read_text())) for path in folder.glob("failure-*.json")]


def cause(
    codes: Mapping[int, int],
    failures: Sequence[Failure],
    logs: Path,
    early: Sequence[int] = (),
) -> WagontrainError:
    """The error to raise for a job in which several workers ended: the first cause of all.

    A worker that was killed cannot say so, while its peers notice within milliseconds; so a
    signal goes before losing contact with a peer. SIGTERM is what the agent sends to the rest.

    Args:
        codes: exit status of each rank that ended, negative for a signal, in the order in which
            the agent noticed.
        failures: what workers said.
        logs: folder of what they printed.
        early: ranks that ended with status 0 while others failed.
    """
    own = sorted((item for item in failures if item.kind != "peer"), key=lambda item: item.time)
    seen = list(codes)
    killed = [rank for rank in seen if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
    if killed and not (own and seen.index(own[0].rank) < seen.index(killed[0])):
        rank = killed[0]
        name = signal.Signals(-codes[rank]).name
        hint = " (if nobody did that, the machine ran out of memory)" if name == "SIGKILL" else ""
        return WorkerError(
            f"worker rank {rank} was killed by {name}{hint}; the other workers were stopped. "
            f"What it printed is in {logs / f'rank{rank}.log'}"
        )
    if own:
        alike = len({item.message for item in own}) == 1 and len(own) == len(codes)
        return own[0].error("" if alike else f"rank {own[0].rank}: ")
    said = {failure.rank for failure in failures}
    silent = [rank for rank in seen if rank not in said]
    if silent:
        rank = silent[0]
        how = (
            f"was ended by {signal.Signals(-codes[rank]).name}"
            if codes[rank] < 0
            else f"ended with status {codes[rank]} without saying why"
        )
        return WorkerError(
            f"worker rank {rank} {how}; the other workers were stopped. What it printed last, "
            f"from {logs}:\n{last_words(logs, rank)}"
        )
    if early:
        return WorkerError(
            f"worker rank {early[0]} ended early, with status 0, and the others lost it. What it "
            f"printed last, from {logs}:\n{last_words(logs, early[0])}"
        )
    first = min(failures, key=lambda item: item.time)
    return WorkerError(f"worker rank {first.rank} {first.message}")


def last_words(logs: Path, rank: int, lines: int = 10) -> str:
    """The end of what a worker printed."""
    file = logs / f"rank{rank}.log"
    printed = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(printed[-lines:]) or "(nothing)"


def worker_command(folder: Path) -> list[str]:
    """The command that runs the job described in `folder` as a worker."""
    return [sys.executable, "-u", "-m", "wagontrain.worker", str(folder)]
