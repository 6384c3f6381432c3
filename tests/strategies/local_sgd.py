"""A small task that the tests of local SGD share."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.problems import classes, numbers

plain_sgd = partial(torch.optim.SGD, lr=0.1)


def small_task(**fields: Any) -> wt.Task:
    """18 samples in batches of 8: of the last 2, a third rank has none."""
    data = TensorDataset(numbers(18, 5), classes(18, 3))
    model = partial(nn.Linear, 5, 3)
    made = wt.Task(model, F.cross_entropy, plain_sgd, data, batch_size=8, epochs=2)
    return dataclasses.replace(made, **fields)
