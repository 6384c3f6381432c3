"""The command line run in processes of its own, on a small task.

Most tests take `wagontrain` and `python`, which are forks of a process that has imported torch;
`really` and `Running` start new interpreters.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.forks import Fork

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent

TASK = """
import time
from functools import partial
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
import wagontrain as wt

def make(**fields) -> wt.Task:
    data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    return wt.Task(**dict(model=partial(nn.Linear, 4, 2), loss=F.cross_entropy,
                   optimizer=partial(torch.optim.SGD, lr=0.1), train=data, batch_size=8) | fields)

def task() -> wt.Task:
    return make()

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)

def slow() -> wt.Task:
    return make(model=partial(Slow, 4, 2), epochs=1000)

def watched() -> wt.Task:
    return make(epochs=2, validation=make().train)

class RaisesOnRankOne(nn.Linear):
    def forward(self, x):
        output = super().forward(x)
        output.register_hook(self.look)
        return output

    def look(self, gradient):
        import torch.distributed as dist
        if dist.get_rank() == 1:
            raise LookupError("only on rank one")

def one_raises() -> wt.Task:
    return make(model=partial(RaisesOnRankOne, 4, 2))

class Wrong(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.bias * (torch.distributed.is_initialized() and 0.01)

def wrong() -> wt.Task:
    return make(model=partial(Wrong, 4, 2))

class Float32(nn.Linear):
    def forward(self, x):
        return super().forward(x) @ torch.eye(2, dtype=torch.float32)

def insists() -> wt.Task:
    return make(model=partial(Float32, 4, 2))

def diverges() -> wt.Task:
    return make(loss=lambda output, target: (output * 1e30).square().sum().exp())

class SpoiledOnRankOne(nn.Linear):
    taken = 0

    def forward(self, x):
        import torch.distributed as dist
        self.taken += self.training and dist.is_initialized() and dist.get_rank() == 1
        return super().forward(x) * (float("nan") if self.taken == 6 else 1.0)

def one_diverges() -> wt.Task:
    return make(model=partial(SpoiledOnRankOne, 4, 2), epochs=4)

if __name__ == "__main__":
    wt.fit(task, quiet=True, run_dir="from_script")
"""


def clean_environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return environment | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}


def wagontrain(*arguments: str, folder: Path, limit: float = 120) -> CompletedProcess[str]:
    """Run the command to its end, in `folder`."""
    return python(SCRIPTS / "wagontrain", *arguments, folder=folder, limit=limit)


def torchrun(*arguments: str | Path, folder: Path, limit: float = 120) -> CompletedProcess[str]:
    """Run torchrun to its end, in `folder`."""
    return python(SCRIPTS / "torchrun", *arguments, folder=folder, limit=limit)


def python(
    *arguments: str | Path, folder: Path, limit: float = 120,
    more: Mapping[str, str] | None = None, **how: Any,
) -> CompletedProcess[str]:  # fmt: skip
    """Run a script with arguments to its end, in `folder`.

    `more` are further variables of its environment, and `how` is passed on to `Fork`.
    """
    fork = Fork(arguments, folder, clean_environment() | dict(more or {}), **how)
    out, err = fork.communicate(limit)
    assert fork.returncode is not None
    return CompletedProcess(fork.words, fork.returncode, out, err)


def really(program: str, *arguments: str | Path, folder: Path) -> CompletedProcess[str]:
    """Run one of the installed scripts in a new interpreter, in `folder`."""
    return subprocess.run(
        [SCRIPTS / program, *arguments], cwd=folder, timeout=120, text=True,
        capture_output=True, env=clean_environment(), check=False,
    )  # fmt: skip


class Running:
    """A run under way, ended at the latest with the test.

    Args:
        task_file: with the task `slow`.
        workers: how many.
        new: whether in new interpreters instead of forks.
    """

    def __init__(self, task_file: Path, workers: int = 2, new: bool = False) -> None:
        self.folder = task_file.parent / "slow-run"
        words = [SCRIPTS / "wagontrain", "run", f"{task_file}:slow", "--workers", str(workers),
                 "--strategy", "data-parallel", "--run-dir", str(self.folder)]  # fmt: skip
        environment = clean_environment()
        self.process = (
            subprocess.Popen(words, text=True, stdout=-1, stderr=-1, env=environment)
            if new
            else Fork(words, task_file.parent, environment)
        )
        limit = time.monotonic() + 60
        events = self.folder / "events.jsonl"
        while not (events.exists() and '"step": 3' in events.read_text()):
            assert time.monotonic() < limit, "the run did not begin"
            assert self.process.poll() is None, self.process.communicate(timeout=10)
            time.sleep(0.1)
        self.workers = self.children()
        assert len(self.workers) == workers

    def children(self) -> dict[int, int]:
        """Process of each rank: the launcher's children, told by where their output goes."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # some end meanwhile
                output = (folder / "fd" / "1").readlink()
                rank = re.fullmatch(r"rank(\d+)\.log", output.name)
                if rank and self._parent(folder) == self.process.pid:
                    found[int(rank[1])] = int(folder.name)
        return found

    @staticmethod
    def _parent(folder: Path) -> int:
        return int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])

    def end(self, within: float) -> tuple[str, str]:
        """What it printed by its end, which has to come in time and leave nothing running."""
        out, err = self.process.communicate(timeout=within)
        limit = time.monotonic() + within
        while any(Path(f"/proc/{child}").exists() for child in self.workers.values()):
            assert time.monotonic() < limit, "a worker is left running"
            time.sleep(0.1)
        return out, err

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *details: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)  # and its workers end with it
            self.process.communicate(timeout=10)
