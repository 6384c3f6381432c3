"""Replacing layers of a model by split ones, and knowing afterwards who holds what."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wagontrain.axes import Axes
from wagontrain.errors import UsageError, nearest
from wagontrain.layout import Layout, full_name
from wagontrain.mesh import even_shares, ranges
from wagontrain.profile import Cut as Cut
from wagontrain.split import attention
from wagontrain.split.border import Border, Replicated
from wagontrain.split.convolution import Channels
from wagontrain.split.embedding import FetchedLookup, SharedLookup
from wagontrain.split.families import families
from wagontrain.split.linear import Columns, Region, Rows
from wagontrain.split.logits import SplitScores
from wagontrain.split.observe import Observed

Placement = Mapping[str, Cut]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def splittable(layer: nn.Module, shards: bool = False) -> tuple[Cut, ...]:
    """The ways in which a layer can be split; `shards` where every rank has its own samples."""
    if attention.divisible(layer):
        return () if shards else ("heads",)
    if type(layer) is nn.Linear:
        return ("column", "row")
    if type(layer) is nn.Embedding:
        return ("row",) if layer.max_norm is None and not layer.scale_grad_by_freq else ()
    if type(layer) in CONVOLUTIONS:
        return ("column",) if layer.groups == 1 else ()
    return ()


def check_placement(
    model: nn.Module, placement: Placement, observed: Observed, size: int, shards: bool = False
) -> None:
    """Refuse a placement that cannot be.

    Args:
        model: the whole one.
        placement: what was asked for.
        observed: what a forward pass showed.
        size: ranks that weights are divided over.
        shards: whether every rank has its own samples.

    Raises:
        UsageError: it names no layer, or one that cannot be split so.
    """
    layers = {name: layer for name, layer in model.named_modules() if splittable(layer, shards)}
    for name, cut in placement.items():
        if name not in dict(model.named_modules()):
            raise UsageError(
                f"placement names no layer of the model: {name!r}; " + nearest(name, layers)
            )
        if cut == "whole":
            continue
        layer = model.get_submodule(name)
        if cut not in (possible := splittable(layer, shards)):
            ways = ", ".join(possible) or "only left whole"
            raise UsageError(
                f"layer {name!r} ({type(layer).__name__}) cannot be split by {cut}: it can be "
                f"{ways}"
            )
        why = not_split_because(name, model, observed)
        if why:
            raise UsageError(f"layer {name!r} cannot be split: {why}; leave it whole")
    kept = consistent(model, placement, size)
    for name, cut in placement.items():
        if cut != "whole" and name not in kept:
            raise UsageError(
                f"layer {name!r} shares its weights with {_sharer(model, name)!r}, which would not "
                "be divided in the same way: name both (an Embedding by row goes with a Linear by "
                "column), or leave both whole"
            )


def _sharer(model: nn.Module, name: str) -> str:
    """Another layer that has one of a layer's weights."""
    own = {id(value) for _, value in own_parameters(model.get_submodule(name))}
    others: Iterator[str] = (
        other
        for other, layer in model.named_modules(remove_duplicate=False)
        if other != name
        and any(id(value) in own for value in layer.parameters(recurse=False))
        and not other.startswith(full_name(name, ""))
    )
    return next(others)


def not_split_because(name: str, model: nn.Module, observed: Observed) -> str:
    """Why a layer cannot be split in this model; empty where it can."""
    layer = model.get_submodule(name)
    if any(full_name(name, key) in observed.loose for key, _ in own_parameters(layer)):
        return "its weights are used by other code than its own forward"
    if name not in observed.layers:
        return "the model does not call it"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    if "forward" in vars(layer) or hasattr(layer, "parametrizations"):
        return "its forward or its weight has been replaced"
    return ""


@dataclass(frozen=True)
class Divided:
    """A model with split layers.

    Args:
        layouts: which part of everything in its `state_dict` this rank holds.
        parts: names of parameters that are divided.
        undo: puts the plain forwards back.
    """

    layouts: dict[str, Layout]
    parts: set[str]
    undo: contextlib.ExitStack


def divide(
    model: nn.Module,
    placement: Placement,
    observed: Observed,
    border: Border,
    axes: Axes,
    device: torch.device,
    last: str | None = None,
) -> Divided:
    """Split layers in place. Those of a pair that fit are fused.

    Args:
        model: the whole one, with weights or on the meta device.
        placement: layer -> how it is split.
        observed: what a forward pass showed.
        border: how samples come and go.
        axes: the mesh; weights are divided along its model axis.
        device: where the parts are put.
        last: the layer whose result the loss takes, if it may stay divided.
    """
    axis, size = axes.model, axes.model.size
    cuts = consistent(model, placement, size)
    state = {**dict(model.named_parameters(remove_duplicate=False)),
             **dict(model.named_buffers(remove_duplicate=False))}  # fmt: skip
    persistent = set(model.state_dict())
    first_of_all = axes.model.index == 0 and axes.data.index == 0
    layouts = {
        name: Layout.whole(value, owner=first_of_all)
        for name, value in state.items()
        if name in persistent
    }
    parts: set[str] = set()
    undo = contextlib.ExitStack()
    remade: dict[int, nn.Parameter] = {}
    regions = _regions(cuts, observed, axis.index)
    inner: set[str] = set()  # layers that come into a region that has begun
    if isinstance(border, Replicated):
        for family in families(model, observed, size):
            if family.is_placed(cuts):
                region = Region(axis.index, family.draws, shaped=True)
                regions |= dict.fromkeys([*family.columns, family.row], region)
                inner.update(family.columns[1:])
    for name, cut in cuts.items():
        layer = model.get_submodule(name)
        for key, (dim, mine) in _parts(layer, cut, size, axis.index).items():
            full = full_name(name, key)
            home, _, last_name = full.rpartition(".")
            parameters = model.get_submodule(home)._parameters
            parameter = parameters[last_name]
            assert parameter is not None
            if id(parameter) in remade:  # tied to one that was divided in the same way
                parameters[last_name] = remade[id(parameter)]
                layouts[full] = next(
                    layout for other, layout in layouts.items()
                    if state.get(other) is parameter and layout.dim is not None
                )  # fmt: skip
            else:
                shape, owner = tuple(parameter.shape), axes.data.index == 0
                layouts[full] = Layout(shape, dim, mine, owner=owner)
                part = remade[id(parameter)] = part_of(parameter, layouts[full], device)
                parameters[last_name] = part
            parts.add(full)
        forward = _forward(layer, name, cut, border, axis, regions, name == last, state)
        if name in inner:
            forward.first = False
        # An attribute of the instance goes before the method of its class.
        vars(layer)["forward"] = forward
        undo.callback(vars(layer).pop, "forward", None)
    attention.without_fast_path(model, [model.get_submodule(name) for name in cuts], undo)
    return Divided(layouts, parts, undo)


