"""Several hosts: errors, interfaces, Slurm. Needs a test bed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hosts import ASKED, Nursery, wait_for

pytestmark = pytest.mark.testbed

HOSTS = 3


def test_an_error_on_one_host_is_told_on_all(hosts: Nursery, tmp_path: Path) -> None:
    asked = ("run", "job.py:one_raises", "--strategy", "data-parallel", "--run-dir", "R")
    children = [hosts.run(rank, 3, tmp_path, *asked) for rank in range(3)]
    said = [child.end(within=30) for child in children]
    assert [status for status, _ in said] == [1, 1, 1]
    assert "LookupError: only on rank one" in said[1][1]
    for rank in (0, 2):
        assert "wagontrain: rank" in said[rank][1]
        assert "rank 1 on host tb1 failed: only on rank one" in said[rank][1]


def test_a_wrong_interface_and_a_loopback_master_are_refused(
    hosts: Nursery, tmp_path: Path
) -> None:
    asked = ("run", "job.py", "--run-dir", "R", "--interface", "eth9")
    status, said = hosts.run(1, 3, tmp_path, *asked).end(within=20)
    assert (status, said) == (
        2,
        "wagontrain: rank 1: no network interface 'eth9' on tb1; did you mean 'eth0'? "
        "(known: eth0, lo)\n",
    )
    asked = ("run", "job.py", "--run-dir", "R", "--interface", "lo")
    status, said = hosts.run(0, 3, tmp_path, *asked).end(within=20)
    assert status == 2
    assert "other hosts cannot reach" in said
    assert not (tmp_path / "R").exists()


def test_slurms_variables_are_enough(hosts: Nursery, tmp_path: Path) -> None:
    torchruns = dict.fromkeys(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    children = [
        hosts.run(
            rank, 3, tmp_path, "run", "job.py", "--strategy", "data-parallel", "--run-dir", "R",
            environment=torchruns | {
                "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
                "SLURM_NODEID": str(rank), "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "1",
                "SLURM_STEP_NODELIST": "tb[0-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
            },
        )
        for rank in range(3)
    ]  # fmt: skip
    assert [child.end(within=30)[0] for child in children] == [0, 0, 0]
    summary = json.loads((tmp_path / "R" / "summary.json").read_text())
    assert summary["hosts"] == ["tb0", "tb1", "tb2"]


def test_everybody_listens_on_the_chosen_address_only(hosts: Nursery, tmp_path: Path) -> None:
    children = [
        hosts.run(rank, 2, tmp_path, *ASKED, phase="in step 1" if rank == 1 else "")
        for rank in range(2)
    ]
    wait_for(tmp_path / "reached")
    for host, child in enumerate(children):
        own = "".join(f"{part:02X}" for part in reversed((10, 77, 0, host + 1)))
        listening = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{child.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    listening.add(fields[1].rpartition(":")[0])
        assert listening == {own}
