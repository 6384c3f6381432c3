"""What a shard is to hold, as plain data that the coordinator sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic
from pydantic import TypeAdapter

from wagontrain.errors import WorkerError
from wagontrain.servers.parts import Part
from wagontrain.servers.tables import Table


@dataclass(frozen=True)
class Job:
    """What a shard is to hold, and how it is updated.

    Args:
        index, shards: which of how many it is.
        parts: its own, as `divide` gave them.
        rule: name of the update rule, see `rules`.
        settings: of the rule: `strength` of dc-asgd.
        optimizer: class of the task's optimizer in torch.optim.
        groups: settings of each of its groups of parameters.
        tables: embedding tables that live on the shards.
        seed: what their rows are drawn from.
        most: pushes of one worker that may be put aside at a time.
        file: where the state is written to; "" for nowhere.
        every: seconds from one writing to the next.
    """

    index: int
    shards: int
    parts: tuple[Part, ...]
    rule: str = "optimizer"
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "SGD"
    groups: tuple[dict[str, Any], ...] = ({},)
    tables: tuple[Table, ...] = ()
    seed: int = 0
    most: int = 64
    file: str = ""
    every: float = 60.0

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Job:
        """From plain data.

        Raises:
            WorkerError: it is none.
        """
        try:
            return _ADAPTER.validate_python(dict(plain))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise WorkerError(f"a shard's job was refused: {first['msg']} at {where}") from None

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        made: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return made


_ADAPTER = TypeAdapter(Job)
