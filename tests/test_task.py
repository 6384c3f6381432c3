from __future__ import annotations

import dataclasses
import random
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import wagontrain as wt
from tests.problems import build
from wagontrain.errors import TaskError, UsageError, nearest
from wagontrain.task import call_model, describe, load_task, make_task, place


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: give a whole number from 1 on"),
        ({"batch_size": 19}, "batch_size is 19, but the data set has 18 samples"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"accumulate": 9}, "cuts a batch of 8 into 9 micro-batches"),
        ({"loader_workers": -1}, "loader_workers is -1"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0"),
        ({"precision": "float8"}, "precision is 'float8'"),
        ({"train": Endless()}, "a stream, .* say shuffle=False"),
        ({"train": Endless(), "shuffle": False}, "Endless.* without __len__"),
        ({"validation": Endless()}, "Task.validation .*has no length"),
        ({"train": TensorDataset(torch.zeros(0))}, "Task.train is empty"),
        ({"model": nn.Linear(1, 1)}, "is a module that already exists"),
        ({"loss": "mse"}, "Task.loss is of the type str, which cannot be called"),
        ({"metrics": {"loss": F.mse_loss}}, "rename it"),
    ],
)
def test_a_field_that_cannot_be_trained_with_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        dataclasses.replace(build("linear-regression"), **fields)


def _built(model: Any) -> wt.Task:
    return dataclasses.replace(build("linear-regression"), model=model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: "net", "Task.model returned str"),
        (lambda: nn.LazyLinear(2), "lazy layers"),
        (lambda: nn.ReLU(), "nothing to train"),
        (lambda: nn.Linear(1, 1).requires_grad_(False), "nothing to train"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        _built(model).build_model()


def test_optimizers_and_schedulers_that_cannot_be_stepped_are_refused() -> None:
    task = build("linear-regression")
    model = task.build_model()
    with pytest.raises(TaskError, match="LBFGS evaluates the model several times"):
        dataclasses.replace(task, optimizer=torch.optim.LBFGS).build_optimizer(model)
    with pytest.raises(TaskError, match="returned a list with a Parameter"):
        dataclasses.replace(task, optimizer=list).build_optimizer(model)
    optimizer = task.build_optimizer(model)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(TaskError, match="ReduceLROnPlateau steps on a metric"):
        dataclasses.replace(task, scheduler=plateau).build_scheduler(optimizer)


def test_the_seed_fixes_the_weights_and_leaves_the_callers_random_numbers_alone() -> None:
    task = build("conv-batch-norm")
    before, python = torch.get_rng_state(), random.getstate()
    first, second = task.build_model(), task.build_model()
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()
    other = dataclasses.replace(task, seed=1).build_model()
    for one, two, three in zip(
        first.parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        assert one.numel() == 4 or not torch.equal(one, three)


Pair = namedtuple("Pair", ["left", "right"])


def test_inputs_of_all_kinds() -> None:
    def model(left: Any, right: Any = 0) -> Any:
        return left - right

    x, y = torch.tensor(3), torch.tensor(1)
    assert call_model(model, x) == 3
    assert call_model(model, (x, y)) == 2
    assert call_model(model, [x, y]) == 2
    assert call_model(model, {"right": x, "left": y}) == -2
    assert call_model(model, Pair(x, y)) == 2
    assert call_model(model, 5) == 5


def test_placing_keeps_the_nest() -> None:
    nest = {"a": [torch.zeros(2), (torch.ones(1), 3)], "b": Pair(torch.zeros(1), "text")}
    placed = place(nest, torch.device("meta"))
    assert placed["a"][0].is_meta
    assert placed["a"][1][1] == 3
    assert placed["b"].left.is_meta
    assert placed["b"].right == "text"
    assert describe(nest) == "{a: ([2], ([1], int)), b: ([1], str)}"


def test_a_task_is_a_value_or_a_function() -> None:
    task = build("linear-regression")
    assert make_task(task) is task
    assert make_task(lambda: task, {"epochs": 7}).epochs == 7
    with pytest.raises(TaskError, match="gave NoneType"):
        make_task(lambda: None)  # type: ignore[arg-type,return-value]


FILE = """
import wagontrain as wt
def task() -> wt.Task: ...
def other() -> wt.Task: ...
number = 3
"""


def test_loading_a_task_file(tmp_path: Path) -> None:
    file = tmp_path / "job.py"
    file.write_text(FILE)
    assert load_task(str(file)).__name__ == "task"  # type: ignore[union-attr]
    assert load_task(f"{file}:other").__name__ == "other"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"has no 'othr': .* did you mean 'other'\?"):
        load_task(f"{file}:othr")
    with pytest.raises(UsageError, match=r"'number' in .* is int"):
        load_task(f"{file}:number")
    with pytest.raises(UsageError, match="does not exist"):
        load_task(str(tmp_path / "none.py"))
    for text, message in (("import nothing_at_all", "ModuleNotFoundError"), ("def", "SyntaxError")):
        file.write_text(text)
        with pytest.raises(UsageError, match=f"could not be imported: {message}"):
            load_task(str(file))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="not a Python file"):
        load_task(str(tmp_path / "notes.txt"))


def test_the_nearest_name() -> None:
    assert nearest("data-paralel", ["hybrid", "data-parallel"]).startswith(
        "did you mean 'data-parallel'?"
    )
    assert nearest("xyz", ["b", "a"]) == "known: a, b"
    assert nearest("xyz", []) == "known: none"


def test_steps_of_an_epoch() -> None:
    task = build("linear-regression")
    assert (task.samples, task.steps_per_epoch) == (18, 3)
    assert dataclasses.replace(task, batch_size=9).steps_per_epoch == 2
    assert partial(dataclasses.replace, task)(batch_size=18).steps_per_epoch == 1


def test_what_a_task_function_draws_at_random_is_the_same_for_every_worker() -> None:
    def source() -> wt.Task:
        data = TensorDataset(torch.randn(9, 5), torch.randn(9))
        drawn.append((data.tensors[0].sum().item(), random.random()))
        return dataclasses.replace(build("linear-regression"), train=data, batch_size=3)

    drawn: list[tuple[float, float]] = []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_task(source)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    make_task(source)
    assert drawn[0] == drawn[1]


def fail(*arguments: Any) -> Any:
    raise ValueError("no such thing")


def test_functions_of_the_user_that_raise_are_named() -> None:
    task = build("linear-regression")
    with pytest.raises(TaskError, match=r"Task.model failed: ValueError: no such thing \(.*\.py"):
        dataclasses.replace(task, model=fail).build_model()
    with pytest.raises(TaskError, match="Task.optimizer failed"):
        dataclasses.replace(task, optimizer=fail).build_optimizer(task.build_model())
    with pytest.raises(TaskError, match="the function that builds the task failed"):
        make_task(fail)
    with pytest.raises(TaskError, match="Task.scheduler is of the type int"):
        dataclasses.replace(task, scheduler=3)
    with pytest.raises(TaskError, match="Task.metrics is not a dict of functions"):
        dataclasses.replace(task, metrics={"accuracy": 1})


def test_parameters_beside_the_model_are_refused() -> None:
    task = build("linear-regression")
    other = nn.Parameter(torch.zeros(1))
    with pytest.raises(TaskError, match="holds parameters that are not the model's"):
        dataclasses.replace(
            task, optimizer=lambda own: torch.optim.SGD([*own, other], lr=0.1)
        ).build_optimizer(task.build_model())
    with pytest.raises(TaskError, match="Task.loss is a module with parameters of its own"):
        dataclasses.replace(task, loss=nn.Bilinear(1, 1, 1))
