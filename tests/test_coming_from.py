"""Each pair of examples/coming_from trains to the same loss."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import ROOT, python, torchrun

FOLDER = ROOT / "examples" / "coming_from"
TWO = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


def loss(out: str) -> float:
    (found,) = re.findall(r"loss (\d+\.\d+)", out)
    return float(found)


def trained(
    name: str, folder: Path, alone: bool = False, limit: float = 60, **variables: str
) -> float:
    """The loss that a file prints, run by torchrun on two processes or as it is."""
    if alone:
        done = python(FOLDER / name, folder=folder, limit=limit, more=variables)
    else:
        done = torchrun(*TWO, FOLDER / name, folder=folder, limit=limit)
    assert done.returncode == 0, done.stderr
    return loss(done.stdout)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> float:
    return trained("after.py", tmp_path_factory.mktemp("after"), alone=True)


def test_ddp(after: float, tmp_path: Path) -> None:
    before = trained("ddp_before.py", tmp_path)
    assert before < 1.0  # of 2.3 for guessing
    assert after == pytest.approx(before, abs=2e-6)
    assert (tmp_path / "weights.pt").exists()


@pytest.mark.whole
@pytest.mark.parametrize("name", ["accelerate_before.py", "fabric_before.py", "loop_after.py"])
def test_others(name: str, after: float, tmp_path: Path) -> None:
    assert trained(name, tmp_path) == pytest.approx(after, abs=2e-6)


@pytest.mark.whole
def test_ray_train(after: float, tmp_path: Path) -> None:
    # A cluster of its own: one that was left behind here would be waited for.
    variables = {"RAY_ADDRESS": "local"}
    found = trained("ray_train_before.py", tmp_path, alone=True, limit=200, **variables)
    assert found == pytest.approx(after, abs=2e-6)
