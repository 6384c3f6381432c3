"""Which layers to split, and how: exactly, for costs that add up.

A layer costs what it computes, exchanges and updates, whichever way it is held; two layers with
nothing but elementwise functions between them cost less together, split by columns and then by
rows, for nothing travels in between; so do families of layers (`split.families`). Along chains of
the former dynamic programming finds the cheapest placement; where memory does not allow it, a
mixed-integer program does (HiGHS).

What a sum of gradients costs depends on how much of it the backward pass hides, which no sum of
costs can say: it is given as a share that is not hidden, and the simulator decides between the
placements for several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from wagontrain.cluster import Kind
from wagontrain.costs import Costs
from wagontrain.profile import Cut, Layer
from wagontrain.split import predict
from wagontrain.split.predict import Border, Stretch

EXPOSED = (1.0, 0.3, 0.0)
"""Shares of the sums of gradients that are not hidden, to find placements for."""
_SECONDS = 5.0


@dataclass(frozen=True)
class Option:
    """A way of holding a layer.

    Args:
        seconds: that it costs in a step.
        nbytes: of weights, gradients and optimizer state that a worker then holds.
    """

    seconds: float
    nbytes: float


@dataclass(frozen=True)
class Problem:
    """Layers to place.

    Args:
        options: layer -> its ways.
        saved: (layer, the one after it) -> seconds saved by columns for the first and rows for the
            second; and of families, by columns for all but the last.
    """

    options: Mapping[str, Mapping[Cut, Option]]
    saved: Mapping[tuple[str, ...], float]

    def seconds(self, placement: Mapping[str, Cut]) -> float:
        """What a placement costs."""
        total = sum(self.options[name][cut].seconds for name, cut in placement.items())
        return total - sum(
            saved
            for names, saved in self.saved.items()
            if predict.together(names).items() <= placement.items()
        )

    def nbytes(self, placement: Mapping[str, Cut]) -> float:
        """What a worker holds."""
        return sum(self.options[name][cut].nbytes for name, cut in placement.items())


def problem(costs: Costs, border: Border, samples: float, exposed: float) -> Problem:
    """The layers of a task that can be split, with what each way costs.

    Args:
        costs: of the task on the cluster.
        border: of split layers.
        samples: that a worker works on at a time with layers that are whole.
        exposed: share of the sums of gradients that nothing hides.
    """
    layers = {layer.name: layer for layer in costs.profile.layers}
    names = list(layers)
    options: dict[str, dict[Cut, Option]] = {}
    saved: dict[tuple[str, ...], float] = {}
    for layer in costs.profile.layers:
        ways = _ways(layer, border)
        if len(ways) > 1:
            first = layer.name == names[0]
            options[layer.name] = {
                cut: _option(costs, border, layer, cut, samples, exposed, first) for cut in ways
            }
    for name in options:
        after = layers[name].after
        if after in options and "column" in options[name] and "row" in options[after]:
            between = tuple(
                layers[each] for each in names[names.index(name) : names.index(after) + 1]
            )
            pair = _exchanged(costs, border, Stretch(between, "pair", name == names[0]))
            apart = _exchanged(
                costs, border, Stretch(between[:1], "column", name == names[0])
            ) + _exchanged(costs, border, Stretch(between[-1:], "row"))
            saved[name, after] = max(0.0, apart - pair)
    for family in predict.families(costs.profile, None, border):
        members = tuple(layer.name for layer in family)
        if options.keys() >= set(members):
            first = members[0] == names[0]
            apart = sum(
                _exchanged(costs, border, Stretch((each,), "column")) for each in family[:-1]
            )
            apart += _exchanged(costs, border, Stretch(family[-1:], "row"))
            whole = _exchanged(costs, border, Stretch(family, "family", first))
            saved[members] = max(0.0, apart - whole)
    return Problem(options, saved)


def _ways(layer: Layer, border: Border) -> list[Cut]:
    """Heads can be split only where all ranks see all samples; tied layers stay whole."""
    if layer.tied:  # alone it could not be divided, and options are of one layer
        return ["whole"]
    split: list[Cut] = [cut for cut in layer.cuts if cut != "heads" or not border.shards]
    return ["whole", *split]


def _option(
    costs: Costs,
    border: Border,
    layer: Layer,
    cut: Cut,
    samples: float,
    exposed: float,
    first: bool,
) -> Option:
    copies = 2 + costs.profile.optimizer
    if cut == "whole":
        seconds = costs.forward(layer, samples, 0) + costs.backward(layer, samples, 0)
        seconds += costs.update(layer.nbytes, 0)
        if border.shards:
            ranks = range(border.ranks)
            if layer.sparse:
                rows = layer.touched(border.batch)
                seconds += exposed * costs.exchange("exchange", rows, ranks)
            else:
                seconds += exposed * costs.exchange("all_reduce", layer.nbytes, ranks)
        return Option(seconds, copies * layer.nbytes)
    part = 1 / border.ranks
    seconds = costs.forward(layer, border.batch, 0, part)
    seconds += costs.backward(layer, border.batch, 0, part)
    seconds += costs.update(layer.nbytes * part, 0)
    kind = "table" if layer.kind == "Embedding" else "scores" if _scores(layer, cut) else cut
    return Option(
        seconds + _exchanged(costs, border, Stretch((layer,), kind, first)),
        copies * layer.nbytes * part,
    )


def _scores(layer: Layer, cut: Cut) -> bool:
    return layer.scores and cut == "column"


def _exchanged(costs: Costs, border: Border, stretch: Stretch) -> float:
    """Seconds of all exchanges at the borders of a stretch."""
    ranks = range(border.ranks)
    before, after = border.forward(stretch)
    total = sum(costs.exchange("exchange", nbytes, ranks) for nbytes in (*before, *after))
    before, after = border.backward(stretch)
    total += sum(costs.exchange("exchange", nbytes, ranks) for nbytes in before)
    kind: Kind = "exchange" if border.shards else "all_reduce"
    return total + sum(costs.exchange(kind, nbytes, ranks) for nbytes in after)


def cheapest(given: Problem, room: float = math.inf) -> dict[str, Cut]:
    """The placement that costs least; where it needs more than `room` bytes, the one that fits.

    Where none fits, the one that needs least.
    """
    found: dict[str, Cut] = {}
    for chain in _chains(given):
        found |= _along(given, chain)
    for names in _families(given):
        changed = found | predict.together(names)
        if given.seconds(changed) < given.seconds(found):
            found = changed
    if given.nbytes(found) <= room:
        return found
    return _limited(given, room) or {
        name: min(ways, key=lambda cut, ways=ways: ways[cut].nbytes)  # type: ignore[misc]
        for name, ways in given.options.items()
    }


def _families(given: Problem) -> list[tuple[str, ...]]:
    return [names for names in given.saved if len(names) > 2]


def _chains(given: Problem) -> Iterator[list[str]]:
    """Layers one behind the other; one that has nobody beside it is a chain of its own."""
    after = {names[0]: names[1] for names in given.saved if len(names) == 2}
    heads = given.options.keys() - set(after.values())
    for name in given.options:
        if name in heads:
            chain = [name]
            while chain[-1] in after:
                chain.append(after[chain[-1]])
            yield chain


def _along(given: Problem, chain: Sequence[str]) -> dict[str, Cut]:
    """The cheapest placement of a chain, by dynamic programming."""
    best: dict[Cut, tuple[float, list[Cut]]] = {
        cut: (option.seconds, [cut]) for cut, option in given.options[chain[0]].items()
    }
    for before, name in itertools.pairwise(chain):
        saved = given.saved[before, name]
        best = {
            cut: min(
                (
                    so_far + option.seconds - saved * ((last, cut) == ("column", "row")),
                    [*cuts, cut],
                )
                for last, (so_far, cuts) in best.items()
            )
            for cut, option in given.options[name].items()
        }
    return dict(zip(chain, min(best.values())[1], strict=True))


def _limited(given: Problem, room: float) -> dict[str, Cut] | None:
    """The cheapest placement of so many bytes, as a mixed-integer program; None where none fits."""
    ways = [(name, cut) for name, options in given.options.items() for cut in options]
    place = {way: number for number, way in enumerate(ways)}
    groups = list(given.saved)
    count = len(ways) + len(groups)
    price = [given.options[name][cut].seconds for name, cut in ways]
    price += [-given.saved[group] for group in groups]
    rows, low, high = [], [], []

    def constrain(row: Mapping[int, float], least: float, most: float) -> None:
        full = np.zeros(count)
        for number, value in row.items():
            full[number] = value
        rows.append(full)
        low.append(least)
        high.append(most)

    for name, options in given.options.items():
        constrain({place[name, cut]: 1.0 for cut in options}, 1.0, 1.0)
    for number, group in enumerate(groups, len(ways)):
        for way in predict.together(group).items():
            constrain({number: 1.0, place[way]: -1.0}, -np.inf, 0.0)
    nbytes = {place[way]: given.options[way[0]][way[1]].nbytes / max(room, 1.0) for way in ways}
    constrain(nbytes, -np.inf, 1.0)
    done = milp(
        price, integrality=np.ones(count), bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(rows), low, high),
        options={"time_limit": _SECONDS},
    )  # fmt: skip
    if done.x is None:
        return None
    return {name: cut for (name, cut), number in place.items() if done.x[number] > 0.5}
