"""A parameter server on a Ray cluster whose processes and nodes are lost. Needs a test bed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests import rays
from tests.commands import ROOT
from tests.forks import Fork
from tests.rays import Cluster, end, until
from tests.servers import counting
from wagontrain import events
from wagontrain.folder import RunFolder
from wagontrain.testbed.bed import why_not

pytestmark = [
    pytest.mark.whole,
    pytest.mark.testbed,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
]

EPOCHS = 60
TASK = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.servers import counting

def task():
    return counting.task({epochs}, partial(counting.until_there_is, Path({done!r}), 0.1))
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why_not():
        pytest.skip(str(why_not()))
    with rays.up(tmp_path_factory.mktemp("r")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    with rays.used(running) as cluster:
        yield cluster


class Run:
    """A run on the cluster; its workers are slow until `done` is there."""

    def __init__(self, cluster: Cluster, *settings: str) -> None:
        self.cluster = cluster
        self.done = cluster.folder / "done"
        text = TASK.format(root=str(ROOT), epochs=EPOCHS, done=str(self.done))
        (cluster.files / "job.py").write_text(text)
        words = [word for setting in settings for word in ("--set", setting)]
        self.process: Fork = cluster.train(
            "job.py", "--strategy", "parameter-server", "--workers", "2", *words
        )
        self.folder: Path = cluster.files / "run"

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        file = self.folder / "events.jsonl"
        found = events.read(file) if file.exists() else []
        return [event for event, _ in found if event["kind"] == kind]

    def until(self, count: int, kind: str, seconds: float = 90) -> None:
        """So many events of a kind have come."""

        def come() -> bool:
            assert self.process.poll() is None, self.process.communicate(10)
            return len(self.of(kind)) >= count

        until(come, f"{count} times {kind}", seconds)

    def goes_on(self) -> None:
        """More is applied."""
        self.until(len(self.of("step")) + 20, "step")


def test_what_a_worker_says_is_told(cluster: Cluster) -> None:
    (cluster.files / "job.py").write_text("from parts import *\n")
    process = cluster.train("job.py:one_raises", "--strategy", "parameter-server", "--workers", "2")
    status, _, err = end(process, 60)
    assert status == 1
    assert "wagontrain: " in err


def test_too_many_workers_are_refused_in_a_line(cluster: Cluster) -> None:
    process = cluster.train("job.py", "--strategy", "parameter-server", "--workers", "4")
    status, _, err = end(process, 60)
    assert (status, err.count("\n")) == (2, 1)
    assert "4 workers were asked for, each with 1 CPU; the Ray cluster has 3 CPUs" in err
    assert not (cluster.files / "run").exists()


def test_processes_and_a_node_are_replaced(cluster: Cluster) -> None:
    """The last test: the cluster has two nodes afterwards."""
    run = Run(cluster, "servers=2", "replicas=1")
    run.until(2, "joined")
    run.goes_on()
    assert sorted(cluster.processes("servers.serving")) == [1, 2]  # the head is in the first host

    os.kill(max(cluster.processes("wagontrain.worker").items())[1], signal.SIGKILL)
    run.until(3, "joined")
    run.goes_on()

    os.kill(max(cluster.processes("servers.serving").items())[1], signal.SIGKILL)
    run.until(1, "shard_restarted")
    run.goes_on()

    # A node with a shard; what it had comes back elsewhere, and is found there.
    lost = max(cluster.processes("servers.serving"))
    assert cluster.bed.kill(lost) > 3
    run.until(2, "shard_restarted", 150)
    run.goes_on()

    run.done.touch()
    status, out, err = end(run.process, 120)
    assert (status, err) == (0, ""), err
    assert "2 workers" in out
    summary = json.loads((run.folder / "summary.json").read_text())
    weights = safetensors.torch.load_file(RunFolder(run.folder).weights)
    kept = [event for event, _ in events.read(run.folder / "events.jsonl")]
    counting.check(weights, summary, kept, EPOCHS)
    whys = [event["why"] for event in run.of("restarted")]
    assert any("is gone with its Ray actor" in why for why in whys), whys
    assert any("was killed by SIGKILL" in why for why in whys), whys
    assert (run.folder / "logs" / "server0.log").exists()
    assert (run.folder / "logs" / "rank0.log").exists()
