"""Convolutions split in space train as one process does, and send what the formula says."""

from __future__ import annotations

import dataclasses
import functools
import signal
import statistics
import sys
from collections.abc import Callable
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
from tests.problems import OPTIMIZERS, VARIANTS, classes, numbers
from wagontrain import building, verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.run import run
from wagontrain.transport import Context

SAMPLES, BATCH, STEPS = 10, 4, 6  # the last of three batches has 2


def max_pooled() -> nn.Module:
    """k = 3, 5 and 1; the heights 13, 6, 4 are no multiples of any number of ranks."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 5, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 1, bias=False),
        nn.Flatten(), nn.Linear(60, 3),
    )  # fmt: skip


def average_pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 5, stride=2, padding=3), nn.AvgPool2d(3, 1, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, (3, 2), padding="same"), nn.GELU(),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), nn.Conv2d(4, 4, 3, padding=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.ReLU(),
        nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 5, 3, padding=1), nn.SiLU(),
        nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.Linear(245, 3),
    )  # fmt: skip


def unshared() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(),
        wt.nn.LocallyConnected2d(3, 4, (13, 14), 3, stride=2, padding=1), nn.ReLU(),
        wt.nn.LocallyConnected2d(4, 2, 7, (3, 2), bias=False), nn.Flatten(), nn.Linear(60, 3),
    )  # fmt: skip


class Reused(nn.Module):
    """One pooling used everywhere, a skip connection, a scale that is learned, and NHWC images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.three = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.one(x * self.scale[:, None, None])))
        x = self.frozen(F.relu(self.two(x)))
        x = self.pool(x + self.three(x))
        return self.head(self.norm(torch.tanh(x)).mean((2, 3)))


def convolutions_only() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


def dropping() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1),
        nn.MaxPool2d(6), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function
    for function in (
        max_pooled,
        average_pooled,
        normed,
        unshared,
        Reused,
        convolutions_only,
        dropping,
    )
}


def task_of(model: str, optimizer: str = "momentum", variant: str = "plain") -> wt.Task:
    data = TensorDataset(numbers(SAMPLES, 2, 13, 14), classes(SAMPLES, 3))
    return wt.Task(
        model=MODELS[model], loss=F.cross_entropy, optimizer=OPTIMIZERS[optimizer], train=data,
        validation=data, batch_size=BATCH, epochs=2, **VARIANTS[variant],
    )  # fmt: skip


@functools.cache
def expected(*problem: str) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(task_of(*problem), "float64")
        return train_plainly(task, torch.device("cpu"), 0, STEPS)


def trained(context: Context, settings: dict[str, Any], *problem: str) -> Any:
    strategy = wt.make_strategy("split-weights", {"strips": True, **settings})
    with verify.computing_in("float64"):
        task, _ = verify.prepared(task_of(*problem), "float64")
        with wt.Run(task, strategy, context) as training:
            losses = [training.step(batch).loss for batch in training.batches()]
            training.runner.check_replicas()
            values = training.validate()
            held = {
                name: tuple(value.shape) for name, value in training.runner.model.named_parameters()
            }
            state = training.runner.state_dict()["model"]
            trace = Trace.of(losses, training.task.build_model(), state)
            training.close()
    return trace, held, values


CASES = [
    *((model, "momentum", "plain", {}, size) for model in MODELS for size in (1, 2, 3, 4)),
    *((model, "adam", "clip", {}, 3) for model in MODELS),
    *((model, "adam", "accumulate", {"degree": 2}, 4) for model in MODELS),
    *((model, "momentum", "clip", {"placement": {}}, 2) for model in MODELS),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("model", "optimizer", "variant", "settings", "size"), CASES)
def test_trains_as_one_process(
    gang: Gang, model: str, optimizer: str, variant: str, settings: dict[str, Any], size: int
) -> None:
    reference = expected(model, optimizer, variant)
    for trace, _, _ in gang.run(size, trained, settings, model, optimizer, variant):
        strategy = wt.make_strategy("split-weights")
        verdict = verify.compare(trace, reference, strategy, size, "float64")
        assert verdict.passed, verdict


def test_each_rank_holds_the_unshared_weights_of_its_rows(gang: Gang) -> None:
    found = gang.run(3, trained, {}, "unshared", "momentum", "plain")
    rows = [(held["2.weight"][0], held["2.bias"][0], held["4.weight"][0]) for _, held, _ in found]
    assert rows == [(3, 3, 2), (2, 2, 2), (2, 2, 1)]
    assert all(held["0.weight"] == (3, 2, 3, 3) for _, held, _ in found)


def test_validation_is_that_of_one_process(gang: Gang) -> None:
    (_, _, alone), *_ = gang.run(1, trained, {}, "normed", "momentum", "plain")
    for _, _, values in gang.run(3, trained, {}, "normed", "momentum", "plain"):
        assert values == pytest.approx(alone, abs=1e-9)


