"""A command run in every host of a test bed, with the variables that torchrun would set."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wagontrain.testbed.bed import Bed, threads
from wagontrain.testbed.links import address

MASTER_PORT = 29500
_PATIENCE = 10.0


@dataclass(frozen=True)
class Ended:
    """How the commands ended, one status per process in order of rank."""

    statuses: tuple[int, ...]
    seconds: float
    timed_out: bool = False

    @property
    def status(self) -> int:
        """0 where all ended well, else the first other one; 124 after a time-out."""
        if self.timed_out:
            return 124
        first = next((status for status in self.statuses if status), 0)
        return first if first >= 0 else 128 - first


def variables(bed: Bed, host: int, local: int, per_host: int) -> dict[str, str]:
    """What torchrun sets for the process with number `local` on a host."""
    size = bed.shape.hosts * per_host
    numbers = {
        "RANK": host * per_host + local,
        "LOCAL_RANK": local,
        "GROUP_RANK": host,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": per_host,
        "GROUP_WORLD_SIZE": bed.shape.hosts,
        "MASTER_PORT": MASTER_PORT,
        "OMP_NUM_THREADS": threads(bed.shape.cpus_of(host), per_host, bed.shape.hosts),
    }
    return {"MASTER_ADDR": address(0)} | {name: str(value) for name, value in numbers.items()}


def run(
    bed: Bed,
    command: Sequence[str],
    per_host: int = 1,
    say: Callable[[str], None] = print,
    timeout: float | None = None,
) -> Ended:
    """Run a command in every host to its end; every line it prints is named after its host.

    What is left when the time is over, or at Ctrl-C, is asked to end, and killed if it does not.

    Args:
        bed: the hosts.
        command: program and arguments.
        per_host: processes in each host.
        say: takes each line.
        timeout: seconds until all are ended; None for no limit.
    """
    began = time.monotonic()
    running: list[subprocess.Popen[str]] = []
    readers = []
    try:
        for host in range(bed.shape.hosts):
            for local in range(per_host):
                process = bed.start(
                    host, command, variables(bed, host, local, per_host),
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    text=True, errors="replace",
                )  # fmt: skip
                running.append(process)
                name = f"tb{host}" if per_host == 1 else f"tb{host}.{local}"
                readers.append(threading.Thread(target=_pass_on, args=(process, name, say)))
                readers[-1].start()
        timed_out = not _wait(running, timeout)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        if not _wait(running, _PATIENCE):
            for process in running:
                process.kill()
        for host in range(bed.shape.hosts):
            bed.kill(host)  # what the commands left behind, or their pipes stay open
        for reader in readers:
            reader.join(_PATIENCE)
    statuses = tuple(process.wait(_PATIENCE) for process in running)
    return Ended(statuses, time.monotonic() - began, timed_out)


def _wait(running: Sequence[subprocess.Popen[str]], timeout: float | None) -> bool:
    """Whether all end in time."""
    limit = None if timeout is None else time.monotonic() + timeout
    for process in running:
        try:
            process.wait(None if limit is None else max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def _pass_on(process: subprocess.Popen[str], name: str, say: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            say(f"{name} | {line.rstrip()}")
