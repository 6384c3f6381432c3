"""A shard's state on disk, written now and then without holding anybody up."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

from wagontrain.servers.contents import Contents, contents, write
from wagontrain.servers.shard import Shard


class Keeper:
    """Writes a shard's state to its file every so many seconds.

    The state is copied between two commits; the copy is written in a thread.
    """

    def __init__(self, shard: Shard, file: Path) -> None:
        self.shard = shard
        self.file = file
        self.problem: str | None = None
        self._next = time.monotonic() + shard.job.every
        self._written = -1
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Begin to write if it is time, and anything has changed."""
        now = time.monotonic()
        busy = self._thread is not None and self._thread.is_alive()
        if now < self._next or busy or self.shard.version == self._written:
            return
        self._next = now + self.shard.job.every
        self._written = self.shard.version
        content = contents(self.shard)
        copy = replace(
            content,
            values=[value.clone() for value in content.values],
            tensors={name: value.clone() for name, value in content.tensors.items()},
        )
        self._thread = threading.Thread(target=self._write, args=(copy,), name="keeper")
        self._thread.start()

    def _write(self, copy: Contents) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write(copy, self.file)
        except OSError as error:
            self.problem = f"the state could not be written to {self.file}: {error}"

    def close(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