def in_half_precision(context: Context) -> list[float]:
    """Losses of a training in bfloat16, on strips or on one process."""
    task = dataclasses.replace(task_of("normed"), precision="bfloat16")
    strategy = wt.make_strategy("split-weights", {"strips": True})
    with wt.Run(task, strategy, context) as training:
        losses = [training.step(batch).loss for batch in training.batches()]
        training.runner.check_replicas()
        training.close()
    return losses


def test_strips_of_half_precision(gang: Gang) -> None:
    (alone,) = gang.run(1, in_half_precision)
    for losses in gang.run(3, in_half_precision):
        assert losses == pytest.approx(alone, rel=0.05)


def stretch(context: Context, settings: dict[str, Any], steps: range, state: Any) -> Any:
    """Some of the steps of a training, from a state; the losses, and the state at its end."""
    strategy = wt.make_strategy("split-weights", {"strips": True, **settings})
    with verify.computing_in("float64"):
        task, _ = verify.prepared(task_of("unshared", "adam"), "float64")
        with wt.Run(task, strategy, context) as training:
            if state is not None:
                training.runner.load_state_dict(state)
            batches = [batch for batch in training.batches() if batch.step in steps]
            losses = [training.runner.step(batch).loss for batch in batches]
            state = training.runner.state_dict()
            training.close()
    return losses, state


def test_another_number_of_ranks_takes_up_the_state(gang: Gang) -> None:
    first, state = gang.run(4, stretch, {"degree": 2}, range(3), None)[0]
    second, _ = gang.run(3, stretch, {}, range(3, STEPS), state)[0]
    reference = expected("unshared", "adam", "plain").losses
    assert [*first, *second] == pytest.approx(reference, abs=1e-9)


def dropped(context: Context) -> list[list[Tensor]]:
    """What a dropout on strips made of ones, in the two micro-batches of a step."""
    task = task_of("dropping", "momentum", "accumulate")
    strategy = wt.make_strategy("split-weights", {"strips": True})
    seen: list[Tensor] = []
    with wt.Run(task, strategy, context) as training:
        with torch.no_grad():
            training.model[0].weight.zero_()
            training.model[0].bias.fill_(1)
        training.model[1].register_forward_hook(lambda *call: seen.append(call[2].detach().clone()))
        for batch in training.batches():
            training.step(batch)
            training.runner.check_replicas()  # behind the strips all have drawn alike
        training.close()
    return seen[:2]


def test_ranks_draw_for_their_own_strips(gang: Gang) -> None:
    (one, again), (other, _) = gang.run(2, dropped)
    assert (len(one[0, 0]), len(other[0, 0])) == (7, 6)
    assert not one[:, :, :6].equal(other)
    assert not one.equal(again)


def sent_by(context: Context, pooled: bool) -> list[Any]:
    """Bytes of each step with three convolutions of 8 channels on images of 64 x 96."""
    tail = [nn.AdaptiveAvgPool2d(1)] if pooled else [nn.MaxPool2d(8)]
    data = TensorDataset(numbers(8, 1, 64, 96), classes(8, 3))
    task = wt.Task(
        model=lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), *tail, nn.Flatten(), nn.Linear(8 if pooled else 768, 3),
        ),
        loss=F.cross_entropy, optimizer=OPTIMIZERS["momentum"], train=data, batch_size=4, epochs=2,
    )  # fmt: skip
    strategy = wt.make_strategy("split-weights", {"strips": True, "placement": {}})
    with wt.Run(task, strategy, context) as training:
        sent = [training.step(batch).sent for batch in training.batches()]
        training.close()
    return sent


@pytest.mark.parametrize("pooled", [True, False])
def test_bytes_are_those_of_the_formula(gang: Gang, pooled: bool) -> None:
    ranks, width, channels, batch = 4, 96, 8, 4
    row = width * channels * batch * 4
    halos = 2 * (2 + 1) * row  # forward and backward, 5 x 5 and 3 x 3
    weights = (8 * 9 + 8) + (64 * 25 + 8) + (64 * 9 + 8)
    summed = 2 * (ranks - 1) / ranks * weights * 4
    gathered = 0 if pooled else (ranks - 1) * channels * batch * 4 * 2 * 12
    for rank, sent in enumerate(gang.run(ranks, sent_by, pooled)):
        neighbours = 1 if rank in (0, ranks - 1) else 2
        expected_bytes = neighbours * halos + summed + gathered
        # In the middle: on a starved machine the kernel sends some packets twice.
        assert statistics.median(sent[1:]) == pytest.approx(expected_bytes, rel=0.2)


def refused(context: Context, model: Callable[[], nn.Module], settings: dict[str, Any]) -> str:
    task = wt.Task(
        model=model, loss=F.cross_entropy, optimizer=OPTIMIZERS["momentum"], batch_size=2,
        train=TensorDataset(numbers(4, 1, 6, 6), classes(4, 3)), epochs=1,
    )  # fmt: skip
    strategy = wt.make_strategy("split-weights", {"strips": True, **settings})
    with pytest.raises(wt.UsageError) as failure, wt.Run(task, strategy, context):
        pass
    return str(failure.value)


