"""State that any strategy takes up, at any number of workers; and files that are damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import pickletools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build
from wagontrain import checkpoint, pieces, verify
from wagontrain.transport import Context

STEPS = 6
WAYS: list[tuple[str, dict[str, Any], int]] = [
    ("data-parallel", {}, 2),
    ("hybrid", {"placement": "all"}, 3),
    ("sharded", {"least": 8}, 4),
    ("sharded", {"stage": 1}, 2),
    ("split-weights", {}, 3),
    ("split-weights", {"degree": 2}, 4),
    ("data-parallel", {}, 1),
]


def steps(
    context: Context,
    way: tuple[str, dict[str, Any], int],
    problem: tuple[str, ...],
    folder: Path,
    upto: int,
    resume: bool = True,
) -> tuple[list[float | None], dict[str, torch.Tensor]]:
    """Losses of the steps up to `upto`, going on from the folder's newest checkpoint."""
    strategy = wt.make_strategy(way[0], way[1])
    ahead = folder if resume else None
    with verify.computing_in("float64"):
        return _steps(context, strategy, build(*problem), folder, upto, ahead)


def _steps(
    context: Context, strategy: wt.Strategy, task: wt.Task, folder: Path, upto: int, ahead: Any
) -> tuple[list[float | None], dict[str, torch.Tensor]]:
    task, _ = verify.prepared(task, "float64")
    with wt.Run(task, strategy, context, max_steps=STEPS, resume=ahead) as run:
        losses = []
        for batch in run.batches():
            losses.append(run.step(batch).loss)
            if run.step_count == upto:
                break
        run.check_replicas()
        run.save(folder / "checkpoints")
        weights = {name: value.clone() for name, value in run.runner.state_dict()["model"].items()}
        run.close()
    return losses, weights


@pytest.mark.parametrize("problem", ["conv-batch-norm", "tied-weights", "embedding"])
@pytest.mark.parametrize(("optimizer", "variant"), [("adam", "scheduler"), ("momentum", "clip")])
def test_a_run_goes_on_under_any_strategy_and_world_size(
    gang: Gang, tmp_path: Path, problem: str, optimizer: str, variant: str
) -> None:
    """One step in each of six ways, taken up from the one before: the loss curve of one process."""
    task = (problem, optimizer, variant)
    whole, last = gang.run(1, steps, WAYS[-1], task, tmp_path / "whole", STEPS, False)[0]
    together: list[float | None] = []
    for upto, way in enumerate(WAYS[:STEPS], start=1):
        answers = gang.run(way[2], steps, way, task, tmp_path / "run", upto, upto > 1)
        together += answers[0][0]
        assert all(losses == answers[0][0] for losses, _ in answers)
    assert together == pytest.approx(whole, rel=1e-10)
    for name, value in answers[0][1].items():
        torch.testing.assert_close(value, last[name], rtol=1e-8, atol=1e-9)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint after two steps."""
    way = ("data-parallel", {}, 1)
    steps(Context(), way, ("conv-batch-norm", "adam", "scheduler"), tmp_path / "run", 2, False)
    return tmp_path / "run" / "checkpoints" / "step-2"


def resumed(saved: Path, **changes: Any) -> None:
    task = dataclasses.replace(build("conv-batch-norm", "adam", "scheduler"), **changes)
    wt.Run(task, wt.make_strategy("data-parallel"), Context(), resume=saved).close()


def test_a_checkpoint_holds_no_pickle_and_nothing_unfinished(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["rank0-0.safetensors", "state.json"]
    assert [path.name for path in saved.parent.iterdir()] == ["step-2"]
    for path in saved.iterdir():
        with pytest.raises(ValueError, match=r"opcode|pickle|exhausted|expected"):
            list(pickletools.genops(path.read_bytes()))
    tensors = safetensors.torch.load_file(saved / "rank0-0.safetensors")
    assert "model.0.weight" in tensors
    assert "optimizer.0.weight.exp_avg" in tensors


def test_the_newest_is_taken_and_older_ones_go(tmp_path: Path) -> None:
    way = ("data-parallel", {}, 1)
    for upto in (1, 2, 3):
        steps(Context(), way, ("embedding",), tmp_path, upto, upto > 1)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-2", "step-3"]
    assert checkpoint.latest(tmp_path).steps == 3
    assert checkpoint.latest(tmp_path / "checkpoints" / "step-2").steps == 2


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("cut short", "rank0-0.safetensors was changed or cut short"),
        ("one byte", "rank0-0.safetensors was changed or cut short"),
        ("remove", "rank0-0.safetensors is missing"),
        ("json", "state.json is not what was written"),
        ("other json", "of a form that this version"),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved: Path, harm: str, said: str) -> None:
    file = saved / "rank0-0.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "cut short":
        os.truncate(file, len(content) - 8)
    elif harm == "one byte":
        content[-5] ^= 1
        file.write_bytes(content)
    elif harm == "remove":
        file.unlink()
    else:
        (saved / "state.json").write_text("{" if harm == "json" else "[1]")
    with pytest.raises(wt.UsageError, match=said):
        resumed(saved)
    with pytest.raises(wt.UsageError, match=said):
        checkpoint.export(checkpoint.Checkpoint(saved), saved / "out.safetensors")


class Other(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(180, 3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": Other}, r"'0.weight' is of shape \[4, 2, 3, 3\] there and \[5, 2, 3, 3\] here"),
        ({"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3))}, "of another model"),
        ({"batch_size": 4}, "written with batch_size 8, here it is 4: samples would be seen twice"),
        ({"seed": 3}, "written with seed 0, here it is 3"),
        ({"scheduler": None}, "the checkpoint has a scheduler, but the task has none"),
        ({"epochs": 1}, None),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    saved: Path, changes: dict[str, Any], said: str | None
) -> None:
    if said is None:
        resumed(saved, **changes)
        with pytest.raises(wt.UsageError, match="has 2 steps, and 2 were asked for"):
            task = dataclasses.replace(build("conv-batch-norm", "adam", "scheduler"), **changes)
            strategy = wt.make_strategy("data-parallel")
            wt.Run(task, strategy, Context(), resume=saved, max_steps=2)
        return
    with pytest.raises(wt.UsageError, match=said):
        resumed(saved, **changes)


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(wt.UsageError, match="holds no checkpoint"):
            checkpoint.latest(path)


def crashing(context: Context, folder: Path, at: str) -> None:
    """Save, with the process's end in the middle of it."""

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    try:
        if at == "pieces.write":
            patch.setattr(pieces, "write", crash)
        elif at == "rename":
            patch.setattr(Path, "rename", crash)
        else:
            patch.setattr(checkpoint, at, crash)
        with pytest.raises(KeyboardInterrupt):
            steps(context, ("data-parallel", {}, 1), ("embedding",), folder, 2)
    finally:
        patch.undo()


