from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build
from wagontrain import verify
from wagontrain.folder import RunFolder
from wagontrain.transport import Context


class Recorder(wt.Callback):
    """Writes down what it is told, and wishes to stop where it was told to."""

    def __init__(self, stop_at: int | None = None, on: int | None = None) -> None:
        self.stop_at, self.on = stop_at, on
        self.rank = 0
        self.told: list[Any] = []

    def on_start(self, run: wt.Run) -> None:
        self.rank = run.context.world.rank
        self.told = ["start"]

    def on_step(self, report: wt.StepReport) -> str | None:
        self.told.append((report.step, report.loss))
        wishes = self.stop_at == report.step and self.on in (None, self.rank)
        return f"rank {self.rank} had enough" if wishes else None

    def on_validation(self, epoch: int, values: Any) -> None:
        self.told.append((epoch, values["loss"]))

    def on_end(self, summary: Any) -> None:
        self.told.append(summary["stopped"])


class Scripted(wt.Callback):
    """Makes validation losses what a test wants them to be, before others see them."""

    def __init__(self, *losses: float) -> None:
        self.losses = losses

    def on_validation(self, epoch: int, values: Any) -> None:
        values["loss"] = self.losses[epoch]


def task(*callbacks: Any, epochs: int = 6) -> wt.Task:
    made = build("conv-batch-norm")
    return dataclasses.replace(made, validation=made.train, callbacks=callbacks, epochs=epochs)


def trained(context: Context, strategy: str, made: wt.Task) -> tuple[dict[str, Any], list[Any]]:
    with wt.Run(made, wt.make_strategy(strategy), context) as run:
        summary = wt.trainer.train(run)
    return summary, getattr(made.callbacks[0], "told", [])


@pytest.mark.parametrize("strategy", ["data-parallel", "pipeline", "local-sgd"])
def test_every_rank_is_told_the_same(gang: Gang, strategy: str) -> None:
    (summary, first), (_, second) = gang.run(2, trained, strategy, task(Recorder(), epochs=2))
    assert first == second
    assert first[0] == "start"
    assert first[-1] is summary["stopped"] is None
    assert [step for step, _ in first[1:-1]] == [0, 1, 2, 0, 3, 4, 5, 1]


@pytest.mark.parametrize("strategy", ["data-parallel", "sharded"])
def test_what_one_rank_wishes_all_do_after_the_same_step(gang: Gang, strategy: str) -> None:
    made = task(Recorder(stop_at=4, on=1))
    for summary, told in gang.run(2, trained, strategy, made):
        assert summary["steps"] == 5
        assert summary["stopped"] == told[-1] == "rank 1 had enough"
        assert math.isfinite(summary["validation"]["loss"])


def test_early_stopping_counts_validations_that_are_no_better() -> None:
    stopping = wt.EarlyStopping(patience=2, least=0.1)
    stopping.on_start(None)
    wishes = [
        bool(stopping.on_validation(0, {"loss": loss})) for loss in (3, 2, 1.95, math.nan, 1.0)
    ]
    assert wishes == [False, False, False, True, False]
    largest = wt.EarlyStopping("accuracy", patience=1, mode="max")
    assert largest.on_validation(0, {"accuracy": 0.5}) is None
    assert largest.on_validation(1, {"accuracy": 0.6}) is None
    reason = largest.on_validation(2, {"accuracy": 0.6})
    assert reason == "accuracy has not become better than 0.6 in 1 validations"


def test_early_stopping_ends_all_ranks_at_once(gang: Gang) -> None:
    made = task(Scripted(3, 2, 2, 2, 1, 0), wt.EarlyStopping(patience=2))
    for summary, _ in gang.run(3, trained, "data-parallel", made):
        assert summary["steps"] == 4 * made.steps_per_epoch
        assert "in 2 validations" in summary["stopped"]


def test_a_stopped_run_keeps_its_weights_and_says_why(tmp_path: Path) -> None:
    made = task(Scripted(3, 2, 2, 2, 1, 0), wt.EarlyStopping(patience=1))
    done = wt.fit(made, "data-parallel", run_dir=tmp_path / "R", quiet=True)
    assert done.summary["steps"] == 3 * made.steps_per_epoch
    assert done.state_dict()
    kept = json.loads((tmp_path / "R" / "summary.json").read_text())
    assert kept["stopped"] == done.summary["stopped"]
    assert any("has not become better" in line for line in wt.jobs.result_lines(kept, None))
    kinds = [
        json.loads(line)["kind"]
        for line in (tmp_path / "R" / "events.jsonl").read_text().splitlines()
    ]
    assert kinds.count("stopped") == 1


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    """Patience 3, of which 2 are used up before the run is cut: one is left, not three."""
    losses = (1, 2, 2, 2, 2, 2)
    first = task(Scripted(*losses), wt.EarlyStopping(patience=3), epochs=3)
    wt.fit(first, "data-parallel", run_dir=tmp_path / "R", quiet=True)
    again = task(Scripted(*losses), wt.EarlyStopping(patience=3))
    done = wt.fit(again, "data-parallel", run_dir=tmp_path / "S", resume=tmp_path / "R", quiet=True)
    assert done.summary["steps"] == 4 * again.steps_per_epoch