def starting(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).mean((2, 3)) + self.one.weight.sum()


class Twice(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).mean((2, 3)) + self.one(x + 1).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (partial(nn.Sequential, nn.Flatten(), nn.Linear(36, 3)), {}, "begin with a convolution"),
        (partial(starting, nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), {}, "circular"),
        (partial(starting, nn.Conv2d(1, 2, 4)), {}, "makes 3 rows of 6, fewer than one for each"),
        (partial(starting, nn.Conv2d(1, 2, 3)), {"placement": {"0": "column"}}, "placement has"),
        (Tied, {}, "used by other code than its own forward"),
        (Twice, {}, "called several times"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    gang: Gang, model: Any, settings: dict[str, Any], said: str
) -> None:
    for message in gang.run(4, refused, model, settings):
        assert said in message
        assert "\n" not in message


def built_in_parts(context: Context) -> list[float]:
    """Losses of a training whose model is taken to fit on no rank."""
    strategy = wt.make_strategy("split-weights", {"strips": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "fits", lambda *_: (False, 0, 0))
        with wt.Run(task_of("unshared"), strategy, context) as training:
            losses = [training.step(batch).loss for batch in training.batches()]
            training.runner.check_replicas()
            training.close()
    return losses


def test_unshared_weights_that_fit_nowhere(gang: Gang) -> None:
    """They begin alike on any number of ranks."""
    two, three = gang.run(2, built_in_parts)[0], gang.run(3, built_in_parts)[0]
    assert two == pytest.approx(three, rel=1e-4)


class Fickle(nn.Module):
    """Calls its layers in another order after the trial."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(c, 2, 3, padding=1) for c in (1, 2, 2))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += x.device.type != "meta"
        x = self.one(x)
        x = self.three(self.two(x)) if self.passes < 2 else self.two(self.three(x))
        return x.mean((2, 3))


def other_images(context: Context) -> tuple[list[Tensor], list[str]]:
    """Results for images of other heights than in training, and what is said of bad ones."""
    results, said = [], []
    task = task_of("convolutions_only")
    strategy = wt.make_strategy("split-weights", {"strips": True})
    with wt.Run(task, strategy, context) as training, torch.no_grad():
        results = [training.model(numbers(2, 2, height, 6)) for height in (5, 20, 13)]
        with pytest.raises(wt.UsageError) as failure:
            training.model(numbers(2, 2, 4, 6))
        said.append(str(failure.value))
        results.append(training.model(numbers(2, 2, 5, 6)))
        training.close()
    task = dataclasses.replace(
        task, model=Fickle, train=TensorDataset(numbers(4, 1, 6, 6), classes(4, 2))
    )
    with wt.Run(task, strategy, context) as training, pytest.raises(wt.ModelError) as failure:
        for batch in training.batches():
            training.step(batch)
    said.append(str(failure.value))
    return results, said


def test_images_of_any_height_in_the_same_order_of_layers(gang: Gang) -> None:
    model = verify.prepared(task_of("convolutions_only"), "float32")[0].build_model()
    with torch.no_grad():
        expected_results = [model(numbers(2, 2, height, 6)) for height in (5, 20, 13, 5)]
    for results, said in gang.run(3, other_images):
        for result, wanted in zip(results, expected_results, strict=True):
            torch.testing.assert_close(result, wanted)
        assert "makes 2 rows of an image of 4" in said[0]
        assert "the same order of layers" in said[1]


TALL = """
import sys
from functools import partial
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
import wagontrain as wt

class Tall(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.linspace(0, 1 + index, 4096 * 256).view(1, 4096, 256), index

def convolutions():
    first, second, third = (nn.Conv2d(c, 16, 3, padding=1) for c in (1, 16, 16))
    return nn.Sequential(first, nn.ReLU(True), second, nn.ReLU(True), third, nn.ReLU(True),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))

task = wt.Task(model=convolutions, loss=F.cross_entropy, train=Tall(), batch_size=1,
               optimizer=partial(torch.optim.SGD, lr=0.1))
strategy = wt.make_strategy(*eval(sys.argv[1]))
run = wt.connect(task, strategy)
for batch in run.batches():
    print("loss", run.step(batch).loss, flush=True)
run.finish()
"""


@pytest.mark.whole
@pytest.mark.testbed
def test_images_that_do_not_fit_on_one_host_train_in_strips(tmp_path: Path) -> None:
    """Importing torch takes some 290 MB, the image's activations another 350."""
    file = tmp_path / "tall.py"
    file.write_text(TALL)
    said: list[str] = []
    with Bed.up(Shape(4, memory="550M")) as bed:
        alone = bed.start(0, [sys.executable, str(file), "('data-parallel',)"])
        assert alone.wait(120) == -signal.SIGKILL
        chosen = "('split-weights', {'strips': True})"
        ended = run(bed, [sys.executable, str(file), chosen], say=said.append, timeout=150)
    assert ended.status == 0, said
    assert len([line for line in said if "loss" in line]) == 8
