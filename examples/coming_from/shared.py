"""What both files of each pair train: a small network on the digits that scikit-learn has."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES = 1536


def digits() -> TensorDataset:
    """Images [64] with values to 1, and which digit each is."""
    images, targets = load_digits(return_X_y=True)
    x = torch.tensor(images[:SAMPLES], dtype=torch.float32) / 16
    return TensorDataset(x, torch.tensor(targets[:SAMPLES]))


class Net(nn.Sequential):
    """Logits of the digit: [n, 64] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
