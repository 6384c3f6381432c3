"""What happened, in words."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

LINES = 300
"""Kept; of those before there is the number."""

LONGEST = 400
"""Characters of a line."""

SILENT = frozenset({"step", "loss", "times", "workers"})
"""Kinds of events that the page shows otherwise."""

_MANY = frozenset({"dropped", "again", "refused", "mislaid"})
_TROUBLE = frozenset(
    {"failed", "left", "lost", "spoiled", "too_far", "restarted", "mislaid", "refused"}
)


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
        self.kinds: Counter[str] = Counter()
        self._lines: deque[Line] = deque(maxlen=lines)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event; those of which there may be very many stand together."""
        kind = clipped(event["kind"], 40)
        if kind in self.kinds or len(self.kinds) < 100:
            self.kinds[kind] += 1
        last = self._lines[-1] if self._lines else None
        text, when, number = clipped(sentence(event)), float(event["time"]), self.count
        line = Line(number, number, when, kind, text, kind in _TROUBLE)
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


def clipped(text: object, longest: int = LONGEST) -> str:
    """At most so many characters of what may be anything."""
    words = text if isinstance(text, str) else str(text)
    return words if len(words) <= longest else words[: longest - 1] + "…"


def sentence(event: Mapping[str, Any]) -> str:
    """An event as a person reads it."""
    say = _SENTENCES.get(event["kind"])
    if say is not None:
        return say(event)
    fields = (
        f"{key} {clipped(value, 80)}" for key, value in event.items() if key not in ("kind", "time")
    )
    return f"{str(event['kind']).replace('_', ' ')}: {', '.join(fields)}"


def figures(values: Mapping[str, Any]) -> str:
    """Named figures: loss 0.1234, accuracy 0.9876."""
    return ", ".join(
        f"{clipped(name, 40)} {value:.4f}"
        for name, value in list(values.items())[:20]
        if isinstance(value, int | float)
    )


def _start(event: Mapping[str, Any]) -> str:
    count = event["world_size"]
    return f"training begins: {event['strategy']} over {count} worker{'s' * (count != 1)}"


def _validation(event: Mapping[str, Any]) -> str:
    return f"epoch {event['epoch'] + 1}: validation {figures(event['values'])}"


def _joined(event: Mapping[str, Any]) -> str:
    return f"worker {event['worker']} joined, on {event.get('host')} (process {event['process']})"


def _left(event: Mapping[str, Any]) -> str:
    doing = f" while {event['doing']}" if event.get("doing") else ""
    return f"worker {event['worker']} on {event.get('host')} is gone: {event['why']}{doing}"


def _restarted(event: Mapping[str, Any]) -> str:
    which = f"process {event['process']} ({event['what']} of those started)"
    return f"{which} {event['why']}; another begins"


def _shard(event: Mapping[str, Any]) -> str:
    return f"server shard {event['shard']} is back, with update {event['version']}"


def _lost(event: Mapping[str, Any]) -> str:
    count = len(event["leases"])
    what = f"{count} batch{'es' * (count != 1)}"
    return f"what worker {event['worker']} had in hand goes to others: {what}"


def _dropped(event: Mapping[str, Any]) -> str:
    return f"a gradient of worker {event['worker']} does not count: {event['reason']}"


def _again(event: Mapping[str, Any]) -> str:
    return f"worker {event['worker']} takes over work of step {event['step']}"


def _spoiled(event: Mapping[str, Any]) -> str:
    return f"worker {event['worker']} has no gradient: {event['reason']}"


def _end(event: Mapping[str, Any]) -> str:
    return f"training has ended after {event['summary']['steps']} steps"


def _failed(event: Mapping[str, Any]) -> str:
    return f"training failed: {event['message']}"


_SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "start": _start, "validation": _validation, "joined": _joined, "left": _left,
    "restarted": _restarted, "shard_restarted": _shard, "lost": _lost, "dropped": _dropped,
    "again": _again, "spoiled": _spoiled, "end": _end, "failed": _failed,
}  # fmt: skip
