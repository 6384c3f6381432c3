"""What every worker is doing, among the events of a run, for whoever watches it from outside.

Once a second is enough for a person, and with many workers that would be much to write and keep:
workers that do the same are written together, and no more than some kB a second on average.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from wagontrain.events import Events

SECONDS = 1.0
"""Between two events, where there is not too much to say."""

BYTES_PER_SECOND = 2000
"""Written on average at most."""

SLOWER, WAITED = 1.3, 0.1
"""A worker is slow that takes so many times as long as the median of the others, where these wait
so much of their time."""


class Signs:
    """Writes events of the kind "workers", from whichever thread hears the workers.

    Args:
        events: where they go: into the run's files, and not to somebody who would be called from
            a thread that he does not know of.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._due = 0.0

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() >= self._due

    def send(self, doing: Mapping[int, str], silent: Mapping[int, float], **more: Any) -> None:
        """One event.

        Args:
            doing: of each worker a phrase, such as "in step 812".
            silent: seconds since each was last heard of.
            more: further fields.
        """
        alike: dict[str, list[int]] = {}
        for number, phrase in doing.items():
            alike.setdefault(phrase, []).append(number)
        quiet = {
            str(number): round(seconds, 1)
            for number, seconds in silent.items()
            if seconds > 2 * SECONDS
        }
        fields = {
            "doing": {phrase: ranges(numbers) for phrase, numbers in alike.items()},
            "silent": quiet,
            **more,
        }
        every = max(SECONDS, len(json.dumps(fields)) / BYTES_PER_SECOND)
        self._due = time.monotonic() + every
        with contextlib.suppress(OSError):  # whoever trains meets a full disk, too, and says so
            self._events.send("workers", every=round(every, 1), **fields)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as a short text: 0-3,7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def numbers_in(text: str) -> list[int]:
    """What `ranges` wrote.

    Raises:
        ValueError: it is no such text, or of more numbers than there can be workers.
    """
    found: list[int] = []
    for span in filter(None, text.split(",")):
        parts = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", span)
        if parts is None:
            raise ValueError(f"{span!r} is no range of numbers")
        begin, end = int(parts[1]), int(parts[2] or parts[1])
        if end - begin > 1_000_000:
            raise ValueError(f"{span!r} are too many workers")
        found.extend(range(begin, end + 1))
    return found
