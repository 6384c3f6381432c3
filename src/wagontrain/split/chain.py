"""The layers at the beginning of a model that can work on strips of an image.

They begin with a convolution and go on as long as each result has one way only: elementwise
functions, then the next layer. Where it branches, where its shape is asked for, or where a layer
comes that needs the whole image, the strips are put together and all goes on as without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from wagontrain.errors import UsageError
from wagontrain.nn import LocallyConnected2d, pair
from wagontrain.split.divide import not_split_because
from wagontrain.split.halo import Window
from wagontrain.split.observe import ELEMENTWISE, Call, Observed, Visit

CONVOLUTIONS = (nn.Conv2d, LocallyConnected2d)
KNOWN = (*CONVOLUTIONS, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Chain:
    """Layers that work on strips.

    Args:
        layers: their names in the order of their calls; one without weights may come again.
        draws: whether random numbers are drawn between them.
    """

    layers: tuple[str, ...] = ()
    draws: bool = False


def find(model: nn.Module, observed: Observed, ranks: int, whole: Collection[str] = ()) -> Chain:
    """The longest chain of layers that can work on strips.

    Args:
        model: the whole one.
        observed: what a forward pass showed.
        ranks: how many strips there are.
        whole: names of layers that shall not.

    Raises:
        UsageError: not even the first layer can; says why.
    """
    called = (each for each in observed.visits if each.leaf in observed.layers)
    visit = next(called, None)
    name = visit.leaf if visit else ""
    first = model.get_submodule(name)
    if visit is None or type(first) not in CONVOLUTIONS:
        raise UsageError(
            f"strips begin with a convolution, but the first layer that the model calls is "
            f"{name!r} ({type(first).__name__}): leave strips off"
        )
    why = _unfit(model, visit, observed, ranks, whole)
    if why:
        raise UsageError(f"layer {name!r} cannot work on strips: {why}")
    layers, drawing = [name], False
    following: tuple[Visit, bool] | None
    while following := _after(visit, model, observed):
        visit, draws = following
        if _unfit(model, visit, observed, ranks, whole):
            break
        layers.append(visit.leaf)
        drawing |= draws
        if isinstance(model.get_submodule(visit.leaf), nn.AdaptiveAvgPool2d):
            break
    return Chain(tuple(layers), drawing)


def _after(visit: Visit, model: nn.Module, observed: Observed) -> tuple[Visit, bool] | None:
    """The next layer's call, and whether random numbers are drawn before it."""
    value, drawing = visit.output, False
    while True:
        users: dict[Any, Visit | Call] = {}
        for call in observed.calls:
            if value not in call.inputs or call.leaf == visit.leaf:
                continue
            if call.output == value and call.function not in ELEMENTWISE:
                return None  # written to, by something that may look at places
            if _knows(model, call.leaf):
                for each in observed.visits:
                    if each.leaf == call.leaf and each.input == value:
                        users[each] = each
            elif call.output != value:
                users[id(call)] = call
            else:
                drawing |= call.draws
        for number, leaf in observed.looked_at:
            if number == value and not _knows(model, leaf):
                return None
        if len(users) != 1:
            return None
        (user,) = users.values()
        if isinstance(user, Visit):
            return user, drawing
        if user.function not in ELEMENTWISE or len(set(user.inputs)) != 1:
            return None
        value, drawing = user.output, drawing | user.draws


def _knows(model: nn.Module, leaf: str | None) -> bool:
    return leaf is not None and type(model.get_submodule(leaf)) in KNOWN


def _unfit(
    model: nn.Module, visit: Visit, observed: Observed, ranks: int, whole: Collection[str]
) -> str:
    """Why a layer cannot work on strips; empty where it can."""
    return next(_hindrances(model, visit, observed, ranks, whole), "")


def _hindrances(
    model: nn.Module, visit: Visit, observed: Observed, ranks: int, whole: Collection[str]
) -> Iterator[str]:
    name, layer = visit.leaf, model.get_submodule(visit.leaf)
    shared = [id(value) for _, value in model.named_parameters(remove_duplicate=False)]
    if name in whole:
        yield "placement has it; leave it out there"
    if len(visit.shape) != 4:
        yield f"its input is of shape {list(visit.shape)}, not [n, channels, height, width]"
    if any(shared.count(id(value)) > 1 for value in layer.parameters()):
        yield "its weights are another layer's as well; leave strips off"
    stateful = isinstance(layer, (*CONVOLUTIONS, nn.BatchNorm2d))
    if stateful and sum(each.leaf == name for each in observed.visits) > 1:
        yield "it is called several times; leave strips off"
    if observed.layers.count(name) and (why := not_split_because(name, model, observed)):
        yield f"{why}; leave strips off"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        yield "it has forward hooks, or another forward; leave strips off"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        yield f"it pads by {layer.padding_mode!r}, which looks at the far border; pad by 'zeros'"
    if getattr(layer, "ceil_mode", False) or getattr(layer, "return_indices", False):
        yield "it has ceil_mode or return_indices; leave strips off"
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        if layer.output_size not in (1, (1, 1)):
            yield "only an average over the whole image can be taken from strips"
        return
    rows = window_of(layer).rows(visit.shape[2])
    if min(rows, visit.shape[2]) < ranks:
        yield (
            f"it makes {rows} rows of {visit.shape[2]}, fewer than one for each of {ranks} "
            "workers; give a lower degree"
        )


def window_of(layer: Any) -> Window:
    """How the rows of a layer's result come from those of its input."""
    if not isinstance(layer, (*CONVOLUTIONS, nn.MaxPool2d, nn.AvgPool2d)):
        return Window()
    dilation = pair(getattr(layer, "dilation", 1))[0]
    size = (pair(layer.kernel_size)[0] - 1) * dilation + 1
    return Window(size, pair(layer.stride)[0], *sides(layer, 0))


def sides(layer: Any, dim: int) -> tuple[int, int]:
    """Padding before and behind along a dim, 0 for height and 1 for width."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = (pair(layer.kernel_size)[dim] - 1) * pair(layer.dilation)[dim]
        return total // 2, total - total // 2
    around = pair(layer.padding)[dim]
    return around, around
