"""Whole trainings on servers, in threads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import wagontrain as wt
from tests.problems import PROBLEMS, build
from tests.servers.crews import Threads
from wagontrain import checkpoint, verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.transport import Context

STEPS = 6
# Batch norm looks at the whole batch, which no worker has.
TAKEN = sorted(name for name in PROBLEMS if "batch-norm" not in name)


def trained(problem: tuple[str, str, str], workers: int, folder: Path, **settings: object) -> Trace:
    strategy = wt.make_strategy("parameter-server", {"consistency": "synchronous", **settings})
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(*problem), "float64")
        outcome = Threads(task, strategy, workers, folder).run()
        return Trace.of(outcome.losses, task.build_model(), outcome.weights)


def expected(problem: tuple[str, str, str]) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(*problem), "float64")
        return train_plainly(task, torch.device("cpu"), 0, STEPS)


@pytest.mark.parametrize("problem", TAKEN)
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (3, 2)])
def test_synchronous_steps_train_as_one_process(
    problem: str, workers: int, servers: int, tmp_path: Path
) -> None:
    case = (problem, "momentum", "plain")
    found = trained(case, workers, tmp_path / "run", servers=servers)
    strategy = wt.make_strategy("parameter-server", {"consistency": "synchronous"})
    verdict = verify.compare(found, expected(case), strategy, workers, "float64")
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "how", [("adam", "clip"), ("momentum", "accumulate"), ("adam", "scheduler")]
)
def test_every_way_of_stepping(how: tuple[str, str], tmp_path: Path) -> None:
    case = ("mlp" if "mlp" in PROBLEMS else TAKEN[0], *how)
    found = trained(case, 2, tmp_path / "run", servers=2)
    strategy = wt.make_strategy("parameter-server", {"consistency": "synchronous"})
    verdict = verify.compare(found, expected(case), strategy, 2, "float64")
    assert verdict.passed, verdict


def test_batch_norm_is_refused_in_exact_steps(tmp_path: Path) -> None:
    strategy = wt.make_strategy("parameter-server", {"consistency": "synchronous"})
    with pytest.raises(wt.UsageError, match=r"is batch norm.*data-parallel"):
        Threads(build("conv-batch-norm"), strategy, 2, tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"consistency": "ssp:1", "servers": 2},
        {"backup": 1},
        {"rule": "adagrad", "rate": 0.1},
        {"rule": "staleness-aware"},
        {"rule": "dc-asgd"},
        {"n_push": 2, "n_fetch": 2},
        {"rule": "easgd", "n_push": 2},
        {"overlap": True, "momentum": "task"},
    ],
    ids=str,
)
def test_every_sample_counts_once_an_epoch(settings: dict[str, object], tmp_path: Path) -> None:
    strategy = wt.make_strategy("parameter-server", settings)
    task = dataclasses.replace(build("linear-regression"), epochs=3)
    outcome = Threads(task, strategy, 3, tmp_path / "run").run()
    assert outcome.summary["samples"] == 3 * task.samples
    per_epoch = [0, 0, 0]
    for event in outcome.of("step"):
        per_epoch[event["epoch"]] += event["samples"]
    if not {"backup", "n_push"} & set(settings):  # whose updates may hold samples of two epochs
        assert per_epoch == [task.samples] * 3
    assert not strategy.exact
    staleness = outcome.summary["staleness"]
    assert sum(staleness["histogram"].values()) == len(outcome.losses) or settings.get("backup")
    assert all(torch.isfinite(value).all() for value in outcome.weights.values())


def test_goes_on_from_another_strategys_checkpoint_and_back(tmp_path: Path) -> None:
    task = build("linear-regression")
    whole = train_plainly(task, torch.device("cpu"), 0, STEPS)
    first = dataclasses.replace(task, epochs=1)
    folder = tmp_path / "checkpoints"
    with wt.Run(first, wt.make_strategy("data-parallel"), Context()) as run:
        for batch in run.batches():
            run.step(batch)
        saved = run.save(folder)
        run.close()
    assert saved is not None
    strategy = wt.make_strategy("parameter-server", {"consistency": "synchronous", "servers": 2})
    source = checkpoint.Restored(Context(), checkpoint.Checkpoint(saved))
    outcome = Threads(task, strategy, 2, tmp_path / "run", source).run()
    assert outcome.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    for name, value in outcome.weights.items():
        torch.testing.assert_close(value, whole.parameters[name])
    # What the servers left has the optimizer's momentum, for whoever goes on from it.
    longer = dataclasses.replace(task, epochs=3)
    again = train_plainly(longer, torch.device("cpu"), 0, 9)
    place = outcome.folder.path
    with wt.Run(longer, wt.make_strategy("data-parallel"), Context(), resume=place) as run:
        losses = [run.step(batch).loss for batch in run.batches()]
        run.close()
    assert losses == pytest.approx(again.losses[6:], rel=1e-5)
