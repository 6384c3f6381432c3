"""Which embedding layers have their tables on the shards, and models built without those.

A model is built as ever, but the memory of such a table is withheld: its weight is on torch's
meta device, where it has a shape and no numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from wagontrain.building import bytes_to_train, skeleton, taken_bytes, usable_bytes
from wagontrain.errors import UsageError, nearest
from wagontrain.layout import full_name
from wagontrain.servers import rules
from wagontrain.servers.tables import Table
from wagontrain.task import Task

Layer = nn.Embedding | nn.EmbeddingBag

_LARGE = 4
"""Rows for each sample of a batch from which "auto" takes a table to be large."""

_COPIES = 2
"""A table is held by the coordinator and by the shards, which may be on one host."""


@dataclass(frozen=True)
class Placed:
    """A model some of whose layers have their tables on the shards.

    Args:
        model: the others' memory is there.
        layers: those layers, by name.
        whole: whether their tables have memory here all the same.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    whole: bool

    def tables(self, optimizer: Optimizer | None = None) -> tuple[Table, ...]:
        """What shards have to know of them.

        Args:
            optimizer: of the model, where groups of parameters matter.

        Raises:
            UsageError: it leaves a table out.
        """
        return tuple(_table(name, layer, optimizer) for name, layer in self.layers.items())


def build(task: Task, tables: str, whole: bool) -> Placed:
    """Build a task's model.

    Args:
        task: whose model.
        tables: "" for none, "auto", or names of layers with commas between them.
        whole: whether the tables are to have memory here. They have it in any case where the
            model cannot be built without memory first, for it looks at its own weights.

    Raises:
        UsageError: a layer's table cannot be on the shards.
    """
    plain = skeleton(task) if tables else None
    if plain is None or whole:
        model = task.build_model()
        return Placed(model, chosen(model, tables, task.batch_size), True)
    shapes = {
        tuple(layer.weight.shape) for layer in chosen(plain, tables, task.batch_size).values()
    }
    with _Withheld(shapes):
        model = task.build_model()
    layers = chosen(model, tables, task.batch_size)
    _materialise(model, {layer.weight for layer in layers.values()})
    return Placed(model, layers, False)


def fit_here(task: Task) -> bool:
    """Whether the whole model, tables and all, has room on a host that has shards as well."""
    plain, usable = skeleton(task), usable_bytes(torch.device("cpu"))
    if plain is None or usable is None:
        return True
    return _COPIES * bytes_to_train(plain, task) <= usable - taken_bytes()


def chosen(model: nn.Module, tables: str, batch_size: int) -> dict[str, Layer]:
    """The layers of a model whose tables are to be on the shards, by name.

    "auto" takes those with `sparse=True` and those with many rows for each sample of a batch.

    Raises:
        UsageError: there is none, or no layer of a name, or its table cannot be there.
    """
    if not tables:
        return {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}
    if tables != "auto":
        names = [name.strip() for name in tables.split(",")]
        for name in names:
            if name not in layers or not name:
                raise UsageError(
                    f"tables: {name!r} is no nn.Embedding or nn.EmbeddingBag within the model; "
                    f"{nearest(name, sorted(layers)) if layers else 'it has none'}"
                )
            if problem := _problem(model, name, layers[name]):
                raise UsageError(f"the table of {name!r} cannot be on the servers: {problem}")
        return {name: layers[name] for name in names}
    found = {
        name: layer
        for name, layer in layers.items()
        if (layer.sparse or layer.num_embeddings >= _LARGE * batch_size)
        and not _problem(model, name, layer)
    }
    if not found:
        raise UsageError(
            f"tables=auto: no embedding with sparse=True or at least {_LARGE * batch_size} rows "
            f"({_LARGE} for each sample of a batch) can have its table on the servers: name "
            "layers, or leave tables out"
        )
    return found


def _problem(model: nn.Module, name: str, layer: Layer) -> str:
    """Why a layer's table cannot be on the shards; "" if it can."""
    if not name:
        return "it is the whole model"
    if type(layer).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return f"{type(layer).__name__} has a forward of its own"
    if layer.max_norm is not None:
        return "max_norm changes rows while they are looked up; clip the gradient instead"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq counts ids in the whole batch, which no worker sees"
    if isinstance(layer, nn.EmbeddingBag) and layer.mode == "max":
        return "it takes the maximum over a bag; 'sum' and 'mean' can"
    if not layer.weight.requires_grad:
        return "it is frozen, and so never changes"
    same = [
        other
        for other, value in model.named_parameters(remove_duplicate=False)
        if value is layer.weight
    ]
    if len(same) > 1:
        return f"its weight is tied, as {' and '.join(map(repr, same))}"
    return ""


def _table(name: str, layer: Layer, optimizer: Optimizer | None) -> Table:
    group = 0
    if optimizer is not None:
        numbers = [
            number
            for number, each in enumerate(optimizer.param_groups)
            if any(value is layer.weight for value in each["params"])
        ]
        if not numbers:
            raise UsageError(
                f"the table of {name!r} cannot be on the servers: the optimizer leaves it out"
            )
        group = numbers[0]
    padding = -1 if layer.padding_idx is None else int(layer.padding_idx)
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    rows, dim = layer.weight.shape
    return Table(full_name(name, "weight"), rows, dim, dtype, group, padding=padding)


def require_rules(rule: str, optimizer: Optimizer, tables: Collection[Table]) -> None:
    """Refuse an update rule that cannot be applied to single rows.

    Raises:
        UsageError: which, and what can.
    """
    for table in tables:
        group = optimizer.param_groups[table.group]
        rules.rule_of_tables(rule, type(optimizer).__name__, group)


def require_exact(optimizer: Optimizer, tables: Collection[Table]) -> None:
    """Refuse an optimizer that would change rows which a step does not touch, in exact steps.

    Raises:
        UsageError: which it is, and what works instead.
    """
    kind = type(optimizer).__name__
    for table in tables:
        group = optimizer.param_groups[table.group]
        moving = [key for key in ("momentum", "weight_decay", "lr_decay") if group.get(key)]
        if kind in ("SGD", "Adagrad") and not moving:
            continue
        what = f"{kind} with {moving[0]}={group[moving[0]]}" if moving else kind
        raise UsageError(
            f"{what} changes rows of {table.name!r} that a step does not touch, which rows on the "
            "servers do not do: use plain SGD or Adagrad in synchronous steps, or "
            "consistency=asynchronous"
        )


class _Withheld(TorchFunctionMode):
    """Within, what is made in one of these shapes has no memory."""

    def __init__(self, shapes: Collection[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and _size(args, given) in self._shapes:
            given["device"] = "meta"
        return func(*args, **given)


def _size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
    return tuple(kwargs.get("size", size))


def _materialise(model: nn.Module, without: Collection[Tensor]) -> None:
    """Give memory to what only happened to be of a table's shape; servers know its numbers."""
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is None or not value.is_meta or value in without:
                    continue
                if value not in made:
                    made[value] = torch.empty_like(value, device="cpu")
                    if isinstance(value, nn.Parameter):
                        made[value] = nn.Parameter(made[value], value.requires_grad)
                held[key] = made[value]
