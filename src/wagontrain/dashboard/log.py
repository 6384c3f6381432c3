"""What happened, a line each: the last few hundred of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wagontrain.sentences import clipped, is_trouble, sentence

LINES = 300
"""Kept; of those before there is the number."""

_MANY = frozenset({"dropped", "again", "refused", "mislaid"})


@dataclass
class Line:
    """One line of the log.

    Args:
        number: counted from the run's beginning, of the last event that it stands for.
        first: number of the first of them, which stays.
        time: seconds since the epoch.
        kind: of event.
        text: for a person.
        trouble: whether something went wrong.
        times: how many such events in a row it stands for.
    """

    number: int
    first: int
    time: float
    kind: str
    text: str
    trouble: bool
    times: int = 1


class Log:
    """The last lines; `count` events there were, and `before` of them stand in no line any more."""

    def __init__(self, lines: int = LINES) -> None:
        self.count = self.before = 0
        self._lines: deque[Line] = deque(maxlen=lines)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event; those of which there may be very many stand together."""
        kind = clipped(event["kind"], 40)
        last = self._lines[-1] if self._lines else None
        text, when, number = sentence(event), float(event["time"]), self.count
        line = Line(number, number, when, kind, text, is_trouble(event))
        if last is not None and last.kind == kind and kind in _MANY:
            line.first, line.times = last.first, last.times + 1
            self._lines.pop()
        if len(self._lines) == self._lines.maxlen:
            self.before += self._lines[0].times
        self._lines.append(line)
        self.count += 1

    def since(self, number: int) -> list[dict[str, Any]]:
        """Lines from this number on."""
        return [asdict(line) for line in self._lines if line.number >= number]
