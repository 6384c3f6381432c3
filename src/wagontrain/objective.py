"""What every runner does alike: forward and loss, the update, measuring on validation data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wagontrain.batches import Batch, Cut, MicroBatch
from wagontrain.errors import LossError, ModelError, WagontrainError
from wagontrain.task import Task, call_model, describe, origin
from wagontrain.transport import lost_peer


@dataclass(frozen=True)
class Evaluation:
    """Weighted sums over this rank's share of a validation batch, and their weight."""

    weight: float = 0.0
    sums: Mapping[str, float] = field(default_factory=dict)


class Update:
    """The optimizer, with clipping before it and the scheduler after it: once per step."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self.optimizer = task.build_optimizer(model)
        self.scheduler = task.build_scheduler(self.optimizer)
        self.clip = task.clip_grad_norm
        self.parameters = [value for value in model.parameters() if value.requires_grad]

    def apply(self) -> None:
        """Update the parameters from their gradients, then clear these."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer and scheduler."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of optimizer and scheduler."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


class Objective:
    """The task's forward and loss, with the user's slips turned into messages.

    Raises:
        ModelError: forward or loss raised, or the loss is not a scalar.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self._first = True

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision the task asks for."""
        if self.task.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def __call__(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """Mean loss over the micro-batch, a scalar tensor."""
        with self.precision():
            output = self.forward(model, micro)
            try:
                if self._first:
                    loss = _strictly(self.task.loss, output, micro.target)
                else:
                    loss = self.task.loss(output, micro.target)
            except Exception as error:  # whatever the user's loss raises is theirs to read
                _pass_on(error)
                raise ModelError(
                    f"the loss failed on output {describe(output)} and target "
                    f"{describe(micro.target)}: {origin(error)}"
                ) from error
        if isinstance(loss, Tensor) and loss.dim() == 0 and not loss.requires_grad:
            raise ModelError(
                "the loss does not depend on any parameter: it was detached, or computed "
                "without the model's output"
            )
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ModelError(
                f"the loss is {describe(loss)}, not a scalar tensor: return the mean over the "
                "samples given"
            )
        self._first = False
        return loss

    def forward(self, model: nn.Module, micro: MicroBatch) -> Any:
        """The model's output."""
        try:
            return call_model(model, micro.inputs)
        except Exception as error:  # whatever the user's model raises is theirs to read
            _pass_on(error)
            when = "the first batch" if self._first else "a batch"
            raise ModelError(
                f"the model's forward failed on {when}, input {describe(micro.inputs)}: "
                f"{origin(error)}"
            ) from error

    def weight(self, micro: MicroBatch) -> float:
        """What the micro-batch counts for in a mean; 0 for a stand-in."""
        if micro.count == 0:
            return 0.0
        return float(micro.count if self.task.weight is None else self.task.weight(micro.target))

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Loss and metrics of the task on this rank's share, as weighted sums."""
        weight, sums = 0.0, dict.fromkeys(["loss", *self.task.metrics], 0.0)
        for micro in batch.micro_batches:
            share = self.weight(micro)
            if share == 0:
                continue
            with torch.no_grad(), self.precision():
                output = self.forward(model, micro)
                measures = {"loss": self.task.loss, **self.task.metrics}
                for name, measure in measures.items():
                    value = torch.as_tensor(measure(output, micro.target), dtype=torch.float64)
                    if value.numel() not in (1, micro.count):
                        raise ModelError(
                            f"metric {name!r} gave {describe(value)} for {micro.count} samples: "
                            "return the mean over them, or one number for each"
                        )
                    sums[name] += float(value.mean()) * share
            weight += share
        return Evaluation(weight, sums)


def _pass_on(error: Exception) -> None:
    """Let errors through that are about the machines and not about the user's model."""
    if isinstance(error, torch.OutOfMemoryError | WagontrainError) or lost_peer(error):
        raise error


def _strictly(loss: Any, output: Any, target: Any) -> Any:
    """The loss, with torch's warning of a silent broadcast turned into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")
        return loss(output, target)


def require_finite(losses: Sequence[float], batch: Batch, cut: Cut) -> None:
    """Check each rank's part of the loss of a step.

    Raises:
        LossError: one is not finite; the message says which step, rank and samples.
    """
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad:
        return
    rank = bad[0]
    pieces = dataclasses.replace(cut, rank=rank).micro_batches(
        batch.positions, len(batch.micro_batches)
    )
    samples = ", ".join(f"{mine.start} to {mine.stop - 1}" for _, mine in pieces if len(mine))
    raise LossError(
        f"the loss is {losses[rank]} at step {batch.step} (epoch {batch.epoch}) on rank {rank}, "
        f"samples {samples} in the epoch's order; the weights are still those before this step. "
        "Lower the learning rate, clip the gradient (clip_grad_norm) or look at these samples"
    )
