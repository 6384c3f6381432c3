"""What happened in a run, in words: the same on the live page, in the report and in a trace.

Fields of events are listed in `events`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 400
"""Characters of a sentence."""

FIGURES = frozenset({"step", "loss", "times", "workers"})
"""Kinds of events that are figures or signs of life: nothing that happened."""

OWN_WILL = "left of its own will"
"""Why a worker left that nobody has to look for."""

_TROUBLE = frozenset(
    {
        "failed",
        "left",
        "lost",
        "spoiled",
        "too_far",
        "restarted",
        "mislaid",
        "refused",
        "shard_lost",
    }
)


def sentence(event: Mapping[str, Any]) -> str:
    """An event as a person reads it, in at most `LONGEST` characters.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it lacks what it should say.
    """
    say = _SENTENCES.get(event["kind"], _other)
    return clipped(say.format_map(event) if isinstance(say, str) else say(event))


def is_trouble(event: Mapping[str, Any]) -> bool:
    """Whether somebody should look at it: who leaves of its own will is no loss."""
    if event["kind"] == "lost":
        return bool(event["leases"])
    return event["kind"] in _TROUBLE and event.get("why") != OWN_WILL


def cause(message: str) -> str:
    """Why a run failed, from what its last event says of that."""
    return "stopped by Ctrl-C" if message.startswith("KeyboardInterrupt") else message


def clipped(text: object, longest: int = LONGEST) -> str:
    """At most so many characters of what may be anything."""
    words = text if isinstance(text, str) else str(text)
    return words if len(words) <= longest else words[: longest - 1] + "…"


def _other(event: Mapping[str, Any]) -> str:
    fields = (
        f"{key} {clipped(value, 80)}" for key, value in event.items() if key not in ("kind", "time")
    )
    return f"{str(event['kind']).replace('_', ' ')}: {', '.join(fields)}"


def _start(event: Mapping[str, Any]) -> str:
    count = event["world_size"]
    return f"training begins: {event['strategy']} over {count} worker{'s' * (count != 1)}"


def _validation(event: Mapping[str, Any]) -> str:
    values = ", ".join(
        f"{clipped(name, 40)} {value:.4f}"
        for name, value in list(event["values"].items())[:20]
        if isinstance(value, int | float)
    )
    return f"epoch {event['epoch'] + 1}: validation {values}"


def _left(event: Mapping[str, Any]) -> str:
    doing = f" while {event['doing']}" if event.get("doing") else ""
    return f"worker {event['worker']} on {event.get('host')} is gone: {event['why']}{doing}"


def _lost(event: Mapping[str, Any]) -> str:
    count = len(event["leases"])
    if not count:
        return f"worker {event['worker']} had nothing in hand"
    what = f"{count} batch{'es' * (count != 1)}"
    return f"what worker {event['worker']} had in hand goes to others: {what}"


def _mislaid(event: Mapping[str, Any]) -> str:
    count = len(event["pushes"])
    return f"a server shard has lost {count} gradient{'s' * (count != 1)}, computed once more"


_SENTENCES: dict[str, str | Callable[[Mapping[str, Any]], str]] = {
    "start": _start,
    "validation": _validation,
    "checkpoint": "checkpoint after {step} steps",
    "stopped": "training stops after {step} steps: {reason}",
    "joined": "worker {worker} joined, on {host} (process {process})",
    "left": _left,
    "restarted": "process {process} ({what} of those started) {why}; another begins",
    "shard_restarted": "server shard {shard} is back, with update {version}",
    "shard_placed": "server shard {shard} is to be on {host}",
    "shard_lost": "server shard {shard} on {host} is lost: {why}",
    "lost": _lost,
    "mislaid": _mislaid,
    "dropped": "a gradient of worker {worker} does not count: {reason}",
    "again": "worker {worker} takes over work of step {step}",
    "spoiled": "worker {worker} has no gradient: {reason}",
    "too_far": "a trial step after {step} steps went too far: {reason}",
    "refused": "somebody was refused: {reason}",
    "end": "training has ended after {summary[steps]} steps",
    "failed": lambda event: f"training failed: {cause(event['message'])}",
}
