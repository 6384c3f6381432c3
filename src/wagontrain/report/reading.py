"""A run directory as plain data.

Runs crash, and are looked at while they go on: a summary may be missing, the last line of
`events.jsonl` may be half written. What cannot be understood is left out and said so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wagontrain.errors import UsageError
from wagontrain.events import MALFORMED, Event, parsed
from wagontrain.folder import RunFolder
from wagontrain.plan import Plan
from wagontrain.sentences import FIGURES, cause, is_trouble, sentence

KEPT = 500
"""Happenings of a kind that are kept: the first ones; the rest are counted."""

Ending = Literal["ended", "failed", "open"]
Numbers = list[float]


@dataclass
class Steps:
    """One entry per step, in the order of the file; what is not known is not a number.

    Args:
        step: its number, from 0 over the whole training.
        time: seconds since the start of the run, at its end.
        samples: that were trained on by then, those before a resume included.
        count: samples of the step.
        seconds: of the step, its data included.
        sent: bytes that rank 0 sent.
        staleness: updates that the oldest gradient did not know of.
    """

    step: Numbers = field(default_factory=list)
    time: Numbers = field(default_factory=list)
    samples: Numbers = field(default_factory=list)
    count: Numbers = field(default_factory=list)
    seconds: Numbers = field(default_factory=list)
    sent: Numbers = field(default_factory=list)
    staleness: Numbers = field(default_factory=list)


@dataclass
class Losses:
    """Mean losses of one step or several, each with when it became known."""

    time: Numbers = field(default_factory=list)
    samples: Numbers = field(default_factory=list)
    loss: Numbers = field(default_factory=list)


@dataclass(frozen=True)
class Validation:
    """Metrics over the validation data.

    Args:
        time: seconds since the start of the run.
        samples: trained on by then.
        step: steps by then.
        values: by name.
    """

    time: float
    samples: float
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Happening:
    """Something that happened at a moment: a worker joined, a checkpoint was written.

    Args:
        kind: of the event.
        time: seconds since the start of the run.
        text: what the event says, for a person.
        trouble: whether somebody should look at it.
    """

    kind: str
    time: float
    text: str
    trouble: bool


@dataclass(frozen=True)
class RankStep:
    """Where the time of one step went on every rank, in seconds."""

    step: int
    compute: tuple[float, ...]
    waiting: tuple[float, ...]
    data: tuple[float, ...]
    exchange: float

    @property
    def length(self) -> float:
        """Seconds on the rank that took longest."""
        own = zip(self.compute, self.waiting, self.data, strict=True)
        return max((sum(parts) for parts in own), default=0.0) + self.exchange


@dataclass
class RankTimes:
    """What ranks told of their steps.

    Args:
        steps: how many told.
        compute, waiting, data: sums of seconds, one per rank.
        exchange: sum of seconds.
        typical: the step whose length is the median.
    """

    steps: int = 0
    compute: Numbers = field(default_factory=list)
    waiting: Numbers = field(default_factory=list)
    data: Numbers = field(default_factory=list)
    exchange: float = 0.0
    typical: RankStep | None = None


@dataclass
class RunRecord:
    """What a run's files say.

    Args:
        path: the run directory.
        start: the event that says what was run; empty where there is none.
        plan: why it was distributed so, where that was decided by measurement.
        summary: how it ended; None where it did not, or not well.
        failure: why it failed; empty where it did not say.
        tracebacks: the last line of what each rank left behind, by its log's name.
        problems: what could not be read, a line each.
    """

    path: Path
    start: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    summary: dict[str, Any] | None = None
    failure: str = ""
    tracebacks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)
    losses: Losses = field(default_factory=Losses)
    validations: list[Validation] = field(default_factory=list)
    times: RankTimes = field(default_factory=RankTimes)
    happenings: list[Happening] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    last: float = 0.0
    """Seconds from the start to the last event."""

    @property
    def name(self) -> str:
        """What the directory is called."""
        return self.path.resolve().name

    @property
    def ending(self) -> Ending:
        """How it ended, as far as the files say."""
        if self.summary is not None:
            return "ended"
        return "failed" if self.failure or self.tracebacks else "open"

    def told(self, name: str, otherwise: Any = None) -> Any:
        """A field of the start, or where that says nothing, of the summary."""
        found = self.start.get(name)
        if found is None and self.summary is not None:
            found = self.summary.get(name)
        return otherwise if found is None else found

    @property
    def metrics(self) -> list[str]:
        """Names of what validation measured, the loss first."""
        names = dict.fromkeys(name for each in self.validations for name in each.values)
        return sorted(names, key=lambda name: name != "loss")


def read_run(path: Path) -> RunRecord:
    """Everything that a run directory says.

    Raises:
        UsageError: it is no run directory, or cannot be read.
    """
    folder = RunFolder(path)
    if not folder.events.is_file():
        raise UsageError(
            f"{str(path)!r} is no run directory, for it has no events.jsonl: give one that "
            "`wagontrain run` has made"
        )
    run = RunRecord(path)
    try:
        _Reader(run).read(folder.events)
        _read_files(run, folder)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    return run


def lines(file: Path, problems: list[str]) -> Iterator[tuple[Event, int]]:
    """The events in a file, each with the byte at which its line begins.

    Args:
        file: of events, one JSON object a line.
        problems: gets a line for what cannot be read.
    """
    broken, at = 0, 0
    with file.open("rb") as content:
        for line in content:
            begin, at = at, at + len(line)
            if not line.endswith(b"\n"):
                problems.append("the last event was not written to its end, and is left out")
                break
            event = parsed(line)
            if event is None:
                broken += 1
            else:
                yield event, begin
    if broken:
        problems.append(f"{broken} lines of events.jsonl are no events, and are left out")


class _Reader:
    """Takes the events of a file one by one."""

    def __init__(self, run: RunRecord) -> None:
        self.run = run
        self.began: float | None = None
        self.samples = 0.0
        self.lengths: list[tuple[float, int]] = []
        self.strange = 0

    def read(self, file: Path) -> None:
        for event, at in lines(file, self.run.problems):
            try:
                self._take(event, at)
            except MALFORMED:
                self.strange += 1
        if self.strange:
            self.run.problems.append(
                f"{self.strange} events lack what they should say, and are left out"
            )
        if self.lengths:
            self.lengths.sort()
            self.run.times.typical = _one(file, self.lengths[(len(self.lengths) - 1) // 2][1])

    def _take(self, event: Event, at: int) -> None:
        time = float(event["time"])
        if self.began is None:
            self.began = time
        since = time - self.began
        self.run.last = max(self.run.last, since)
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event, since, at)
        elif event["kind"] not in FIGURES:
            self._happened(event, since)

    def _on_start(self, event: Event, since: float, at: int) -> None:
        self.run.start = event
        first, per_epoch = int(event.get("first_step", 0)), int(event.get("steps_per_epoch", 0))
        if first and per_epoch:  # every epoch sees every sample once; its last batch is smaller
            epochs, rest = divmod(first, per_epoch)
            self.samples = float(epochs * event["samples"] + rest * event["batch_size"])

    def _on_step(self, event: Event, since: float, at: int) -> None:
        count, seconds = float(event["samples"]), float(event["seconds"])
        self.samples += count
        steps = self.run.steps
        steps.step.append(int(event["step"]))
        steps.time.append(since)
        steps.samples.append(self.samples)
        steps.count.append(count)
        steps.seconds.append(seconds + float(event.get("data_seconds") or 0.0))
        steps.sent.append(_number(event.get("sent")))
        steps.staleness.append(_number(event.get("staleness")))
        self._note_loss(event, since)

    def _on_loss(self, event: Event, since: float, at: int) -> None:
        self._note_loss(event, since)

    def _note_loss(self, event: Event, since: float) -> None:
        if event.get("loss") is not None:
            losses = self.run.losses
            losses.loss.append(float(event["loss"]))
            losses.time.append(since)
            losses.samples.append(self.samples)

    def _on_times(self, event: Event, since: float, at: int) -> None:
        step = rank_step(event)
        times = self.run.times
        if not times.steps:
            for name in ("compute", "waiting", "data"):
                setattr(times, name, [0.0] * len(step.compute))
        if len(step.compute) != len(times.compute):
            raise ValueError("another number of ranks")
        for name in ("compute", "waiting", "data"):
            sums = getattr(times, name)
            for rank, value in enumerate(getattr(step, name)):
                sums[rank] += value
        times.exchange += step.exchange
        times.steps += 1
        self.lengths.append((step.length, at))

    def _on_validation(self, event: Event, since: float, at: int) -> None:
        values = {str(name): _number(value) for name, value in event["values"].items()}
        found = Validation(since, self.samples, int(event["step"]), values)
        self.run.validations.append(found)
        self._happened(event, since)

    def _on_end(self, event: Event, since: float, at: int) -> None:
        self.run.summary = _summary(event["summary"])

    def _on_failed(self, event: Event, since: float, at: int) -> None:
        self.run.failure = cause(str(event["message"]))
        self._happened(event, since)

    def _happened(self, event: Event, since: float) -> None:
        kind = str(event["kind"])
        happening = Happening(kind, since, sentence(event), is_trouble(event))
        count = self.run.counts[kind] = self.run.counts.get(kind, 0) + 1
        if count <= KEPT:
            self.run.happenings.append(happening)


def rank_step(event: Event) -> RankStep:
    """What an event of the kind `times` says.

    Raises:
        KeyError, TypeError, ValueError: it lacks what it should say.
    """
    compute, waiting, data = (
        tuple(map(float, event[name])) for name in ("compute", "waiting", "data")
    )
    if not len(compute) == len(waiting) == len(data) > 0:
        raise ValueError("not every rank")
    return RankStep(int(event["step"]), compute, waiting, data, float(event["exchange"]))


def _one(file: Path, at: int) -> RankStep:
    with file.open("rb") as content:
        content.seek(at)
        return rank_step(json.loads(content.readline()))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _summary(content: Any) -> dict[str, Any]:
    """A summary, which has at least what is told of every run.

    Raises:
        KeyError, TypeError, ValueError: it has not.
    """
    for name in ("steps", "seconds", "samples_per_second"):
        float(content[name])
    return dict(content)


def _read_files(run: RunRecord, folder: RunFolder) -> None:
    """What stands beside the events."""
    if run.summary is None and folder.has_ended():
        try:
            run.summary = _summary(folder.read_summary())
        except (KeyError, TypeError, ValueError):
            run.problems.append("summary.json lacks what it should say, and is left out")
    plan = folder.path / "plan.json"
    if plan.exists():
        try:
            _note_plan(run, json.loads(plan.read_text()))
        except (ValueError, UsageError):
            run.problems.append("plan.json is no plan of this version, and is left out")
    if folder.logs.is_dir():
        for file in sorted(folder.logs.glob("*.traceback")):
            text = file.read_text(errors="replace").strip()
            run.tracebacks[file.stem] = text.splitlines()[-1] if text else "it says nothing"


def _note_plan(run: RunRecord, content: dict[str, Any]) -> None:
    """The plan, and what is going to be run, where no event says that."""
    named = [name for name in ("strategy", "settings", "exact") if name in content]
    own: dict[str, Any] = {name: content.pop(name) for name in named}
    if "chosen" in content:
        run.plan = Plan.from_json(content)
    else:
        own |= content
    run.start = {**own, **run.start}
