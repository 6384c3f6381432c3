"""Embedding tables that live on the shards only, and hold what rows were touched.

Row r of a table is on shard r mod M. It exists, with its optimizer state, from its first update
on. Before, its values are those that the shard was given to begin with, or where it was given
none are drawn from (seed, table, row), so that they are the same whoever asks and whenever.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wagontrain.errors import WorkerError
from wagontrain.servers.parts import torch_type
from wagontrain.servers.rules import Rule, Settings

# Named by Python from 3.13 on; more address space than there is memory has to be asked for so.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
Bits = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Table:
    """An embedding table.

    Args:
        name: of its weight in the model.
        rows: how many there can be.
        dim: numbers in a row.
        dtype: their type.
        group: of parameters that it belongs to.
        std: standard deviation of a new row's numbers.
        padding: the row that is drawn as zeros; -1 for none.
    """

    name: str
    rows: int
    dim: int
    dtype: str = "float32"
    group: int = 0
    std: float = 1.0
    padding: int = -1

    @property
    def id_type(self) -> torch.dtype:
        """Type in which ids of rows travel."""
        kinds = (torch.int16, torch.int32, torch.int64)
        return next(kind for kind in kinds if self.rows - 1 <= torch.iinfo(kind).max)

    @property
    def row_bytes(self) -> int:
        """Of the numbers of a row."""
        return self.dim * torch_type(self.dtype).itemsize


def untouched(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros, so many, for which there is no memory until they are written to."""
    if size == 0:
        return torch.zeros(0, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags), dtype=dtype)


