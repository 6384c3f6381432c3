"""Several hosts: what happens when one of them dies, hangs or is cut off. Needs a test bed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.hosts import ASKED, PATIENCE, Child, Nursery, wait_for

pytestmark = pytest.mark.testbed

HOSTS = 3

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


@pytest.mark.parametrize(
    ("phase", "victim", "how"),
    [
        *(
            (phase, victim, how)
            for phase, victim in (("step", 1), ("validation", 2), ("checkpoint", 1), ("step", 0))
            for how in ("kill", "stop", "cut")
        ),
        ("exchange", 1, "kill"),
    ],
)
def test_a_lost_host_is_named(
    hosts: Nursery, tmp_path: Path, phase: str, victim: int, how: str
) -> None:
    children = [
        hosts.run(rank, 3, tmp_path, *ASKED, phase=PHASES[phase] if rank == victim else "")
        for rank in range(3)
    ]
    wait_for(tmp_path / "reached")
    time.sleep(1.5)  # until its pulse has said where it is
    began = time.monotonic()
    harm(hosts, victim, children[victim], how)
    for rank, child in enumerate(children):
        if rank == victim:
            continue
        status, said = child.end(within=25)
        assert status == 1, said
        lines = [line for line in said.splitlines() if line.startswith("wagontrain: ")]
        assert len(lines) == 1, said
        assert f"rank {victim} on host tb{victim} " in lines[0]
        assert f"last seen {PHASES[phase]}" in lines[0]
        assert "Traceback" not in said
        stacks = (tmp_path / "R" / "stacks" / f"rank{rank}.txt").read_text()
        assert "most recent call first" in stacks
    # PATIENCE for the silence, a few beats to tell, 5 s for the main thread to end by itself.
    assert time.monotonic() - began < PATIENCE + 12
    own_end(children[victim], how)


@pytest.mark.parametrize("how", ["kill", "stop", "cut"])
def test_a_host_lost_before_all_have_met_is_named(hosts: Nursery, tmp_path: Path, how: str) -> None:
    first = hosts.run(0, 3, tmp_path, *ASKED)
    second = hosts.run(1, 3, tmp_path, *ASKED, phase="meeting the other ranks")
    wait_for(tmp_path / "reached")  # the third never comes
    time.sleep(1.5)
    harm(hosts, 1, second, how)
    status, said = first.end(within=20)
    assert status == 1
    assert "rank 1 on host tb1 has not been heard of" in said
    assert "last seen meeting the other ranks" in said
    own_end(second, how)
