"""Processes on test-bed hosts that start at once: forks (see `forks`) that move into a host.

One can be told to stop in a phase, so that a test can kill it, stop it or cut it off right there.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.commands import SCRIPTS
from tests.forks import Fork
from wagontrain.testbed import links
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.links import address
from wagontrain.testbed.run import variables

# Long enough for processes that get little of a busy machine.
PATIENCE = 5.0
ASKED = (
    "run", "job.py:watched", "--strategy", "data-parallel", "--run-dir", "R",
    "--patience", str(PATIENCE),
)  # fmt: skip


def wait_for(file: Path, seconds: float = 60) -> None:
    """Return when the file is there."""
    limit = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < limit, f"no {file.name}"
        time.sleep(0.05)


def way_into(bed: Bed, host: int) -> Any:
    """What moves the process that calls it into a host, as `Bed.start` starts one there."""
    namespace = links.NAMESPACES / bed.namespaces[host]
    return partial(_enter, host, bed.caps.files(host), namespace, bed.folder / "hosts")


def _enter(host: int, groups: list[Path], namespace: Path, names: Path) -> None:
    for group in groups:
        group.write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
    with namespace.open() as file:
        failed = libc.setns(file.fileno(), 0)
    if failed or libc.unshare(_NEW_MOUNTS | _NEW_HOST_NAME):
        raise OSError(ctypes.get_errno(), "the process cannot enter the host")
    Path("/proc/sys/kernel/hostname").write_text(f"tb{host}")
    for mount in (["--make-rprivate", "/"], ["--bind", str(names), "/etc/hosts"]):
        subprocess.run(["mount", *mount], check=True, timeout=10)


_NEW_MOUNTS, _NEW_HOST_NAME = 0x0002_0000, 0x0400_0000  # CLONE_NEWNS, CLONE_NEWUTS of sched.h


class Nursery:
    """Hosts of a test bed, and the forks in them."""

    def __init__(self, hosts: int, **shape: Any) -> None:
        self.bed = Bed.up(Shape(hosts, **shape))
        self.children: list[Child] = []

    def run(
        self,
        host: int,
        size: int,
        folder: Path,
        *arguments: str,
        first: int = 0,
        phase: str = "",
        environment: Mapping[str, str | None] | None = None,
    ) -> Child:
        """Start `wagontrain ARGUMENTS` as the rank of a host in a job of so many.

        The job is on the hosts from `first` on. With `phase`, the rank writes its number to a
        file `reached` when it comes to that phase, and stays there. `environment` replaces
        variables, or with None removes them.
        """
        given = {
            **os.environ, **variables(self.bed, host, 0, 1),
            "RANK": str(host - first), "WORLD_SIZE": str(size), "MASTER_ADDR": address(first),
            # A port of its own for each job.
            "MASTER_PORT": str(20_000 + zlib.crc32(bytes(folder)) % 9_000), **(environment or {}),
        }  # fmt: skip
        child = Child(
            [SCRIPTS / "wagontrain", *arguments], folder,
            {name: value for name, value in given.items() if value is not None},
            before=partial(_arrive, way_into(self.bed, host), phase, folder / "reached"),
        )  # fmt: skip
        self.children.append(child)
        return child

    def reset(self) -> None:
        """End all children, and heal all links."""
        for child in self.children:
            child.close()
        for host in range(self.bed.shape.hosts):
            self.bed.heal(host)
        self.children.clear()

    def down(self) -> None:
        """Take the hosts down."""
        self.bed.down()


class Child(Fork):
    """One rank under way."""

    def end(self, within: float) -> tuple[int, str]:
        """Its exit status and what it said, once it has ended, which has to be in time."""
        out, err = self.communicate(within)
        assert self.returncode is not None
        return self.returncode, out + err


def _arrive(enter: Any, phase: str, reached: Path) -> None:
    enter()
    _stay_in(phase, reached)


def _stay_in(phase: str, reached: Path) -> None:
    from wagontrain.watch import RankWatch

    usual = RankWatch.at

    def at(watch: RankWatch, doing: str, patient: bool = False) -> None:
        usual(watch, doing, patient)
        if phase and doing.startswith(phase) and not reached.exists():
            reached.write_text(str(watch.rank))
            time.sleep(60)

    RankWatch.at = at  # type: ignore[method-assign]
