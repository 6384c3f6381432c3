"""What every runner does alike: forward and loss, the update, measuring on validation data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wagontrain.batches import Batch, Cut, MicroBatch
from wagontrain.errors import LossError, ModelError, TaskError, WagontrainError
from wagontrain.layout import local
from wagontrain.optimizers import (
    is_hooked,
    require_elementwise,
    treats_parameters_by_themselves,
)
from wagontrain.outputs import leaves_out, loss_of_output
from wagontrain.task import Task, call_model, describe, origin
from wagontrain.watch import lost_peer


@dataclass(frozen=True)
class Evaluation:
    """Weighted sums over this rank's share of a validation batch, and their weight."""

    weight: float = 0.0
    sums: Mapping[str, float] = field(default_factory=dict)


Norm = Callable[[Iterable[Tensor]], Tensor]


class Update:
    """The optimizer, with clipping before it and the scheduler after it: once per step.

    Args:
        task: what is trained.
        model: its parameters, or a rank's part of them.
        norm: of the whole gradient, where `model` has only a part of it.
    """

    def __init__(self, task: Task, model: nn.Module, norm: Norm | None = None) -> None:
        self.optimizer = task.build_optimizer(model)
        self.scheduler = task.build_scheduler(self.optimizer)
        self.clip = task.clip_grad_norm
        self.norm = norm
        if norm is not None:
            require_elementwise(self.optimizer)
        self.parameters = [value for value in model.parameters() if value.requires_grad]
        # Others may look at several parameters at once, or count their steps by themselves.
        own = treats_parameters_by_themselves(self.optimizer)
        self.in_parts = own and self.clip is None and not is_hooked(self.optimizer)

    def begin(self) -> None:
        """Clear the gradients of the step before, or those that a model brought along.

        Not sooner: freed together with a step's activations, their memory goes back to the
        system, and the next step pays for it with thousands of page faults.
        """
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, arrivals: Iterable[Sequence[Tensor]] = ()) -> None:
        """Update the parameters from their gradients.

        Args:
            arrivals: parameters in the order in which their gradients are complete. Each is
                updated at once where that is the same as all in one: torch's own optimizers
                treat every parameter by itself. To clip, the whole gradient has to be there.
        """
        if self.in_parts:
            self._step_in_parts(arrivals)
        else:
            for _ in arrivals:
                pass
            if self.clip is not None:
                self._clip(self.clip)
            self.step()
        if self.scheduler is not None:
            try:
                self.scheduler.step()
            except ValueError as error:  # OneCycleLR past its end, say
                raise ModelError(f"the scheduler cannot go on: {origin(error)}") from error

    def step(self) -> None:
        """The optimizer's step, once all gradients are there."""
        self.optimizer.step()

    def _clip(self, largest: float) -> None:
        if self.norm is None:
            nn.utils.clip_grad_norm_(self.parameters, largest)
            return
        norm = self.norm(self.parameters)
        factor = min(1.0, largest / (float(norm) + 1e-6))  # as clip_grad_norm_ has it
        for value in self.parameters:
            if value.grad is not None:
                local(value.grad).mul_(factor)

    def _step_in_parts(self, arrivals: Iterable[Sequence[Tensor]]) -> None:
        """Optimizers leave out parameters without gradient: the others' are put aside."""
        held: dict[Tensor, Tensor] = {
            value: value.grad for value in self.parameters if value.grad is not None
        }
        left = dict(held)
        try:
            for value in held:
                value.grad = None
            for arrived in arrivals:
                here = [value for value in arrived if value in left]
                for value in here:
                    value.grad = left.pop(value)
                if here:
                    self.optimizer.step()
                for value in here:
                    value.grad = None
            for value, gradient in left.items():
                value.grad = gradient
            if left or not held:
                self.optimizer.step()
        finally:
            for value, gradient in held.items():
                value.grad = gradient


