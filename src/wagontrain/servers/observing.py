"""What a coordinator tells whoever keeps or shows what happens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from wagontrain.servers import commands
from wagontrain.servers.contents import Contents
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.messages import Done


@dataclass
class Member:
    """A worker that takes part."""

    number: int
    peer: bytes
    host: str
    process: int
    seen: float
    doing: str = ""
    sent: int = 0
    memory: int = 0
    client: str = ""


class Observer:
    """What happens, for whoever keeps or shows it; all of it may be left out."""

    def committed(self, apply: commands.Apply | commands.Stepped) -> None:
        """An update was decided on."""

    def validated(self, result: commands.Validated) -> None:
        """A validation is complete."""

    def pushed(self, message: Done) -> None:
        """A gradient lies on all shards, whether it counts or not."""

    def noted(self, kind: str, fields: dict[str, Any]) -> None:
        """Something else that belongs among the run's events."""

    def seen(self, member: Member) -> None:
        """A worker has given a sign of life."""

    def looked(self, members: Iterable[Member], fleet: Fleet, now: float) -> None:
        """Several times a second: who is there at `now`, by `time.monotonic`."""

    def kept(self, keep: commands.Keep) -> None:
        """A snapshot is taken."""

    def wants_state(self, keep: commands.Keep) -> bool:
        """Whether the state of a snapshot is to be kept."""
        return False

    def state(self, keep: commands.Keep, parts: list[Contents]) -> None:
        """The whole state of a snapshot, of every shard."""
