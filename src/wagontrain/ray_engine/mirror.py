"""A folder on one host, copied to another as it grows. No filesystem is shared.

Files that grow are sent from where the copy ends; files that are put in place by a rename are
sent anew, and the copy is put in place the same way. Names that end in .part are not sent, nor
what is in a folder of such a name; what says that a checkpoint is whole is sent last.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wagontrain.errors import WorkerError

MOST_BYTES = 16 << 20
"""Most bytes that are sent at once."""

_PART = ".part"
_SEAL = "state.json"


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file.

    Args:
        name: the file's path in the folder, with slashes.
        start: where in the file they belong; 0 begins the file anew.
        content: the bytes.
        whole: whether the copy is complete with them, for now.
    """

    name: str
    start: int
    content: bytes
    whole: bool


class Original:
    """The folder that is copied."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Kept open, so that no other file can take the inode's number.
        self._open: dict[str, BinaryIO] = {}
        self._sent: dict[str, int] = {}

    def pieces(self, most: int = MOST_BYTES) -> list[Piece]:
        """What is new since the last call, the smallest first, up to so many bytes."""
        found = []
        for left, name in sorted(self._changed(), key=lambda each: (each[1].endswith(_SEAL), each)):
            if most <= 0:
                break
            start, file = self._sent.get(name, 0), self._open[name]
            file.seek(start)
            content = file.read(min(left, most))
            most -= len(content)
            self._sent[name] = start + len(content)
            found.append(Piece(name, start, content, whole=len(content) == left))
        return found

    def _changed(self) -> list[tuple[int, str]]:
        """Bytes left to send of each file that has any, or that is new."""
        changed = []
        # Older checkpoints go meanwhile, which rglob takes for an error.
        found = [Path(folder, name) for folder, _, names in os.walk(self._folder) for name in names]
        for path in found:
            inside = path.relative_to(self._folder)
            unfinished = any(part.endswith(_PART) for part in inside.parts)
            if unfinished or path.is_symlink() or not path.is_file():
                continue
            name = inside.as_posix()
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                self._look_at(name, path)
                left = os.fstat(self._open[name].fileno()).st_size - self._sent.get(name, 0)
                if left > 0 or name not in self._sent:
                    changed.append((left, name))
        return changed

    def _look_at(self, name: str, path: Path) -> None:
        """Open a file that has not been sent in its present form."""
        if name in self._open:
            now, before = path.stat(), os.fstat(self._open[name].fileno())
            replaced = (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino)
            if not replaced and now.st_size >= self._sent.get(name, 0):
                return
            self._open.pop(name).close()
            self._sent.pop(name, None)
        self._open[name] = path.open("rb")

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.close()


class Copy:
    """The folder that pieces are put into."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def put(self, piece: Piece) -> None:
        """Write a piece; a file that is replaced is there, the old or the new, at any moment.

        Raises:
            WorkerError: the piece belongs outside the folder.
        """
        path = (self._folder / piece.name).resolve()
        if not path.is_relative_to(self._folder):
            raise WorkerError(f"a worker sent the file {piece.name!r}, outside the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        if piece.start == 0:
            part.write_bytes(piece.content)
        else:
            with (part if part.exists() else path).open("ab") as file:
                file.write(piece.content)
        if piece.whole and part.exists():
            part.replace(path)
