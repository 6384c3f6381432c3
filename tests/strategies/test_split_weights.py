"""Split weights: what a rank holds, what travels, the split softmax."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import classes, numbers
from wagontrain.axes import Axis
from wagontrain.mesh import World
from wagontrain.split.border import Replicated
from wagontrain.split.logits import SplitScores
from wagontrain.transport import Context

BATCH, WIDTH, CLASSES = 48, 128, 640


def speech() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid(),
        nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


def speech_task(**changes: Any) -> wt.Task:
    fields: dict[str, Any] = {
        "model": speech, "loss": F.cross_entropy, "batch_size": BATCH,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "train": TensorDataset(numbers(144, 20), classes(144, CLASSES)),
    }  # fmt: skip
    return wt.Task(**(fields | changes))


def trained(
    context: Context, settings: dict[str, Any]
) -> tuple[list[int | None], dict[str, tuple[int, ...]]]:
    with wt.Run(speech_task(), wt.make_strategy("split-weights", settings), context) as run:
        found = [run.step(batch).sent for batch in run.batches()]
        run.check_replicas()
        shapes = {name: tuple(value.shape) for name, value in run.model.named_parameters()}
        run.close()
    return found[1:], shapes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_columns_then_rows_and_what_travels(gang: Gang, size: int) -> None:
    """Two sums forward, two backward, and three numbers a sample for the loss."""
    expected = 2 * (size - 1) / size * BATCH * (4 * WIDTH + 3) * 4
    for rank, (found, shapes) in enumerate(gang.run(size, trained, {})):
        for count in found:
            assert count is not None
            assert 0.9 * expected < count < 1.1 * expected + 1500 * size
        mine = WIDTH // size + (rank < WIDTH % size)
        assert shapes["0.weight"] == (mine, 20)
        assert shapes["2.weight"] == (WIDTH, mine)
        assert shapes["2.bias"] == (WIDTH,)
        last = CLASSES // size + (rank < CLASSES % size)
        assert shapes["8.weight"] == (last, WIDTH)


def test_a_degree_below_the_world_leaves_rows_that_are_data_parallel(gang: Gang) -> None:
    answers = gang.run(4, trained, {"degree": 2})
    for rank, (_, shapes) in enumerate(answers):
        assert shapes["0.weight"] == (WIDTH // 2, 20), rank


def split_scores(context: Context, dims: tuple[int, ...], dim: int) -> tuple[SplitScores, Tensor]:
    whole = numbers(*dims).double().requires_grad_()
    world = context.world
    axis = Axis(tuple(range(world.size)), world.rank, context.group, context.side)
    widths = [len(part) for part in torch.arange(dims[dim]).tensor_split(world.size)]
    part = whole.split(widths, dim)[world.rank]
    return SplitScores.of(part, Replicated(axis), widths, dim), whole


CASES = {
    "plain": (lambda s, t: F.cross_entropy(s, t), (6, 7), 1, (6,)),
    "summed": (lambda s, t: F.cross_entropy(s, t, reduction="sum"), (6, 7), 1, (6,)),
    "each": (lambda s, t: F.cross_entropy(s, t, reduction="none").mean(), (6, 7), 1, (6,)),
    "ignored": (lambda s, t: F.cross_entropy(s, t, ignore_index=3), (6, 7), 1, (6,)),
    "flattened": (
        lambda s, t: F.cross_entropy(s.flatten(0, 1), t.flatten()), (2, 3, 7), 2, (2, 3),
    ),
    "viewed": (
        lambda s, t: F.cross_entropy(s.view(-1, s.size(-1)), t.view(-1)), (2, 3, 7), 2, (2, 3),
    ),
    "transposed": (lambda s, t: F.cross_entropy(s.transpose(1, 2), t), (2, 3, 7), 2, (2, 3)),
    "smoothed": (lambda s, t: F.cross_entropy(s, t, label_smoothing=0.1), (6, 7), 1, (6,)),
    "weighted": (lambda s, t: F.cross_entropy(s, t, torch.arange(7.0).double()), (6, 7), 1, (6,)),
    "by hand": (lambda s, t: F.nll_loss(s.log_softmax(-1), t), (6, 7), 1, (6,)),
    "squared": (lambda s, t: ((s - F.one_hot(t, 7)) ** 2).mean(), (6, 7), 1, (6,)),
    "sliced": (lambda s, t: F.cross_entropy(s[:, :5], t.clamp(max=4)), (6, 7), 1, (6,)),
    "its shape": (lambda s, t: s.sum() / s.shape[1] / len(s) / s.numel(), (6, 7), 1, (6,)),
}  # fmt: skip


def both(context: Context, case: str) -> tuple[float, float, Tensor, Tensor]:
    function, dims, dim, of_target = CASES[case]
    target = classes(6, 7, seed=5).view(of_target)
    scores, whole = split_scores(context, dims, dim)
    loss = function(scores, target)
    (gradient,) = torch.autograd.grad(loss, whole, retain_graph=True)
    plain = function(whole, target)
    (expected,) = torch.autograd.grad(plain, whole)
    own = scores.part().shape[dim]
    start = sum(scores._widths[: context.world.rank])
    return (
        float(loss),
        float(plain),
        gradient.narrow(dim, start, own),
        expected.narrow(dim, start, own),
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_split_scores_behave_like_whole_ones(gang: Gang, size: int, case: str) -> None:
    for loss, plain, gradient, expected in gang.run(size, both, case):
        assert loss == pytest.approx(plain, rel=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def out_of_bounds(context: Context) -> str:
    scores, _ = split_scores(context, (6, 7), 1)
    try:
        F.cross_entropy(scores, torch.full((6,), 7))
    except IndexError as error:
        return str(error)
    return "taken"


def test_a_class_that_is_not_there_is_an_error(gang: Gang) -> None:
    assert gang.run(2, out_of_bounds) == ["Target 7 is out of bounds."] * 2


class Dropped(nn.Sequential):
    """Ones through a dropout between columns and rows: what comes out shows the mask."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 600), nn.Dropout(0.5), nn.Linear(600, 600, bias=False))
        nn.init.zeros_(self[0].weight)
        nn.init.ones_(self[0].bias)
        with torch.no_grad():
            self[2].weight.copy_(torch.eye(600))


