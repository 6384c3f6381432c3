"""Groups of parameters, averages of weights, checkpointed activations, compiled models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import BATCH, SAMPLES, build, classes, numbers
from wagontrain import verify
from wagontrain.building import require_same_groups
from wagontrain.reference import Trace, train_plainly
from wagontrain.transport import Context

CPU = torch.device("cpu")
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("data-parallel", {}), ("sharded", {"stage": 1}), ("sharded", {"stage": 2, "least": 8}),
    ("sharded", {"least": 8}), ("split-weights", {}), ("hybrid", {"placement": "all"}),
    ("pipeline", {"micro_batches": 2}),
]  # fmt: skip
every_way = pytest.mark.parametrize(("strategy", "settings"), WAYS)


class Net(nn.Module):
    """Three layers, of which the one in the middle is computed again in the backward pass."""

    def __init__(self, again: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.again, self.reentrant = again, reentrant

    def inner(self, x: Tensor) -> Tensor:
        return torch.relu(self.middle(torch.relu(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.again:
            return self.last(self.inner(x))
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def task(**fields: Any) -> wt.Task:
    data = TensorDataset(numbers(SAMPLES, 5), classes(SAMPLES, 3))
    usual = {"model": Net, "loss": F.cross_entropy, "train": data, "batch_size": BATCH, "epochs": 2}
    usual |= {"optimizer": partial(torch.optim.Adam, lr=0.01), "validation": data}
    return wt.Task(**(usual | fields))


def trained(context: Context, strategy: str, settings: dict[str, Any], make: Any) -> Any:
    """What happened, with the values of validation; or the message of a refusal."""
    with verify.computing_in("float64"):
        made, _ = verify.prepared(make(), "float64")
        try:
            run = wt.Run(made, wt.make_strategy(strategy, settings), context)
        except wt.WagontrainError as error:
            return f"{type(error).__name__}: {error}"
        losses, values = [], []
        for epoch in run.epochs():
            losses += [run.step(batch).loss or 0.0 for batch in run.batches(epoch)]
            values.append(run.validate()["loss"])
        run.check_replicas()
        state = run.runner.state_dict()
        run.close()
    return Trace.of(losses, made.build_model(), state["model"]), values, state


def plainly(make: Callable[[], wt.Task]) -> Trace:
    with verify.computing_in("float64"):
        return train_plainly(verify.prepared(make(), "float64")[0], CPU, 0, 6)


def passed(found: Trace, expected: Trace) -> bool:
    return verify.compare(found, expected, wt.make_strategy("data-parallel"), 2, "float64").passed


# --- groups of parameters -----------------------------------------------------------------------


def no_decay_for_biases(model: nn.Module) -> torch.optim.Optimizer:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, value in model.named_parameters():
        groups[name.endswith("bias")].append(value)
    weights = {"params": groups[False], "weight_decay": 0.5}
    return torch.optim.AdamW([weights, {"params": groups[True], "lr": 0.05}], lr=0.01)


def by_names(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    named = list(named_parameters)
    biases = [pair for pair in named if "bias" in pair[0]]
    others = [pair for pair in named if "bias" not in pair[0]]
    return torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.5}, {"params": biases, "lr": 0.05}], lr=0.01
    )


def by_size(model: nn.Module) -> torch.optim.Optimizer:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for value in model.parameters():
        groups[value.numel() > 16].append(value)
    return torch.optim.SGD(
        [{"params": groups[True], "lr": 0.1}, {"params": groups[False], "lr": 0.2}]
    )


def grouped() -> wt.Task:
    return task(optimizer=no_decay_for_biases)


@every_way
def test_groups_are_honoured(gang: Gang, strategy: str, settings: dict[str, Any]) -> None:
    expected = plainly(grouped)
    assert not passed(plainly(task), expected)
    for found, _, _ in gang.run(2, trained, strategy, settings, grouped):
        assert passed(found, expected)


def test_groups_by_names_are_the_same_groups(gang: Gang) -> None:
    named = partial(task, optimizer=by_names)
    assert passed(plainly(named), plainly(grouped))
    for found, _, _ in gang.run(2, trained, "sharded", {"least": 8}, named):
        assert passed(found, plainly(grouped))


def test_groups_by_sizes_are_refused_where_tensors_are_divided(gang: Gang) -> None:
    sized = partial(task, optimizer=by_size)
    for message in gang.run(2, trained, "split-weights", {}, sized):
        assert message.startswith("TaskError: Task.optimizer makes other groups")
    for found, _, _ in gang.run(2, trained, "data-parallel", {}, sized):
        assert passed(found, plainly(sized))


def test_groups_of_equal_numbers_are_not_taken_for_the_same() -> None:
    """Two layers that change places: as many parameters in each group, but others."""

    def wide(model: nn.Module) -> torch.optim.Optimizer:
        values = list(model.parameters())
        return torch.optim.SGD(
            [{"params": [v for v in values if (v.shape[0] > 2) is more]} for more in (True, False)],
            lr=0.1,
        )

    made = task(model=lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), optimizer=wide)
    part = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 3))
    whole = made.build_model()
    require_same_groups(made, whole, made.build_optimizer(whole))
    with pytest.raises(wt.TaskError, match="makes other groups of parameters here"):
        require_same_groups(made, part, made.build_optimizer(part))


def test_groups_survive_a_checkpoint_of_another_strategy(tmp_path: Path) -> None:
    whole = wt.fit(grouped, "data-parallel", run_dir=tmp_path / "W", quiet=True)
    wt.fit(
        partial(task, optimizer=by_names), "sharded", run_dir=tmp_path / "R", steps=3, quiet=True
    )
    rest = wt.fit(
        grouped, "data-parallel", run_dir=tmp_path / "S", resume=tmp_path / "R", quiet=True
    )
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, rest.state_dict()[name], atol=1e-6)


# --- several losses -----------------------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"kind": self.kind(x), "size": self.size(x).squeeze(1)}


def of_kind(output: Any, target: Any) -> Tensor:
    return F.cross_entropy(output["kind"], target["kind"])


def of_size(output: Any, target: Any) -> Tensor:
    return F.mse_loss(output["size"], target["size"])


class Both(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.kind, self.size = numbers(SAMPLES, 5), classes(SAMPLES, 3), numbers(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.x[index], {"kind": self.kind[index], "size": self.size[index]}


def two_losses() -> wt.Task:
    return task(
        model=TwoHeads, loss=lambda output, target: of_kind(output, target) + 0.3 * of_size(
            output, target), train=Both(), validation=Both(),
        metrics={"kind": of_kind, "size": of_size},
    )  # fmt: skip


@every_way
def test_losses_are_summed_and_their_parts_are_metrics(
    gang: Gang, strategy: str, settings: dict[str, Any]
) -> None:
    expected = plainly(two_losses)
    for found, values, _ in gang.run(2, trained, strategy, settings, two_losses):
        assert passed(found, expected)
        assert values[1] < values[0]


def test_parts_of_a_loss_are_reported(tmp_path: Path) -> None:
    values = wt.fit(two_losses, "data-parallel", run_dir=tmp_path / "R", quiet=True).summary[
        "validation"
    ]
    assert values["loss"] == pytest.approx(values["kind"] + 0.3 * values["size"], rel=1e-5)


# --- the average of weights ---------------------------------------------------------------------


def averaged() -> wt.Task:
    return task(ema=0.8)


def average_by_torch(dtype: str = "float64") -> tuple[dict[str, Tensor], list[float]]:
    """What torch's own AveragedModel keeps, its first value the first weights; validated."""
    with verify.computing_in(dtype):
        made, _ = verify.prepared(averaged(), dtype)
        model = made.build_model()
        average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        average.update_parameters(model)
        optimizer = made.build_optimizer(model)
        values = []
        x, y = made.train.tensors  # type: ignore[attr-defined]
        x = x.to(torch.get_default_dtype())
        for epoch in range(2):
            order = wt.batches.Order(SAMPLES, BATCH, made.seed).epoch(epoch)
            for index in order.split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
                average.update_parameters(model)
            with torch.no_grad():
                values.append(float(F.cross_entropy(average(x), y)))
        return {name: value.detach() for name, value in average.module.named_parameters()}, values


