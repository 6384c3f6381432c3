"""Whole runs with processes that die, are replaced, and join."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

TASK = """
import dataclasses
from functools import partial
import time
import torch
import wagontrain as wt

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)

def mean(output, target):
    return ((output - target) ** 2).mean()

def task():
    x = torch.randn(256, 6)
    y = x @ torch.arange(6.0).unsqueeze(1)
    data = torch.utils.data.TensorDataset(x, y)
    return wt.Task(model=partial(Slow, 6, 1), loss=mean,
                   optimizer=partial(torch.optim.SGD, lr=0.02), train=data, validation=data,
                   batch_size=8, epochs=12)

def batch():
    return dataclasses.replace(
        task(), optimizer=partial(torch.optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe",
                                  tolerance_change=0.0, tolerance_grad=0.0),
        batch_size=256, epochs=12)

def spoiled():
    good = task()
    x, y = good.train.tensors
    y[100] = float("nan")
    return good
"""


class Running:
    """A run under way, and what it has told so far."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "job.py").write_text(TASK)
        self.run = folder / "R"
        command = [sys.executable, "-m", "wagontrain", "run", *arguments, "--run-dir", "R"]
        self.process = subprocess.Popen(
            command, cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def events(self) -> list[dict[str, Any]]:
        file = self.run / "events.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True)
                if line.endswith("\n")]  # fmt: skip

    def until(self, holds: Callable[[list[dict[str, Any]]], Any], what: str) -> Any:
        """What the condition gives, once it holds."""
        limit = time.monotonic() + 60
        while not (found := holds(self.events())):
            assert self.process.poll() is None, (what, self.process.communicate())
            assert time.monotonic() < limit, what
            time.sleep(0.05)
        return found

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=90)
        return self.process.returncode, out, err

    def children(self) -> dict[str, int]:
        """Processes of the run by what their command says."""
        found = {}
        for line in subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines():  # fmt: skip
            number, _, command = line.strip().partition(" ")
            match = re.search(r"servers\.serving \S+ (\d+)", command)
            found[f"server {match[1]}" if match else f"worker {number}"] = int(number)
        return found


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    runs: list[Running] = []

    def start(*arguments: str) -> Running:
        runs.append(Running(tmp_path, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()  # nothing where it has ended
        run.process.communicate(timeout=10)


def steps(events: list[dict[str, Any]]) -> int:
    return sum(event["kind"] == "step" for event in events)


@pytest.mark.whole
def test_killed_are_replaced_and_others_join(
    started: Callable[..., Running], tmp_path: Path
) -> None:
    run = started(
        "job.py", "--strategy", "parameter-server", "--workers", "2",
        "--set", "servers=2", "--set", "replicas=1",
    )  # fmt: skip
    run.until(lambda events: steps(events) > 20, "steps")
    joined = run.until(lambda events: [e for e in events if e["kind"] == "joined"], "joined")
    os.kill(joined[0]["process"], signal.SIGKILL)
    left = run.until(lambda events: [e for e in events if e["kind"] == "left"], "left")
    assert left[0]["worker"] == joined[0]["worker"]
    assert left[0]["why"] == "was killed by SIGKILL"
    server = run.children()["server 1"]
    os.kill(server, signal.SIGKILL)
    run.until(lambda events: [e for e in events if e["kind"] == "shard_restarted"], "restarted")
    endpoint = run.until(
        lambda events: [e["join"] for e in events if e["kind"] == "start"], "start"
    )[0]
    other = subprocess.Popen(
        [sys.executable, "-m", "wagontrain", "join", endpoint, "--secret-file", "R/secret"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    run.until(
        lambda events: [e for e in events if e["kind"] == "joined" and e["process"] == other.pid],
        "joined from outside",
    )
    status, out, err = run.end()
    assert (status, err) == (0, ""), (out, err)
    said = other.communicate(timeout=20)
    assert other.returncode == 0, said
    summary = json.loads((run.run / "summary.json").read_text())
    assert summary["samples"] == 12 * 256
    assert summary["validation"]["loss"] < 0.1
    assert summary["lost"] == 0
    assert summary["most_workers"] >= 3
    pushes = {int(worker): each["pushes"] for worker, each in summary["workers"].items()}
    assert sum(pushes.values()) == summary["steps"]
    outside = next(e for e in run.events() if e["kind"] == "joined" and e["process"] == other.pid)
    assert pushes[outside["worker"]] > 0
    assert "staleness" in out


def test_a_spoiled_sample_ends_the_run_and_is_named(started: Callable[..., Running]) -> None:
    run = started("job.py:spoiled", "--strategy", "parameter-server", "--workers", "2")
    status, _, err = run.end()
    assert status == 1
    assert re.fullmatch(r"wagontrain: step \d+, samples \d+ to \d+ .*the loss is nan on .*\n", err)


@pytest.mark.whole
@pytest.mark.parametrize("replicas", [1, 0])
def test_a_killed_shard_of_sandblaster(started: Callable[..., Running], replicas: int) -> None:
    """With a mirror it goes on as if nothing had been; without it the run says what is lost."""
    run = started(
        "job.py:batch", "--strategy", "sandblaster", "--workers", "1",
        "--set", "servers=2", "--set", f"replicas={replicas}",
    )  # fmt: skip
    run.until(lambda events: steps(events) >= 2, "steps")
    os.kill(run.children()["server 1"], signal.SIGKILL)
    status, out, err = run.end()
    if not replicas:
        assert status == 1
        assert re.fullmatch(r"wagontrain: a server shard ended.*use replicas=1.*\n", err), err
        return
    assert (status, err) == (0, ""), (out, err)
    assert any(event["kind"] == "shard_restarted" for event in run.events())
    summary = json.loads((run.run / "summary.json").read_text())
    assert (summary["samples"], summary["lost"]) == (12 * 256, 0)
    # Least squares on six unknowns: L-BFGS is there long before the end.
    assert summary["validation"]["loss"] < 1e-8
    assert "iterations" in out


def test_under_torchrun_the_first_process_leads_and_all_end_well(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TASK)
    command = [sys.executable, "-m", "wagontrain", "run", "job.py:batch", "--strategy",
               "sandblaster", "--steps", "2", "--run-dir", "R"]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = [
        {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank,
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        }
        for rank in "01"
    ]  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ | place, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for place in places
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads((tmp_path / "R" / "summary.json").read_text())["most_workers"] == 2


def test_a_wrong_secret_and_nobody_there(started: Callable[..., Running], tmp_path: Path) -> None:
    run = started("job.py", "--strategy", "parameter-server", "--workers", "1")
    endpoint = run.until(
        lambda events: [e["join"] for e in events if e["kind"] == "start"], "start"
    )[0]
    (tmp_path / "wrong").write_text("0" * 64)

    def join(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "wagontrain", "join", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stderr

    status, err = join(endpoint, "--secret-file", "wrong")
    assert status == 2
    assert "refused the secret" in err
    status, err = join(endpoint)
    assert status == 2
    assert "--secret-file RUN_DIR/secret" in err
    assert (tmp_path / "R" / "secret").stat().st_mode & 0o077 == 0
    assert str(ROOT) not in err
