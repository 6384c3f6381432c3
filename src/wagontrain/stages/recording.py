"""What a forward pass calls, one after the other, so that any stretch of it can be run by itself.

The model's own code runs once, on tensors that have shapes but no memory (torch's fake tensors),
while every call of a layer or of a torch function is noted, with where its arguments came from.
Python in between is not traced: shapes are numbers, branches are taken, and a recording holds for
inputs of its shapes only. Recording costs milliseconds, so every shape gets its own.

Layers are called as they are, whatever is in them. Containers, and layers that hold a large part
of the model's weights, are looked into.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from wagontrain.errors import UsageError
from wagontrain.task import call_model, origin


@dataclass(frozen=True)
class Value:
    """Stands for a tensor: by number those of `Recording.values`, the inputs first."""

    number: int


@dataclass(frozen=True)
class Held:
    """Stands for a parameter or buffer of the model, by its name."""

    name: str


@dataclass(frozen=True)
class Call:
    """One call of a layer or a function.

    Args:
        target: path of the layer, or the function.
        leaves: arguments, flattened, with `Value` and `Held` for tensors.
        structure: how arguments are put together again as (args, kwargs).
        results: numbers of the tensors in what it gives.
        changed: arguments that it changes in place.
        differentiated: whether gradients flow through it.
    """

    target: str | Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: Any
    results: tuple[int, ...]
    changed: tuple[Value | Held, ...] = ()
    differentiated: bool = True

    @property
    def takes(self) -> Iterator[int]:
        """Numbers of the tensors that it is given."""
        return (leaf.number for leaf in self.leaves if isinstance(leaf, Value))

    def run(self, model: nn.Module, values: dict[int, Tensor]) -> None:
        """Call it for real, and add its results to `values`."""
        leaves = [_fetch(model, values, leaf) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        target = model.get_submodule(self.target) if isinstance(self.target, str) else self.target
        with torch.set_grad_enabled(self.differentiated and torch.is_grad_enabled()):
            output = target(*args, **kwargs)
        values.update(zip(self.results, _tensors(output), strict=True))


def _fetch(model: nn.Module, values: Mapping[int, Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Value):
        return values[leaf.number]
    if isinstance(leaf, Held):
        path, _, key = leaf.name.rpartition(".")
        return getattr(model.get_submodule(path), key)
    return leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class Recording:
    """A forward pass.

    Args:
        inputs: how many of the values are the model's inputs.
        calls: in the order in which they were made.
        values: an example of each tensor: shape, dtype, and whether it needs a gradient.
        output: what the model gives, with `Value` for tensors.
        together: pairs (first, last) of calls that no cut may separate, because one changes in
            place what the other has another view of.
    """

    inputs: int = 0
    calls: list[Call] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    output: Any = None
    together: list[tuple[int, int]] = field(default_factory=list)

    @property
    def path(self) -> list[Any]:
        """What was called, to compare recordings by."""
        return [(call.target, call.results, tuple(call.takes)) for call in self.calls]

    @property
    def has_figures(self) -> bool:
        """Whether the output holds single numbers: a loss that the model computed, say."""
        leaves = pytree.tree_leaves(self.output)
        return any(
            isinstance(leaf, Value) and not self.values[leaf.number].dim() for leaf in leaves
        )

    def result(self, model: nn.Module, values: Mapping[int, Tensor]) -> Any:
        """The model's output, out of the tensors that were computed."""
        return pytree.tree_map(lambda leaf: _fetch(model, values, leaf), self.output)


class Blueprint:
    """A model without memory, to record forward passes of.

    Args:
        model: the real one, with or without memory; it is not changed.
        device: where it is going to run.
        share: layers with more than this part of all parameters are looked into.
    """

    def __init__(self, model: nn.Module, device: torch.device, share: float = 1.0) -> None:
        self.mode = FakeTensorMode()
        self.device = device
        copies: dict[int, Any] = {}
        with self.mode:
            for value in (*model.parameters(), *model.buffers()):
                fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                parameter = isinstance(value, nn.Parameter)
                copies[id(value)] = nn.Parameter(fake, value.requires_grad) if parameter else fake
        self.model = copy.deepcopy(model, copies)
        for module in self.model.modules():
            if isinstance(module, _NormBase) and module.momentum is None:
                module.momentum = 0.1  # None means a mean over all steps, and reads their number
        self.layers = dict(_layers(self.model, share))

    def record(self, inputs: Any, training: bool) -> Recording:
        """A forward pass on inputs of these shapes.

        Raises:
            UsageError: it does something that cannot be recorded.
        """
        leaves, structure = pytree.tree_flatten(inputs)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise UsageError(
                "the model cannot be cut into stages: its input holds something else than "
                "tensors; give tensors, or use the strategy sharded"
            )
        self.model.train(training)
        recorder = _Recorder(self.model, self.layers, self.device)
        try:
            with self.mode:
                fakes = [
                    torch.empty(leaf.shape, dtype=leaf.dtype, device=self.device) for leaf in leaves
                ]
                recorder.add(fakes)
                recorder.recording.inputs = len(fakes)
                with recorder.watching():
                    output = call_model(self.model, pytree.tree_unflatten(fakes, structure))
                recorder.recording.output = recorder.named(output)
        except UsageError:
            raise
        except Exception as error:  # whatever the user's model raises is theirs to read
            raise UsageError(
                "the model cannot be cut into stages: its forward does not run on shapes alone, "
                "as it must where branches hang on values of tensors, or tensors are neither "
                f"parameters nor buffers ({origin(error)}); change that, or use the strategy "
                "sharded"
            ) from error
        return recorder.recording