@every_way
def test_the_average_is_torchs(gang: Gang, strategy: str, settings: dict[str, Any]) -> None:
    expected, expected_values = average_by_torch()
    for found, values, state in gang.run(2, trained, strategy, settings, averaged):
        assert passed(found, plainly(task))  # training itself goes on as without
        assert values == pytest.approx(expected_values, rel=1e-9)
        for name, value in expected.items():
            assert torch.allclose(state["ema"][name], value, rtol=0, atol=1e-12)


def test_the_average_is_exported_and_resumed(tmp_path: Path) -> None:
    whole = wt.fit(averaged, "data-parallel", run_dir=tmp_path / "W", quiet=True)
    plain = wt.fit(task, "data-parallel", run_dir=tmp_path / "P", quiet=True)
    expected, values = average_by_torch("float32")
    assert whole.summary["validation"]["loss"] == pytest.approx(values[-1], abs=1e-5)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-5)
        assert not torch.allclose(value, plain.state_dict()[name], atol=1e-5)
    wt.fit(averaged, "sharded", run_dir=tmp_path / "R", steps=3, quiet=True)
    rest = wt.fit(
        averaged, "data-parallel", run_dir=tmp_path / "S", resume=tmp_path / "R", quiet=True
    )
    for name, value in rest.state_dict().items():
        assert torch.allclose(value, whole.state_dict()[name], atol=1e-6)


