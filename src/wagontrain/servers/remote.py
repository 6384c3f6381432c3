"""Embedding layers whose tables are on the shards: a worker has the rows that a lease needs.

A forward pass asks the shards for the rows of its ids, each once, and waits for them: one round
trip for each table, less where the lease had those rows before. Autograd gives their gradients,
which travel with the next push, each row once.

Bytes for each row of a batch, b in a row: b down, b up, and its id, of 2, 4 or 8 bytes, twice up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wagontrain.errors import ModelError
from wagontrain.servers.messages import RowBytes
from wagontrain.servers.parts import torch_type
from wagontrain.servers.placing import Layer, Placed
from wagontrain.servers.tables import Table, summed

Rows = dict[str, tuple[Tensor, Tensor]]
"""table -> ids, each once and ascending, and what belongs to them: [ids, dim]."""


class Shards(Protocol):
    """Where rows are asked for: see `client.Client`."""

    def rows(
        self, wanted: Callable[[int], Rows], at_least: int, snapshot: int | None
    ) -> Future[RowBytes]:
        """Begin to fetch rows into place."""

    def await_(self, future: Future[RowBytes]) -> RowBytes:
        """A result."""


@dataclass
class _Held:
    """Rows of one table that a lease has, and those that gradients are taken of."""

    ids: Tensor
    values: Tensor
    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Tables:
    """All tables, for one worker.

    Args:
        tables: them.
        shards: how many shards there are.
        lines: to them.

    Attributes:
        bytes: of rows, since `take_bytes` was called last.
    """

    def __init__(self, tables: Sequence[Table], shards: int, lines: Shards) -> None:
        self._tables = {table.name: table for table in tables}
        self._shards = shards
        self._lines = lines
        self._at_least = 0
        self._snapshot: int | None = None
        self._held: dict[str, _Held] = {}
        self._collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._bytes = RowBytes()

    def begin(self, at_least: int, snapshot: int | None = None) -> None:
        """A lease begins: rows with so many commits in them, or of a snapshot."""
        self._at_least, self._snapshot = at_least, snapshot
        self._held = {table.name: _nothing(table) for table in self._tables.values()}

    def read(self, table: Table, ids: Tensor) -> Tensor:
        """Rows, [ids, dim], a leaf of the graph where gradients are wanted.

        Args:
            table: whose.
            ids: int64 on the CPU, each once and ascending.

        Raises:
            ModelError: there is no row of an id.
        """
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < table.rows:
            bad = ids[(ids < 0) | (ids >= table.rows)][0]
            raise ModelError(
                f"id {int(bad)} is none of table {table.name!r}, which has rows 0 to "
                f"{table.rows - 1}: look at the data, or make the table larger"
            )
        held = self._held[table.name]
        missing = ids[~torch.isin(ids, held.ids, assume_unique=True)]
        if len(missing):
            self._fetch(table, held, missing)
        rows = held.values[torch.searchsorted(held.ids, ids)]
        if torch.is_grad_enabled():
            rows.requires_grad_()
            held.leaves.append((ids, rows))
        return rows

    def _fetch(self, table: Table, held: _Held, ids: Tensor) -> None:
        parts = [self._own(table, ids, shard) for shard in range(self._shards)]
        room = [
            torch.empty((len(part), table.dim), dtype=torch_type(table.dtype)) for part in parts
        ]

        def wanted(shard: int) -> Rows:
            if not len(parts[shard]):
                return {}
            return {table.name: (parts[shard].to(table.id_type), room[shard])}

        moved = self._lines.await_(self._lines.rows(wanted, self._at_least, self._snapshot))
        if self._snapshot is None:
            touched = len(ids) * table.row_bytes
            self._count(RowBytes(touched, moved.sent, moved.received))
        together = torch.cat([held.ids, *parts])
        order = torch.argsort(together)
        held.ids, held.values = together[order], torch.cat([held.values, *room])[order]

    def _own(self, table: Table, ids: Tensor, shard: int) -> Tensor:
        return ids[ids % self._shards == shard]

    def collect(self, counts: bool = True) -> None:
        """Add up the gradients of a backward pass; unless its samples count for nothing."""
        for name, held in self._held.items():
            padding = self._tables[name].padding
            for ids, leaf in held.leaves if counts else ():
                if leaf.grad is not None:
                    real = ids != padding  # its row never changes
                    self._collected.setdefault(name, []).append((ids[real], leaf.grad[real]))
            held.leaves = []

    def forget(self) -> None:
        """The gradients collected are needed no longer."""
        self._collected = {}

    def gradients(self) -> Rows:
        """Gradients of all leases collected, each row once."""
        return {
            name: summed([ids for ids, _ in parts], [gradient for _, gradient in parts])
            for name, parts in self._collected.items()
        }

    def slices(self, rows: Rows) -> Callable[[int], Rows]:
        """Which of these each shard has, as they travel."""

        def of(shard: int) -> Rows:
            found: Rows = {}
            for name, (ids, gradients) in rows.items():
                mine = ids % self._shards == shard
                if mine.any():
                    found[name] = ids[mine].to(self._tables[name].id_type), gradients[mine]
            return found

        made = [of(shard) for shard in range(self._shards)]
        return lambda shard: made[shard]

    def _count(self, moved: RowBytes) -> None:
        total = self._bytes
        self._bytes = RowBytes(
            total.touched + moved.touched, total.sent + moved.sent, total.received + moved.received
        )

    def take_bytes(self) -> RowBytes:
        """What was moved since the last call."""
        taken, self._bytes = self._bytes, RowBytes()
        return taken


def _nothing(table: Table) -> _Held:
    empty = torch.empty((0, table.dim), dtype=torch_type(table.dtype))
    return _Held(torch.empty(0, dtype=torch.int64), empty)


class RemoteEmbedding(nn.Module):
    """Stands in for an embedding layer whose table is on the shards.

    `weight` has its name and shape, and no memory.

    Args:
        layer: the one that was there.
        table: its table.
        tables: where rows come from.
    """

    def __init__(self, layer: Layer, table: Table, tables: Tables) -> None:
        super().__init__()
        self.num_embeddings = layer.num_embeddings
        self.embedding_dim = layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.sparse = layer.sparse
        self.table = table
        self._tables = tables
        self._bag: dict[str, Any] | None = None
        if isinstance(layer, nn.EmbeddingBag):
            self._bag = {"mode": layer.mode, "include_last_offset": layer.include_last_offset}

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As nn.Embedding, or as nn.EmbeddingBag."""
        ids, places = torch.unique(input, return_inverse=True)
        known = ids.long().cpu()
        rows = self._tables.read(self.table, known).to(input.device)
        padding = None
        if self.padding_idx is not None:
            at = (known == self.padding_idx).nonzero().view(-1)
            padding = int(at[0]) if len(at) else None
        if self._bag is None:
            return F.embedding(places, rows, padding)
        bag: Tensor = F.embedding_bag(
            places, rows, offsets, per_sample_weights=per_sample_weights, padding_idx=padding,
            **self._bag,
        )  # fmt: skip
        return bag

    def extra_repr(self) -> str:
        """What it is."""
        return f"{self.num_embeddings}, {self.embedding_dim}, on the servers"


def stand_in(placed: Placed, device: torch.device, tables: Tables) -> nn.Module:
    """Put stand-ins in the place of layers whose tables are on the shards.

    Args:
        placed: the model and those layers.
        device: where the rest of the model goes.
        tables: where rows come from.
    """
    model = placed.model
    weights = {}
    for (name, layer), table in zip(placed.layers.items(), placed.tables(), strict=True):
        weights[name] = nn.Parameter(torch.empty_like(layer.weight, device="meta"))
        model.set_submodule(name, RemoteEmbedding(layer, table, tables))
    model.to(device)
    for name, weight in weights.items():  # not before: what has no memory cannot be moved
        model.get_submodule(name).register_parameter("weight", weight)
    return model
