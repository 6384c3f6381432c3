"""What a task costs, on paper: for models too big to run here, and machines that nobody here owns.

The model is built without memory (on torch's meta device), one pass through it is watched, and
every layer takes what its arithmetic or its memory traffic takes, whichever is more:

    seconds(n) = call + max(flops · n / speed, (weights + activations · n) / bandwidth)

Source: Williams et al. 2009, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures" (CACM). Real kernels stay below either roof: give paces that products of matrices
and copies reach on the machine in question, not those of its datasheet.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wagontrain.batches import MicroBatch
from wagontrain.building import skeleton, taken_bytes
from wagontrain.errors import TaskError, UsageError
from wagontrain.objective import Objective
from wagontrain.optimizers import values_per_weight
from wagontrain.planner.facts import layers_of
from wagontrain.planner.profiling import fingerprint
from wagontrain.profile import Layer, Line, Profile
from wagontrain.task import Task
from wagontrain.trial import trial_batch

_META = torch.device("meta")


@dataclass(frozen=True)
class Machine:
    """A worker, on paper.

    Args:
        speed: 10⁹ operations a second that products of matrices reach, in the task's type.
        bandwidth: 10⁹ bytes a second that its memory gives and takes.
        device: "cpu" or "cuda".
        call: seconds that any operation takes, whatever it works on: some 5 to 10 microseconds,
            for launching a kernel and for torch itself.
    """

    speed: float
    bandwidth: float
    device: str
    call: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("speed", "bandwidth", "call"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}: give a number above 0")


def on_paper(task: Task, machine: Machine) -> Profile:
    """The profile of a task on a machine, without running it on any.

    Nothing is allocated but a few samples. Activations are counted in float32, even where the
    task computes in bfloat16: rather too much than too little.

    Args:
        task: what is to be trained.
        machine: to be trained on.

    Raises:
        TaskError: the model cannot be built without memory.
        ModelError: the model or loss failed.
    """
    model = _bare(task)
    micro = trial_batch(task, torch.device("cpu"))
    # Autocast does not know the meta device.
    objective = Objective(dataclasses.replace(task, precision="float32"), _META)
    layers = layers_of(model, objective, _on_meta(micro))
    state = values_per_weight(task.build_optimizer(model))
    piece = -(-task.batch_size // task.accumulate)
    return Profile(
        model=fingerprint(task, model),
        batch_size=task.batch_size,
        accumulate=task.accumulate,
        layers=timed(layers, machine, piece),
        # The weight, its gradient and its state are read; the weight and its state are written.
        update=Line(machine.call, (3 + 2 * state) / (machine.bandwidth * 1e9)),
        optimizer=state,
        buffers=sum(value.nbytes for value in model.buffers()),
        sample=micro.nbytes / micro.count,
        base=taken_bytes() if machine.device == "cpu" else 0,
        speed=machine.speed,
        device=machine.device,
    )


def timed(layers: Sequence[Layer], machine: Machine, most: int) -> tuple[Layer, ...]:
    """Layers with the seconds that they take on a machine.

    Args:
        layers: as `facts.layers_of` gives them.
        machine: that they are computed on.
        most: samples at a time. Lines are exact for one sample and for so many; where memory
            limits the first and arithmetic the other, they are a little above in between.
    """
    found, first = [], True
    for layer in layers:
        moved = max(layer.given + layer.output, layer.kept)
        weights = float(layer.nbytes)
        if layer.kind.startswith("Embedding"):
            # Rows are looked up; their gradient is as large as the table.
            forward = _line(machine, most, 0.0, 0.0, 2 * layer.output)
            backward = _line(machine, most, 0.0, weights, 2 * layer.output)
        else:
            forward = _line(machine, most, layer.flops, weights, moved)
            # Gradients of the input and of the weights; the first layer's input needs none.
            ways = 2 if layer.parts and not first else 1
            backward = _line(machine, most, ways * layer.flops, ways * weights, ways * moved)
        first = first and not layer.parts
        found.append(dataclasses.replace(layer, forward=forward, backward=backward))
    return tuple(found)


def _line(machine: Machine, most: int, flops: float, weights: float, moved: float) -> Line:
    """Seconds for n samples of so many operations and bytes each, and bytes of weights."""

    def seconds(samples: int) -> float:
        computing = flops * samples / machine.speed
        return machine.call + max(computing, (weights + moved * samples) / machine.bandwidth) / 1e9

    if most == 1:
        return Line(0.0, seconds(1))
    each = (seconds(most) - seconds(1)) / (most - 1)
    return Line(seconds(1) - each, each)


def _bare(task: Task) -> nn.Module:
    model = skeleton(task)
    if model is None:
        raise TaskError(
            "the model cannot be built without memory, for it looks at its own weights while it "
            "is built: let it skip that where they are on the meta device (weight.is_meta)"
        )
    if any(not value.is_meta for value in (*model.parameters(), *model.buffers())):
        # It was built elsewhere, perhaps once for all: the task's own stays as it is.
        model = copy.deepcopy(model).to(_META)
    return model.train()


def _on_meta(micro: MicroBatch) -> MicroBatch:
    def moved(tree: Any) -> Any:
        return pytree.tree_map(
            lambda leaf: leaf.to(_META) if isinstance(leaf, Tensor) else leaf, tree
        )

    return dataclasses.replace(micro, inputs=moved(micro.inputs), target=moved(micro.target))