def test_a_callback_more_or_less_takes_nothing_from_the_others(tmp_path: Path) -> None:
    losses = (1, 2, 2, 2, 2, 2)
    first = task(Scripted(*losses), wt.EarlyStopping(patience=3), epochs=3)
    wt.fit(first, "data-parallel", run_dir=tmp_path / "R", quiet=True)
    again = task(Recorder(), Scripted(*losses), wt.EarlyStopping(patience=3))
    done = wt.fit(again, "data-parallel", run_dir=tmp_path / "S", resume=tmp_path / "R", quiet=True)
    assert done.summary["steps"] == 4 * again.steps_per_epoch


def test_no_batch_is_read_after_the_end() -> None:
    made = task(Recorder(stop_at=1))
    with wt.Run(made, wt.make_strategy("data-parallel"), Context()) as run:
        batches = run.training.epoch(0)
        run.training.epoch = lambda *_: batches  # type: ignore[method-assign]
        assert [run.step(batch).step for batch in run.batches()] == [0, 1]
        assert next(batches).step == 2
        run.close()


class Meddling(wt.Callback):
    """Changes the model on the second rank only."""

    def on_start(self, run: wt.Run) -> None:
        self.run = run

    def on_validation(self, epoch: int, values: Any) -> None:
        if self.run.context.world.rank == 1:
            with torch.no_grad():
                next(self.run.model.parameters()).add_(1e-3)


def _meddled(context: Context, folder: Path) -> str:
    made = task(Meddling(), epochs=1)
    place = RunFolder.create(folder / "R", "fit") if context.world.rank == 0 else None
    try:
        with wt.Run(made, wt.make_strategy("data-parallel"), context, place) as run:
            wt.trainer.train(run)
    except wt.ReplicaError as error:
        return str(error)
    return ""


def test_a_model_that_one_rank_has_changed_is_not_saved(gang: Gang, tmp_path: Path) -> None:
    for message in gang.run(2, _meddled, tmp_path):
        assert "of rank 1 is no longer that of rank 0" in message
    assert not list(tmp_path.rglob("step-*"))


def test_one_task_trained_twice_begins_anew(tmp_path: Path) -> None:
    made = task(Scripted(3, 2, 2, 2, 1, 0), wt.EarlyStopping(patience=2))
    steps = [
        wt.fit(made, "data-parallel", run_dir=tmp_path / name, quiet=True).summary["steps"]
        for name in "RS"
    ]
    assert steps[0] == steps[1] == 4 * made.steps_per_epoch


def test_a_callback_that_fails_is_named() -> None:
    class Failing(wt.Callback):
        def on_step(self, report: wt.StepReport) -> str | None:
            raise KeyError("nothing there")

    with pytest.raises(wt.ModelError, match=r"Failing.on_step failed: KeyError: 'nothing there'"):
        trained(Context(), "data-parallel", task(Failing()))


@pytest.mark.parametrize(
    ("callback", "changes", "words"),
    [
        (wt.EarlyStopping("accuracy"), {}, "no metric of the task: give one of loss"),
        (wt.EarlyStopping(), {"validation": None}, "give Task.validation some"),
        (print, {}, "no wagontrain.Callback"),
        (wt.EarlyStopping, {}, "give an object of it"),
    ],
)
def test_useless_callbacks_are_refused(callback: Any, changes: Any, words: str) -> None:
    with pytest.raises(wt.TaskError, match=words):
        dataclasses.replace(task(), callbacks=[callback], **changes)


def test_callbacks_are_a_list() -> None:
    with pytest.raises(wt.TaskError, match="Task.callbacks is EarlyStopping: give a list"):
        dataclasses.replace(task(), callbacks=wt.EarlyStopping())


def test_verification_calls_none() -> None:
    assert verify.prepared(task(Recorder()), "float64")[0].callbacks == ()


@pytest.mark.parametrize("strategy", ["parameter-server", "sandblaster"])
def test_strategies_without_ranks_refuse_them(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(wt.UsageError, match=r"workers come and go: leave Task.callbacks out"):
        wt.fit(task(Recorder()), strategy, workers=2, run_dir=tmp_path / "R", quiet=True)
    assert not (tmp_path / "R").exists()
