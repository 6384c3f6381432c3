from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.gang import Gang
from tests.problems import numbers
from wagontrain.batchnorm import Participation, global_batch_norm
from wagontrain.errors import TaskError
from wagontrain.mesh import proportional_shares
from wagontrain.transport import Context

SHAPES = {nn.BatchNorm1d: (12, 3), nn.BatchNorm2d: (12, 3, 4, 5), nn.BatchNorm3d: (12, 3, 2, 2, 3)}


def _layer(kind: type[nn.Module], **settings: object) -> nn.Module:
    torch.manual_seed(0)
    layer = kind(3, **settings).double()
    if layer.affine:
        with torch.no_grad():
            layer.weight.uniform_(0.5, 2)
            layer.bias.uniform_(-1, 1)
    return layer


def _pass(layer: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * weight).sum().backward()
    found = {"output": output.detach(), "input_gradient": x.grad}
    found |= {f"{name}_gradient": value.grad for name, value in layer.named_parameters()}
    return found | {name: value.clone() for name, value in layer.named_buffers()}


def shared(
    context: Context, kind: type[nn.Module], settings: dict[str, object], due: list[int]
) -> dict[str, Tensor]:
    """One pass over this rank's share; a rank without any takes a stand-in."""
    rank = context.world.rank
    x, weight = numbers(*SHAPES[kind]).double(), numbers(*SHAPES[kind], seed=9).double()
    share = slice(sum(due[:rank]), sum(due[: rank + 1]))
    counts = due[rank] > 0
    mine, upstream = (x[share], weight[share]) if counts else (x[:1] * 100, weight[:1] * 0)
    layer = _layer(kind, **settings)
    assert context.side is not None
    with global_batch_norm(layer, context.side, Participation(counts)):
        found = _pass(layer, mine, upstream)
    return found


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 5, 2], [1, 0, 2]])
def test_equals_one_batch_norm_over_all(
    gang: Gang, kind: type[nn.Module], settings: dict[str, object], weights: list[float]
) -> None:
    due = proportional_shares(12, weights)
    x, weight = numbers(*SHAPES[kind]).double(), numbers(*SHAPES[kind], seed=9).double()
    alone = _pass(_layer(kind, **settings), x, weight)
    ranks = gang.run(3, shared, kind, settings, due)
    taking = [rank for rank, size in zip(ranks, due, strict=True) if size]
    for name in ("output", "input_gradient"):
        together = torch.cat([rank[name] for rank in taking])
        torch.testing.assert_close(together, alone[name], rtol=1e-10, atol=1e-10)
    for rank, size in zip(ranks, due, strict=True):
        if not size:
            assert not rank["input_gradient"].any()
        for name, _ in _layer(kind, **settings).named_buffers():
            torch.testing.assert_close(rank[name], alone[name], rtol=1e-10, atol=1e-10)
    for name in alone:
        if name.endswith("_gradient") and name != "input_gradient":
            total = torch.stack([rank[name] for rank in ranks]).sum(0)
            torch.testing.assert_close(total, alone[name], rtol=1e-10, atol=1e-10)


def evaluated(context: Context) -> bool:
    layer = _layer(nn.BatchNorm1d).eval()
    x = numbers(4, 3).double()
    plain = layer(x)
    assert context.side is not None
    with global_batch_norm(layer, context.side, Participation()):
        return torch.equal(layer(x), plain) and not hasattr(layer.forward, "__func__")


def test_evaluation_exchanges_nothing_and_equals_torch(gang: Gang) -> None:
    assert all(gang.run(2, evaluated))


class Own(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_batch_norm_of_ones_own_is_refused() -> None:
    with (
        pytest.raises(TaskError, match="layer '1' is a batch norm of the class Own"),
        global_batch_norm(nn.Sequential(nn.ReLU(), Own(3)), None, Participation()),  # type: ignore[arg-type]
    ):
        pass


def one_value(context: Context) -> str:
    layer = _layer(nn.BatchNorm1d)
    assert context.side is not None
    with global_batch_norm(layer, context.side, Participation(context.world.rank == 0)):
        try:
            layer(numbers(1, 3).double())
        except ValueError as error:
            return str(error)
    return "no error"


def test_a_single_value_per_channel_is_refused_as_torch_does(gang: Gang) -> None:
    for message in gang.run(2, one_value):
        assert "Expected more than 1 value per channel" in message


def test_the_layer_is_as_before_afterwards(gang: Gang) -> None:
    assert all(gang.run(2, restored))


def restored(context: Context) -> bool:
    layer = _layer(nn.BatchNorm1d)
    keys = set(vars(layer))
    assert context.side is not None
    with global_batch_norm(layer, context.side, Participation()):
        pass
    return set(vars(layer)) == keys
