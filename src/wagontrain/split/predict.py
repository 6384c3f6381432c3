"""What steps with split layers take: their exchanges at each border, put into a step's graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from wagontrain.costs import Costs, Step
from wagontrain.errors import UsageError
from wagontrain.profile import Cut, Layer, Profile

Cuts = Mapping[str, Cut]
"""Layer -> "column", "row", "heads" or "whole"."""


@dataclass(frozen=True)
class Stretch:
    """Layers one behind the other that are held in the same way.

    Args:
        layers: in the order of the forward pass.
        cut: "whole", "column", "row", "table", "pair": columns, then rows; "family": several by
            columns, then rows; or "scores".
        first: whether the model begins with it: no gradient goes back from it.
    """

    layers: tuple[Layer, ...]
    cut: str
    first: bool = False


def stretches(profile: Profile, cuts: Cuts, border: Border) -> list[Stretch]:
    """The layers of a model, put together as they are exchanged for.

    Args:
        profile: of the model.
        cuts: of its layers.
        border: of those that are split.

    Raises:
        UsageError: a layer is to be split that the model has not.
    """
    known = {layer.name for layer in profile.layers}
    if unknown := cuts.keys() - known:
        raise UsageError(f"the plan splits {min(unknown)!r}, which is no layer of this model")
    found: list[Stretch] = []
    layers = list(profile.layers)
    names = [each.name for each in layers]
    rows = {each[0].name: each[-1].name for each in families(profile, cuts, border)}
    position = 0
    while position < len(layers):
        layer = layers[position]
        cut, first = cuts.get(layer.name, "whole"), position == 0
        if cut == "whole" or not (layer.parts or layer.tied):
            if found and found[-1].cut == "whole":
                found[-1] = Stretch((*found[-1].layers, layer), "whole", found[-1].first)
            else:
                found.append(Stretch((layer,), "whole", first))
            position += 1
            continue
        row, kind = rows.get(layer.name, ""), "family"
        if cut == "column" and layer.after and cuts.get(layer.after) == "row":
            row, kind = layer.after, "pair"
        if row:
            end = names.index(row, position)
            found.append(Stretch(tuple(layers[position : end + 1]), kind, first))
            position = end + 1
            continue
        kind = "table" if layer.kind == "Embedding" and cut == "row" else cut
        if cut == "column" and layer.scores:
            kind = "scores"
        found.append(Stretch((layer,), kind, first))
        position += 1
    return found


def families(profile: Profile, cuts: Cuts | None, border: Border) -> Iterator[tuple[Layer, ...]]:
    """Layers by columns with the one by rows behind them, where nothing travels within.

    Args:
        profile: of the model.
        cuts: which have to be those; where not given, all that may be.
        border: of split layers.
    """
    if border.shards:
        return
    found: dict[str, list[Layer]] = {}
    for layer in profile.layers:
        if layer.family and layer.heads % border.ranks == 0:
            found.setdefault(layer.family, []).append(layer)
    for row, columns in found.items():
        wanted = together([*(each.name for each in columns), row])
        if cuts is None or wanted.items() <= cuts.items():
            yield (*columns, _of(profile, row))


def by_traffic(profile: Profile, ranks: int) -> dict[str, Cut]:
    """Split in the hybrid where that sends fewer bytes than a sum of gradients.

    As the hybrid does it on the model itself.
    """
    batch = profile.batch_size
    by_name = {layer.name: layer for layer in profile.layers}
    placement: dict[str, Cut] = {}
    for layer in profile.layers:
        if not layer.cuts or layer.name in placement:
            continue
        cut, sent = cheapest(layer, batch, ranks)
        after = by_name.get(layer.after)
        if after is not None and after.cuts and layer.kind == after.kind == "Linear":
            both = batch * (layer.given + after.output)
            if both < sent + cheapest(after, batch, ranks)[1]:
                placement |= {layer.name: "column", after.name: "row"}
                continue
        placement[layer.name] = cut
    return placement


def cheapest(layer: Layer, batch: int, ranks: int) -> tuple[Cut, float]:
    """How to hold a layer in the hybrid, and bytes for it, but for a factor that all ways share."""
    found: list[tuple[float, Cut]] = [(float(layer.nbytes), "whole")]
    if layer.kind == "Embedding":
        found.append((batch * layer.output / ranks, "row"))
    else:
        found.append((batch * (layer.given + layer.output / ranks), "column"))
        found.append((batch * (layer.given / ranks + layer.output), "row"))
    sent, cut = min(each for each in found if each[1] == "whole" or each[1] in layer.cuts)
    return cut, sent


@dataclass(frozen=True)
class Border:
    """Bytes that travel at the borders of split layers, as `split.border` moves them.

    Args:
        ranks: that the weights are divided over.
        batch: samples that all of them see together.
        shards: whether each has its own samples, as in the hybrid; else all have all.
    """

    ranks: int
    batch: float
    shards: bool

    def forward(self, stretch: Stretch) -> tuple[list[float], list[float]]:
        """Bytes of the exchanges before a stretch's forward, and after it."""
        given, result = (self.batch * each for each in _ends(stretch))
        own = self.ranks
        if self.shards:
            return {
                "column": ([given], [result / own]),
                "scores": ([given], [result / own]),
                "heads": ([given], [result]),
                "row": ([given / own], [result]),
                "pair": ([given], [result]),
                "table": ([], [result / own]),
            }[stretch.cut]
        return {
            "column": ([], [result]),
            # Of a row the largest, the sum and the target's travel, instead of all.
            "scores": ([], [self.batch * stretch.layers[-1].rows * 3 * 4 * 2]),
            "heads": ([], [result, result]),
            "row": ([], [result, result]),
            "pair": ([], [result, result]),
            "family": ([], [result, result]),
            "table": ([], [result, result]),
        }[stretch.cut]

    def backward(self, stretch: Stretch) -> tuple[list[float], list[float]]:
        """Bytes of the exchanges before a stretch's backward, and after it."""
        before, after = self.forward(stretch)
        if self.shards:
            # The reverse of the forward: a gather becomes a sum of the same size.
            return after, [] if stretch.first else before
        given = self.batch * _ends(stretch)[0]
        if stretch.first or stretch.cut == "table":
            return [], []
        if stretch.cut == "row":  # each rank's features of the gradient are gathered, not summed
            return [given], []
        if stretch.cut == "family":  # from each of them by itself
            return [], [given] * sum(bool(layer.family) for layer in stretch.layers)
        return [], [given]