def test_an_average_begins_at_the_weights_of_a_checkpoint_without_one(tmp_path: Path) -> None:
    wt.fit(task, "data-parallel", run_dir=tmp_path / "R", steps=3, quiet=True)
    run = wt.connect(averaged, "data-parallel", resume=tmp_path / "R")
    state = run.runner.state_dict()
    for name, value in state["model"].items():
        assert torch.equal(state["ema"][name], value)
    run.close()


def test_strategies_without_an_average_refuse_it(gang: Gang, tmp_path: Path) -> None:
    for message in gang.run(2, trained, "local-sgd", {}, averaged):
        assert message.startswith("UsageError: local-sgd keeps no moving average")
    with pytest.raises(wt.UsageError, match="keeps no moving average"):
        wt.fit(averaged, "parameter-server", workers=2, run_dir=tmp_path / "R", quiet=True)
    with pytest.raises(wt.TaskError, match="between 0 and 1"):
        task(ema=1.5)


# --- activations computed again -----------------------------------------------------------------


@every_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_nothing(
    gang: Gang, strategy: str, settings: dict[str, Any], reentrant: bool
) -> None:
    again = partial(task, model=partial(Net, again=True, reentrant=reentrant))
    expected = plainly(task)
    for found in gang.run(2, trained, strategy, settings, again):
        if strategy == "pipeline" and reentrant:
            assert "custom autograd function" in found
            continue
        assert passed(found[0], expected)


# --- compiled models ----------------------------------------------------------------------------


def _compiled() -> nn.Module:
    return torch.compile(Net(), backend="eager")  # type: ignore[return-value]


def _compiled_in_place() -> nn.Module:
    model = Net()
    model.compile(backend="eager")
    return model


def _compiled_inside() -> nn.Module:
    model: Any = Net()
    model.middle = torch.compile(model.middle, backend="eager")
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [_compiled, _compiled_in_place, _compiled_inside])
def test_a_compiled_model_trains_under_its_own_names(gang: Gang, make: Any) -> None:
    compiled = partial(task, model=make)
    assert set(compiled().build_model().state_dict()) == set(Net().state_dict())
    expected = plainly(task)
    for way in (("data-parallel", {}), ("sharded", {"stage": 1}), ("local-sgd", {})):
        for found, _, _ in gang.run(2, trained, *way, compiled):
            assert way[0] == "local-sgd" or passed(found, expected)


def test_what_was_compiled_is_what_is_called() -> None:
    calls = []

    def backend(graph: Any, examples: Any) -> Any:
        calls.append(graph)
        return graph.forward

    model = task(model=lambda: torch.compile(Net(), backend=backend)).build_model()
    model(numbers(4, 5))
    assert calls


@pytest.mark.parametrize(("strategy", "settings"), WAYS[2:])
def test_strategies_that_change_layers_refuse_a_compiled_model(
    gang: Gang, strategy: str, settings: dict[str, Any]
) -> None:
    for model, what in ((_compiled, "the model"), (_compiled_inside, "module 'middle'")):
        for message in gang.run(2, trained, strategy, settings, partial(task, model=model)):
            assert message.startswith(f"UsageError: {what} is compiled (torch.compile)")


@pytest.mark.filterwarnings("default")  # torch's own, of what it looks at while it compiles
def test_a_compiled_batch_norm_is_refused_over_ranks(gang: Gang) -> None:
    for message in gang.run(2, trained, "data-parallel", {}, _compiled_norms):
        assert "is a batch norm, which takes its statistics over all workers" in message
    run = wt.Run(_compiled_norms(), wt.make_strategy("data-parallel"), Context())
    assert run.step(next(run.batches())).loss
    run.close()


def _compiled_norms() -> wt.Task:
    made = build("conv-batch-norm")
    plain = made.model
    return dataclasses.replace(
        made, model=lambda: torch.compile(plain(), backend="eager"), validation=made.train
    )
