"""Whole trainings on several hosts by the commands that a person types. Needs a test bed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.whole.beds import on_hosts

pytestmark = [pytest.mark.whole, pytest.mark.testbed]

MNIST = ROOT / "examples" / "mnist.py"
CPUS = ("--cpus", "0.45")
PARAMETERS = 61_706 * 4  # bytes of LeNet


def check_the_digits(run: Path, usage: list[dict[str, Any]]) -> None:
    """Accuracy, the hosts, and the kernel's bytes against 2(N - 1)/N · P a step."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.96
    assert summary["hosts"] == ["tb0", "tb1", "tb2", "tb3"]
    floor = 2 * 3 / 4 * PARAMETERS * summary["steps"]
    for host in usage:
        assert 0.9 * floor < host["bytes_sent"] < 1.1 * floor


def test_wagontrain_run_on_four_hosts(tmp_path: Path) -> None:
    command = ("wagontrain", "run", MNIST, "--strategy", "data-parallel", "--run-dir", "R")
    usage = on_hosts(tmp_path, *command, more=CPUS)
    check_the_digits(tmp_path / "R", usage)


def test_torchrun_on_four_hosts(tmp_path: Path) -> None:
    command = (
        "exec torchrun --nnodes 4 --nproc-per-node 1 --node-rank $RANK"
        f" --master-addr $MASTER_ADDR --master-port $MASTER_PORT -m wagontrain run {MNIST}"
        " --strategy data-parallel"
    )
    usage = on_hosts(tmp_path, "sh", "-c", command, more=CPUS)
    (run,) = (tmp_path / "runs").iterdir()
    check_the_digits(run, usage)
