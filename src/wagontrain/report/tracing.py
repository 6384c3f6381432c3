"""A run for a trace viewer: the trace event format, as Perfetto and chrome://tracing open it.

| process        | what is in it                                                              |
|----------------|----------------------------------------------------------------------------|
| rank r         | each step's data, computing, waiting and exchange, as measured             |
| run            | steps as rank 0 or the coordinator counted them; events; loss as a counter |
| predicted step | the step as planned, at the beginning of the axis                          |

Measured are the lengths. They are laid out from the beginning of each step in the order in which
they begin; what would reach into the next step is cut there, and its `args` hold what was measured.
Times are whole microseconds: with fractions, one thing would begin a rounding error before the one
before it ended, and viewers drop what overlaps without lying within.

Source: "Trace Event Format" (Google, 2016), events of the phases X, i, C and M.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from wagontrain.errors import UsageError
from wagontrain.report.reading import RankStep, RunRecord, lines, rank_step

STEPS = 2000
"""Steps in a trace, where nobody asks for more: viewers take long to open what is larger."""
_PARTS = ("data", "compute", "waiting", "exchange")

Record = dict[str, Any]


def write(run: RunRecord, file: Path, steps: int = STEPS) -> int:
    """Write a trace of the last steps of a run; returns how many of its steps are in it.

    Args:
        run: as it was read.
        file: to write.
        steps: at most, from the end of the run backwards.

    Raises:
        UsageError: the file cannot be written, or no steps are asked for.
    """
    if steps < 1:
        raise UsageError(f"{steps} steps were asked for: give at least 1")
    found, count = records(run, steps)
    try:
        with file.open("w", encoding="utf-8") as out:
            json.dump({"traceEvents": found, "displayTimeUnit": "ms"}, out, separators=(",", ":"))
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    return count


def records(run: RunRecord, steps: int = STEPS) -> tuple[list[Record], int]:
    """The records of a trace, those that name things first, then in the order of time."""
    ranks = len(run.times.compute)
    rest = _Places(ranks)
    named = [
        *(_named(rank + 1, f"rank {rank}", rank) for rank in range(ranks)),
        _named(rest.run, "run", ranks), _named(rest.predicted, "predicted step", ranks + 1),
    ]  # fmt: skip
    slots = _slots(run, steps)
    begins = min((slot.begin for slot in slots.values()), default=0.0)
    since = 0.0 if len(slots) == len(run.steps.step) else begins
    measured = [*_of_run(run, slots, since, rest), *_of_ranks(run, slots)]
    happened = [
        {"ph": "i", "name": each.kind.replace("_", " "), "ts": _micro(each.time), "pid": rest.run,
         "tid": 0, "s": "g", "args": {"what": each.text}}
        for each in run.happenings
        if each.time >= since
    ]  # fmt: skip
    lanes, predicted = _predicted(run, rest, begins)
    timed = sorted([*measured, *happened, *predicted], key=lambda each: each["ts"])
    return [*named, *lanes, *timed], len(slots)


class _Places:
    """Numbers of processes; those of ranks are one more than theirs."""

    def __init__(self, ranks: int) -> None:
        self.run, self.predicted = ranks + 1, ranks + 2


def _named(process: int, name: str, place: int) -> Record:
    return {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "ts": 0,
            "args": {"name": name, "sort_index": place}}  # fmt: skip


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


def _span(name: str, begin: float, end: float, row: tuple[int, int], **more: Any) -> Record:
    """From one time to another, in a process's row."""
    return {
        "ph": "X", "name": name, "ts": _micro(begin), "dur": _micro(end) - _micro(begin),
        "pid": row[0], "tid": row[1], "args": more,
    }  # fmt: skip


class _Slot(NamedTuple):
    """When a step began and ended, and when the next one began; seconds from the start."""

    begin: float
    end: float
    following: float


def _slots(run: RunRecord, most: int) -> dict[int, _Slot]:
    """The last steps, by number. None begins before the one before it has ended."""
    steps = run.steps
    kept = range(max(0, len(steps.step) - most), len(steps.step))
    found: list[tuple[int, float, float]] = []
    before = 0.0
    for place in kept:
        end = max(before, steps.time[place])
        begin = max(before, end - steps.seconds[place])
        found.append((int(steps.step[place]), begin, end))
        before = end
    starts = [*(begin for _, begin, _ in found), before][1:]
    return {
        number: _Slot(begin, end, following)
        for (number, begin, end), following in zip(found, starts, strict=True)
    }


def _of_run(
    run: RunRecord, slots: Mapping[int, _Slot], since: float, places: _Places
) -> list[Record]:
    """Steps as one rank or the coordinator saw them, and the loss."""
    found: list[Record] = [
        _span(f"step {number}", slot.begin, slot.end, (places.run, 0))
        for number, slot in slots.items()
    ]
    found += [
        {"ph": "C", "name": "loss", "ts": _micro(at), "pid": places.run, "tid": 0,
         "args": {"loss": loss}}
        for at, loss in zip(run.losses.time, run.losses.loss, strict=True)
        if at >= since and math.isfinite(loss)
    ]  # fmt: skip
    return found


def _of_ranks(run: RunRecord, slots: Mapping[int, _Slot]) -> list[Record]:
    """What ranks spent their time on, in the steps that have a slot."""
    found: list[Record] = []
    ignored: list[str] = []  # said when the run was read
    for event, _ in lines(run.path / "events.jsonl", ignored):
        if event["kind"] != "times":
            continue
        try:
            step = rank_step(event)
        except (KeyError, TypeError, ValueError):
            continue
        if step.step in slots and len(step.compute) == len(run.times.compute):
            found += _of_step(step, slots[step.step])
    return found


def _of_step(step: RankStep, slot: _Slot) -> Iterator[Record]:
    for rank in range(len(step.compute)):
        at = slot.begin
        for name in _PARTS:
            seconds = step.exchange if name == "exchange" else getattr(step, name)[rank]
            end = max(at, min(at + max(0.0, seconds), slot.following))
            if _micro(end) > _micro(at):
                yield _span(name, at, end, (rank + 1, 0), step=step.step, seconds=seconds)
            at = end


def _predicted(run: RunRecord, places: _Places, begins: float) -> tuple[list[Record], list[Record]]:
    """Names of the predicted step's rows, and what is in them."""
    pieces = run.plan.timeline if run.plan is not None else ()
    lanes = sorted({(piece.rank, piece.resource) for piece in pieces})
    named = [
        {"ph": "M", "name": "thread_name", "pid": places.predicted, "tid": number, "ts": 0,
         "args": {"name": f"rank {rank} {resource}" if resource != "server" else f"server {rank}"}}
        for number, (rank, resource) in enumerate(lanes)
    ]  # fmt: skip
    found = [
        _span(
            piece.label, begins + piece.start, begins + (piece.start + piece.seconds),
            (places.predicted, lanes.index((piece.rank, piece.resource))), seconds=piece.seconds,
        )
        for piece in pieces
    ]  # fmt: skip
    return named, found
