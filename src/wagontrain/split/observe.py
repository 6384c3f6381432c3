"""In which order a model calls its layers, and what lies between them: watched, not traced.

A forward pass on a few samples runs as it is, any Python in it, while every call of a torch
function is noted. That tells which layers are used in the ordinary way, once each, and where a
layer's result goes through elementwise functions alone into the next one: there the two can be
split so that nothing travels in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from wagontrain.batches import MicroBatch
from wagontrain.layout import full_name
from wagontrain.objective import Objective


@dataclass
class Call:
    """One call of a torch function."""

    function: Any
    inputs: list[int]
    output: int
    layer: str | None
    draws: bool = False
    leaf: str | None = None


@dataclass(frozen=True)
class Visit:
    """One call of a module that has no others in it.

    Args:
        leaf: the module's name.
        input: number of the tensor it was called with.
        output: number of the one it returned.
        shape: of its input.
        result: shape of what it returned.
    """

    leaf: str
    input: int
    output: int
    shape: tuple[int, ...]
    result: tuple[int, ...]


@dataclass(frozen=True)
class Observed:
    """What a forward pass showed.

    Args:
        layers: names of layers in the order of their calls, with every call of each.
        loose: names of parameters that somebody but their own layer uses.
        pairs: layer -> the fully connected layer that its result goes into, with nothing but
            elementwise functions in between.
        draws: layers between which and the next of the pair random numbers are drawn.
        shapes: of the input of each layer's first call.
        calls: of torch functions, in their order.
        visits: of modules without others in them, in their order.
        looked_at: tensors whose shape or content was asked for, each with the module without
            others that did so; or that the model returned.
    """

    layers: list[str] = field(default_factory=list)
    loose: frozenset[str] = frozenset()
    pairs: Mapping[str, str] = field(default_factory=dict)
    draws: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    calls: Sequence[Call] = ()
    visits: Sequence[Visit] = ()
    looked_at: frozenset[tuple[int, str | None]] = frozenset()

    def once(self, layer: str) -> bool:
        """Whether a layer is called exactly once in a pass."""
        return self.layers.count(layer) == 1


class _Watcher(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str], homes: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names
        self.homes = homes  # of layers that are never called: those that use their weights
        self.calls: list[Call] = []
        self.stack: list[str] = []
        self.loose: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.leaf: str | None = None
        self.visits: list[Visit] = []
        self.looked_at: set[tuple[int, str | None]] = set()
        self._kept: list[Any] = []  # so that no number of a tensor is given twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(output)
        if not outputs:
            self.look(inputs)
        if not isinstance(output, Tensor) and not isinstance(output, tuple | list):
            return output
        layer = None
        for value in inputs:
            name = self.names.get(id(value))
            if name is None:
                continue
            owner = name.rpartition(".")[0]
            if self.stack and self.stack[-1] in (owner, self.homes.get(owner)):
                owner = self.stack[-1]
                layer = owner
            else:
                self.loose.add(name)
        self._kept += [inputs, outputs]
        if layer is not None and inputs:
            self.shapes.setdefault(layer, tuple(inputs[0].shape))
        draws = func in _DROPOUTS and bool(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
        for value in outputs:
            self.calls.append(
                Call(func, [id(each) for each in inputs], id(value), layer, draws, self.leaf)
            )
        return output

    def look(self, values: list[Tensor]) -> None:
        """Note that something other than a tensor was made of these."""
        self._kept.append(values)
        self.looked_at |= {(id(value), self.leaf) for value in values}

    def visit(self, leaf: str, inputs: Any, output: Any) -> None:
        """Note a call of a module without others in it."""
        self._kept.append((inputs, output))
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            shapes = tuple(inputs[0].shape), tuple(output.shape)
            self.visits.append(Visit(leaf, id(inputs[0]), id(output), *shapes))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def observe(model: nn.Module, objective: Objective, micro: MicroBatch) -> Observed:
    """Run a forward pass and note what happens in it."""
    names = {id(value): name for name, value in model.named_parameters(remove_duplicate=False)}
    shared: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(value), []).append(name)
    homes = {
        full_name(name, "out_proj"): name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    watcher = _Watcher(names, homes)
    handles = []
    order: list[str] = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            handles += _around(watcher, name, module)
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        handles += [
            module.register_forward_pre_hook(_entering(watcher, order, name, shared, module)),
            module.register_forward_hook(_leaving(watcher)),
        ]
    try:
        with torch.random.fork_rng(), torch.no_grad(), objective.precision(), watcher:
            returned = objective.forward(model, micro)
            watcher.look(_tensors(returned))
    finally:
        for handle in handles:
            handle.remove()
    pairs, draws = _pairs(watcher.calls, model)
    return Observed(
        order, frozenset(watcher.loose), pairs, frozenset(draws), watcher.shapes, watcher.calls,
        watcher.visits, frozenset(watcher.looked_at),
    )  # fmt: skip


def _around(watcher: _Watcher, name: str, module: nn.Module) -> list[Any]:
    """Hooks that note the calls of a module without others in it."""

    def enter(*_: Any) -> None:
        watcher.leaf = name

    def leave(_: nn.Module, inputs: Any, output: Any) -> None:
        watcher.leaf = None
        with torch._C.DisableTorchFunction():
            watcher.visit(name, inputs, output)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _entering(
    watcher: _Watcher, order: list[str], name: str, shared: Any, module: nn.Module
) -> Any:
    def enter(*_: Any) -> None:
        order.append(name)
        watcher.stack.append(name)
        # A tied parameter is at home in every layer that has it.
        for value in module.parameters(recurse=False):
            own = [each for each in shared[id(value)] if each.rpartition(".")[0] == name]
            watcher.names[id(value)] = own[0]  # type: ignore[index]

    return enter


def _leaving(watcher: _Watcher) -> Any:
    def leave(*_: Any) -> None:
        watcher.stack.pop()

    return leave


def _pairs(calls: list[Call], model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """Fully connected layers that follow each other with elementwise functions in between."""
    uses: dict[int, list[Call]] = {}
    for call in calls:
        for value in set(call.inputs):
            if call.output != value:  # in place: the tensor goes on
                uses.setdefault(value, []).append(call)
    pairs: dict[str, str] = {}
    drawing: set[str] = set()
    for call in calls:
        if call.layer is None or call.function is not F.linear:
            continue
        value, draws = call.output, False
        for used in _chain(value, uses, calls):
            draws |= used.draws
            if used.function is F.linear and used.layer is not None:
                if isinstance(model.get_submodule(used.layer), nn.Linear):
                    pairs[call.layer] = used.layer
                    if draws:
                        drawing.add(call.layer)
                break
    return pairs, drawing


def _chain(value: int, uses: Mapping[int, list[Call]], calls: list[Call]) -> Iterator[Call]:
    """The calls that a tensor goes through, as long as there is one way only."""
    for call in calls:
        if call.output == value and value in call.inputs and call.function in _DROPOUTS:
            yield call  # in place
    while True:
        followers = uses.get(value, [])
        if len(followers) != 1:
            return
        (call,) = followers
        yield call
        if call.function not in ELEMENTWISE or len(set(call.inputs)) != 1:
            return
        value = call.output


_DROPOUTS = {F.dropout, F.alpha_dropout}

ELEMENTWISE = _DROPOUTS | {
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.gelu, F.silu, F.mish,
    F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.relu6, F.logsigmoid, torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.tanh,
    Tensor.tanh, F.tanh, torch.exp, torch.abs, torch.square, Tensor.square, F.tanhshrink,
    F.hardshrink, F.softshrink, F.threshold,
}  # fmt: skip
