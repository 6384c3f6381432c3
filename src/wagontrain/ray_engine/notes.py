"""What a crew's launching process and its leader tell each other.

The leader hears lines on its standard input: first a `Begin`, then names of processes that are to
be started again, at last "over". What it tells are lines of a file in the job's folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NOTES = "notes.jsonl"


@dataclass(frozen=True)
class Begin:
    """What is to be started.

    Args:
        coordinator: where it listens.
        shards: how many.
        secret: of the job.
    """

    coordinator: str
    shards: int
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Began:
    """A process was started: by the name of its log, where, and its number there."""

    name: str
    host: str
    process: int


@dataclass(frozen=True)
class Ended:
    """A process has ended.

    Args:
        name: of its log.
        how: in words.
        status: its exit status; None where it is not known, for its actor is gone.
        failure: what it said about its end, as plain data.
    """

    name: str
    how: str
    status: int | None = None
    failure: dict[str, Any] | None = None


def write(note: Began | Ended, folder: Path) -> None:
    """Add a line to the notes."""
    with (folder / NOTES).open("a") as file:
        file.write(json.dumps({"kind": type(note).__name__, **asdict(note)}) + "\n")


def note_of(line: bytes) -> Began | Ended:
    """The note of a line."""
    fields = json.loads(line)
    kind: type[Began | Ended] = Began if fields.pop("kind") == "Began" else Ended
    return kind(**fields)
