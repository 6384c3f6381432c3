"""What the benchmarks train: models of several shapes, with made-up data.

Pure PyTorch, so that the opponents' scripts need nothing else; `task` wraps a problem for
wagontrain. Inputs are random numbers, never zeros (some kernels are quicker on zeros), and the
same in every process. Few distinct samples are held, so that four processes on one machine have
room and fetching a batch costs next to nothing.

Sources: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 5 (speech);
Krizhevsky 2014, "One weird trick" (AlexNet of one tower); Simonyan and Zisserman 2015, table 1,
column D (VGG-16); He et al. 2016, table 1 (ResNet-18); Radford et al. 2019 (GPT-2's layers).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    import wagontrain as wt

SEED = 0


@dataclass(frozen=True)
class Problem:
    """A model with its loss, optimizer and data.

    Args:
        model: builds the module; seeded by `build`.
        loss: `(output, target) -> mean over the samples given`.
        optimizer: `parameters -> optimizer`.
        data: builds the dataset.
        batch_size: samples of a step over all workers.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    data: Callable[[], TensorDataset]
    batch_size: int

    def build(self) -> nn.Module:
        """The model, with the same weights in every process."""
        torch.manual_seed(SEED)
        return self.model()

    def batches(self, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of one shuffled batch after the other, for ever."""
        inputs, target = self.data().tensors
        generator = torch.Generator().manual_seed(SEED)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                mine = order[start : start + self.batch_size].chunk(size)[rank]
                yield inputs[mine], target[mine]


def speech() -> Problem:
    """DistBelief's speech network: 42 M parameters, all in fully connected layers."""
    widths = [440, 2560, 2560, 2560, 2560]

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.Sigmoid()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 8192))

    sgd = partial(torch.optim.SGD, lr=0.01)
    return Problem(model, F.cross_entropy, sgd, partial(_classes, 512, (440,), 8192), 128)


def alexnet() -> Problem:
    """AlexNet of one tower: 61 M parameters, 96 % of them in three layers."""

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Flatten(),
            nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
    return Problem(model, F.cross_entropy, sgd, partial(_classes, 128, (3, 224, 224), 1000), 64)


def vgg16() -> Problem:
    """VGG-16 on images of 64 x 64: 44 M parameters, two thirds of them in three layers."""

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        before = 3
        for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        return nn.Sequential(
            *layers, nn.Flatten(),
            nn.Linear(512 * 2 * 2, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
    return Problem(model, F.cross_entropy, sgd, partial(_classes, 128, (3, 64, 64), 1000), 32)


class _Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride > 1:
            around = nn.Conv2d(before, after, 1, stride, bias=False)
            self.around = nn.Sequential(around, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.around(x))


def resnet18() -> Problem:
    """ResNet-18 on images of 64 x 64: 11.7 M parameters, all in convolutions but for the last."""

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        before = 64
        for after in (64, 128, 256, 512):
            layers += [_Residual(before, after, after // before), _Residual(after, after, 1)]
            before = after
        return nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(512, 1000),
        )  # fmt: skip

    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    return Problem(model, F.cross_entropy, sgd, partial(_classes, 128, (3, 64, 64), 1000), 64)


class Block(nn.Module):
    """A layer of GPT-2; one matrix for each of query, key and value, so that heads can be split."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.merge = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before_attention(x)
        heads = (
            part(y).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.before_mlp(x))))


class Gpt(nn.Module):
    """GPT-2's shape, small. `forward` takes tokens of shape [batch, length]."""

    def __init__(self, tokens: int, length: int, width: int, layers: int, head: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, head) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of shape [batch, tokens of the vocabulary, length], as cross_entropy takes."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(self.last_norm(x)).transpose(1, 2)


_VOCABULARY, _LENGTH = 10_000, 128


def gpt() -> Problem:
    """29 M parameters: six layers of width 512, sequences of 128 tokens."""

    def data() -> TensorDataset:
        text = torch.randint(0, _VOCABULARY, (256, _LENGTH + 1), generator=_generator())
        return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous())

    model = partial(Gpt, _VOCABULARY, _LENGTH, 512, 6, 64)
    return Problem(model, F.cross_entropy, partial(torch.optim.AdamW, lr=3e-4), data, 16)


class Recommender(nn.Module):
    """Large tables of embeddings under a small network; only the rows in a batch are touched."""

    def __init__(self, fields: int, rows: int, width: int, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width, sparse=sparse) for _ in range(fields))
        self.head = nn.Sequential(
            nn.Linear(fields * width, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(),
            nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, codes: Tensor) -> Tensor:
        """One score per sample, from codes of shape [batch, fields]."""
        found = [table(codes[:, field]) for field, table in enumerate(self.tables)]
        return self.head(torch.cat(found, 1)).squeeze(1)


def recommender(sparse: bool = True) -> Problem:
    """Four million rows of 16 numbers in eight tables: 64 M parameters, almost all untouched."""
    fields, rows = 8, 500_000

    def data() -> TensorDataset:
        codes = torch.randint(0, rows, (4096, fields), generator=_generator())
        clicks = torch.randint(0, 2, (4096,), generator=_generator()).float()
        return TensorDataset(codes, clicks)

    model = partial(Recommender, fields, rows, 16, sparse)
    sgd = partial(torch.optim.SGD, lr=0.1)
    return Problem(model, F.binary_cross_entropy_with_logits, sgd, data, 1024)


def dense_recommender() -> Problem:
    """The same with embeddings as torch makes them by default: gradients of whole tables."""
    return recommender(sparse=False)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    function.__name__: function
    for function in (speech, alexnet, vgg16, resnet18, gpt, recommender, dense_recommender)
}


def exchanged_bytes(model: nn.Module) -> int:
    """Bytes of gradients that data parallelism exchanges; of sparse ones only a few, left out."""
    sparse = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.sparse
    }
    return sum(
        value.numel() * value.element_size()
        for value in model.parameters()
        if id(value) not in sparse
    )


def task(name: str, **changes: Any) -> wt.Task:
    """A problem as a task of wagontrain, with so many epochs that steps never run out."""
    import wagontrain as wt

    problem = PROBLEMS[name]()
    fields: dict[str, Any] = {
        "model": problem.model,
        "loss": problem.loss,
        "optimizer": problem.optimizer,
        "train": problem.data(),
        "batch_size": problem.batch_size,
        "epochs": 10**6,
        "seed": SEED,
    }
    return wt.Task(**(fields | changes))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _classes(samples: int, shape: tuple[int, ...], classes: int) -> TensorDataset:
    """Random inputs of a shape, each of a random class."""
    inputs = torch.randn(samples, *shape, generator=_generator())
    return TensorDataset(inputs, torch.randint(0, classes, (samples,), generator=_generator()))
