"""The same with wagontrain: python after.py [STRATEGY], or under torchrun, Slurm or Ray."""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from shared import Net, digits
from torch.utils.data import DataLoader

import wagontrain as wt


def task() -> wt.Task:
    data = digits()
    return wt.Task(
        model=Net,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        train=DataLoader(data, batch_size=64),  # the batch of all workers together
        validation=data,
        epochs=3,
        seed=0,
    )


if __name__ == "__main__":
    strategy = sys.argv[1] if len(sys.argv) > 1 else "data-parallel"
    done = wt.fit(task, strategy, workers=2, quiet=True)
    print(f"loss {done.summary['validation']['loss']:.6f}")
