"""Split weights (DistBelief): every layer's weights are divided over machines.

All ranks of a row of the mesh see the same samples; each holds some columns or rows of every
layer that is worth it, and only activations that cross a border travel. Columns followed by rows
need no exchange in between; the last layer's scores stay divided, and the loss is computed from
the parts. What `degree` leaves of the world is data parallel.

    columns then rows, per pair and step:   2 · 2 (N - 1) / N · B · d · s bytes
                                            (the sum forward, the input's gradient backward)

Limits: what travels grows with the batch, and every layer waits for the slowest rank.

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 3; Shoeybi et al.
2019, "Megatron-LM", section 3 (columns then rows, the split softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from wagontrain.axes import check_degree, lay_out
from wagontrain.batchnorm import forward_over
from wagontrain.costs import Costs, Step
from wagontrain.errors import UsageError
from wagontrain.mesh import World
from wagontrain.replication import Buckets
from wagontrain.simulate import Graph
from wagontrain.split import placing, predict
from wagontrain.split.border import Replicated
from wagontrain.split.chain import Chain, find
from wagontrain.split.divide import Cut, check_placement, divide
from wagontrain.split.plan import in_turn, prepare, settle
from wagontrain.split.strips import Strips, divide_rows, shared_by
from wagontrain.strategy import Strategy
from wagontrain.synchronous import Synchronous
from wagontrain.task import Task, trainable
from wagontrain.transport import Context


@dataclass(frozen=True)
class SplitWeights(Strategy):
    """Settings of split weights.

    Args:
        degree: ranks that divide the weights between them; all where not given. The rest of the
            world is data parallel.
        placement: layer -> "column", "row" or "whole"; "auto" splits every layer of at least
            `least` parameters, columns and rows in turn where nothing else lies between.
        least: parameters that make a layer worth splitting with placement "auto".
        strips: whether the convolutions that a model begins with work on strips of the image,
            with what lies between them, instead of being split by their channels.
    """

    degree: int | None = None
    placement: Literal["auto"] | dict[str, Cut] = "auto"
    least: int = 0
    strips: bool = False

    name: ClassVar[str] = "split-weights"
    summary: ClassVar[str] = "weights divided, activations travel (DistBelief)"

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    def check(self, task: Task, world: World) -> None:
        """Refuse a degree that does not divide the world, and more rows than samples.

        Raises:
            UsageError: one of these.
        """
        check_degree(self.degree, world.size)
        rows = world.size // (self.degree or world.size)
        if rows > task.batch_size:
            raise UsageError(
                f"{world.size} workers of degree {self.degree} make {rows} rows that cannot share "
                f"a batch of {task.batch_size}: give a higher degree"
            )

    @classmethod
    def candidates(cls, costs: Costs) -> list[SplitWeights]:
        """Every degree above 1 that divides the world: all split, and the cheapest placement."""
        degrees = [each for each in range(2, costs.size + 1) if costs.size % each == 0]
        samples = costs.profile.batch_size
        fit = [each for each in degrees if costs.size // each <= samples]
        if not any(layer.cuts for layer in costs.profile.layers):
            return []
        found = []
        for each in fit:
            plain = cls(degree=None if each == costs.size else each)
            batch = costs.profile.batch_size / costs.profile.accumulate / (costs.size // each)
            border = predict.Border(each, batch, shards=False)
            cheapest = placing.cheapest(placing.problem(costs, border, batch, exposed=0.0))
            found.append(plain)
            if any(
                cut != "whole" for cut in cheapest.values()
            ):  # else every worker would do all of the work
                found.append(replace(plain, placement=cheapest))
        return found

    def step_graph(self, costs: Costs) -> Graph:
        """Every rank of a row sees the row's samples; what is split exchanges its state."""
        found, border, members = self._laid_out(costs)
        step = Step(costs, costs.leaders, members, dict.fromkeys(costs.leaders, border.batch))
        rows = costs.size // border.ranks
        for micro in range(costs.profile.accumulate):
            last = micro == costs.profile.accumulate - 1
            predict.pass_through(step, found, border, last, summed=False)
        own = predict.split_bytes(found) / border.ranks
        whole = sum(each.nbytes for each in costs.profile.layers) - own * border.ranks
        if rows > 1:  # every rank with those of the other rows that hold the same
            step.members = range(0, costs.size, border.ranks)
            step.add_to_bucket(own + whole)
            step.send_bucket()
            step.update()
        else:
            step.update(others=own + whole)
        return step.graph

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """A part of the split layers and a copy of the others, and the row's activations."""
        found, border, _ = self._laid_out(costs)
        return predict.memory(costs, found, border, border.batch)

    def _laid_out(self, costs: Costs) -> tuple[list[predict.Stretch], predict.Border, range]:
        if self.strips:
            raise UsageError("strips are not predicted yet: leave them out, or name the strategy")
        profile, degree = costs.profile, self.degree or costs.size
        batch = profile.batch_size / profile.accumulate / (costs.size // degree)
        border = predict.Border(degree, batch, shards=False)
        placement: predict.Cuts
        if not isinstance(self.placement, str):
            placement = self.placement
        else:
            placement = predict.in_turn(profile, self.least, border)
        return predict.stretches(profile, placement, border), border, range(degree)

    def setup(self, task: Task, context: Context) -> SplitWeightsRunner:
        """Build the model and leave each rank its part."""
        return SplitWeightsRunner(self, task, context)


class SplitWeightsRunner(Synchronous):
    """Split weights at work on one rank."""

    def __init__(self, strategy: SplitWeights, task: Task, context: Context) -> None:
        prepared = prepare(task, context, without_memory=strategy.strips)
        model, device = prepared.model, context.world.device
        self.axes = axes = lay_out(context, strategy.degree or context.world.size)
        if strategy.placement == "auto":
            placement = in_turn(prepared, strategy.least, size=axes.model.size)
        else:
            placement = strategy.placement
            check_placement(model, placement, prepared.observed, axes.model.size)
        chain = Chain()
        if strategy.strips:
            named = () if strategy.placement == "auto" else placement
            chain = find(model, prepared.observed, axes.model.size, named)
            placement = {name: cut for name, cut in placement.items() if name not in chain.layers}
        if axes.model.size == 1:
            placement, chain = {}, Chain()
        divided = divide(
            model, placement, prepared.observed, Replicated(axes.model), axes, device,
            prepared.last,
        )  # fmt: skip
        divide_rows(model, chain, divided, axes, device)
        if prepared.bare:
            settle(model, device)
            prepared.fill(task, model, divided.layouts)
        super().__init__(task, context, model, divided.layouts, data=axes.data)
        self.open.push(divided.undo)
        self.of_strips = shared_by(model, chain)
        if chain.layers:
            self._cut(chain)
        if {name for name, _ in trainable(model)} - self.of_strips:
            self.replicate(axes.data, Buckets(unused=prepared.unused, apart=self.of_strips))

    def _cut(self, chain: Chain) -> None:
        """Put the chain's layers to work on this rank's strip."""

        def norm(layer: Any) -> Callable[[Tensor], Tensor]:
            assert self.context.side is not None
            return forward_over(layer, self.context.side, self.participation)

        strips = Strips(self.model, chain, self.axes.model, norm)
        self.open.push(strips.open)

    def exchange(self) -> None:
        """Sum the gradients that each rank has of its strip, over all strips of all samples."""
        if not self.of_strips:
            return
        self.ready = self.ready or self.clock.mark()
        gradients = []
        for name, value in trainable(self.model):
            if name in self.of_strips:
                if value.grad is None:  # all ranks have to send as many numbers
                    value.grad = torch.zeros_like(value)
                gradients.append(value.grad)
        for dtype in dict.fromkeys(each.dtype for each in gradients):
            alike = [each for each in gradients if each.dtype is dtype]
            flat = torch.cat([each.reshape(-1) for each in alike])
            dist.all_reduce(flat, group=self.context.group)
            sums = torch.split(flat, [each.numel() for each in alike])
            for gradient, total in zip(alike, sums, strict=True):
                gradient.copy_(total.view_as(gradient))

    def close(self) -> None:
        """Put the plain layers' forwards back; their weights stay divided."""
        super().close()
        self.axes.close()
