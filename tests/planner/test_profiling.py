"""What a task costs here: that layers add up, and that noise makes nothing free."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.problems import classes, numbers
from wagontrain.errors import ModelError, UsageError
from wagontrain.planner import keeping, profiling
from wagontrain.planner.profiling import fingerprint, measure
from wagontrain.profile import Line, Profile

CPU = torch.device("cpu")


def model(width: int = 400) -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
    )


def task(**changes: Any) -> wt.Task:
    made = wt.Task(
        model=model,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        train=TensorDataset(numbers(256, 20), classes(256, 5)),
        batch_size=128,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes as have to be, and not for seconds."""
    monkeypatch.setattr(profiling, "_SECONDS", 0.05)


def test_a_profile_of_a_task() -> None:
    found = measure(task(model=partial(model, 1500)), CPU, [32, 64, 128])
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == ["0", "1", "2", "3", "4"]
    assert found.nbytes == sum(value.nbytes for value in model(1500).parameters())
    # The large layer takes most of the time of those with weights.
    heavy = ("0", "2", "4")
    total = {name: layers[name].forward(128) + layers[name].backward(128) for name in heavy}
    assert max(total, key=lambda name: total[name]) == "2"
    assert found.optimizer == pytest.approx(2.0, rel=0.01)  # Adam's two
    assert found.sample == 20 * 4 + 8
    assert found.update(found.nbytes) > 0
    assert layers["4"].scores  # cross-entropy of what it gives
    assert Profile.from_json(found.to_json()) == found


@given(
    st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-7, 10)), min_size=1, max_size=5),
    st.integers(1, 10_000),
)
def test_noise_makes_nothing_free(points: list[tuple[int, float]], samples: int) -> None:
    line = Line.through(points)
    assert line.fixed >= 0
    assert line.each > 0
    assert line(samples) > 0


@given(st.floats(0, 1), st.floats(1e-6, 1e-2))
def test_a_line_is_found_again(fixed: float, each: float) -> None:
    exact = Line(fixed, each)
    found = Line.through([(n, exact(n)) for n in (8, 16, 32)])
    if each * 8 > 0.2 * fixed:  # else a sample costs as little as noise
        assert found(100) == pytest.approx(exact(100), rel=1e-3)


def test_a_fingerprint_is_of_model_task_and_optimizer() -> None:
    plain = fingerprint(task(), model())
    assert plain == fingerprint(task(), model())
    others = [
        fingerprint(task(), model(401)),
        fingerprint(task(batch_size=64), model()),
        fingerprint(task(accumulate=2), model()),
        fingerprint(task(optimizer=partial(torch.optim.SGD, lr=0.1)), model()),
    ]
    assert len({plain, *others}) == 5


def test_a_profile_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def noting(*arguments: Any) -> Profile:
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(keeping, "measure", noting)
    first = keeping.profile_of(task(), 4, tmp_path)
    assert keeping.profile_of(task(), 4, tmp_path) == first
    assert len(measured) == 1
    keeping.profile_of(task(batch_size=64), 4, tmp_path)
    assert len(measured) == 2
    for file in tmp_path.glob("profile-*.json"):
        file.write_text(file.read_text()[:-40])  # a disk was full
    assert keeping.profile_of(task(), 4, tmp_path).layers[0].name == "0"
    assert len(measured) == 3


def test_a_first_batch_that_fails_is_told() -> None:
    wrong = task(train=TensorDataset(numbers(256, 21), classes(256, 5)))
    with pytest.raises(ModelError, match="forward failed on the first batch"):
        measure(wrong, CPU, [16])


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', '{"format": 1, "layers": 3}'])
def test_files_that_are_no_profiles(text: str) -> None:
    with pytest.raises(UsageError, match="this is no profile of this version"):
        Profile.from_json(text)
