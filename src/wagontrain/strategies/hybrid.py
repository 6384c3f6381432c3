"""The AlexNet hybrid ("one weird trick"): on the same workers, some layers are data parallel and
others have their weights split.

Layers with much compute and little weight (convolutions) see each rank's own samples, and their
gradients are summed. Layers with much weight and little compute (fully connected ones, large
embedding tables) are divided: every rank gives its activations to all, computes its columns or
rows for all samples, and takes back the results of its own. Every layer takes and gives the
rank's own samples at its border, so that any module works without being traced.

    a column split sends, a rank and step:  2 (N - 1) / N · B · (d_in + d_out / N) · s bytes
    a row split:                            2 (N - 1) / N · B · (d_in / N + d_out) · s
    columns and rows fused:                 2 (N - 1) / N · B · (d_in + d_out of the second) · s
    a table by rows, each of width d:       2 (N - 1) / N · B / N · d · s
    replicating the layer instead:          2 (N - 1) / N · d_in · d_out · s

with the global batch B: by traffic, splitting wins about where B < d_out.

Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks",
section 4; Dean et al. 2012.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from wagontrain.axes import lay_out
from wagontrain.batches import MicroBatch
from wagontrain.costs import Costs, Step
from wagontrain.errors import UsageError
from wagontrain.mesh import World
from wagontrain.profile import Layer, Profile
from wagontrain.replication import Buckets
from wagontrain.simulate import Graph, simulate
from wagontrain.split import placing, predict
from wagontrain.split.border import Shards
from wagontrain.split.divide import Cut, check_placement, divide, splittable, ways
from wagontrain.split.plan import Prepared, in_turn, prepare, settle
from wagontrain.strategy import Strategy
from wagontrain.synchronous import Synchronous
from wagontrain.task import Task
from wagontrain.transport import Context


@dataclass(frozen=True)
class Hybrid(Strategy):
    """Settings of the hybrid.

    Args:
        placement: layer -> "column", "row" or "whole" (data parallel); "auto" splits a layer
            where that sends fewer bytes than summing its gradients, "all" every one that can be.
        bucket_mb: MiB of replicated gradients that travel together.
        chunks: pieces in which activations come to a layer split by columns, so that computing on
            one hides the transfer of the next: scheme (c) of the paper; 1 is scheme (a).
        variable_batch: update split layers after every micro-batch of `Task.accumulate`, and the
            others once per batch. Other mathematics: relaxed.
    """

    placement: Literal["auto", "all"] | dict[str, Cut] = "auto"
    bucket_mb: float | None = None
    chunks: int = 1
    variable_batch: bool = False

    name: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "convolutions data parallel, heavy layers split (AlexNet)"

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise UsageError(f"chunks is {self.chunks}: give 1 or more")

    @property
    def exact(self) -> bool:
        """True unless split layers are updated more often than the others."""
        return not self.variable_batch

    def check(self, task: Task, world: World) -> None:
        """Refuse more workers than samples in a batch.

        Raises:
            UsageError: some would never have one.
        """
        if world.size > task.batch_size:
            raise UsageError(
                f"{world.size} workers cannot share a batch of {task.batch_size}: use at most "
                f"{task.batch_size} workers, a larger batch_size, or split-weights"
            )
        if self.variable_batch and task.accumulate == 1:
            raise UsageError(
                "variable_batch updates split layers after every micro-batch, but the batch is "
                "not cut into any: give Task.accumulate of 2 or more"
            )
        if self.variable_batch and (task.clip_grad_norm is not None or task.weight is not None):
            raise UsageError(
                "variable_batch knows no gradient of the whole batch to clip, and counts samples: "
                "leave out Task.clip_grad_norm and Task.weight, or variable_batch"
            )

    @classmethod
    def candidates(cls, costs: Costs) -> list[Hybrid]:
        """Placements that cost least, and the best of them changed as the simulator finds better.

        How much of the sums of gradients is hidden is not known before it is simulated: there is a
        placement for each of some shares.
        """
        if costs.size > costs.profile.batch_size or costs.size == 1:
            return []
        border = predict.Border(
            costs.size, costs.profile.batch_size / costs.profile.accumulate, shards=True
        )
        found: list[Hybrid] = []
        for exposed in placing.EXPOSED:
            problem = placing.problem(costs, border, costs.samples(0), exposed)
            made = cls(placement=placing.cheapest(problem))
            if (over := _lacking(made, costs)) > 0:
                room = problem.nbytes(placing.cheapest(problem)) - over
                made = cls(placement=placing.cheapest(problem, room))
            placement: Any = made.placement
            splits = any(cut != "whole" for cut in placement.values())
            if splits and made not in found:  # one that splits nothing is data parallel
                found.append(made)
        if not found:
            return []
        first = min(found, key=lambda each: _seconds(each, costs))
        best = best_of(first, costs)
        return found if best in found else [*found, best]

    def step_graph(self, costs: Costs) -> Graph:
        """Whole layers on the own share, split ones on all samples, exchanges at each border."""
        found, border = self._laid_out(costs)
        counts = {rank: costs.samples(rank) for rank in costs.leaders}
        step = Step(costs, costs.leaders, range(costs.size), counts, self.bucket_mb)
        for micro in range(costs.profile.accumulate):
            last = micro == costs.profile.accumulate - 1
            predict.pass_through(step, found, border, last, summed=True)
        step.send_bucket()
        step.update(others=predict.split_bytes(found) / costs.size)
        return step.graph

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """A copy of the whole layers, and a part of the split ones."""
        found, border = self._laid_out(costs)
        return predict.memory(costs, found, border, costs.samples(rank))

    def _laid_out(self, costs: Costs) -> tuple[list[predict.Stretch], predict.Border]:
        profile = costs.profile
        placement: predict.Cuts
        if isinstance(self.placement, str):
            placement = list(predict.placements(profile, costs.size))[-1]
            if self.placement == "auto":
                placement = predict.by_traffic(profile, costs.size)
        else:
            placement = self.placement
        border = predict.Border(costs.size, profile.batch_size / profile.accumulate, shards=True)
        return predict.stretches(profile, placement, border), border

    def setup(self, task: Task, context: Context) -> HybridRunner:
        """Build the model and leave each rank its part."""
        return HybridRunner(self, task, context)


class HybridRunner(Synchronous):
    """The hybrid at work on one rank."""

    def __init__(self, strategy: Hybrid, task: Task, context: Context) -> None:
        prepared = prepare(task, context)
        model, world = prepared.model, context.world
        self.axes = axes = lay_out(context, world.size)
        if strategy.placement == "auto":
            placement = by_traffic(prepared, task.batch_size, world.size)
        elif strategy.placement == "all":
            placement = in_turn(prepared, shards=True)
        else:
            placement = strategy.placement
            check_placement(model, placement, prepared.observed, world.size, shards=True)
        border = Shards(axes.model, strategy.chunks)
        placement = placement if world.size > 1 else {}
        divided = divide(model, placement, prepared.observed, border, axes, world.device)
        if prepared.bare:
            settle(model, world.device)
            prepared.fill(task, model, divided.layouts)
        super().__init__(task, context, model, divided.layouts)
        self.open.push(divided.undo)
        self._at_once = [
            value
            for name, value in model.named_parameters()
            if strategy.variable_batch and name in divided.parts
        ]
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        if trained - divided.parts:
            buckets = Buckets(strategy.bucket_mb, prepared.unused, apart=divided.parts)
            self.replicate(self.data, buckets)

    def passed(self, micro: MicroBatch, total: float) -> None:
        """With a variable batch, update the split layers from this micro-batch alone."""
        if not self._at_once:
            return
        own = set(self._at_once)
        others = [value for value in self.update.parameters if value not in own]
        kept = [value.grad for value in others]
        for value in others:
            value.grad = None
        for value in self._at_once:
            if value.grad is not None:  # from a sum over the batch to a mean over this part
                value.grad.mul_(total / micro.total)
        self.update.optimizer.step()
        for value in self._at_once:
            value.grad = None
        for value, gradient in zip(others, kept, strict=True):
            value.grad = gradient

    def close(self) -> None:
        """Put the plain layers' forwards back; their weights stay divided."""
        super().close()
        self.axes.close()


