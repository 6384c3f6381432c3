"""Real processes on several hosts, killed, stopped and cut off at random. Needs a test bed."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.commands import ROOT
from tests.hosts import Child, Nursery
from tests.servers import counting
from wagontrain import events
from wagontrain.folder import RunFolder

pytestmark = pytest.mark.testbed

HOSTS = 3
PATIENCE = 4.0
LONG = PATIENCE + 2.0
TASK = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.servers import counting

def task():
    return counting.task({epochs}, partial(counting.until_there_is, Path({done!r}), {pause}))
"""
ALONE = dict.fromkeys(
    ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
     "MASTER_ADDR", "MASTER_PORT")
)  # fmt: skip
# A process that ends again and again within seconds of its start ends the run: see hands._QUICK.
AGE, QUICK = 21.0, 2


class Job:
    """A run on the first host with a worker and two shards; workers join from the others.

    Args:
        hosts: where.
        folder: for its files.
        epochs: how many are trained.
        pause: seconds of a step while there is harm.
    """

    def __init__(self, hosts: Nursery, folder: Path, epochs: int, pause: float) -> None:
        self.hosts = hosts
        self.folder = folder
        self.epochs = epochs
        self.done = folder / "done"
        text = TASK.format(root=str(ROOT), epochs=epochs, done=str(self.done), pause=pause)
        (folder / "job.py").write_text(text)
        self.run = hosts.run(
            0, 1, folder, "run", "job.py", "--strategy", "parameter-server", "--workers", "1",
            "--set", "servers=2", "--set", "replicas=1", "--interface", "eth0",
            "--patience", str(PATIENCE), "--run-dir", "R", environment=ALONE,
        )  # fmt: skip
        self.joined: dict[int, Child] = {}
        (start,) = self.until(lambda: self.of("start"), "a start")
        self.endpoint = start["join"]
        for host in range(1, HOSTS):
            self.join(host)
        self.until(lambda: self.workers() == HOSTS, "workers")
        self.until(lambda: len(self.of("step")) > 20, "steps")

    def join(self, host: int) -> None:
        words = ("join", self.endpoint, "--secret-file", "R/secret")
        self.joined[host] = self.hosts.run(host, 1, self.folder, *words, environment=ALONE)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        found = events.read(self.folder / "R" / "events.jsonl")
        return [event for event, _ in found if event["kind"] == kind]

    def workers(self) -> int:
        """How many take part."""
        return len(self.of("joined")) - len(self.of("left"))

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 90) -> Any:
        """What the condition gives, once it holds."""
        limit = time.monotonic() + seconds
        while not (found := holds()):
            assert self.run.poll() is None, (what, self.run.communicate(5))
            assert time.monotonic() < limit, what
            time.sleep(0.1)
        return found

    def children(self) -> dict[str, int]:
        """Processes that the run has started: "0" and "1" are shards, "worker" is the worker."""
        found = {}
        listed = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.run.pid)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for line in listed.splitlines():
            number, _, command = line.strip().partition(" ")
            if "servers.serving" in command:
                found[command.split()[-4]] = int(number)
            elif "wagontrain.worker" in command:
                found["worker"] = int(number)
        return found

    def check(self) -> float:
        """Let it end, and look at what came of it; the error of the line that it learned."""
        self.done.touch()
        status, said = self.run.end(within=120)
        assert status == 0, said
        for child in self.joined.values():
            status, said = child.end(within=30)
            assert status == 0, said
        summary = json.loads((self.folder / "R" / "summary.json").read_text())
        weights = safetensors.torch.load_file(RunFolder(self.folder / "R").weights)
        kept = [event for event, _ in events.read(self.folder / "R" / "events.jsonl")]
        counting.check(weights, summary, kept, self.epochs)
        return float(summary["validation"]["error"])


