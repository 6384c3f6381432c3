"""The whole state of a training on servers, as an ordinary model and optimizer.

The coordinator makes one, from which every shard is given its first state, and into which the
parts of a snapshot are put for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wagontrain.errors import UsageError
from wagontrain.layout import Layout
from wagontrain.optimizers import kind_of, parts_of, require_elementwise
from wagontrain.servers import placing
from wagontrain.servers.contents import Contents
from wagontrain.servers.job import Job
from wagontrain.servers.model import entries_of
from wagontrain.servers.parts import PARAMETERS, Buffer, Part, divide, region_of
from wagontrain.servers.table_images import TableImages
from wagontrain.servers.vectors import RULE as VECTORS
from wagontrain.state import Held, Source, Training
from wagontrain.task import Task


class Image:
    """A task's model and optimizer, and how they are divided over shards.

    Args:
        task: what is trained.
        shards: over how many servers.
        rule: of the servers; only the task's own optimizer leaves state for others to go on from.
        tables: which layers have their tables on the servers, see `placing.chosen`.

    Raises:
        TaskError: the optimizer looks at whole tensors, or a tensor is no plain one.
        UsageError: the task has several optimizers, or a table cannot be on the servers.
    """

    def __init__(self, task: Task, shards: int, rule: str, tables: str = "") -> None:
        placed = placing.build(task, tables, whole=not tables or placing.fit_here(task))
        self.model = placed.model
        self.optimizer = task.build_optimizer(self.model, closures=rule == VECTORS)
        self.scheduler = task.build_scheduler(self.optimizer)
        if len(parts_of(self.optimizer)) > 1:
            raise UsageError(
                f"the task has several optimizers ({kind_of(self.optimizer)}), but servers have "
                "one: give one with groups of parameters, or use a strategy whose workers have "
                "their own optimizers, such as data-parallel, sharded or local-sgd"
            )
        if rule != VECTORS:
            require_elementwise(self.optimizer)
        found = placed.tables(self.optimizer)
        placing.require_rules(rule, self.optimizer, found)
        self.tables = TableImages(found, self.model, self.optimizer, placed.whole, rule)
        without = [table.name for table in found]
        self.entries = entries_of(self.model, self.optimizer, without)
        self.parts = divide(self.entries, shards)
        self.rule = rule
        self._seed = task.seed

    def jobs(
        self,
        groups: Sequence[dict[str, Any]],
        settings: dict[str, Any],
        files: str = "",
        most: int = 64,
    ) -> list[Job]:
        """What each shard is to hold.

        Args:
            groups: settings of each group of parameters.
            settings: of the rule.
            files: folder in which shards keep their state now and then, in a folder of the host
                that each is on; "" for nowhere.
            most: pushes of one worker that may be put aside at a time.
        """
        return [
            Job(
                index, len(self.parts), tuple(parts), self.rule, settings,
                type(self.optimizer).__name__, tuple(groups), self.tables.all, self._seed,
                most=most,
                file=f"{files}/shard-{index}.safetensors" if files else "",
            )
            for index, parts in enumerate(self.parts)
        ]  # fmt: skip

    @property
    def training(self) -> Training:
        """All that has state."""
        layouts = {
            name: Layout.whole(value)
            for name, value in self.model.state_dict().items()
            if not value.is_meta
        }
        more = self.tables.more
        return Training(self.model, layouts, self.optimizer, self.scheduler, more=more)

    def restore(self, source: Source) -> None:
        """Take up a checkpoint's state, scheduler included.

        Raises:
            UsageError: it is of another model.
        """
        self.training.restore(source)
        self.tables.restored(source)

    def part(self, index: int) -> Contents:
        """The state that one shard begins with."""
        parts = self.parts[index]
        buffer = Buffer(parts)
        tensors = self.model.state_dict()
        for part, view in zip(buffer.parts, buffer.views, strict=True):
            view.copy_(tensors[part.name].reshape(-1)[part.start : part.stop])
        made = Contents(0, buffer.regions, self.tables.part(index, len(self.parts)))
        if not self.optimizer.state or self.rule != "optimizer":
            return made
        parameters = dict(self.model.named_parameters())
        for at, part in enumerate(updated(parts)):
            for key, value in self.optimizer.state.get(parameters[part.name], {}).items():
                if value is not None:
                    made.tensors[f"state.{at}.{key}"] = _cut(value, parameters[part.name], part)
        made.plain["groups"] = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        return made

    def take(self, kept: Sequence[Contents], memory: Any = None) -> Held:
        """The state that the shards together have, by the plain model's names.

        Args:
            kept: of each shard.
            memory: what the decisions keep beside that.
        """
        tensors = self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        for parts, content in zip(self.parts, kept, strict=True):
            buffer = Buffer(parts)
            for region, its in zip(buffer.regions, content.values, strict=True):
                region.copy_(its)
            for part, view in zip(buffer.parts, buffer.views, strict=True):
                tensors[part.name].reshape(-1)[part.start : part.stop] = view
            if self.rule == "optimizer":
                for at, part in enumerate(updated(parts)):
                    self._take_state(parameters[part.name], part, at, content)
        self.tables.take(kept)
        return self.training.held()

    def _take_state(self, parameter: Tensor, part: Part, at: int, content: Contents) -> None:
        prefix = f"state.{at}."
        state = self.optimizer.state[parameter]
        for name, value in content.tensors.items():
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix)
            if value.dim() == 0:
                state[key] = value
                continue
            if key not in state:
                state[key] = torch.zeros_like(parameter, dtype=value.dtype)
            state[key].reshape(-1)[part.start : part.stop] = value


def updated(parts: Sequence[Part]) -> list[Part]:
    """Those that have optimizer state, in the order in which a shard counts them."""
    return [part for part in parts if region_of(part.group) == PARAMETERS]


def _cut(state: Any, parameter: Tensor, part: Part) -> Tensor:
    value = torch.as_tensor(state)
    if value.shape != parameter.shape:
        return value
    return value.detach().reshape(-1)[part.start : part.stop].clone()


def refuse_batch_norm(model: nn.Module, instead: str) -> None:
    """Refuse a model that looks at the whole batch, of which workers of servers see a part.

    Args:
        model: the model.
        instead: what else the user may do.

    Raises:
        UsageError: a layer is batch norm.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                f"{name!r} is batch norm, which looks at the whole batch, and workers of a "
                f"parameter server do not see each other's samples: {instead}"
            )
