"""What has to be known before layers are split: the model, tried on a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from wagontrain.batches import MicroBatch
from wagontrain.building import initialise, require_uncompiled, skeleton, whole_or_skeleton
from wagontrain.errors import ModelError, UsageError
from wagontrain.layout import Layout
from wagontrain.objective import Objective
from wagontrain.split.divide import Cut, splittable, ways
from wagontrain.split.families import families
from wagontrain.split.observe import Observed, observe
from wagontrain.task import Task, place, trainable
from wagontrain.transport import Context
from wagontrain.trial import trial_batch, trial_model, unused_in_trial


@dataclass(frozen=True)
class Prepared:
    """A model that is about to be divided.

    Args:
        model: with its weights, or on the meta device where a whole copy does not fit.
        observed: what a forward pass showed.
        unused: whether some parameter got no gradient in a trial.
        samples: how many samples the trial had.
        bare: whether it was built without memory.
    """

    model: nn.Module
    observed: Observed
    unused: bool
    samples: int
    bare: bool

    @property
    def last(self) -> str | None:
        """The layer that is called last, if it is fully connected."""
        name = self.observed.layers[-1] if self.observed.layers else None
        if name is None or type(self.model.get_submodule(name)) is not nn.Linear:
            return None
        return name if self.observed.once(name) else None

    def fill(self, task: Task, model: nn.Module, layouts: Mapping[str, Layout]) -> None:
        """Give a divided model its first weights, where it was built without."""
        plain = skeleton(task)
        assert plain is not None
        initialise(model, plain, layouts, task.seed)


def prepare(task: Task, context: Context, without_memory: bool = False) -> Prepared:
    """Build the model and try it. Every rank has to call this.

    Args:
        task: what is trained.
        context: this rank's place in the job.
        without_memory: whether it is tried on the meta device, where it can be: activations of
            the whole may not fit. The loss is then not checked to be a mean over samples.

    Raises:
        UsageError: it neither fits nor runs without memory.
        TaskError: the loss is no mean over samples.
        ModelError: the model or the loss failed.
    """
    device = context.world.device
    model = whole_or_skeleton(task, context)
    require_uncompiled(model, "divides the layers")
    micro = trial_batch(task, device)
    if not next(model.parameters()).is_meta:
        model = model.to(device)
        plain = skeleton(task) if without_memory else None
        if plain is not None and (tried := _tried_without_memory(task, plain, micro)):
            return Prepared(model, *tried, micro.count, bare=False)
        unused = bool(unused_in_trial(task, Objective(task, device), model))
        observed = observe(trial_model(task, model), Objective(task, device), micro)
        return Prepared(model, observed, unused, micro.count, bare=False)
    objective = Objective(task, torch.device("meta"))
    try:
        observed = observe(model, objective, _nowhere(micro))
    except (ModelError, NotImplementedError) as error:
        raise UsageError(
            f"the model does not fit on one host, and its forward cannot run without memory, on "
            f"torch's meta device: {error}"
        ) from error
    return Prepared(model, observed, False, micro.count, bare=True)


def _nowhere(micro: MicroBatch) -> MicroBatch:
    """Samples without memory."""
    meta = torch.device("meta")
    return replace(micro, inputs=place(micro.inputs, meta), target=place(micro.target, meta))


def _tried_without_memory(
    task: Task, model: nn.Module, micro: MicroBatch
) -> tuple[Observed, bool] | None:
    """What a pass on the meta device shows, and whether some parameter got no gradient.

    None where the model or the loss reads numbers, which are not there.
    """
    objective, shown = Objective(task, torch.device("meta")), _nowhere(micro)
    try:
        observed = observe(model, objective, shown)
        objective(model, shown).backward()
    except (ModelError, NotImplementedError, RuntimeError):
        return None
    return observed, any(value.grad is None for _, value in trainable(model))


def settle(model: nn.Module, device: torch.device) -> None:
    """Give memory to what is left on the meta device of a divided model."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None and value.is_meta:
                empty = torch.empty_like(value, device=device)
                module._parameters[key] = nn.Parameter(empty, value.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=device)


def in_turn(
    prepared: Prepared, least: int = 0, shards: bool = False, size: int = 1
) -> dict[str, Cut]:
    """Columns for every layer, but rows for the second one of a pair, and heads for attention.

    With `size` ranks that all have all samples, also rows for the last one of a family.
    """
    placement: dict[str, Cut] = {}
    observed = prepared.observed
    before = {after: name for name, after in observed.pairs.items()}
    for name in ways(prepared.model, observed, least, shards):
        possible = splittable(prepared.model.get_submodule(name), shards)
        fused = placement.get(before.get(name, "")) == "column" and "row" in possible
        placement[name] = "row" if fused else possible[0]
    for family in families(prepared.model, observed, size) if size > 1 and not shards else ():
        if all(name in placement for name in family.placement):
            placement |= family.placement
    return placement