def part_of(parameter: nn.Parameter, layout: Layout, device: torch.device) -> nn.Parameter:
    """A rank's part of a parameter, with memory; its numbers too, where the whole one has them."""
    if parameter.is_meta:
        content = torch.empty(layout.local_shape, dtype=parameter.dtype, device=device)
    else:
        content = layout.take(parameter.detach()).to(device)
    return nn.Parameter(content, requires_grad=parameter.requires_grad)


def _parts(layer: Any, cut: Cut, size: int, index: int) -> dict[str, tuple[int, tuple[range, ...]]]:
    """Of each tensor that a cut divides the dim, and the indices along it that a rank holds."""
    if cut == "heads":
        return attention.parts(layer, size, index)
    dims = {"weight": 0, "bias": 0}
    if isinstance(layer, nn.Embedding):
        dims = {"weight": 0}
    elif cut == "row":
        dims = {"weight": 1}
    return {
        key: (dim, (ranges(even_shares(value.shape[dim], size))[index],))
        for key, dim in dims.items()
        if (value := layer._parameters[key]) is not None
    }


def consistent(model: nn.Module, placement: Placement, size: int) -> dict[str, Cut]:
    """The layers to split; tied weights are divided in one way, or left whole."""
    cuts: dict[str, Cut] = {name: cut for name, cut in placement.items() if cut != "whole"}
    users: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(value), []).append(name)
    while True:
        divided: dict[str, tuple[str, Any]] = {}
        for layer, cut in cuts.items():
            ranks = [_parts(model.get_submodule(layer), cut, size, rank) for rank in range(size)]
            for key in ranks[0]:
                divided[full_name(layer, key)] = layer, tuple(rank[key] for rank in ranks)
        clashing = set()
        for names in users.values():
            found = [divided[name] for name in names if name in divided]
            if len({how for _, how in found}) > 1 or 0 < len(found) < len(names):
                clashing |= {layer for layer, _ in found}
        if not clashing:
            return cuts
        for layer in clashing:
            del cuts[layer]


def _regions(cuts: Mapping[str, Cut], observed: Observed, index: int) -> dict[str, Region]:
    """One region for each pair that can be fused, under the names of both layers."""
    regions: dict[str, Region] = {}
    for before, after in observed.pairs.items():
        fit = cuts.get(before) == "column" and cuts.get(after) == "row"
        if fit and observed.once(before) and observed.once(after):
            regions[before] = regions[after] = Region(index, before in observed.draws)
    return regions


def _forward(
    layer: nn.Module,
    name: str,
    cut: Cut,
    border: Border,
    axis: Any,
    regions: Mapping[str, Region],
    last: bool,
    state: Mapping[str, Tensor],
) -> Any:
    if isinstance(layer, nn.MultiheadAttention):
        return attention.Heads(layer, border)
    shape = state[full_name(name, "weight")].shape
    if isinstance(layer, nn.Embedding):
        rows = ranges(even_shares(shape[0], axis.size))
        if isinstance(border, Replicated):
            return SharedLookup(layer, border, rows, layer.padding_idx)
        return FetchedLookup(layer, axis, rows, layer.padding_idx)
    if isinstance(layer, nn.Linear):
        widths = even_shares(shape[0 if cut == "column" else 1], axis.size)
        region = regions.get(name)
        if cut == "row":
            return Rows(layer, border, widths, region)
        if last and region is None and isinstance(border, Replicated):
            return _Scores(layer, border, widths)
        return Columns(layer, border, widths, region)
    return Channels(layer, border, even_shares(shape[0], axis.size))


class _Scores(Columns):
    """Columns whose result stays divided, and looks whole."""

    def __call__(self, x: Tensor) -> Tensor:
        border, y = self.product(x)
        return SplitScores.of(y.view(*x.shape[:-1], y.shape[1]), border, list(self.widths), -1)


def own_parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A layer's parameters; attention uses those of its output layer as its own."""
    return layer.named_parameters(recurse=type(layer) is nn.MultiheadAttention)


def parameters_of(layer: nn.Module) -> int:
    """Numbers in a layer's own parameters."""
    return sum(math.prod(value.shape) for _, value in own_parameters(layer))


def ways(model: nn.Module, observed: Observed, least: int, shards: bool = False) -> Sequence[str]:
    """Names of layers that can be split and hold at least so many numbers, in order of calls."""
    return [
        name
        for name in dict.fromkeys(observed.layers)
        if splittable(model.get_submodule(name), shards)
        and parameters_of(model.get_submodule(name)) >= least
        and not not_split_because(name, model, observed)
    ]