class Harm:
    """What happens to a job, and what has to be undone later."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job = job
        self.random = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self._undo: list[tuple[float, int, str, Callable[[], object]]] = []
        self._number = 0
        self._born: dict[str, tuple[int, float, int]] = {}
        self._began = time.monotonic()
        self._shards_killed = 0

    def busy(self, what: str) -> bool:
        """Whether something is being done to this host or process."""
        return any(name == what for _, _, name, _ in self._undo)

    def later(self, seconds: float, what: str, undo: Callable[[], object]) -> None:
        self._number += 1
        heapq.heappush(self._undo, (time.monotonic() + seconds, self._number, what, undo))

    def wait(self, seconds: float) -> None:
        """Let time pass, undoing what is due."""
        limit = time.monotonic() + seconds
        while True:
            while self._undo and self._undo[0][0] <= time.monotonic():
                heapq.heappop(self._undo)[3]()
            left = limit - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.05))

    def one(self) -> bool:
        """One harm, if what chance chose can be harmed now."""
        chosen = self.random.choice(
            ["kill joined", "stop joined", "cut joined"] * 2
            + ["kill child", "stop child", "cut first", "kill child"]
        )
        seconds = self.random.choice([0.3, 1.0, LONG])
        host = self.random.randint(1, HOSTS - 1)
        name = self.random.choice(["0", "1", "worker"])
        if "joined" in chosen:
            able = not self.busy(f"host {host}") and self.joined(chosen, host, seconds)
        elif chosen == "cut first":
            able = not self.busy("host 0")
            if able:
                self.job.hosts.bed.cut(0)
                self.later(seconds, "host 0", partial(self.job.hosts.bed.heal, 0))
        else:
            able = not self.busy(name) and self.child(chosen, name, min(seconds, 1.0))
        self.happened[chosen] += able
        return able

    def joined(self, chosen: str, host: int, seconds: float) -> bool:
        job, what = self.job, f"host {host}"
        child = job.joined[host]
        assert child.poll() is None, child.communicate(5)
        if chosen == "kill joined":
            child.send_signal(signal.SIGKILL)
            child.communicate(10)
            job.join(host)
        elif chosen == "stop joined":
            child.send_signal(signal.SIGSTOP)
            self.later(seconds, what, partial(child.send_signal, signal.SIGCONT))
        else:
            job.hosts.bed.cut(host)
            self.later(seconds, what, partial(job.hosts.bed.heal, host))
        return True

    def child(self, chosen: str, name: str, seconds: float) -> bool:
        """Something to a process that the run has started, and starts again."""
        job, process = self.job, self.job.children().get(name)
        if process is None:
            return False
        known, since, quick = self._born.get(name, (process, self._began, 0))
        if known != process:
            since = time.monotonic()
        self._born[name] = process, since, quick
        if chosen == "stop child":
            os.kill(process, signal.SIGSTOP)
            self.later(seconds, name, partial(_go_on, process))
            return True
        if name != "worker":
            # While one is down there is but one copy of each half.
            if len(job.of("shard_restarted")) < self._shards_killed:
                return False
            if self.busy("0") or self.busy("1"):
                return False
            self._shards_killed += 1
        old = time.monotonic() - since > AGE
        if not old and quick >= QUICK:
            self._shards_killed -= name != "worker"
            return False
        self._born[name] = process, since, 0 if old else quick + 1
        os.kill(process, signal.SIGKILL)
        return True

    def until(self, count: int) -> None:
        """So many harms; then all is undone, and everybody is back."""
        limit = time.monotonic() + 60 + 5 * count
        while sum(self.happened.values()) < count:
            assert time.monotonic() < limit, self.happened
            assert self.job.run.poll() is None, self.job.run.communicate(5)
            self.one()
            self.wait(self.random.uniform(0.1, 0.8))  # there is no event to wait for in chance
        while self._undo:
            self.wait(0.2)
        job = self.job
        job.until(lambda: len(job.of("shard_restarted")) >= self._shards_killed, "shards")
        job.until(lambda: job.workers() == HOSTS, "workers")
        assert not job.done.exists()
        assert job.run.poll() is None, job.run.communicate(5)


def _go_on(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
        os.kill(process, signal.SIGCONT)


@pytest.fixture
def first(hosts: Nursery) -> Iterator[Nursery]:
    """The hosts; what a run has started there ends with the test."""
    yield hosts
    for host in range(HOSTS):
        hosts.bed.kill(host)


def harmed(hosts: Nursery, folder: Path, harms: int, epochs: int, seed: int) -> float:
    print(f"seed {seed}")
    job = Job(hosts, folder, epochs, 0.1)
    harm = Harm(job, seed)
    harm.until(harms)
    print(harm.happened)
    return job.check()


@pytest.mark.whole
def test_ten_harms(first: Nursery, tmp_path: Path) -> None:
    assert harmed(first, tmp_path, 10, 40, seed=1) < 0.2


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_harms(first: Nursery, tmp_path: Path) -> None:
    """And what was learned is as good as where nothing happened: 0.09 is the points' noise."""
    calm, harmed_ = tmp_path / "calm", tmp_path / "harmed"
    for folder in (calm, harmed_):
        folder.mkdir()
    job = Job(first, calm, 40, 0.1)  # slow until all are there
    undisturbed = job.check()
    first.reset()
    seed = random.SystemRandom().randrange(2**32)
    assert abs(harmed(first, harmed_, 100, 450, seed) - undisturbed) < 0.02
