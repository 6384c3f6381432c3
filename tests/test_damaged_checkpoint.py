"""Checkpoints tampered with, checksums and all: one clear line, and nothing changes."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import wagontrain as wt
from tests.commands import wagontrain
from tests.gang import Gang
from tests.problems import build
from tests.test_checkpoint import steps
from wagontrain import checkpoint
from wagontrain.folder import checksum
from wagontrain.transport import Context

PROBLEM = ("conv-batch-norm", "adam", "scheduler")
FIRST, SECOND = "rank0-0.safetensors", "rank1-0.safetensors"
Harm = Callable[[Path], None]


@pytest.fixture(scope="module")
def untouched(gang: Gang, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, of which each has a part of the weights."""
    folder = tmp_path_factory.mktemp("untouched")
    gang.run(2, steps, ("split-weights", {}, 2), PROBLEM, folder, 2, False)
    return folder / "checkpoints" / "step-2"


@pytest.fixture
def saved(untouched: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    copy = tmp_path / "checkpoints" / "step-2"
    shutil.copytree(untouched, copy)
    return copy


def resumed(saved: Path) -> None:
    strategy = wt.make_strategy("data-parallel")
    wt.Run(build(*PROBLEM), strategy, Context(), resume=saved).close()


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def described(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what state.json says."""
    file = saved / "state.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def put(saved: Path, name: str, content: bytes) -> None:
    """Put a file in the place of another, with a checksum that agrees."""
    (saved / name).write_bytes(content)
    described(saved, lambda state: state["files"].update({name: checksum(saved / name)}))


def with_header(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a file of tensors."""
    content = (saved / FIRST).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    put(saved, FIRST, struct.pack("<Q", len(text)) + text + content[8 + length :])


def with_places(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change where a file says that its pieces begin."""

    def in_header(header: dict[str, Any]) -> None:
        places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        change(places)
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)

    with_header(saved, in_header)


def without(saved: Path, name: str) -> None:
    (saved / name).unlink()
    described(saved, lambda state: state["files"].pop(name))


def outside(saved: Path, name: str) -> None:
    shutil.copy(saved / SECOND, saved.parent / "outside.safetensors")
    named = {name: checksum(saved / SECOND)}
    described(saved, lambda state: state["files"].update(named))


def state(text: str | bytes) -> Harm:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda saved: (saved / "state.json").write_bytes(raw) and None


def huge(saved: Path) -> None:
    with (saved / "state.json").open("r+b") as file:
        file.truncate(2**33)  # without taking room


WEIGHT = "model.0.weight"
HARMS: dict[str, tuple[Harm, str]] = {
    "state cut short": (
        lambda saved: state((saved / "state.json").read_bytes()[:-9])(saved),
        "state.json is not what was written",
    ),
    "state of other bytes": (state(b"\xff\x00\x80"), "state.json is not what was written"),
    "state without bottom": (state("[" * 100_000), "state.json is not what was written"),
    "state of odd kinds": (
        state('{"!kind": "dict", "items": 5}'), "state.json is not what was written",
    ),
    "state without end": (huge, "state.json has 8589934592 bytes"),
    "no files": (
        lambda saved: described(saved, lambda state: state.pop("files")), "no 'files'",
    ),
    "a shape as text": (
        lambda saved: described(saved, lambda state: state["shapes"].update({WEIGHT: "2"})),
        "'model.0.weight' of shape '2'",
    ),
    "another shape": (
        lambda saved: described(saved, lambda state: state["shapes"].update({WEIGHT: [2**40]})),
        "of tensor 'model.0.weight' not every piece is there",
    ),
    "steps as text": (
        lambda saved: described(saved, lambda state: state.update(steps="2")), "no 'steps'",
    ),
    "no data": (lambda saved: described(saved, lambda state: state.update(data=[])), "no 'data'"),
    "data that says nothing": (
        lambda saved: described(saved, lambda state: state.update(data={})), "no 'samples'",
    ),
    "groups of text": (
        lambda saved: described(saved, lambda state: state["optimizer"].update(groups="ab")),
        "no groups of parameters",
    ),
    "state of numbers": (
        lambda saved: described(saved, lambda state: state["optimizer"].update(state={"a": 1})),
        "no state of the optimizer",
    ),
    "a scheduler that is a list": (
        lambda saved: described(saved, lambda state: state.update(scheduler=[])), "no scheduler",
    ),
    "a file above": (
        lambda saved: outside(saved, "../outside.safetensors"),
        r"no rank writes a file '../outside.safetensors'",
    ),
    "a file elsewhere": (
        lambda saved: outside(saved, "/etc/hostname"), "no rank writes a file '/etc/hostname'",
    ),
    "a rank left out": (lambda saved: without(saved, SECOND), "not every piece is there"),
    "all ranks left out": (
        lambda saved: [without(saved, name) for name in (FIRST, SECOND)] and None,
        "not every piece is there",
    ),
    "one rank twice": (
        lambda saved: put(saved, SECOND, (saved / FIRST).read_bytes()), "not every piece is there",
    ),
    "a pickle": (
        lambda saved: put(saved, FIRST, pickle.dumps({"model.0.weight": [1.0]})),
        "rank0-0.safetensors is no file of tensors",
    ),
    "a file of torch.save": (
        lambda saved: torch.save({"a": torch.ones(2)}, saved / FIRST)
        or put(saved, FIRST, (saved / FIRST).read_bytes()),
        "rank0-0.safetensors is no file of tensors",
    ),
    "an empty file": (lambda saved: put(saved, FIRST, b""), "is no file of tensors"),
    "a header without end": (
        lambda saved: put(saved, FIRST, struct.pack("<Q", 2**60) + b"{}"), "is no file of tensors",
    ),
    "a shape beyond the file": (
        lambda saved: with_header(saved, lambda header: header[WEIGHT].update(shape=[10**9] * 4)),
        "is no file of tensors",
    ),
    "a place far away": (
        lambda saved: with_places(
            saved, lambda places: places[WEIGHT].update(saved_offsets=[10**15, 0, 0, 0])
        ),
        "of tensor 'model.0.weight' not every piece is there",
    ),
    "a place below 0": (
        lambda saved: with_places(
            saved, lambda places: places[WEIGHT].update(saved_offsets=[-1, 0, 0, 0])
        ),
        "is no file of tensors",
    ),
    "places of text": (
        lambda saved: with_places(saved, lambda places: places.update({WEIGHT: "here"})),
        "is no file of tensors",
    ),
    "no places": (
        lambda saved: put(saved, FIRST, safetensors.torch.save({WEIGHT: torch.ones(4, 2, 3, 3)})),
        "is no file of tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_named_in_one_line_and_nothing_changes(
    saved: Path, tmp_path: Path, harm: str
) -> None:
    do, said = HARMS[harm]
    resumed(saved)
    do(saved)
    harmed = {} if harm == "state without end" else everything(tmp_path)
    with pytest.raises(wt.UsageError, match=said) as caught:
        resumed(saved)
    assert str(caught.value).count("\n") == 0
    if "another model" not in said and harm != "data that says nothing":
        with pytest.raises(wt.UsageError, match=said):
            checkpoint.export(checkpoint.Checkpoint(saved), tmp_path / "out.safetensors")
    if harmed:
        assert everything(tmp_path) == harmed


def test_files_that_are_not_the_checkpoints_are_not_read(saved: Path) -> None:
    (saved / "rank7-0.safetensors").write_bytes(pickle.dumps("not read"))
    resumed(saved)


def test_of_another_optimizer_is_refused(saved: Path) -> None:
    task = build("conv-batch-norm", "momentum", "scheduler")
    with pytest.raises(wt.UsageError, match="of another optimizer: Adam there, SGD here"):
        wt.Run(task, wt.make_strategy("data-parallel"), Context(), resume=saved)


def refused(context: Context, saved: Path) -> str:
    try:
        wt.Run(build(*PROBLEM), wt.make_strategy("sharded"), context, resume=saved).close()
    except wt.UsageError as error:
        return str(error)
    return "taken"


def test_every_rank_refuses_what_the_first_finds(gang: Gang, saved: Path) -> None:
    put(saved, FIRST, b"{}")
    first, second = gang.run(2, refused, saved)
    assert first == second
    assert "rank0-0.safetensors is no file of tensors" in first


def test_the_command_says_one_line_and_leaves_no_folder(saved: Path, task_file: Path) -> None:
    without(saved, SECOND)
    asked = ("run", f"{task_file}:task", "--resume", str(saved), "--run-dir", "R")
    for words in (asked, ("export", str(saved), "out.safetensors")):
        done = wagontrain(*words, folder=task_file.parent)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "not every piece is there" in done.stderr
    assert not (task_file.parent / "R").exists()
    assert not (task_file.parent / "out.safetensors").exists()