def _ends(stretch: Stretch) -> tuple[float, float]:
    return stretch.layers[0].given, stretch.layers[-1].output


def pass_through(
    step: Step, found: Sequence[Stretch], border: Border, last: bool, summed: bool
) -> None:
    """One micro-batch forward and backward.

    Args:
        step: to add to.
        found: the model.
        border: of its split layers.
        last: whether it is the last micro-batch, after which gradients travel.
        summed: whether gradients of whole layers are summed over the members of the step.
    """
    inside = border.batch
    part = 1 / border.ranks
    for stretch in found:
        if stretch.cut == "whole":
            step.forward(stretch.layers)
            continue
        before, after = border.forward(stretch)
        for nbytes in before:
            step.exchange(f"to {stretch.layers[0].name}", "exchange", nbytes)
        step.forward(stretch.layers, part, inside)
        for nbytes in after:
            step.exchange(f"from {stretch.layers[-1].name}", "exchange", nbytes)
    for stretch in reversed(found):
        if stretch.cut == "whole":
            if last and summed:
                step.backward_summing(stretch.layers)
            else:
                step.backward(stretch.layers[::-1])
            continue
        before, after = border.backward(stretch)
        for nbytes in before:
            step.exchange(f"to {stretch.layers[-1].name}, backward", "exchange", nbytes)
        step.backward(stretch.layers[::-1], part, inside)
        for nbytes in after:
            kind = "exchange" if border.shards else "all_reduce"
            step.exchange(f"from {stretch.layers[0].name}, backward", kind, nbytes)  # type: ignore[arg-type]


def split_bytes(found: Sequence[Stretch]) -> float:
    """Bytes of the weights of all split layers."""
    return sum(
        layer.nbytes for stretch in found if stretch.cut != "whole" for layer in stretch.layers
    )


def memory(
    costs: Costs, found: Sequence[Stretch], border: Border, samples: float
) -> dict[str, float]:
    """Bytes of a worker: split layers see all samples, and hold a part of their weights."""
    whole = [layer for stretch in found if stretch.cut == "whole" for layer in stretch.layers]
    split = [layer for stretch in found if stretch.cut != "whole" for layer in stretch.layers]
    part = 1 / border.ranks
    items = costs.memory(whole, samples)
    of_split = costs.memory(split, border.batch, part, part)
    for name in ("weights", "gradients", "optimizer"):
        items[name] += of_split[name]
    items["weights"] -= costs.profile.buffers  # counted twice
    items["activations"] += of_split["activations"] * part
    gathered = max((max(_ends(each)) for each in found if each.cut != "whole"), default=0.0)
    items["at borders"] = 2 * gathered * border.batch
    return items


def placements(profile: Profile, ranks: int) -> Iterator[dict[str, Cut]]:
    """Of the hybrid: by traffic, and every layer that can be."""
    first = by_traffic(profile, ranks)
    yield first
    every = {
        layer.name: first.get(layer.name) or layer.cuts[0] for layer in profile.layers if layer.cuts
    }
    every = {
        name: cut if cut != "whole" else _of(profile, name).cuts[0] for name, cut in every.items()
    }
    if every != first:
        yield every


def in_turn(profile: Profile, least: int, border: Border) -> dict[str, Cut]:
    """As `split.plan.in_turn`, from a profile: columns, rows for the second of a pair and the last
    of a family, heads."""
    before = {layer.after: layer.name for layer in profile.layers if layer.after}
    placement: dict[str, Cut] = {}
    for layer in profile.layers:
        numbers = sum(math.prod(part.shape) for part in layer.parts)
        if not layer.cuts or numbers < least:
            continue
        fused = placement.get(before.get(layer.name, "")) == "column" and "row" in layer.cuts
        placement[layer.name] = "row" if fused else layer.cuts[0]
    for family in families(profile, None, border):
        wanted = together([layer.name for layer in family])
        if wanted.keys() <= placement.keys():
            placement |= wanted
    return placement


def together(names: Sequence[str]) -> dict[str, Cut]:
    """Columns for all but the last, which has rows."""
    return {**dict.fromkeys(names[:-1], "column"), names[-1]: "row"}


def _of(profile: Profile, name: str) -> Layer:
    return next(layer for layer in profile.layers if layer.name == name)