def _seconds(strategy: Hybrid, costs: Costs) -> float:
    """Of a step."""
    return simulate(strategy.step_graph(costs), costs.interference).seconds


def _lacking(strategy: Hybrid, costs: Costs) -> float:
    """Bytes that the worker with the least room lacks; below zero where all have some left."""
    return max(
        sum(strategy.memory(costs, rank).values()) - costs.cluster.room(rank)
        for rank in costs.leaders
    )


def best_of(strategy: Hybrid, costs: Costs) -> Hybrid:
    """The placement that the simulator finds quickest, changing one layer or pair at a time.

    Layers that are alike, as those of a transformer's blocks, are changed together.
    """

    def seconds(placement: dict[str, Cut]) -> float:
        tried = replace(strategy, placement=placement)
        return _seconds(tried, costs) if _lacking(tried, costs) <= room else math.inf

    room = max(0.0, _lacking(strategy, costs))

    best: dict[str, Cut] = dict(strategy.placement)  # type: ignore[arg-type]  # candidates give one
    least = seconds(best)
    for alike in _alike(costs.profile):
        ways: list[tuple[Cut, Cut | None]] = [("whole", None)]
        ways += [(cut, None) for cut in _CUTS if cut in alike[0].cuts]
        if alike[0].after:
            ways += [("column", "row"), ("whole", "whole")]
        for cut, following in ways:
            change = {layer.name: cut for layer in alike}
            if following is not None:
                change |= {layer.after: following for layer in alike}
            tried = best | change
            if tried != best and (found := seconds(tried)) < least:
                best, least = tried, found
    return replace(strategy, placement=best)


