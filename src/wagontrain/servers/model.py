"""A task's model in flat memory: what travels are slices of it, without copying."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from wagontrain.errors import TaskError
from wagontrain.servers.parts import WHOLE, Entry, Memory, Whole, divide, own_memory


def entries_of(
    model: nn.Module, optimizer: Optimizer, without: Collection[str] = ()
) -> list[Entry]:
    """What a model consists of, for servers.

    Parameters that the optimizer has are updated; buffers are assigned, for batch norm and others
    change them in forward passes; the rest stays as it is.

    Args:
        model: of a task.
        optimizer: of it.
        without: names of what is left out: tables.

    Raises:
        TaskError: a tensor is of a kind that does not lie in plain memory.
    """
    groups = {
        value: number
        for number, group in enumerate(optimizer.param_groups)
        for value in group["params"]
        if value.requires_grad
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = []
    seen: set[Tensor] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if value in seen or name in without:
            continue
        seen.add(value)
        if value.is_sparse or value.is_quantized or value.is_complex():
            raise TaskError(
                f"{name!r} is a {value.dtype} tensor of layout {value.layout}, which servers "
                "cannot hold: use dense real tensors, or the strategy data-parallel"
            )
        group: Any = groups.get(value, "constant")
        if name not in parameters:
            group = "assigned"
        dtype = str(value.dtype).removeprefix("torch.")
        result.append(Entry(name, tuple(value.shape), dtype, group))
    return result


class FlatModel:
    """A model whose parameters, buffers and gradients are views of flat memory.

    Args:
        model: its tensors are replaced by views with the same content.
        entries: see `entries_of`.
        shards: over how many servers it is divided.
        memory: gives bytes; servers on this machine may see them without their being sent.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        shards: int,
        memory: Memory = own_memory,
    ) -> None:
        self.memory = memory
        self.model = model
        self.entries = entries
        self.shards = shards
        self._on_shard = [
            tuple(part.name for part in parts if isinstance(part.group, int))
            for parts in divide(entries, shards)
        ]
        self.values = self.another()
        self._tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.updated = {
            entry.name: self._tensors[entry.name]
            for entry in entries
            if isinstance(entry.group, int)
        }
        self.assigned = [entry.name for entry in entries if entry.group == "assigned"]
        for entry in entries:
            self.values.views[entry.name].copy_(self._tensors[entry.name].detach())
        self.show(self.values)

    def another(self, regions: int = WHOLE) -> Whole:
        """Memory for as much again."""
        return Whole(self.entries, self.shards, regions, self.memory)

    def show(self, values: Whole) -> None:
        """Let the model compute with these values."""
        for entry in self.entries:
            self._tensors[entry.name].data = values.views[entry.name]
        self.values = values

    def collect_in(self, gradients: Whole) -> None:
        """Let the next backward passes add to these gradients, which begin at zero."""
        for region in gradients.regions:
            region.zero_()
        for name, value in self.updated.items():
            value.grad = gradients.views[name]

    def without(self, touched: Collection[str]) -> Callable[[int], tuple[str, ...]]:
        """Which of a shard's parameters are not among those that got a gradient."""
        return lambda shard: tuple(name for name in self._on_shard[shard] if name not in touched)

    def leave_buffers_in(self, gradients: Whole) -> None:
        """Put the buffers as they are now beside the gradients."""
        for name in self.assigned:
            gradients.views[name].copy_(self._tensors[name])
