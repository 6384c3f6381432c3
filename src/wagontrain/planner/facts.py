"""What can be said of a model's layers without a clock: sizes, arithmetic, how they can be split.

One forward pass is watched; it may be on the meta device, where nothing is computed and no
memory is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from wagontrain.batches import MicroBatch
from wagontrain.errors import ModelError
from wagontrain.objective import Objective
from wagontrain.profile import Cut, Layer, Line, Part
from wagontrain.split.divide import consistent, splittable, ways
from wagontrain.split.families import families
from wagontrain.split.observe import Observed, observe

NOTHING = Line(0.0, 0.0)


def is_layer(module: nn.Module) -> bool:
    """Whether a module counts as a layer: one without others in it, or with own weights."""
    return not list(module.children()) or bool(list(module.parameters(recurse=False)))


def layers_of(model: nn.Module, objective: Objective, micro: MicroBatch) -> tuple[Layer, ...]:
    """The layers of a model in the order of their first calls, without times.

    Args:
        model: in training mode, perhaps on the meta device.
        objective: of the task, for the device that the model is on.
        micro: samples to try it on; what is said of a sample is the mean over them.

    Raises:
        ModelError: the model or loss failed.
    """
    seen, softmax = _pass(model, objective, micro)
    try:
        observed = observe(model, objective, micro)
    except ModelError:  # it asks for gradients in its forward: nobody can divide it
        observed = Observed(list(seen))
    named = dict(model.named_modules())
    homes, tied = _homes(model, list(seen)), _tied(model)
    possible = set(_divided(model, observed)) if observed.calls else set()
    families_of = {
        name: family
        for family in families(model, observed)
        for name in family.columns
        if possible.issuperset(family.placement)
    }
    found = []
    for name, facts in seen.items():
        module, family = named[name], families_of.get(name)
        splits = name in possible and observed.once(name)
        found.append(
            Layer(
                name, type(module).__name__, tuple(homes.get(name, ())), NOTHING, NOTHING,
                facts.rows / micro.count, facts.given / micro.count, facts.output / micro.count,
                facts.kept / micro.count, facts.flops / micro.count,
                splittable(module) if splits else (), _after(name, observed),
                softmax and type(module) is nn.Linear and name == observed.layers[-1],
                isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse,
                family.row if family else "", family.heads if family else 0, name in tied,
            )
        )  # fmt: skip
    return tuple(found)


def _divided(model: nn.Module, observed: Observed) -> dict[str, Cut]:
    """The layers that can be split: tied ones only where both can be alike."""
    every = {name: splittable(model.get_submodule(name))[0] for name in ways(model, observed, 0)}
    return consistent(model, every, 1)


def _after(name: str, observed: Observed) -> str:
    after = observed.pairs.get(name, "")
    return after if after and observed.once(name) and observed.once(after) else ""


def _homes(model: nn.Module, called: list[str]) -> dict[str, list[Part]]:
    """Trainable weights by layer: of a module that is never called, by the one around it."""
    homes: dict[str, list[Part]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        owner = name.rpartition(".")[0]
        while owner and owner not in called:
            owner = owner.rpartition(".")[0]
        home = owner if owner in called else called[0]
        homes.setdefault(home, []).append(Part(name, tuple(value.shape), value.nbytes))
    return homes


def _tied(model: nn.Module) -> set[str]:
    """Layers that share weights with others."""
    users: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(value), set()).add(name.rpartition(".")[0])
    return {name for names in users.values() if len(names) > 1 for name in names}


@dataclass
class _Facts:
    """Of one layer, for all samples together."""

    rows: float = 0.0
    given: float = 0.0
    output: float = 0.0
    kept: float = 0.0
    flops: float = 0.0


@dataclass
class _Watch:
    """Notes what each layer is given, returns, keeps for the backward pass, and computes.

    What is computed between two layers, attention for one, counts for the one before.
    """

    counter: FlopCounterMode
    facts: dict[str, _Facts] = field(default_factory=dict)
    now: str = ""
    seen: set[int] = field(default_factory=set)
    counted: int = 0

    def keep(self, tensor: Tensor) -> None:
        """Count what is kept, and keep nothing: the result of a layer that its own backward
        holds would never be let go of."""
        storage = tensor.untyped_storage()
        if self.now and storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.facts[self.now].kept += storage.nbytes()
            self.alive.append(storage)  # so that no other gets its number

    def __post_init__(self) -> None:
        self.alive: list[Any] = []

    def tally(self) -> None:
        """What was computed since the last time counts for the layer that began last."""
        total = self.counter.get_total_flops()
        self.facts[self.now].flops += total - self.counted
        self.counted = total

    def begin(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, named: Any = None) -> None:
            if self.now:
                self.tally()
            self.now = name
            self.facts.setdefault(name, _Facts())

        return note

    def end(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            given, returned = _tensors((inputs, named)), _tensors(output)
            facts = self.facts[name]
            facts.output += sum(each.nbytes for each in returned[:1])
            if given:
                facts.given += given[0].nbytes
                wide = isinstance(module, nn.Linear | nn.MultiheadAttention)
                facts.rows += given[0].numel() / (given[0].shape[-1] if wide else 1)

        return note


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Softmax(TorchFunctionMode):
    """Notes whether the loss is a cross-entropy."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is F.cross_entropy
        return func(*args, **(kwargs or {}))


def _pass(
    model: nn.Module, objective: Objective, micro: MicroBatch
) -> tuple[dict[str, _Facts], bool]:
    """What a pass shows of each layer, and whether the loss is a cross-entropy."""
    counter = FlopCounterMode(display=False)
    watch = _Watch(counter)
    watch.seen = {value.untyped_storage()._cdata for value in model.parameters()}
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if is_layer(module):
                for handle in (
                    module.register_forward_pre_hook(watch.begin(name), with_kwargs=True),
                    module.register_forward_hook(watch.end(name), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
        softmax = stack.enter_context(_Softmax())
        stack.enter_context(counter)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.keep, _gone))
        objective(model, micro)
    if watch.now:
        watch.tally()
    return watch.facts, softmax.seen


def _gone(nothing: None) -> Tensor:
    raise AssertionError("nobody goes backward through a pass that is only watched")
