"""The Ray engine on a cluster of three hosts, which share no files with the launching process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.commands import ROOT, SCRIPTS, TASK, clean_environment
from tests.forks import Fork
from tests.hosts import way_into
from wagontrain.testbed import links
from wagontrain.testbed.bed import Bed, Shape, why_not

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
]

HEAD = "10.77.0.1:6379"

SCRIPT = """
import parts
import wagontrain as wt

def task():
    return parts.task()

if __name__ == "__main__":
    result = wt.fit(task, engine="ray", workers=2, steps=4, quiet=True, run_dir="run")
    print(result.summary["steps"], sorted(result.state_dict()))
"""


@dataclass
class Cluster:
    """Ray nodes in hosts tb0 to tb2, the head in tb0, with one CPU each.

    `files` is seen as `seen` by what is launched, where the nodes see an empty folder.
    """

    bed: Bed
    folder: Path
    environment: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def start_node(self, host: int, *arguments: str) -> None:
        log = self.folder / f"node{host}.log"
        command = [
            SCRIPTS / "ray", "start", *arguments, f"--node-ip-address=10.77.0.{host + 1}",
            f"--temp-dir={self.folder / str(host)}", "--num-cpus=1",
            "--object-store-memory=80000000", "--disable-usage-stats", "--block",
        ]  # fmt: skip
        with log.open("w") as out:
            node = self.bed.start(
                host, [str(word) for word in command], self.environment, stdout=out,
                stderr=subprocess.STDOUT, env=clean_environment(),
            )  # fmt: skip
        self.nodes.append(node)
        until(lambda: "Ray runtime started" in log.read_text(), f"node {host} is up")

    def launch(self, *command: str, **variables: str) -> Fork:
        """Start a script in tb0, in the folder that nobody else sees, as a fork."""
        return Fork(
            command, self._seen, clean_environment() | self.environment | variables,
            before=partial(_see, way_into(self.bed, 0), self.files, self._seen), starts=1,
        )  # fmt: skip

    def launch_new(self, *command: str) -> subprocess.Popen[str]:
        """Likewise, in a new interpreter."""
        enter = f'mount --bind {self.files} {self._seen} && cd {self._seen} && exec "$@"'
        process: subprocess.Popen[str] = self.bed.start(
            0, ["sh", "-c", enter, "sh", *command], self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(),
        )  # fmt: skip
        return process

    @property
    def _seen(self) -> Path:
        seen = self.folder / "seen"
        seen.mkdir(exist_ok=True)
        return seen

    def train(self, *arguments: str, **variables: str) -> Fork:
        return self.launch(*self.command(*arguments), **variables)

    @staticmethod
    def command(*arguments: str) -> list[str]:
        program = str(SCRIPTS / "wagontrain")
        return [program, "run", *arguments, "--engine", "ray", "--address", HEAD, "--run-dir",
                "run"]  # fmt: skip

    def training(self, task: str) -> Fork:
        """A run on two nodes, of which some steps are done."""
        process = self.train(task, "--workers", "2")
        events = self.files / "run" / "events.jsonl"
        until(
            lambda: (
                process.poll() is not None
                or (events.exists() and '"step": 3' in events.read_text())
            ),
            "training is under way",
        )
        assert process.poll() is None, process.communicate(10)
        return process

    def processes(self, kind: str) -> dict[int, int]:
        """Process numbers of actors ("ray::Rank") or workers ("wagontrain.worker"), by host."""
        found = {}
        for host, namespace in enumerate(self.bed.namespaces):
            for process in links.processes(namespace):
                folder = Path(f"/proc/{process}")
                try:  # a fork has its name, of 15 letters, in another place
                    named = (folder / "cmdline").read_text() + (folder / "comm").read_text()
                except OSError:  # it has ended
                    continue
                if kind[:15] in named:
                    found[host] = process
        return found


def until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, f"not in {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why_not():
        pytest.skip(str(why_not()))
    folder = tmp_path_factory.mktemp("r")
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "tmp").mkdir()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "TMPDIR": str(folder / "tmp"),
    }
    with Bed.up(Shape(3)) as bed:
        cluster = Cluster(bed, folder, environment)
        cluster.start_node(0, "--head", "--port=6379", "--include-dashboard=false")
        for host in (1, 2):
            cluster.start_node(host, f"--address={HEAD}")
        yield cluster
    for node in cluster.nodes:
        node.wait(10)


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The cluster, on which nothing is left after the test, unless a node was lost."""
    running.files.mkdir()
    (running.files / "parts.py").write_text(TASK)
    (running.files / "job.py").write_text("from parts import *\n")
    yield running
    running.files.rename(running.folder / f"files-{secrets.token_hex(4)}")
    for kind in ("ray::Rank", "wagontrain.worker", "ray_engine.leader"):
        until(lambda kind=kind: not running.processes(kind), f"no {kind} is left", 10)
    if all(node.poll() is None for node in running.nodes):
        assert not list((running.folder / "tmp").glob("wagontrain-*"))


