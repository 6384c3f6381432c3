"""A task: what to train, and nothing about machines. Put your own model and data here.

python {file}
wagontrain run {file} --workers 2
wagontrain verify {file} --workers 2
wagontrain plan {file} --workers 2
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, random_split

import wagontrain as wt


class Net(nn.Module):
    """Two hidden layers: points [n, 2] to scores of three classes [n, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
        )

    def forward(self, points: Tensor) -> Tensor:
        return self.layers(points)


def spirals(count: int = 3000) -> TensorDataset:
    """Points on three arms of a spiral, and which arm each is on.

    Any dataset with a length and an index will do; each item is (input, target). An input that is
    a tuple becomes model(*input), a dict model(**input).
    """
    draw = torch.Generator().manual_seed(0)  # every worker has to see the same data
    arm = torch.arange(count) % 3
    radius = torch.rand(count, generator=draw)
    angle = 4 * radius + arm * 2.0944 + 0.15 * torch.randn(count, generator=draw)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return TensorDataset(points, arm)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the samples given that are recognised."""
    return (output.argmax(1) == target).float().mean()


def task() -> wt.Task:
    halves = torch.Generator().manual_seed(0)
    train, validation = random_split(spirals(), [2400, 600], generator=halves)
    return wt.Task(
        model=Net,  # called without arguments, on every worker, with the same random numbers
        loss=F.cross_entropy,  # (output, target) -> mean over the samples given
        optimizer=partial(torch.optim.Adam, lr=1e-2),  # given the model's parameters
        train=train,
        batch_size=100,  # the global batch: of all workers together
        epochs=5,
        # From here on everything may be left out.
        validation=validation,  # looked at after every epoch
        metrics={"accuracy": accuracy},  # (output, target) -> mean over the samples given
        seed=0,  # of the weights and of the order of samples
        # scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=50),  # stepped once a step
        # clip_grad_norm=1.0,  # by the norm of the whole gradient, however it is divided
        # accumulate=2,  # a batch in two halves, for the memory of one
        # precision="bfloat16",
        # weight=count_tokens,  # target -> what a sample counts, where losses are means over tokens
    )


if __name__ == "__main__":
    wt.fit(task)  # in this process, or in its place among torchrun's