class Rows:
    """One shard's rows of a table: values and state, in the order of their first update.

    Args:
        table: which.
        rule: how rows are updated.
        index, shards: which rows are here.
        seed: what new rows are drawn from.

    Attributes:
        first: what rows are before their first update, [rows here, dim]; None: they are drawn.
    """

    def __init__(self, table: Table, rule: Rule, index: int, shards: int, seed: int) -> None:
        self.table = table
        self.rule = rule
        self.index = index
        self.shards = shards
        self.count = 0
        self._key = _key(f"{seed} {table.name}")
        self.first: Tensor | None = None
        here = len(range(index, table.rows, shards))
        # Address space for all rows; the kernel gives memory for those that are written.
        self._slots = untouched(here, torch.int64)  # 0: none, else slot + 1
        self._ids = untouched(here, torch.int64)
        dtype = torch_type(table.dtype)
        widths = {"values": table.dim} | dict.fromkeys(rule.like, table.dim)
        self._kept = {
            key: untouched(here * width, dtype).view(here, width) for key, width in widths.items()
        } | {key: untouched(here, torch.float32).view(here, 1) for key in rule.single}

    def require(self, ids: Tensor) -> None:
        """Check that these are ids of rows that are here.

        Raises:
            WorkerError: one is not.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.table.rows:
            raise WorkerError(
                f"table {self.table.name!r} has rows 0 to {self.table.rows - 1}, and "
                f"{int(ids.min())} to {int(ids.max())} were asked for"
            )
        astray = ids[ids % self.shards != self.index]
        if len(astray):
            raise WorkerError(
                f"row {int(astray[0])} of table {self.table.name!r} is on shard "
                f"{int(astray[0]) % self.shards}, not here on shard {self.index}"
            )

    def slots(self, ids: Tensor) -> Tensor:
        """Where rows are kept, -1 for those that are not there yet."""
        return self._slots[ids // self.shards] - 1

    def read(self, ids: Tensor) -> Tensor:
        """Values of rows, [ids, dim], as a copy."""
        if not self.count:
            return self.new(ids)
        slots = self.slots(ids)
        rows = self._kept["values"][slots.clamp(min=0)]
        absent = slots < 0
        if absent.any():
            rows[absent] = self.new(ids[absent])
        return rows

    def new(self, ids: Tensor) -> Tensor:
        """What rows are before their first update, [ids, dim]."""
        if self.first is not None:
            return self.first[ids // self.shards]
        counters = ids.numpy().astype(np.uint64)[:, None] * np.uint64(self.table.dim)
        columns = np.arange(self.table.dim, dtype=np.uint64)
        numbers = _normal(counters + columns, self._key) * self.table.std
        rows = torch.from_numpy(numbers).to(torch_type(self.table.dtype))
        rows[ids == self.table.padding] = 0
        return rows

    def update(self, ids: Tensor, gradient: Tensor, settings: Settings) -> None:
        """One update of rows.

        Args:
            ids: of the rows, each once.
            gradient: [ids, dim]; may be overwritten.
            settings: of the table's group.
        """
        slots = self.place(ids)
        state = {key: value[slots] for key, value in self._kept.items()}
        values = state.pop("values")
        self.rule.update(values, gradient, state, settings)
        self.write(slots, {"values": values, **state})

    def place(self, ids: Tensor) -> Tensor:
        """Where rows are kept; those that are new are drawn."""
        slots = self.slots(ids)
        absent = ids[slots < 0]
        if len(absent):
            start, self.count = self.count, self.count + len(absent)
            self._slots[absent // self.shards] = torch.arange(start, self.count) + 1
            self._ids[start : self.count] = absent
            self._kept["values"][start : self.count] = self.new(absent)
            slots = self.slots(ids)
        return slots

    def write(self, slots: Tensor, kept: dict[str, Tensor]) -> None:
        """Put values and state of rows back in place."""
        for key, value in kept.items():
            self._kept[key][slots] = value

    def taken(self, slots: Tensor) -> dict[str, Tensor]:
        """Values and state of rows, as copies."""
        return {key: value[slots] for key, value in self._kept.items()}

    def content(self) -> dict[str, Tensor]:
        """Ids, values and state of all rows there are, sharing memory."""
        return {"ids": self._ids[: self.count]} | {
            key: value[: self.count] for key, value in self._kept.items()
        }

    def fill(self, content: dict[str, Tensor]) -> None:
        """Take up what `content` gave, in a table without rows; state may be left out."""
        ids = content["ids"]
        self.count = len(ids)
        self._slots[ids // self.shards] = torch.arange(self.count) + 1
        self._ids[: self.count] = ids
        self._kept["values"][: self.count] = content["values"]
        for key, kept in self._kept.items():
            if key in content:
                kept[: self.count] = content[key]


class KeptRows:
    """A table as it was at one time: what was changed since is put aside before it is changed."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.count = rows.count
        self._aside = untouched(self.count, torch.int64)  # of a slot, 0: unchanged, else place + 1
        self._changed = 0
        self._kept: list[dict[str, Tensor]] = []

    def before(self, ids: Tensor) -> None:
        """Rows of these ids, each once, are about to be updated."""
        slots = self.rows.slots(ids)
        slots = slots[(slots >= 0) & (slots < self.count)]
        slots = slots[self._aside[slots] == 0]
        if len(slots):
            first, self._changed = self._changed + 1, self._changed + len(slots)
            self._aside[slots] = torch.arange(first, self._changed + 1)
            self._kept.append(self.rows.taken(slots))

    def read(self, ids: Tensor) -> Tensor:
        """Values of rows as they were, [ids, dim]."""
        values = self.rows.read(ids)
        slots = self.rows.slots(ids)
        later = slots >= self.count
        values[later] = self.rows.new(ids[later])
        places = torch.zeros_like(slots)
        there = (slots >= 0) & ~later
        places[there] = self._aside[slots[there]]
        changed = places > 0
        if changed.any():
            values[changed] = self._together()["values"][places[changed] - 1]
        return values

    def content(self) -> dict[str, Tensor]:
        """All rows as they were, as copies."""
        content = {key: value[: self.count].clone() for key, value in self.rows.content().items()}
        changed = self._aside.nonzero().view(-1)
        if len(changed):
            for key, value in self._together().items():
                content[key][changed] = value[self._aside[changed] - 1]
        return content

    def _together(self) -> dict[str, Tensor]:
        """What was put aside, in one piece."""
        if len(self._kept) > 1:
            pieces = self._kept
            self._kept = [{key: torch.cat([each[key] for each in pieces]) for key in pieces[0]}]
        return self._kept[0]


def summed(ids: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of rows added up, in the order given: each id once, and its sum."""
    together, places = torch.unique(torch.cat(list(ids)), return_inverse=True)
    rows = torch.cat(list(gradients))
    total = torch.zeros((len(together), rows.shape[1]), dtype=rows.dtype)
    return together, total.index_add_(0, places, rows)


def _key(text: str) -> np.uint64:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mixed(numbers: Bits) -> Bits:
    """splitmix64: 64 bits that look random for each counter (Steele et al. 2014)."""
    z = numbers * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _normal(counters: Bits, key: np.uint64) -> npt.NDArray[np.float64]:
    """A number of the standard normal distribution for each counter (Box and Muller 1958)."""
    first, second = (
        (_mixed(counters * np.uint64(2) + np.uint64(which) + key) >> np.uint64(11)) * 2.0**-53
        for which in (0, 1)
    )
    numbers: npt.NDArray[np.float64] = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * math.pi * second)
    return numbers
