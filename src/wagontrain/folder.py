"""The files of a run.

RUN_DIR/plan.json               the strategy and its settings
RUN_DIR/events.jsonl            everything that happened, see `events`
RUN_DIR/summary.json            how it ended
RUN_DIR/checkpoints/            step-N: the whole state; model.safetensors: the weights at the end
RUN_DIR/tensorboard/            curves
RUN_DIR/logs/                   what each worker printed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wagontrain.errors import UsageError
from wagontrain.events import JsonLines, Sink, TensorBoard

_TAKEN = (
    "plan.json", "events.jsonl", "summary.json", "checkpoints/model.safetensors", "logs/rank0.log",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, label: str) -> RunFolder:
        """Make the folder; without a path, `runs/LABEL-DATE-TIME`.

        Raises:
            UsageError: it holds a run already, is a file, or cannot be written.
        """
        folder = fresh(label) if path is None else Path(path)
        if folder.is_file():
            raise UsageError(f"run directory {str(folder)!r} is a file: give another --run-dir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = [name for name in _TAKEN if (folder / name).exists()]
            if taken:
                raise UsageError(
                    f"run directory {str(folder)!r} already holds a run ({taken[0]}): give "
                    "another --run-dir, or move that one away"
                )
            for name in ("checkpoints", "logs"):
                (folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"run directory {str(folder)!r} cannot be made: {error.strerror}; give another "
                "--run-dir"
            ) from error
        return cls(folder)

    @property
    def events(self) -> Path:
        """The file of events."""
        return self.path / "events.jsonl"

    @property
    def logs(self) -> Path:
        """The folder of what workers printed."""
        return self.path / "logs"

    @property
    def weights(self) -> Path:
        """The trained weights, under the plain model's names."""
        return self.path / "checkpoints" / "model.safetensors"

    def discard(self) -> None:
        """Take the folder away again, if nothing was run in it."""
        kept = (self.path / name for name in _TAKEN[:-1])
        if any(file.exists() for file in kept if file != self.events) or _size(self.events):
            return
        self.events.unlink(missing_ok=True)  # opened, and nothing was to be told
        for name in ("checkpoints", "logs", "stacks", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # it held something else before
            self.path.rmdir()

    def sinks(self) -> list[Sink]:
        """Where events of this run are kept."""
        return [JsonLines(self.events), TensorBoard(self.path / "tensorboard")]

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Keep what is going to be run."""
        _write_json(self.path / "plan.json", plan)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep how it ended."""
        _write_json(self.path / "summary.json", summary)

    def write_traceback(self, rank: int, text: str) -> None:
        """Keep where a rank failed; what is shown is one line."""
        (self.logs / f"rank{rank}.traceback").write_text(text)

    def has_ended(self) -> bool:
        """Whether a run has written how it ended."""
        return (self.path / "summary.json").exists()

    def read_summary(self) -> dict[str, Any]:
        """How it ended."""
        result: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return result


def fresh(label: str) -> Path:
    """`runs/LABEL-DATE-TIME`, or with a number behind it where two start in the same second."""
    parent, name = Path("runs"), f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [parent / name, *(parent / f"{name}-{number}" for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, default=str) + "\n")
    part.replace(path)


def checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