def _layers(model: nn.Module, share: float) -> Iterator[tuple[nn.Module, str]]:
    """Layers to be called as they are, with their paths."""
    whole = sum(value.numel() for value in model.parameters())
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
        if module in seen:
            return
        seen.add(module)
        own = sum(value.numel() for value in module.parameters())
        container = isinstance(module, nn.ModuleList | nn.ModuleDict) or (
            type(module).forward is nn.Sequential.forward
        )
        if any(True for _ in module.children()) and (container or not path or own > share * whole):
            for key, child in module.named_children():
                yield from visit(child, f"{path}.{key}".lstrip("."))
        elif path:
            yield module, path

    return visit(model, "")


class _Recorder(TorchFunctionMode):
    def __init__(
        self, model: nn.Module, layers: Mapping[nn.Module, str], device: torch.device
    ) -> None:
        super().__init__()
        self.recording = Recording()
        self._layers = layers
        self._names = {
            id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())
        }
        self._numbers: dict[int, int] = {}
        self._made: dict[int, list[tuple[int, Tensor]]] = {}
        self._bare: set[int] = set()  # computed without gradients
        self._inside = False
        self._device = device.type
        self._autocast = torch.is_autocast_enabled(self._device)

    def watching(self) -> Any:
        """Within, calls are noted."""
        plainly = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self._layers.get(module)
            if path is None or self._inside:
                return plainly(module, *args, **kwargs)
            return self._note(path, lambda *a, **k: plainly(module, *a, **k), args, kwargs)

        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(nn.Module, "__call__", call))
        stack.enter_context(self)
        return stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        return self._note(func, func, args, kwargs or {})

    def _note(self, target: Any, run: Any, args: Any, kwargs: Any) -> Any:
        given = _tensors((args, kwargs))
        before = [value._version for value in given]
        self._inside = True
        try:
            output = run(*args, **kwargs)
        finally:
            self._inside = False
        results = _tensors(output)
        changed = [value for value, old in zip(given, before, strict=True) if value._version != old]
        if not results and not changed:
            return output
        if isinstance(target, str):
            _require_plain(output, target)
        if torch.is_autocast_enabled(self._device) != self._autocast:
            raise UsageError(
                "the model cannot be cut into stages: its forward switches autocast; let "
                "Task.precision do that, or use the strategy sharded"
            )
        leaves, structure = pytree.tree_flatten(self.named((args, kwargs)))
        names = tuple(self._name(value) for value in changed)
        position = len(self.recording.calls)
        for value in changed:
            self._note_change(value, position)
        numbers = self.add(results)
        differentiated = torch.is_grad_enabled()
        if not differentiated:
            self._bare.update(
                n for n, value in zip(numbers, results, strict=True) if not value.requires_grad
            )
        self.recording.calls.append(
            Call(target, tuple(leaves), structure, numbers, names, differentiated)
        )
        return output

    def add(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Give numbers to tensors that come up."""
        numbers = []
        for value in tensors:
            number = len(self.recording.values)
            self.recording.values.append(value)  # kept, so that no id is given twice
            self._numbers[id(value)] = number
            self._made.setdefault(_memory(value), []).append((len(self.recording.calls), value))
            numbers.append(number)
        return tuple(numbers)

    def named(self, tree: Any) -> Any:
        """The same nest, with what they stand for in place of tensors."""
        _require_plain(tree, "the model")
        return pytree.tree_map(self._name, tree)

    def _name(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        number = self._numbers.get(id(leaf))
        if number in self._bare and leaf.requires_grad:
            raise UsageError(
                "the model cannot be cut into stages: what it computes without gradients gets one "
                "afterwards, by a custom autograd function (torch.utils.checkpoint with "
                "use_reentrant=True, say); say use_reentrant=False, or use the strategy sharded"
            )
        if number is not None:
            return Value(number)
        if id(leaf) in self._names:
            return Held(self._names[id(leaf)])
        raise UsageError(
            f"the model cannot be cut into stages: where a tensor of shape {list(leaf.shape)} in "
            "its forward comes from cannot be seen (a custom autograd function outside of a "
            "layer, say); put that into an nn.Module of its own, or use the strategy sharded"
        )

    def _note_change(self, changed: Tensor, position: int) -> None:
        """Keep together what has other views of a tensor that is changed in place."""
        others = [
            made
            for made, value in self._made.get(_memory(changed), [])
            if value is not changed and made < position
        ]
        if others:
            self.recording.together.append((min(others), position))


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _require_plain(tree: Any, what: str) -> None:
    """Refuse objects with tensors in them that are no tuples, lists or dicts.

    Raises:
        UsageError: there is one.
    """
    for leaf in pytree.tree_leaves(tree):
        if (
            isinstance(leaf, PackedSequence)
            or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type))
            or _has_tensors(leaf)
        ):
            kind = type(leaf).__name__
            instead = (
                "turn the cache for generation off (config.use_cache = False)"
                if "Cache" in kind
                else "use tensors, tuples and dicts"
            )
            raise UsageError(
                f"the model cannot be cut into stages: {what!r} deals in objects of the class "
                f"{kind}, which cannot be sent; {instead}, or use the strategy sharded"
            )


def _has_tensors(leaf: Any, depth: int = 4) -> bool:
    """Whether an object keeps tensors in its attributes: what one stage puts there, no other sees.

    A cache of keys and values is such.
    """
    inside: Any = ()
    if isinstance(leaf, list | tuple):
        inside = leaf
    elif isinstance(leaf, dict):
        inside = leaf.values()
    elif not isinstance(leaf, Tensor | nn.Module | type) and not callable(leaf):
        inside = vars(leaf).values() if hasattr(leaf, "__dict__") else ()
    return any(
        isinstance(each, Tensor) or (depth > 0 and _has_tensors(each, depth - 1)) for each in inside
    )