def mask(context: Context) -> tuple[Tensor, float]:
    task = speech_task(model=Dropped, train=TensorDataset(numbers(96, 4), classes(96, 600)))
    with wt.Run(task, wt.make_strategy("split-weights"), context) as run:
        run.model.train()
        torch.manual_seed(1)
        with torch.no_grad():
            shown = run.model(torch.zeros(3, 4))
        shown = shown.whole() if isinstance(shown, SplitScores) else shown
        after = float(torch.rand(()))
        with torch.no_grad():
            again = run.model(torch.zeros(3, 4))
        again = again.whole() if isinstance(again, SplitScores) else again
        assert not torch.equal(shown > 0, again > 0)  # nor the same for every micro-batch
        run.close()
    return shown, after


def test_dropout_between_split_layers_draws_other_masks_on_every_rank(gang: Gang) -> None:
    answers = gang.run(2, mask)
    (shown, after), (other, also) = answers
    assert torch.equal(shown, other)
    assert after == also  # and outside all ranks draw alike again
    left, right = shown[:, :300] > 0, shown[:, 300:] > 0
    assert 0.35 < left.float().mean() < 0.65
    assert 0.35 < (left == right).float().mean() < 0.65


def test_bad_degrees_are_refused() -> None:
    strategy = wt.make_strategy("split-weights", {"degree": 3})
    with pytest.raises(wt.UsageError, match="degree 3 does not divide 4 workers: give one of 1, 2"):
        strategy.check(speech_task(), World(size=4))
    strategy = wt.make_strategy("split-weights", {"degree": 1})
    with pytest.raises(wt.UsageError, match="make 50 rows that cannot share a batch of 48"):
        strategy.check(speech_task(), World(size=50))


def one_layer(context: Context) -> list[float | None]:
    task = speech_task(model=partial(nn.Linear, 20, CLASSES))
    with wt.Run(task, wt.make_strategy("split-weights"), context) as run:
        losses = [run.step(batch).loss for batch in run.batches()]
        run.close()
    return losses


def test_a_model_that_is_one_layer(gang: Gang) -> None:
    alone, *_ = gang.run(1, one_layer)
    for losses in gang.run(2, one_layer):
        assert losses == pytest.approx(alone, rel=1e-5)