class Objective:
    """The task's forward and loss, with the user's slips turned into messages.

    Raises:
        ModelError: forward or loss raised, or the loss is not a scalar.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self._first = True
        self._first_evaluation = True

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision the task asks for."""
        if self.task.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def __call__(self, model: Callable[..., Any], micro: MicroBatch) -> Tensor:
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
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            raise ModelError(
                f"the loss is {describe(loss)}, not a scalar tensor: return the mean over the "
                "samples given"
            )
        self._first = False
        return loss

    def forward(self, model: Callable[..., Any], micro: MicroBatch) -> Any:
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
        """What the micro-batch counts for in a mean; 0 for a stand-in.

        Raises:
            ModelError: the task's weight is no number from 0 on.
        """
        if micro.count == 0:
            return 0.0
        if self.task.weight is None:
            if self.task.loss is loss_of_output and leaves_out(micro.target):
                raise TaskError(
                    "some labels are -100 and do not count, so that the model's own loss is a mean "
                    "over something else than samples: give Task.weight=wt.count_labels, or for a "
                    "causal language model partial(wt.count_labels, shifted=True)"
                )
            return float(micro.count)
        try:
            weight = float(self.task.weight(micro.target))
        except Exception as error:
            _pass_on(error)
            what = f"Task.weight gave no number for target {describe(micro.target)}"
            raise ModelError(f"{what}: {origin(error)}") from error
        if not 0 <= weight < math.inf:
            raise ModelError(f"Task.weight gave {weight}: give a number from 0 on")
        return weight

    def require_mean(self, model: nn.Module, micro: MicroBatch) -> None:
        """Check on a few samples that the loss is the mean over them, in any split.

        Sums of per-worker losses mean nothing for a loss that adds up, weights samples by class,
        or compares samples with each other. Left out where output and target cannot be cut.

        Raises:
            TaskError: the loss of all is not the mean of the losses of two parts.
        """
        output, samples = self._detached_output(model, micro), micro.count
        if samples < 2:
            return
        everything, tolerance = slice(0, samples), 0.02
        if _can_be_cut((output, micro.target), samples):

            def loss_of(cut: slice) -> tuple[float, float]:
                part, target = _cut((output, micro.target), cut)
                return self._loss_of(part, target, cut.stop - cut.start)

        elif _can_be_cut((micro.inputs, micro.target), samples):  # a loss inside the output, say

            def loss_of(cut: slice) -> tuple[float, float]:
                count = cut.stop - cut.start
                inputs, target = _cut((micro.inputs, micro.target), cut)
                part = MicroBatch(inputs, target, count, count)
                return self._loss_of(self._detached_output(model, part), target, count)

            if loss_of(everything) != loss_of(everything):
                return  # its forward draws random numbers
            # Nothing but rounding is in it; a weight that is one too high per sequence is little.
            tolerance = 0.02 if self.task.precision == "bfloat16" else 1e-4
        else:
            return
        whole, weight = loss_of(everything)
        for border in {1, samples // 2}:
            parts = [loss_of(cut) for cut in (slice(0, border), slice(border, samples))]
            if not weight or not all(part for _, part in parts) or not math.isfinite(whole):
                continue
            mean = sum(loss * part for loss, part in parts) / sum(part for _, part in parts)
            if not math.isclose(whole, mean, rel_tol=tolerance, abs_tol=1e-5):
                raise TaskError(
                    f"the loss is not a mean over the samples given: {whole:.6g} for {samples} of "
                    f"them, but {mean:.6g} as the mean over two parts; use a mean, and "
                    "Task.weight if it is one over something else than samples"
                )

    def _detached_output(self, model: Callable[..., Any], micro: MicroBatch) -> Any:
        with self.precision():  # with gradients: some models differentiate in their forward
            return pytree.tree_map(_detached, self.forward(model, micro))

    def _loss_of(self, output: Any, target: Any, count: int) -> tuple[float, float]:
        """Loss and weight of some samples."""
        with torch.no_grad(), self.precision():
            loss = float(self.task.loss(output, target))
        return loss, self.weight(MicroBatch(None, target, count, count))

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Evaluation:
        """Loss and metrics of the task on this rank's share, as weighted sums.

        Raises:
            ModelError: model, loss or a metric failed, or a metric is not a mean.
        """
        weight, sums = 0.0, dict.fromkeys(["loss", *self.task.metrics], 0.0)
        for micro in batch.micro_batches:
            share = self.weight(micro)
            with torch.no_grad(), self.precision():
                output = self.forward(model, micro)
                if share == 0:
                    continue
                measures = {"loss": self.task.loss, **self.task.metrics}
                for name, measure in measures.items():
                    sums[name] += self._measure(name, measure, output, micro) * share
            weight += share
            self._first_evaluation = False
        return Evaluation(weight, sums)

    def _measure(self, name: str, measure: Any, output: Any, micro: MicroBatch) -> float:
        try:
            call = _strictly if self._first_evaluation else _plainly
            value = torch.as_tensor(call(measure, output, micro.target)).double()
        except Exception as error:  # whatever the user's metric raises is theirs to read
            _pass_on(error)
            what = f"{name!r} failed on validation output {describe(output)}"
            raise ModelError(
                f"{what} and target {describe(micro.target)}: {origin(error)}"
            ) from error
        if value.numel() not in (1, micro.count):
            raise ModelError(
                f"metric {name!r} gave {describe(value)} for {micro.count} samples: "
                "return the mean over them, or one number for each"
            )
        return float(value.mean())


def nothing(output: Any) -> Tensor:
    """A loss of zero that every tensor of a model's output takes part in.

    Raises:
        ModelError: no tensor in it depends on a parameter.
    """
    tensors = [value for value in _tensors_in(output) if value.requires_grad]
    if not tensors:
        raise ModelError("the model's output holds no tensor that depends on its parameters")
    # A loss in it is a mean over nothing, which is no number.
    tensors = [value for value in tensors if value.dim()] or tensors
    return torch.stack([(value * 0).sum().float() for value in tensors]).sum()


def _can_be_cut(tree: Any, samples: int) -> bool:
    """Whether all in a nest are tensors with one entry for each sample."""
    return all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples
        for leaf in pytree.tree_leaves(tree)
    )


