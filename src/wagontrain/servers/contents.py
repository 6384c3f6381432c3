"""All of a shard's state as tensors and plain data: to send, to write to a file, to take up.

values                      its bytes, region by region
state.PART.KEY              what the update rule keeps, by number of the part
first.NAME                  rows of a table as they are before their first update, if given
table.NAME.KEY              rows of tables: ids, values, state
staged.WORKER.SEQUENCE      pushes that are put aside, and .TABLE.ids, .TABLE.rows of them
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagontrain.errors import WorkerError
from wagontrain.servers.parts import WHOLE, Buffer, torch_type
from wagontrain.servers.shard import Shard
from wagontrain.servers.staging import Gradient, Settled


@dataclass
class Contents:
    """A shard's state.

    Args:
        version: commits that are in it.
        values: bytes of the values, region by region.
        tensors: the rest, by name.
        plain: what is no tensor.
    """

    version: int
    values: list[Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    def announced(self) -> dict[str, Any]:
        """What the receiver has to know before the tensors come: see `room`."""
        described = [
            (name, str(value.dtype).removeprefix("torch."), list(value.shape))
            for name, value in self.tensors.items()
        ]
        return {"plain": self.plain, "tensors": described}


def room(announced: Mapping[str, Any]) -> dict[str, Tensor]:
    """Memory for the tensors that were announced.

    Raises:
        WorkerError: that is no announcement.
    """
    try:
        return {
            str(name): torch.empty([int(length) for length in shape], dtype=torch_type(dtype))
            for name, dtype, shape in announced.get("tensors", ())
        }
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkerError(f"a shard's state was refused: {error}") from None


def contents(shard: Shard, snapshot: int | None = None) -> Contents:
    """The state as it is, with pushes that wait; or as it was at a snapshot. Shares memory."""
    if snapshot is None:
        version, values = shard.version, shard.values.now.regions
        states = shard.updater.states()
        tables = {name: rows.content() for name, rows in shard.tables.items()}
    else:
        kept = shard.snapshot(snapshot)
        version, values, states = kept.version, kept.values.regions, kept.states
        tables = {name: rows.content() for name, rows in kept.tables.items()}
    made = Contents(version, values)
    for at, state in enumerate(states):
        made.tensors |= {f"state.{at}.{key}": value for key, value in state.items()}
    for name, content in tables.items():
        made.tensors |= {f"table.{name}.{key}": value for key, value in content.items()}
    made.plain["groups"] = shard.updater.groups
    if snapshot is None:
        for name, rows in shard.tables.items():
            if rows.first is not None:
                made.tensors[f"first.{name}"] = rows.first
        _add_pushes(made, shard)
    return made


def _add_pushes(made: Contents, shard: Shard) -> None:
    staging = shard.staging
    made.plain["gone"] = sorted(staging.gone)
    made.plain["settled"] = {
        worker: [settled.below, *sorted(settled.more)]
        for worker, settled in staging.settled.items()
    }
    made.plain["staged"] = []
    for (worker, sequence), gradient in staging.held.items():
        name = f"staged.{worker}.{sequence}"
        made.plain["staged"].append([worker, sequence, gradient.without, list(gradient.rows)])
        made.tensors[name] = gradient.buffer.memory
        for table, (ids, rows) in gradient.rows.items():
            made.tensors |= {f"{name}.{table}.ids": ids, f"{name}.{table}.rows": rows}


def take_up(shard: Shard, content: Contents) -> None:
    """Let a new shard go on from a state.

    Raises:
        WorkerError: it is of another job.
    """
    for own, its in zip(shard.values.now.regions, content.values, strict=True):
        if own is not its:
            own.copy_(its)
    shard.version = content.version
    try:
        for name, rows in shard.tables.items():
            rows.first = content.tensors.get(f"first.{name}")
            kept = below(content.tensors, f"table.{name}.")
            if kept:
                rows.fill(kept)
        if not content.plain:
            return
        tensors, plain = content.tensors, content.plain
        count = len(shard.updater.values)
        shard.updater.refresh(plain["groups"])
        shard.updater.restore([below(tensors, f"state.{at}.") for at in range(count)])
        staging = shard.staging
        staging.gone = set(plain.get("gone", ()))
        for worker, (first, *more) in plain.get("settled", {}).items():
            staging.settled[int(worker)] = Settled(first, more)
        for worker, sequence, without, tables in plain.get("staged", ()):
            name = f"staged.{worker}.{sequence}"
            slot = staging.slot()
            slot.memory.copy_(tensors[name])
            pushed = {
                table: (tensors[f"{name}.{table}.ids"], tensors[f"{name}.{table}.rows"])
                for table in tables
            }
            staging.held[worker, sequence] = Gradient(slot, tuple(without), pushed)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise WorkerError(f"a state is none of shard {shard.job.index}: {error}") from None


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins so, without that beginning."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def write(content: Contents, file: Path) -> None:
    """Write a state to a file: the old one stays until the new one is complete and on disk.

    Args:
        content: the state; each of its tensors in memory of its own.
        file: where to.

    Raises:
        OSError: the disk is full, say.
    """
    values = {f"values.{region}": value for region, value in enumerate(content.values)}
    scratch = file.with_suffix(".new")
    plain = json.dumps({"version": content.version, "plain": content.plain})
    try:
        save_file({**values, **content.tensors}, scratch, {"wagontrain": plain})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    with scratch.open("rb+") as opened:
        os.fsync(opened.fileno())
    scratch.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(file: Path, regions: Iterable[Tensor]) -> Contents:
    """The state that is in a file.

    Args:
        file: it.
        regions: bytes of values as they have to be.

    Raises:
        WorkerError: there is none, or it cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            plain = json.loads(opened.metadata()["wagontrain"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        values = [tensors.pop(f"values.{region}") for region in range(WHOLE)]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WorkerError(f"the state in {file} cannot be read: {error}") from None
    if [len(value) for value in values] != [len(region) for region in regions]:
        raise WorkerError(f"the state in {file} is of another job: its sizes differ")
    return Contents(plain["version"], values, tensors, plain["plain"])


def empty(shard: Shard) -> list[Tensor]:
    """Memory for the values of a state that is to come."""
    return Buffer(shard.job.parts).regions