_CUTS: tuple[Cut, ...] = ("column", "row")


def _alike(profile: Profile) -> list[list[Layer]]:
    """The layers that can be split, those of the same shapes together."""
    named = {layer.name: layer for layer in profile.layers}
    found: dict[Any, list[Layer]] = {}
    for layer in profile.layers:
        if any(cut in layer.cuts for cut in _CUTS):
            shapes = tuple(part.shape for part in layer.parts)
            after = named[layer.after].kind if layer.after else ""
            key = (layer.kind, shapes, layer.cuts, layer.given, layer.output, after)
            found.setdefault(key, []).append(layer)
    return list(found.values())


def by_traffic(prepared: Prepared, batch_size: int, ranks: int) -> dict[str, Cut]:
    """Split where that sends less than summing gradients would; the two of a pair together."""
    model, observed = prepared.model, prepared.observed
    placement: dict[str, Cut] = {}
    names = ways(model, observed, 0, shards=True)
    for name in names:
        if name in placement:
            continue
        layer: Any = model.get_submodule(name)
        rows = batch_size * _rows(layer, observed.shapes[name]) / prepared.samples
        cut, sent = _cheapest(layer, rows, ranks)
        after = observed.pairs.get(name, "")
        if after in names and observed.once(name) and observed.once(after):
            follower: Any = model.get_submodule(after)
            both = rows * (layer.in_features + follower.out_features)
            if both < sent + _cheapest(follower, rows, ranks)[1]:
                placement |= {name: "column", after: "row"}
                continue
        placement[name] = cut
    return placement


def _rows(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Rows that a layer worked on: what it was given, less its features."""
    return math.prod(shape[:-1]) if isinstance(layer, nn.Linear) else math.prod(shape)


def _cheapest(layer: nn.Module, rows: float, ranks: int) -> tuple[Cut, float]:
    """How to hold a layer, and numbers sent for it, but for a factor that all ways share."""
    replicated = float(sum(value.numel() for value in layer.parameters(recurse=False)))
    found: list[tuple[float, Cut]] = [(replicated, "whole")]
    if isinstance(layer, nn.Linear):
        found.append((rows * (layer.in_features + layer.out_features / ranks), "column"))
        found.append((rows * (layer.in_features / ranks + layer.out_features), "row"))
    elif isinstance(layer, nn.Embedding) and splittable(layer):
        if layer.sparse:  # only what was touched is summed: every rank's goes to all, once
            found[0] = (rows * layer.embedding_dim / 2, "whole")
        # Each rank gets rows for its own samples, and gives their gradients back.
        found.append((rows * layer.embedding_dim / ranks, "row"))
    sent, cut = min(found)
    return cut, sent
