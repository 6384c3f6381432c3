"""Runs of local SGD: what travels, who waits for whom, losses that are none, what is validated."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build, classes, numbers
from tests.strategies.local_sgd import plain_sgd, small_task
from tests.test_events import Kept
from wagontrain.strategies.local_sgd import LocalSGD
from wagontrain.trainer import train
from wagontrain.transport import Context

# --- what travels, and who waits ------------------------------------------------------------------

WIDE = 20_000


def wide_task() -> wt.Task:
    return wt.Task(
        model=partial(nn.Linear, 5, WIDE // 5), loss=F.mse_loss, optimizer=plain_sgd, batch_size=8,
        train=TensorDataset(numbers(160, 5), numbers(160, WIDE // 5)),
    )  # fmt: skip


def sent(context: Context, settings: dict[str, Any]) -> list[int]:
    with wt.Run(wide_task(), wt.make_strategy("local-sgd", settings), context) as run:
        found = []
        for batch in run.batches():
            count = run.step(batch).sent
            assert count is not None
            found.append(count)
        run.close()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_sent_between_averages(gang: Gang, size: int) -> None:
    weights = (WIDE + WIDE // 5) * 4
    for found in gang.run(size, sent, {"steps_between": 5}):
        assert len(found) == 20
        for step, count in enumerate(found, start=1):
            if step % 5:
                assert count == 0
            else:
                expected = 2 * (size - 1) / size * weights
                assert expected <= count < 1.05 * expected + 1000 * size


def test_fragments_send_as_much_at_other_times(gang: Gang) -> None:
    """Weight and bias, each when it is its turn, and on its way in the step after."""
    for found in gang.run(2, sent, {"steps_between": 5, "fragments": 2}):
        for start in (6, 11):
            weight, bias = sum(found[start : start + 2]), sum(found[start + 3 : start + 5])
            assert WIDE * 4 <= weight < 1.05 * WIDE * 4 + 2000
            assert WIDE // 5 * 4 <= bias < 1.05 * WIDE // 5 * 4 + 2000
            assert found[start + 2] == 0


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < limit, f"{file} did not come"
        time.sleep(0.01)


def ahead(context: Context, folder: Path) -> list[float | None]:
    """Rank 1 takes its second step when rank 0 has taken all but the last of the round."""
    with wt.Run(small_task(epochs=3), LocalSGD(steps_between=9), context) as run:
        reports = []
        for batch in run.batches():
            if batch.step == 1 and context.world.rank == 1:
                wait_for(folder / "ahead")
            reports.append(run.step(batch))
            if batch.step == 7 and context.world.rank == 0:
                (folder / "ahead").touch()
        run.close()
    return [report.loss for report in reports]


def test_nobody_waits_between_averages(gang: Gang, tmp_path: Path) -> None:
    """With an exchange in any of these steps, this would not end."""
    for losses in gang.run(2, ahead, tmp_path):
        assert [loss is None for loss in losses] == [True] * 8 + [False]


def overlapping(context: Context, folder: Path) -> None:
    """Rank 0 sends its average and trains on, though rank 1 has not even sent its own."""
    strategy = LocalSGD(steps_between=4, overlap=3)
    with wt.Run(small_task(epochs=3), strategy, context) as run:
        for batch in run.batches():
            if batch.step == 1 and context.world.rank == 1:
                wait_for(folder / "ahead")
            run.step(batch)
            if batch.step == 5 and context.world.rank == 0:
                (folder / "ahead").touch()
        run.finish()


def test_an_overlapped_average_is_not_waited_for(gang: Gang, tmp_path: Path) -> None:
    gang.run(2, overlapping, tmp_path)


def straggling(context: Context) -> dict[str, Any]:
    class Slow(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            time.sleep(0.03 if context.world.rank == 1 else 0.01)
            return super().forward(inputs)

    task = small_task(model=partial(Slow, 5, 3), epochs=8)
    with wt.Run(task, LocalSGD(steps_between=4), context) as run:
        for batch in run.batches():
            run.step(batch)
    return run.finish()


def test_who_is_always_slower_is_still_waited_for_and_named(gang: Gang) -> None:
    for summary in gang.run(2, straggling):
        assert summary["straggler"].startswith("rank 1 on host")
        slow = summary["times_per_rank"][1]["own_seconds"]
        assert 24 * 0.03 <= slow < 24 * 0.06  # of all steps, though told only now and then


# --- errors ---------------------------------------------------------------------------------------


def spoiled(context: Context, folder: Path) -> str:
    """A loss that is no number on rank 1 only, in the fourth step; saved before and after."""
    taken = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        taken[0] += output.requires_grad and len(output) < 8  # not the trial's
        bad = context.world.rank == 1 and taken[0] == 4
        return F.cross_entropy(output, target) * (float("nan") if bad else 1.0)

    task = small_task(loss=loss, epochs=8)
    with wt.Run(task, LocalSGD(steps_between=6), context) as run:
        try:
            for batch in run.batches():
                run.step(batch)
                if run.step_count == 2:
                    run.save(folder)
                if run.step_count == 5:
                    break
        except wt.LossError as error:
            finite = all(bool(value.isfinite().all()) for value in run.model.parameters())
            return f"{error} {finite}"
    return "no error"


def test_a_loss_that_is_no_number_is_named_where_it_is(gang: Gang, tmp_path: Path) -> None:
    well, message = gang.run(2, spoiled, tmp_path)
    assert well == "no error"
    assert message.startswith("the loss is nan at step 3 (epoch 1) on rank 1, samples 4 to 7 in")
    assert message.endswith(" True")
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_samples_that_count_for_nothing_are_named(gang: Gang) -> None:
    for message in [*gang.run(2, weightless), weightless(Context())]:
        assert "add up to 0" in message


def weightless(context: Context) -> str:
    task = dataclasses.replace(build("linear-regression"), weight=lambda target: 0)
    try:
        with wt.Run(task, LocalSGD(steps_between=2), context) as run:
            for batch in run.batches():
                run.step(batch)
    except wt.ModelError as error:
        return str(error)
    return "no error"


# --- a whole run ----------------------------------------------------------------------------------


def whole_run(context: Context, settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Any]:
    kept = Kept()
    task = small_task(
        epochs=12,
        validation=TensorDataset(numbers(11, 5, seed=4), classes(11, 3)),
    )  # fmt: skip
    with wt.Run(task, wt.make_strategy("local-sgd", settings), context, sinks=[kept]) as run:
        summary = train(run)
    with torch.no_grad():
        inputs, target = task.validation[:]  # type: ignore[index]
        own = F.cross_entropy(run.model(inputs), target)
    return summary, own, kept.events


@pytest.mark.parametrize("settings", [{"steps_between": 5}, {"outer": "nesterov"}])
def test_what_is_validated_is_what_is_left_at_the_end(gang: Gang, settings: dict[str, Any]) -> None:
    answers = gang.run(3, whole_run, settings)
    for summary, own, _ in answers:
        assert summary["validation"]["loss"] == pytest.approx(own.item(), rel=1e-5)
        assert summary["exact"] is False
        assert summary["train_loss"] is not None
    events = answers[0][2]
    covered = sum(
        event.get("covers", event.get("samples", 0))
        for event in events
        if event["kind"] in ("step", "loss") and event["loss"] is not None
    )
    assert covered == 12 * 18  # every sample is in some loss
