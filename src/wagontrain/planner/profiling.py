"""Measures what a task costs on this machine: real passes, watched by hooks, nothing traced.

A layer's forward lasts from its call to the next layer's; its backward from the moment its
result's gradient is there to the moment the gradient of the layer before is. So whatever lies
between two layers counts for one of them, and the layers add up to the pass.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wagontrain.batches import MicroBatch
from wagontrain.building import forget_peak, resident_bytes
from wagontrain.objective import Objective, Update
from wagontrain.optimizers import kind_of
from wagontrain.planner.facts import is_layer, layers_of
from wagontrain.profile import Layer, Line, Profile
from wagontrain.task import Task, trainable
from wagontrain.transport import Stopwatch
from wagontrain.trial import trial_batch

_SECONDS = 1.5
"""For each size of batch, after the pass that warms up."""
_MOST = 30


def fingerprint(task: Task, model: nn.Module) -> str:
    """Tells models and tasks apart whose profiles differ."""
    tensors = [
        [name, list(value.shape), str(value.dtype)] for name, value in model.state_dict().items()
    ]
    sources = sorted({_source(type(module)) for module in model.modules()})
    optimizer = kind_of(task.build_optimizer(model))
    told = [tensors, task.batch_size, task.accumulate, task.precision, str(model), sources]
    return hashlib.sha256(json.dumps([*told, optimizer]).encode()).hexdigest()[:16]


def _source(kind: type) -> str:
    """What the file says that a module's class is from; torch's own change with its version."""
    if kind.__module__.startswith("torch."):
        return torch.__version__
    with contextlib.suppress(OSError, TypeError):
        file = inspect.getsourcefile(kind)
        return Path(file).read_text() if file else kind.__qualname__
    return kind.__qualname__


def measure(task: Task, device: torch.device, sizes: Sequence[int]) -> Profile:
    """The profile of a task on this device.

    Args:
        task: what is to be trained.
        device: to measure on.
        sizes: numbers of samples to take at a time.

    Raises:
        ModelError: the model or loss failed on a batch.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        profile = _measured(task, device, sizes)
    # What the process has taken when the model is gone: libraries load code and buffers as they
    # are first used, and keep them.
    forget_peak(device)
    return dataclasses.replace(profile, base=resident_bytes(device))


def _measured(task: Task, device: torch.device, sizes: Sequence[int]) -> Profile:
    model = copy.deepcopy(task.build_model()).to(device).train()
    mark = fingerprint(task, model)
    objective = Objective(task, device)
    few = trial_batch(task, device)
    layers = layers_of(model, objective, few)
    update = Update(task, model)
    update.scheduler = None  # it may be made for so many steps and no more
    watched = _Watched(model, device)
    passes: dict[int, list[_Pass]] = {}
    for size in sorted({min(task.batch_size, max(1, each)) for each in sizes}):
        micro = trial_batch(task, device, size)
        taken = _repeat(watched, model, update, objective, micro)
        passes[micro.count] = taken
    state = sum(
        value.nbytes
        for entries in update.optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor) and value.dim()
    )
    nbytes = sum(value.nbytes for _, value in trainable(model))
    updates = [each.update for found in passes.values() for each in found]
    pace = _pace(passes, device)
    return Profile(
        model=mark,
        batch_size=task.batch_size,
        accumulate=task.accumulate,
        layers=_timed(layers, passes, pace),
        update=Line(0.0, statistics.median(updates) * pace / nbytes),
        optimizer=state / nbytes,
        buffers=sum(value.nbytes for value in model.buffers()),
        sample=few.nbytes / few.count,
        base=0,
        speed=arithmetic(device),
        device=device.type,
    )


def arithmetic(
    device: torch.device, seconds: float = 0.5, dtype: torch.dtype = torch.float32
) -> float:
    """10⁹ operations a second that this worker does in products of matrices."""
    n = 512 if device.type == "cpu" else 4096
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock = Stopwatch(device)
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - began < seconds:
        start = clock.mark()
        torch.mm(left, right)
        taken.append(clock.between(start, clock.mark()))
    # The mean and not the median: a quota stops a process now and then, and that counts.
    return 2e-9 * n**3 / statistics.mean(taken[1:])


