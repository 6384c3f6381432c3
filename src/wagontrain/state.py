"""The state of a training: weights, optimizer and scheduler, whoever holds which part of it.

Tensors are named `model.NAME` and `optimizer.NAME.KEY`, after the plain model's names; what is
not a tensor (learning rates, step counts, the scheduler) is plain data. So what one strategy
saved, another takes up, at any world size.
"""

from __future__ import annotations

import collections
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wagontrain import plain
from wagontrain.errors import UsageError, nearest
from wagontrain.layout import Layout, as_part_of, local
from wagontrain.optimizers import kind_of
from wagontrain.transport import Context


@dataclass(frozen=True)
class Held:
    """What one rank holds of the state.

    Args:
        tensors: this rank's parts by name, sharing memory with the training.
        layouts: which part each is.
        plain: what is not a tensor, the same on every rank.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, layout: Layout) -> None:
        """Note a part."""
        self.tensors[name] = tensor
        self.layouts[name] = layout


class Source(ABC):
    """Where whole tensors come from."""

    plain: Mapping[str, Any]

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every whole tensor there is."""

    @abstractmethod
    def read(self, wanted: Mapping[str, Layout]) -> dict[str, Tensor]:
        """The wanted parts by name. Every rank has to call this once."""


@dataclass(frozen=True)
class Training:
    """All that has state in a training, on one rank.

    Args:
        model: the module, with this rank's parts for parameters and buffers.
        layouts: of everything in the model's `state_dict` that this rank holds.
        optimizer: over the model's parameters.
        scheduler: of the optimizer, if there is one.
        updated: the parameters that this rank updates, where it does not update all it has.
        more: what else a strategy keeps, under names such as `outer.NAME.momentum`. It is taken
            up where a saved state has it, and left alone where another strategy wrote that.
    """

    model: nn.Module
    layouts: Mapping[str, Layout]
    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    updated: Collection[Tensor] | None = None
    more: Held = field(default_factory=Held)

    def held(self) -> Held:
        """This rank's part of the state."""
        held = Held(dict(self.more.tensors), dict(self.more.layouts))
        for name, value in self.model.state_dict().items():
            if name in self.layouts:
                held.add(f"model.{name}", local(value), self.layouts[name])
        names = self._names()
        plain_state: dict[str, dict[str, Any]] = {}
        for parameter, entries in self.optimizer.state.items():
            name = names[parameter]
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    part = local(value)
                    layout = self.layouts[name].of_state(part)
                    if self.updated is not None:
                        layout = replace(layout, owner=parameter in self.updated)
                    held.add(f"optimizer.{name}.{key}", part, layout)
                else:
                    plain_state.setdefault(name, {})[key] = value
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        held.plain["optimizer"] = {"groups": groups, "state": plain_state}
        held.plain["kinds"] = self._kinds()
        held.plain["scheduler"] = None if self.scheduler is None else self.scheduler.state_dict()
        return held

    def restore(self, source: Source) -> None:
        """Take up a state. Nothing is changed if it is not one of this model.

        Raises:
            UsageError: it is of another model or optimizer; says what differs first.
        """
        self._compare(source)
        state = self.model.state_dict(keep_vars=True)
        wanted = {f"model.{name}": self.layouts[name] for name in state if name in self.layouts}
        kept: dict[str, tuple[Tensor, str]] = {}
        shapes = source.shapes()
        more = {name: layout for name, layout in self.more.layouts.items() if name in shapes}
        wanted |= more
        names = self._names()
        of_name = {name: parameter for parameter, name in names.items()}
        for full in shapes:
            kind, _, rest = full.partition(".")
            name, _, key = rest.rpartition(".")
            mine = self.updated is None or of_name.get(name) in self.updated
            if kind == "optimizer" and name in of_name and mine:
                layout = self.layouts[name]
                if shapes[full] != layout.shape:
                    layout = Layout(shapes[full])
                wanted[full] = layout
                kept[full] = (of_name[name], key)
        parts = source.read(wanted)
        with torch.no_grad():
            for name, value in state.items():
                if name in self.layouts:
                    local(value).copy_(parts[f"model.{name}"])
            for name in more:
                self.more.tensors[name].copy_(parts[name])
        try:
            self._restore_optimizer(source, kept, parts)
            if self.scheduler is not None:
                self.scheduler.load_state_dict(source.plain["scheduler"])
        # What torch's and other people's optimizers raise for state that is not theirs.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the checkpoint's state of the optimizer or scheduler is not one of this task's: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _kinds(self) -> dict[str, str | None]:
        scheduler = None if self.scheduler is None else kind_of(self.scheduler)
        return {"optimizer": kind_of(self.optimizer), "scheduler": scheduler}

    def _names(self) -> dict[Tensor, str]:
        return {value: name for name, value in self.model.named_parameters()}

    def _restore_optimizer(
        self,
        source: Source,
        kept: Mapping[str, tuple[Tensor, str]],
        parts: Mapping[str, Tensor],
    ) -> None:
        names = self._names()
        saved_plain = source.plain["optimizer"]
        entries: dict[Tensor, dict[str, Any]] = {}
        for full, (parameter, key) in kept.items():
            part = as_part_of(parameter, parts[full].to(_device_of_state(parameter, key)))
            entries.setdefault(parameter, {})[key] = part
        index: dict[Tensor, int] = {}
        groups = []
        for group, saved in zip(self.optimizer.param_groups, saved_plain["groups"], strict=True):
            for member in group["params"]:
                index[member] = len(index)
            groups.append({**saved, "params": [index[value] for value in group["params"]]})
        for parameter in index:
            own = saved_plain["state"].get(names[parameter])
            if own and (self.updated is None or parameter in self.updated):
                entries.setdefault(parameter, {}).update(own)
        state = {index[parameter]: values for parameter, values in entries.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _compare(self, source: Source) -> None:
        shapes = source.shapes()
        saved = {name.removeprefix("model.") for name in shapes if name.startswith("model.")}
        for name, layout in self.layouts.items():
            if name not in saved:
                raise UsageError(
                    f"the checkpoint is of another model: it has no {name!r}; "
                    f"{nearest(name, sorted(saved))}"
                )
            if shapes[f"model.{name}"] != layout.shape:
                raise UsageError(
                    f"the checkpoint is of another model: {name!r} is of shape "
                    f"{list(shapes[f'model.{name}'])} there and {list(layout.shape)} here"
                )
        groups = source.plain["optimizer"]["groups"]
        if len(groups) != len(self.optimizer.param_groups):
            raise UsageError(
                f"the checkpoint is of another optimizer: it has {len(groups)} groups of "
                f"parameters, this one {len(self.optimizer.param_groups)}"
            )
        if (source.plain["scheduler"] is None) != (self.scheduler is None):
            has, wants = ("no", "one") if self.scheduler is not None else ("a", "none")
            raise UsageError(f"the checkpoint has {has} scheduler, but the task has {wants}")
        for what, own in self._kinds().items():
            there = source.plain.get("kinds", {}).get(what, own)
            if there != own:
                raise UsageError(f"the checkpoint is of another {what}: {there} there, {own} here")


def _device_of_state(parameter: Tensor, key: str) -> torch.device:
    """Step counts stay on the CPU, as torch's optimizers keep them."""
    return torch.device("cpu") if key == "step" else parameter.device


class WholeTensors(Source):
    """A state that is in memory, whole.

    Args:
        tensors: by the names of `Held`.
        plain: what is not a tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.plain = plain

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def read(self, wanted: Mapping[str, Layout]) -> dict[str, Tensor]:
        return {name: layout.take(self.tensors[name]) for name, layout in wanted.items()}


def gathered(context: Context, held: Held) -> dict[str, Tensor]:
    """The whole tensors, on every rank. Every rank has to call this.

    What every rank holds whole is not sent. The rest is broadcast by its owners, piece by piece.
    """
    everyones = announced(context, held)
    whole: dict[str, Tensor] = {}
    counts = collections.Counter(
        name for own in everyones for name, entry in own.items() if entry["whole"]
    )
    names = dict.fromkeys(name for own in everyones for name in own)
    for name in names:
        if counts[name] == len(everyones):
            whole[name] = held.tensors[name]
            continue
        example = next(own[name] for own in everyones if name in own)
        dtype = getattr(torch, example["dtype"])
        result = torch.empty(example["shape"], dtype=dtype, device=context.world.device)
        own = {}
        if name in held.tensors:
            own = dict(held.layouts[name].pieces(held.tensors[name]))
        for rank, entries in enumerate(everyones):
            if name not in entries or not entries[name]["owner"]:
                continue
            for offset, size in entries[name]["pieces"]:
                block = result[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]
                content = own[tuple(offset)] if rank == context.world.rank else None
                block.copy_(_broadcast(context, content, size, dtype, rank))
        whole[name] = result
    return whole


def shared_plain(context: Context, held: Held) -> dict[str, Any]:
    """What is no tensor, of all ranks together: each may know of its own parameters only."""
    own = held.plain["optimizer"]
    together: dict[str, Any] = {}
    for text in context.gather_bytes(plain.encode(own["state"]).encode()):
        together |= plain.decode(text.decode())
    return {**held.plain, "optimizer": {**own, "state": together}}


def announced(context: Context, held: Held) -> list[dict[str, Any]]:
    """What each rank holds, as plain data."""
    own = {
        name: {
            "shape": layout.shape,
            "dtype": str(held.tensors[name].dtype).removeprefix("torch."),
            "owner": layout.owner,
            "whole": layout.dim is None,
            "pieces": [
                (offset, tuple(piece.shape)) for offset, piece in layout.pieces(held.tensors[name])
            ],
        }
        for name, layout in held.layouts.items()
    }
    return [json.loads(text) for text in context.gather_bytes(json.dumps(own).encode())]


def _broadcast(
    context: Context, content: Tensor | None, size: Iterable[int], dtype: torch.dtype, rank: int
) -> Tensor:
    if content is None:
        content = torch.empty(tuple(size), dtype=dtype, device=context.world.device)
    else:
        content = content.contiguous().clone()
    # As bytes: not every type of tensor is known to every engine.
    context.broadcast(content.reshape(-1).view(torch.uint8), rank)
    return content