@pytest.mark.parametrize("at", ["pieces.write", "flush_to_disk", "rename"])
def test_a_crash_while_saving_leaves_the_one_before(tmp_path: Path, at: str) -> None:
    way = ("data-parallel", {}, 1)
    steps(Context(), way, ("embedding",), tmp_path, 1, False)
    crashing(Context(), tmp_path, at)
    assert checkpoint.latest(tmp_path).steps == 1
    checkpoint.latest(tmp_path).check()
    losses, _ = steps(Context(), way, ("embedding",), tmp_path, 2)
    assert len(losses) == 1
    assert checkpoint.latest(tmp_path).steps == 2


def unshared(context: Context, folder: Path) -> list[float | None]:
    """Save and go on where no rank but the first sees the folder."""
    patch = pytest.MonkeyPatch()
    if context.world.rank:
        patch.setattr(checkpoint, "_is_here", lambda path: False)
    try:
        losses, _ = steps(
            context, ("hybrid", {"placement": "all"}, 3), ("embedding", "adam"), folder, 2, False
        )
        more, _ = steps(
            context, ("sharded", {"least": 8}, 3), ("embedding", "adam"), folder, STEPS, True
        )
    finally:
        patch.undo()
    return [*losses, *more]


def test_ranks_that_share_no_disk_save_and_resume(gang: Gang, tmp_path: Path) -> None:
    whole, _ = gang.run(
        1, steps, WAYS[-1], ("embedding", "adam"), tmp_path / "whole", STEPS, False
    )[0]
    for losses in gang.run(3, unshared, tmp_path / "run"):
        assert losses == pytest.approx(whole, rel=1e-10)
    files = json.loads((tmp_path / "run" / "checkpoints" / "step-6" / "state.json").read_text())
    assert {name.partition("-")[0] for name in files["files"]} == {"rank0", "rank1", "rank2"}


def test_export_writes_what_safetensors_reads(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    checkpoint.export(checkpoint.latest(saved), file)
    weights = safetensors.torch.load_file(file)
    model = build("conv-batch-norm").build_model()
    model.load_state_dict(weights)
    kept = safetensors.torch.load_file(saved / "rank0-0.safetensors")
    for name, value in weights.items():
        assert torch.equal(value, kept[f"model.{name}"])
    with pytest.raises(wt.UsageError, match="cannot be written"):
        checkpoint.export(checkpoint.latest(saved), tmp_path / "no" / "such" / "folder")