def copying(device: torch.device, seconds: float = 0.2) -> float:
    """10⁹ bytes a second that this worker's memory gives and takes, in copies."""
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    clock = Stopwatch(device)
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - began < seconds:
        start = clock.mark()
        target.copy_(source)
        taken.append(clock.between(start, clock.mark()))
    return 2e-9 * source.nbytes / statistics.mean(taken[1:])


# --- one pass -----------------------------------------------------------------------------------


class _Clock:
    """Marks of the clock on a GPU's time line, or of the CPU time of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = Stopwatch(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        return self._device.mark() if self._device else time.process_time()

    def between(self, start: Any, stop: Any) -> float:
        return self._device.between(start, stop) if self._device else float(stop - start)


@dataclass
class _Pass:
    """Of one pass: CPU or GPU seconds of each layer by name, and of the update; by the clock."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    update: float = 0.0
    wall: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values()) + self.update


class _Watched:
    """Notes when the layers of a model begin, and when gradients of their results come."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.clock = _Clock(device)
        self.calls: list[tuple[str, Any]] = []
        self.gradients: list[tuple[str, Any]] = []
        for name, module in model.named_modules():
            if is_layer(module):
                module.register_forward_pre_hook(self._begin(name))
                module.register_forward_hook(self._end(name))

    def _begin(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any) -> None:
            self.calls.append((name, self.clock.mark()))

        return note

    def _end(self, name: str) -> Callable[..., None]:
        def came(gradient: Tensor) -> None:
            self.gradients.append((name, self.clock.mark()))

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(came)
                    break

        return note

    def result(self, began: Any, middle: Any, ended: Any) -> _Pass:
        """Seconds of each layer; what comes before the first counts for it."""
        found = _Pass()
        self._share(self.calls, began, middle, found.forward)
        self._share(self.gradients, middle, ended, found.backward)
        self.calls.clear()
        self.gradients.clear()
        return found

    def _share(
        self, marks: list[tuple[str, Any]], began: Any, ended: Any, into: dict[str, float]
    ) -> None:
        if not marks:
            return
        starts = [began, *(mark for _, mark in marks[1:]), ended]
        for (name, _), (start, stop) in zip(marks, itertools.pairwise(starts), strict=True):
            into[name] = into.get(name, 0.0) + self.clock.between(start, stop)


def _repeat(
    watched: _Watched, model: nn.Module, update: Update, objective: Objective, micro: MicroBatch
) -> list[_Pass]:
    """Take steps for a while; the first warms up."""
    passes: list[_Pass] = []
    clock = watched.clock
    began = time.perf_counter()
    while len(passes) < 3 or (len(passes) < _MOST and time.perf_counter() - began < _SECONDS):
        update.begin()
        since = time.perf_counter()
        start = clock.mark()
        loss = objective(model, micro)
        middle = clock.mark()
        loss.backward()
        ended = clock.mark()
        update.apply()
        done = clock.mark()
        taken = watched.result(start, middle, ended)
        taken.update = clock.between(ended, done)
        taken.wall = time.perf_counter() - since
        passes.append(taken)
    return passes[1:]


def _pace(passes: dict[int, list[_Pass]], device: torch.device) -> float:
    """Seconds by the clock for a second of CPU time."""
    if device.type == "cuda":
        return 1.0
    everything = [each for found in passes.values() for each in found]
    return sum(each.wall for each in everything) / sum(each.total for each in everything)


def _timed(
    layers: Sequence[Layer], passes: dict[int, list[_Pass]], pace: float
) -> tuple[Layer, ...]:
    """Layers with what was measured: the median of each."""

    def line(kind: str, name: str) -> Line:
        points = []
        for size, found in passes.items():
            taken = statistics.median(getattr(each, kind).get(name, 0.0) for each in found)
            points.append((size, taken * pace))
        return Line.through(points)

    return tuple(
        dataclasses.replace(
            layer, forward=line("forward", layer.name), backward=line("backward", layer.name)
        )
        for layer in layers
    )
