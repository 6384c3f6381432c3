from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.problems import build
from wagontrain import verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.strategies.data_parallel import DataParallel


def trace(**changes: Any) -> Trace:
    fields = {
        "losses": [1.0, 0.5],
        "parameters": {"a": torch.ones(2, dtype=torch.float64), "b": torch.full((1,), 100.0)},
        "buffers": {"c": torch.zeros(1)},
    }
    return Trace(**(fields | changes))


def verdict(found: Trace, dtype: str = "float64") -> verify.Verdict:
    return verify.compare(found, trace(), DataParallel(), 2, dtype)


def test_equal_traces_pass() -> None:
    assert verdict(trace()).passed
    assert verdict(trace()).max_parameter_deviation == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": [1.0, 0.5 + 1e-7]},
        {"losses": [1.0, math.nan]},
        {"parameters": {"a": torch.ones(2).double() + 1e-7, "b": torch.tensor([100.0])}},
        {"parameters": {"a": torch.ones(2), "b": torch.tensor([math.nan])}},
        {"buffers": {"c": torch.tensor([1e-3])}},
    ],
)  # fmt: skip
def test_any_deviation_fails(changes: dict[str, Any]) -> None:
    assert not verdict(trace(**changes)).passed


def test_deviations_are_relative_to_large_tensors_and_absolute_below_one() -> None:
    found = verdict(
        trace(parameters={"a": torch.ones(2).double() + 0.01, "b": torch.tensor([100.5])})
    )
    assert found.max_parameter_deviation == pytest.approx(0.01)
    assert found.worst_parameter == "a"
    assert verdict(trace(losses=[1.0, 0.5 + 1e-5]), "float32").passed


def test_json_is_json_even_for_nan() -> None:
    found = json.loads(verdict(trace(losses=[1.0, math.nan])).to_json())
    assert found["max_loss_deviation"] is None
    assert found["passed"] is False
    assert found["exact"] is True
    assert found["max_parameter_deviation"] == 0


def test_the_stretch_crosses_an_epoch_and_its_last_batch() -> None:
    task = build("linear-regression")
    assert task.steps_per_epoch == 3
    assert verify.first_step(task, 2) == 2
    assert verify.first_step(task, 10) == 0


def test_dropout_is_turned_off_wherever_it_is() -> None:
    model = nn.Sequential(
        nn.Dropout(0.3), nn.LSTM(2, 2, 2, dropout=0.1), nn.MultiheadAttention(4, 2, dropout=0.2)
    )
    assert verify.turn_off_dropout(model)
    assert not verify.turn_off_dropout(model)
    prepared, had = verify.prepared(build("dropout-off"), "float64")
    assert had
    model = prepared.build_model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_the_reference_is_what_anybody_would_write() -> None:
    """A loop without any of wagontrain's parts but the order of samples."""
    task = build("conv-batch-norm", "momentum", "scheduler")
    found = train_plainly(task, torch.device("cpu"), 0, 6)
    torch.manual_seed(task.seed)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3)
    x, y = task.train.tensors  # type: ignore[attr-defined]
    losses = []
    from wagontrain.batches import Order

    for epoch in range(2):
        order = Order(18, 8, 0).epoch(epoch)
        for index in order.split(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    assert found.losses == losses
    for name, value in model.named_parameters():
        assert torch.equal(found.parameters[name], value)
    for name, value in model.named_buffers():
        assert torch.equal(found.buffers[name], value)


def test_a_small_learning_rate_hides_nothing() -> None:
    """What training moved is the scale: a gradient wrong by half is wrong at any rate."""
    start = {"a": torch.ones(2, dtype=torch.float64)}
    right = trace(parameters={"a": start["a"] + 2e-6}, initial=start)
    wrong = trace(parameters={"a": start["a"] + 3e-6})
    found = verify.compare(wrong, right, DataParallel(), 2, "float64")
    assert not found.passed
    assert found.max_parameter_deviation > 0.3
    same = trace(parameters={"a": start["a"] + 2e-6 + 1e-15})
    assert verify.compare(same, right, DataParallel(), 2, "float64").passed


class Awkward(nn.Module):
    """Tied weights, a buffer that is not saved, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("kept", torch.zeros(2))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_a_trace_takes_what_can_be_compared() -> None:
    model = Awkward()
    found = Trace.of([], model, model.state_dict())
    assert set(found.parameters) == {"one.weight", "one.bias", "two.bias"}
    assert set(found.buffers) == {"kept"}
