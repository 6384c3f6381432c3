"""New events of a file that another process writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wagontrain.events import parsed

CHUNK = 1 << 20
"""Bytes read at a time, so that a long history is taken in turns with the browsers."""

LONGEST = 16 << 20
"""Bytes of a line beyond which it is passed over: memory has an end."""

_HEAD = 128
_MANY = 64
_TIMES = b'{"kind": "times"'


@dataclass
class Read:
    """What one reading gave.

    Args:
        events: in their order.
        unreadable: lines that are no events.
        again: whether the file is another one than before, or begins anew.
        left: bytes that are in the file beyond what was read.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0
    again: bool = False
    left: int = 0


class Tail:
    """Reads a file of events from its beginning, and then what is added.

    Args:
        path: of the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = b""
        self._position = 0  # where the first line begins that was not whole yet
        self._seen = 0  # bytes of it that were there
        self._skipping = False

    def read(self) -> Read:
        """What is new, at most about `CHUNK` bytes of it.

        A last line that is still being written waits for the next call.
        """
        result = Read()
        try:
            with self.path.open("rb") as file:
                head, size = file.read(_HEAD), file.seek(0, 2)
                # A first event has its time in it: another file begins otherwise.
                if size < self._position or not head.startswith(self._head):
                    result.again = self._position > 0
                    self._position, self._seen, self._skipping = 0, 0, False
                self._head = head
                # From the line's beginning: what its writer left of it may have been taken away.
                file.seek(self._position)
                data = file.read(self._seen + CHUNK)
        except (FileNotFoundError, NotADirectoryError):
            return result
        result.left = max(0, size - self._position - len(data))
        *lines, rest = data.split(b"\n")
        if self._skipping and lines:
            del lines[0]
            self._skipping = False
        if len(rest) > LONGEST and not self._skipping:
            self._skipping = True
            result.unreadable += 1
        self._seen = 0 if self._skipping else len(rest)
        self._position += len(data) - self._seen
        for line in without_old_news(lines):
            event = parsed(line)
            if event is None:
                result.unreadable += 1
            else:
                result.events.append(event)
        return result


def without_old_news(lines: list[bytes]) -> list[bytes]:
    """Where much has come at once, only the last of the events that say what each rank spent.

    With hundreds of ranks they are most of a file, and parsing them most of the time.
    """
    if len(lines) < _MANY:
        return lines
    last = max((at for at, line in enumerate(lines) if line.startswith(_TIMES)), default=-1)
    return [line for at, line in enumerate(lines) if at == last or not line.startswith(_TIMES)]
