"""Starting processes on this machine, and ending all when one ends.

They are started and watched by torch.distributed.run's agent.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from wagontrain.errors import WorkerError
from wagontrain.launch.failure import Failure, cause, read_failures
from wagontrain.launch.meeting import WAIT
from wagontrain.launch.pages import ask_for_large_pages
from wagontrain.launch.place import Place, place_from_environment
from wagontrain.launch.rendezvous import LoopbackRendezvous, NoLogs

GRACE_SECONDS = 5
"""Time a worker has to end after it was asked to, before it is killed."""


# --- the worker's end ---------------------------------------------------------------------------


def work(folder: Path, parent: int, job: Callable[[Place | None], None]) -> int:
    """Run `job` as a worker that process `parent` started; returns the exit status.

    The failure, if there is one, is left in `folder` for the launching process, which shows the
    one that caused the others.
    """
    ask_for_large_pages()
    place = place_from_environment()
    end_with(parent, folder)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        job(place)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the launching process reports it
        failure = Failure.of(place.rank if place else 0, error)
        failure.leave(folder)
        return failure.exit_status
    return 0


def end(status: int) -> NoReturn:
    """End this process as the interpreter would, save that C++ is not taken apart.

    Threads of torch.distributed may still wait for ranks that are gone, and seldom one aborts the
    process (SIGABRT) while its statics go: after everything was done, saved and told.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at any end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with(parent: int, folder: Path | None = None) -> None:
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


def worker_command(folder: Path) -> list[str]:
    """The command that runs the job described in `folder` as a worker of this process."""
    # Told who its parent is, it notices if the parent has ended before it could ask.
    return [sys.executable, "-u", "-m", "wagontrain.worker", str(folder), str(os.getpid())]