def _see(enter: Any, files: Path, seen: Path) -> None:
    enter()
    subprocess.run(["mount", "--bind", files, seen], check=True, timeout=10)


def end(process: subprocess.Popen[str] | Fork, within: float) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


@pytest.mark.whole
def test_mnist_trains_and_the_whole_run_comes_back(cluster: Cluster) -> None:
    (cluster.files / "mnist.py").write_text((ROOT / "examples" / "mnist.py").read_text())
    process = cluster.launch_new(
        *cluster.command("mnist.py", "--workers", "3", "--strategy", "data-parallel")
    )
    status, out, err = end(process, 200)
    assert (status, err) == (0, "")
    assert "data-parallel over 3 workers on 3 hosts (cpu, 1 thread each)" in out
    assert "epoch 15/15  step 480/480" in out
    run = cluster.files / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.96
    assert summary["hosts"] == ["tb0", "tb1", "tb2"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(480))
    assert events[-1]["kind"] == "end"
    assert json.loads((run / "plan.json").read_text())["world_size"] == 3
    weights = safetensors.torch.load_file(run / "checkpoints" / "model.safetensors")
    assert weights["classifier.4.bias"].shape == (10,)
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert {file.name for file in (run / "logs").iterdir()} == {f"rank{n}.log" for n in range(3)}
    assert not list(run.rglob("*.part"))


def test_fit_sends_a_script_and_its_neighbours(cluster: Cluster) -> None:
    (cluster.files / "script.py").write_text(SCRIPT)
    process = cluster.launch("script.py", RAY_ADDRESS=HEAD)
    assert end(process, 60) == (0, "4 ['bias', 'weight']\n", "")


def test_the_failing_ranks_own_traceback_is_shown_once(cluster: Cluster) -> None:
    status, _, err = end(cluster.train("job.py:one_raises", "--workers", "2"), 60)
    assert status == 1
    assert err.count("LookupError: only on rank one") == 1
    assert "worker rank 1 failed:" in err
    traceback = (cluster.files / "run" / "logs" / "rank1.traceback").read_text()
    assert "LookupError" in traceback


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("wagontrain.worker", r"worker rank \d on tb{} was killed by SIGKILL .*"),
        ("ray::Rank", r"the Ray actor of worker rank \d on tb{} is gone \(.*\).*"),
    ],
)
def test_a_killed_process_is_named(cluster: Cluster, victim: str, said: str) -> None:
    process = cluster.training("job.py:slow")
    host, number = max(cluster.processes(victim).items())
    os.kill(number, signal.SIGKILL)
    status, _, err = end(process, 20)
    assert status == 1
    assert re.fullmatch(rf"wagontrain: {said.format(host)}\n", err)


def test_ctrl_c_ends_all(cluster: Cluster) -> None:
    process = cluster.training("job.py:slow")
    process.send_signal(signal.SIGINT)
    status, _, err = end(process, 20)
    assert (status, err) == (130, "wagontrain: stopped by Ctrl-C; all workers were ended\n")


@pytest.mark.parametrize(
    ("workers", "variables", "said"),
    [
        (
            4, {},
            "4 workers were asked for, each with 1 CPU; the Ray cluster has 3 CPUs on 3 nodes: "
            "give --workers 3, or add nodes with `ray start`",
        ),
        (
            2, {"RAY_AUTH_TOKEN": "0" * 64},
            "the Ray cluster does not take this user's token: set RAY_AUTH_MODE=token, and put "
            "the token that the cluster was started with into ~/.ray/auth_token or RAY_AUTH_TOKEN",
        ),
    ],
)  # fmt: skip
def test_refusals_are_one_line(
    cluster: Cluster, workers: int, variables: dict[str, str], said: str
) -> None:
    process = cluster.train("job.py", "--workers", str(workers), **variables)
    assert end(process, 40) == (2, "", f"wagontrain: {said}\n")
    assert not (cluster.files / "run").exists()


def test_a_lost_node_is_named(cluster: Cluster) -> None:
    """The last test: the cluster has two nodes afterwards."""
    process = cluster.training("job.py:slow")
    lost = max(cluster.processes("wagontrain.worker"))
    assert cluster.bed.kill(lost) > 3
    status, _, err = end(process, 30)
    assert status == 1
    # Either Ray notices first or the other ranks do.
    assert re.fullmatch(
        rf"wagontrain: (the Ray actor of worker rank \d on|rank \d on host) tb{lost} .*\n", err
    )
