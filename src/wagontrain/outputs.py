"""Models that compute their loss themselves, as Hugging Face's do when they are given labels.

train    samples that are one dict each: model(**sample), and the whole dict is the target, too
loss     wt.loss_of_output
weight   wt.count_labels, where the loss is a mean over labels and not over samples
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wagontrain.errors import ModelError

IGNORED = -100
"""The label that cross-entropy leaves out, in torch and in Hugging Face's models."""


def loss_of_output(output: Any, target: Any) -> Tensor:
    """The loss that a model has put into its output: `output.loss`, or `output["loss"]`.

    Raises:
        ModelError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ModelError(
            f"the model's output ({type(output).__name__}) has no loss: give it labels with its "
            "input, or Task.loss a function (output, target) -> mean"
        )
    if not isinstance(loss, Tensor):
        raise ModelError(f"the loss in the model's output is {type(loss).__name__}, no tensor")
    return loss


def count_labels(target: Any, shifted: bool = False) -> int:
    """How many labels count: those that are not -100. For `Task.weight`.

    Args:
        target: labels, or a dict with them.
        shifted: whether the model guesses the next label, as those for causal language models do:
            the first one of each sequence is then guessed by nobody.

    Raises:
        ModelError: there are no labels.
    """
    labels = target.get("labels") if isinstance(target, Mapping) else target
    if not isinstance(labels, Tensor):
        raise ModelError("the samples have no 'labels' to count: give Task.weight another function")
    return int(((labels[..., 1:] if shifted else labels) != IGNORED).sum())


def leaves_out(target: Any) -> bool:
    """Whether some labels do not count, so that a mean over them is none over samples."""
    labels = target.get("labels") if isinstance(target, Mapping) else None
    return isinstance(labels, Tensor) and bool((labels == IGNORED).any())
