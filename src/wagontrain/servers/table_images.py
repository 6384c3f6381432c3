"""Tables as the coordinator has them: what shards begin with, and what a checkpoint holds.

Where the whole model has room on the coordinator's host, its tables are there too: shards get the
first values of their rows from it, as one process would draw them, and a checkpoint has a table as
any other parameter. Beside it are the steps of each row, of which torch's optimizers keep one for
all: `tables.NAME.step`.

Where it has not, the shards draw rows when they are touched, and a checkpoint holds just those:
`tables.NAME.ids`, `tables.NAME.values` and what the optimizer keeps, `tables.NAME.KEY`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wagontrain.layout import Layout
from wagontrain.servers.contents import Contents, below
from wagontrain.servers.rules import Rule, rule_of_tables
from wagontrain.servers.tables import Table
from wagontrain.state import Held, Source

_PREFIX = "tables."


class TableImages:
    """All tables of a job.

    Args:
        tables: them.
        model: has their weights, with or without memory.
        optimizer: of the model.
        whole: whether the weights have memory.
        rule: of the servers.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        model: nn.Module,
        optimizer: Optimizer,
        whole: bool,
        rule: str,
    ) -> None:
        self.all = tuple(tables)
        self._optimizer = optimizer
        self._whole = whole
        self._own = rule == "optimizer"
        parameters = dict(model.named_parameters())
        self._weights = {table.name: parameters[table.name] for table in tables}
        self._rules = {
            table.name: rule_of_tables(
                rule, type(optimizer).__name__, optimizer.param_groups[table.group]
            )
            for table in tables
        }
        self._touched: dict[str, dict[str, Tensor]] = {}
        self._steps: dict[str, Tensor] = {}
        for table in tables if self._own else ():
            if not whole:
                optimizer.state.pop(self._weights[table.name], None)  # Adagrad has made some
            elif self._rule(table).single:
                self._steps[table.name] = torch.zeros((table.rows, 1), dtype=torch.float32)

    def _rule(self, table: Table) -> Rule:
        return self._rules[table.name]

    @property
    def more(self) -> Held:
        """What a checkpoint holds of tables beside the model and its optimizer."""
        held = Held()
        kept = {name: {"step": steps} for name, steps in self._steps.items()} | self._touched
        for name, tensors in kept.items():
            for key, value in tensors.items():
                held.add(f"{_PREFIX}{name}.{key}", value, Layout.whole(value))
        return held

    def restored(self, source: Source) -> None:
        """A checkpoint was taken up; take from it what only tables have."""
        shapes = source.shapes()
        for table in self.all:
            prefix = f"{_PREFIX}{table.name}."
            if not self._whole:
                wanted = {name: Layout(shapes[name]) for name in shapes if name.startswith(prefix)}
                if wanted:
                    self._touched[table.name] = below(source.read(wanted), prefix)
            elif table.name in self._steps and f"{prefix}step" not in shapes:
                # Of a strategy that counts the steps of all rows as one.
                state = self._optimizer.state.get(self._weights[table.name], {})
                self._steps[table.name].fill_(float(state.get("step", 0)))

    def part(self, index: int, shards: int) -> dict[str, Tensor]:
        """What one shard begins with, as `contents` names it."""
        made: dict[str, Tensor] = {}
        for table in self.all:
            kept = self._touched.get(table.name, {})
            ids = kept.get("ids", torch.empty(0, dtype=torch.int64))
            here = (ids % shards == index).nonzero().view(-1)
            rows = {key: value[here] for key, value in kept.items()}
            if self._whole:
                mine = self._weights[table.name].detach()[index::shards].clone()
                made[f"first.{table.name}"] = mine
                rows = self._rows_with_state(table, mine, index, shards)
            if len(rows.get("ids", ())):
                made |= {f"table.{table.name}.{key}": value for key, value in rows.items()}
        return made

    def _rows_with_state(
        self, table: Table, values: Tensor, index: int, shards: int
    ) -> dict[str, Tensor]:
        """The rows of a shard for which the optimizer keeps something else than zeros."""
        state = self._optimizer.state.get(self._weights[table.name], {})
        kept = {
            key: state[key][index::shards]
            for key in self._rule(table).like
            if self._own and state.get(key) is not None
        }
        if table.name in self._steps:
            kept["step"] = self._steps[table.name][index::shards]
        if not kept:
            return {}
        places = torch.stack([(each != 0).any(1) for each in kept.values()]).any(0)
        at = places.nonzero().view(-1)
        rows = {"ids": at * shards + index, "values": values[at]}
        return rows | {key: value[at] for key, value in kept.items()}

    def take(self, kept: Sequence[Contents]) -> None:
        """Put in what all shards have."""
        for table in self.all:
            pieces = [below(content.tensors, f"table.{table.name}.") for content in kept]
            if self._whole:
                for rows in pieces:
                    self._put(table, rows)
            else:
                self._touched[table.name] = {
                    key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]
                }

    def _put(self, table: Table, rows: dict[str, Tensor]) -> None:
        weight, ids = self._weights[table.name], rows["ids"]
        with torch.no_grad():
            weight[ids] = rows["values"]
        if not self._own or not len(ids):
            return
        state = self._optimizer.state[weight]
        for key in self._rule(table).like:
            if state.get(key) is None:
                state[key] = torch.zeros_like(weight)
            state[key][ids] = rows[key]
        if table.name in self._steps:
            steps = self._steps[table.name]
            steps[ids] = rows["step"]
            state["step"] = steps.max()
