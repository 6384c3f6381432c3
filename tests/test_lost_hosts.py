"""Several hosts: what happens when one of them dies, hangs or is cut off. Needs a test bed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.hosts import ASKED, PATIENCE, Child, Nursery, wait_for

pytestmark = pytest.mark.testbed

HOSTS = 9

PHASES = {
    "step": "in step 2",
    "exchange": "in the exchange of step 2",
    "validation": "in validation",
    "checkpoint": "writing the checkpoint",
}


def harm(hosts: Nursery, victim: int, child: Child, how: str) -> None:
    if how == "cut":
        hosts.bed.cut(victim)
    else:
        child.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def own_end(child: Child, how: str) -> None:
    """The victim itself ends too: at once, or as soon as it can."""
    if how == "stop":
        child.send_signal(signal.SIGCONT)
    status, said = child.end(within=25)
    assert status == (-signal.SIGKILL if how == "kill" else 1), said
    if how == "cut":
        assert "cannot be reached from rank" in said or "has not been heard of" in said


WHOLE = pytest.mark.whole  # one of each is enough for every day


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("step", 1),
        pytest.param("validation", 2, marks=WHOLE),
        pytest.param("checkpoint", 1, marks=WHOLE),
        pytest.param("step", 0, marks=WHOLE),
    ],
)
def test_a_lost_host_is_named(hosts: Nursery, tmp_path: Path, phase: str, victim: int) -> None:
    jobs = [Job(hosts, tmp_path, number, phase, victim) for number in range(len(HOW))]
    check_all(jobs, HOW)


def test_a_host_killed_in_an_exchange_is_named(hosts: Nursery, tmp_path: Path) -> None:
    check_all([Job(hosts, tmp_path, 0, "exchange", 1)], ("kill",))


HOW = ("kill", "stop", "cut")
KNOWN = 3 * PATIENCE / 10
"""Seconds in which a rank's pulse has said where it is: it beats ten times in PATIENCE."""


class Job:
    """A job on three hosts of its own, of which one stays in a phase."""

    def __init__(self, hosts: Nursery, folder: Path, number: int, phase: str, victim: int) -> None:
        self.hosts, self.phase, self.victim = hosts, phase, victim
        self.first = 3 * number
        self.folder = folder / str(number)
        self.folder.mkdir()
        (self.folder / "job.py").write_text((folder / "job.py").read_text())
        self.children = [
            hosts.run(
                self.first + rank, 3, self.folder, *ASKED, first=self.first,
                phase=PHASES[phase] if rank == victim else "",
            )
            for rank in range(3)
        ]  # fmt: skip

    def harm(self, how: str) -> None:
        wait_for(self.folder / "reached")
        time.sleep(KNOWN)
        self.began = time.monotonic()
        harm(self.hosts, self.first + self.victim, self.children[self.victim], how)

    def check(self, how: str) -> None:
        for rank, child in enumerate(self.children):
            if rank == self.victim:
                continue
            status, said = child.end(within=25)
            assert status == 1, (how, said)
            lines = [line for line in said.splitlines() if line.startswith("wagontrain: ")]
            assert len(lines) == 1, (how, said)
            assert f"rank {self.victim} on host tb{self.first + self.victim} " in lines[0], how
            assert f"last seen {PHASES[self.phase]}" in lines[0], how
            assert "Traceback" not in said, how
            stacks = (self.folder / "R" / "stacks" / f"rank{rank}.txt").read_text()
            assert "most recent call first" in stacks
        # PATIENCE for the silence, a few beats to tell, 5 s for the main thread to end by itself.
        assert time.monotonic() - self.began < PATIENCE + 12, how


def check_all(jobs: list[Job], ways: tuple[str, ...]) -> None:
    for job, how in zip(jobs, ways, strict=True):
        job.harm(how)
    for job, how in zip(jobs, ways, strict=True):
        job.check(how)
    for job, how in zip(jobs, ways, strict=True):
        own_end(job.children[job.victim], how)


def test_a_host_lost_before_all_have_met_is_named(hosts: Nursery, tmp_path: Path) -> None:
    ranks = []
    for number, how in enumerate(HOW):
        folder, first = tmp_path / how, 3 * number
        folder.mkdir()
        (folder / "job.py").write_text((tmp_path / "job.py").read_text())
        ranks.append([
            hosts.run(first, 3, folder, *ASKED, first=first),
            hosts.run(first + 1, 3, folder, *ASKED, first=first, phase="meeting the other ranks"),
        ])  # fmt: skip
    for number, how in enumerate(HOW):
        wait_for(tmp_path / how / "reached")  # the third never comes
        time.sleep(KNOWN)
        harm(hosts, 3 * number + 1, ranks[number][1], how)
    for number, how in enumerate(HOW):
        status, said = ranks[number][0].end(within=20)
        assert status == 1, how
        assert f"rank 1 on host tb{3 * number + 1} has not been heard of" in said, how
        assert "last seen meeting the other ranks" in said, how
        own_end(ranks[number][1], how)


def test_a_host_that_drops_out_of_a_probe_is_named(hosts: Nursery, tmp_path: Path) -> None:
    children = [
        hosts.run(
            rank, 3, tmp_path, "probe", "--patience", str(PATIENCE),
            phase="measuring the cluster" if rank == 1 else "",
        )
        for rank in range(3)
    ]  # fmt: skip
    wait_for(tmp_path / "reached")
    time.sleep(KNOWN)
    children[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for rank in (0, 2):
        status, said = children[rank].end(within=25)
        assert status == 1, said
        assert "rank 1 on host tb1 " in said
        assert "measuring the cluster" in said
        assert "Traceback" not in said
    assert time.monotonic() - began < PATIENCE + 12


AUTO = ("run", "job.py:watched", "--run-dir", "R", "--patience", str(PATIENCE))


@pytest.mark.parametrize(
    "phase",
    [
        "measuring the task",
        pytest.param("measuring the cluster", marks=WHOLE),
        pytest.param("weighing the strategies", marks=WHOLE),
        pytest.param("in step 1 of a trial", marks=WHOLE),
    ],
)
def test_a_host_lost_while_auto_plans_is_named(hosts: Nursery, tmp_path: Path, phase: str) -> None:
    first, second = (
        hosts.run(rank, 2, tmp_path, *AUTO, phase=phase if rank else "") for rank in range(2)
    )
    wait_for(tmp_path / "reached")
    time.sleep(KNOWN)
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    status, said = first.end(within=25)
    assert status == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("wagontrain: ")]
    assert "rank 1 on host tb1 has not been heard of for " in line
    assert f"last seen {phase}" in line
    assert "Traceback" not in said
    assert time.monotonic() - began < PATIENCE + 12