def _cut(tree: Any, cut: slice) -> Any:
    return pytree.tree_map(lambda leaf: leaf[cut], tree)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _tensors_in(output: Any) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += [tensor for value in vars(leaf).values() for tensor in _tensors_in(value)]
    return found


def _pass_on(error: Exception) -> None:
    """Let errors through that are about the machines and not about the user's model."""
    if isinstance(error, torch.OutOfMemoryError | WagontrainError) or lost_peer(error):
        raise error


def _strictly(loss: Any, output: Any, target: Any) -> Any:
    """The loss, with torch's warning of a silent broadcast turned into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")
        return loss(output, target)


def _plainly(loss: Any, output: Any, target: Any) -> Any:
    return loss(output, target)


def require_finite(
    losses: Sequence[float], batch: Batch, cut: Cut, model: nn.Module, shares: Sequence[int]
) -> None:
    """Check each rank's part of the loss of a step, before the update that would follow.

    Args:
        losses: one for each rank.
        batch: of the step.
        cut: how this rank takes its share.
        model: or what this rank has of it.
        shares: which of the shares each rank takes.

    Raises:
        LossError: one is not finite; the message says which step, rank and samples.
    """
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if not bad:
        return
    rank = bad[0]
    pieces = dataclasses.replace(cut, rank=shares[rank]).micro_batches(
        batch.positions, len(batch.micro_batches)
    )
    samples = ", ".join(f"{mine.start} to {mine.stop - 1}" for _, mine in pieces if len(mine))
    spoiled = not_finite(dict(model.named_parameters()))
    if spoiled:
        why = (
            f"parameter {spoiled!r} was not finite any more: a gradient of an earlier step was "
            "not, though its loss was. Clip the gradient, or avoid operations such as √0 whose "
            "gradient is infinite"
        )
    else:
        why = (
            "the weights are still those before this step. Lower the learning rate, clip the "
            "gradient (clip_grad_norm) or look at these samples"
        )
    raise LossError(
        f"the loss is {losses[rank]} at step {batch.step} (epoch {batch.epoch}) on rank {rank}, "
        f"samples {samples} in the epoch's order; {why}"
    )


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first floating-point tensor that holds an infinity or NaN, if one does."""
    for name, value in tensors.items():
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if floating and not bool(value.isfinite().all()):
            return name
    return None
