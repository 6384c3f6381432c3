"""Tables of a page, as rows of text."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wagontrain.plan import Candidate, Plan
from wagontrain.plan_view import shown
from wagontrain.report.reading import RunRecord
from wagontrain.units import duration, off_by, short_time, size

UNKNOWN = "–"
_ROWS = 20
_EVENTS = 60
_ENDINGS = {"ended": "well", "failed": "failed", "open": "no end yet"}
_HUMDRUM = ("validation", "checkpoint")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        cells: text; the first says what the row is about.
        strong: whether it is the one to look at.
        note: a line below it.
    """

    cells: Sequence[str]
    strong: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the first column is of text, the others of numbers but for those in `texts`."""

    head: Sequence[str]
    rows: Sequence[Row]
    texts: Sequence[int] = ()
    caption: str = ""
    narrow: bool = False
    """Whether its columns stand close together."""


# --- what was run -------------------------------------------------------------------------------


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What was run, and on what."""
    found = [("strategy", strategy(run)), ("mathematics", mathematics(run))]
    hosts = run.told("hosts", [])
    workers = run.told("world_size")
    if workers is not None:
        where = f" on {len(hosts)} hosts" if len(hosts) > 1 else ""
        device = run.start.get("device")
        threads = run.start.get("threads")
        each = f", {device}" if device else ""
        each += f", {threads} thread{'s' * (threads != 1)} each" if threads else ""
        found.append(("workers", f"{workers}{where}{each}"))
    if hosts:
        named = ", ".join(map(str, hosts[:6]))
        found.append(("hosts", named + (f" and {len(hosts) - 6} more" * (len(hosts) > 6))))
    start = run.start
    if "samples" in start and "batch_size" in start:
        found.append(
            ("data", f"{start['samples']:,} samples in batches of {start['batch_size']:,}")
        )
    if "steps" in start:
        epochs = start.get("epochs")
        length = f"{start['steps']:,} steps" + (f", {epochs} epochs at most" if epochs else "")
        found.append(("length", length))
    if start.get("first_step"):
        found.append(("resumed", f"after {start['first_step']:,} steps"))
    if "time" in start:
        began = time.gmtime(start["time"])
        found.append(("started", time.strftime("%Y-%m-%d %H:%M:%S UTC", began)))
    versions = (run.summary or {}).get("versions") or {}
    if versions:
        found.append(("versions", ", ".join(f"{name} {told}" for name, told in versions.items())))
    found.append(("files", str(run.path)))
    return found


def strategy(run: RunRecord) -> str:
    """Its name, and its settings."""
    settings = run.told("settings", {})
    told = ", ".join(f"{name}={_short(value)}" for name, value in settings.items())
    return f"{run.told('strategy', UNKNOWN)}" + (f" ({told})" if told else "")


def _short(value: Any) -> str:
    told = value if isinstance(value, str) else json.dumps(value, default=str)
    return told if len(told) <= 60 else told[:57] + "..."


def mathematics(run: RunRecord) -> str:
    """Whether it is the same training as on one process."""
    exact = run.told("exact")
    if exact is None:
        return UNKNOWN
    return "exact: the same as one process" if exact else "relaxed: not the same as one process"


def ending(run: RunRecord) -> str:
    """How it ended, in a sentence."""
    if run.summary is not None:
        done = f"{run.summary['steps']:,} steps and {duration(run.summary['seconds'])}"
        why = run.summary.get("stopped")
        return f"Ended after {done}" + (f": {why}" if why else ".")
    done = f"{len(run.steps.step):,} steps and {duration(run.last)}"
    if run.failure:
        return f"Failed after {done}: {run.failure}"
    if run.tracebacks:
        rank, told = next(iter(run.tracebacks.items()))
        return f"Failed after {done}: {rank}: {told}"
    return f"No end is recorded: {done} so far, and it goes on still or was killed."


def highlights(run: RunRecord) -> list[tuple[str, str]]:
    """The figures that are asked for first: what each is, and how much."""
    found = [(f"{rate:,.0f}", "samples/s") for rate in [speed(run)] if rate is not None]
    loss = (run.summary or {}).get("train_loss")
    if loss is None and run.losses.loss:
        found.append((f"{run.losses.loss[-1]:.4g}", "last training loss"))
    elif loss is not None:
        found.append((f"{loss:.4g}", "training loss, last epoch"))
    for name, value in list(last_values(run).items())[:3]:
        found.append((f"{value:.4g}", f"validation {name}"))
    return found


def last_values(run: RunRecord) -> Mapping[str, float]:
    """What the last validation measured."""
    told = (run.summary or {}).get("validation")
    return told or (run.validations[-1].values if run.validations else {})


# --- measured figures ---------------------------------------------------------------------------


def speed(run: RunRecord) -> float | None:
    """Samples a second, while it trained."""
    if run.summary is not None:
        return float(run.summary["samples_per_second"])
    spent = math.fsum(run.steps.seconds)
    return math.fsum(run.steps.count) / spent if spent else None


def step_seconds(run: RunRecord) -> float | None:
    """Mean seconds of a step, its data included."""
    taken = run.steps.seconds
    return math.fsum(taken) / len(taken) if taken else None


def sent_per_step(run: RunRecord) -> float | None:
    """Bytes that the worker which sends most sends in a step; None where they are not counted."""
    summary = run.summary or {}
    steps = int(summary.get("steps", 0)) - int(run.start.get("first_step", 0))
    told = summary.get("bytes_sent_in_steps_per_rank") or summary.get("bytes_sent_per_rank")
    if told and steps > 0:
        return float(max(told)) / steps
    known = [value for value in run.steps.sent if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _counted_in_steps(run: RunRecord) -> bool:
    """Whether bytes are those of steps only, without validation, checkpoints and setting up."""
    return run.summary is None or bool(run.summary.get("bytes_sent_in_steps_per_rank"))


def peak(run: RunRecord) -> float | None:
    """Bytes at the peak of the worker that takes most."""
    told = (run.summary or {}).get("peak_memory_per_rank")
    return float(max(told)) if told else None


def split(run: RunRecord) -> dict[str, float] | None:
    """Mean seconds of a step on the rank that computes longest, by what they are spent on."""
    times = run.times
    if not times.steps:
        return None
    rank = max(range(len(times.compute)), key=times.compute.__getitem__)
    found = {
        "compute": times.compute[rank], "exchange": times.exchange,
        "waiting": times.waiting[rank], "data": times.data[rank],
    }  # fmt: skip
    return {name: seconds / times.steps for name, seconds in found.items()}


def _told(value: float | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else show(value)


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def foretold_by(run: RunRecord) -> dict[str, float]:
    """What was predicted of a step, by name; empty where nothing was."""
    told = (run.summary or {}).get("predicted") or {}
    found: dict[str, float] = {}
    chosen = run.plan.chosen if run.plan is not None else None
    if chosen is not None and chosen.estimate is not None:
        estimate = chosen.estimate
        found |= {
            "seconds_per_step": estimate.seconds, "compute": estimate.compute,
            "exchange": estimate.exposed, "waiting": estimate.waiting,
            "bytes_sent_per_step": estimate.sent, "peak_memory": estimate.peak,
        }  # fmt: skip
        if chosen.measured is not None:
            found["tried_seconds_per_step"] = chosen.measured
    return found | {name: float(value) for name, value in told.items() if value is not None}


_Figure = tuple[str, float | None, float | None, float | None, Callable[[float], str]]


def against(run: RunRecord) -> Table:
    """Predicted beside measured."""
    told, parts = foretold_by(run).get, split(run) or {}
    tried = told("tried_seconds_per_step")
    sent, most = sent_per_step(run), peak(run)
    figures: list[_Figure] = [
        ("time of a step", told("seconds_per_step"), tried, step_seconds(run), short_time),
        ("of it computing", told("compute"), None, parts.get("compute"), short_time),
        ("of it exchange that nothing hides", told("exchange"), None, parts.get("exchange"),
         short_time),
        ("of it waiting for others", told("waiting"), None, parts.get("waiting"), short_time),
        ("of it waiting for data", None, None, parts.get("data"), short_time),
        ("samples/s", told("samples_per_second"), None, speed(run), _rate),
        ("sent in a step, by who sends most", told("bytes_sent_per_step"), None, sent, size),
        ("memory at the peak, of who takes most", told("peak_memory"), None, most, size),
    ]  # fmt: skip
    rows = [
        Row([name, _told(foretold, show), _told(trial, show), _told(happened, show),
             off(happened, foretold)])
        for name, foretold, trial, happened, show in figures
        if foretold is not None or happened is not None
    ]  # fmt: skip
    caption = "Times are means of all steps."
    if sent is not None and not _counted_in_steps(run):
        caption += " Bytes are all that was sent, over the number of steps."
    if parts:
        caption += " Where the time goes is told of the rank that computes longest."
    if any(foretold is not None for _, foretold, *_ in figures):
        return Table(["", "predicted", "in the trial", "measured", "difference"], rows, (), caption)
    caption += " Nothing was predicted, for the strategy was named and not chosen."
    rows = [Row([row.cells[0], row.cells[3]]) for row in rows]
    return Table(["", "measured"], rows, (), caption, narrow=True)


def off(happened: float | None, foretold: float | None) -> str:
    """By how much what happened differs."""
    if happened is None or not foretold:
        return ""
    return off_by(happened, foretold)


# --- the plan -----------------------------------------------------------------------------------


def plan(found: Plan) -> Table:
    """What was weighed: the chosen one, and those that lost with the reason why."""
    listed = [found.chosen, *shown(found)]
    rows = [_candidate(each, each is found.chosen) for each in listed]
    left = len(found.others) + 1 - len(listed)
    more = f"{left} more settings were weighed, that are slower or do not fit." if left else ""
    head = ["strategy", "step", "in the trial", "compute", "exchange", "waiting", "memory", "sent"]
    return Table(head, rows, (), more)


def _candidate(each: Candidate, chosen: bool) -> Row:
    found = each.estimate
    why = "chosen" if chosen else each.why
    note = f"{why}; would win {each.flip}" if each.flip else why
    if found is None:
        return Row([each.title, "cannot be", *[""] * 6], chosen, note)
    step = short_time(found.seconds) if found.fits else "no room"
    return Row(
        [each.title, step, _told(each.measured, short_time), short_time(found.compute),
         short_time(found.exposed), short_time(found.waiting), size(found.peak), size(found.sent)],
        chosen, note,
    )  # fmt: skip


# --- workers ------------------------------------------------------------------------------------


def workers(run: RunRecord) -> Table | None:
    """What each rank, or each worker that took part, did; None where nothing is known."""
    summary = run.summary or {}
    if summary.get("workers"):
        return _crew(summary["workers"])
    rows = summary.get("times_per_rank")
    if not rows and run.times.steps:
        times = run.times
        rows = [
            {"rank": rank, "own_seconds": compute + data, "waiting_seconds": waiting}
            for rank, (compute, data, waiting) in enumerate(
                zip(times.compute, times.data, times.waiting, strict=True)
            )
        ]
    if not rows or not any(row["own_seconds"] for row in rows):
        return None
    memory = summary.get("peak_memory_per_rank") or []
    sent = summary.get("bytes_sent_per_rank") or []
    least = min(row["own_seconds"] for row in rows)
    listed = sorted(rows, key=lambda row: -row["own_seconds"])[:_ROWS]
    made = [
        Row([
            f"rank {row['rank']}", str(row.get("host", UNKNOWN)), duration(row["own_seconds"]),
            f"{row['own_seconds'] / least:.2f}×" if least else UNKNOWN,
            duration(row["waiting_seconds"]), _of(sent, row["rank"]), _of(memory, row["rank"]),
        ])
        for row in listed
    ]  # fmt: skip
    left = len(rows) - len(made)
    caption = "The slowest first: computing and reading data, beside the quickest."
    caption += f" {left} quicker ones are not listed." if left else ""
    head = ["worker", "host", "own work", "of the quickest", "waited", "sent", "memory"]
    return Table(head, made, (1,), caption)


def _of(values: Sequence[float], rank: int) -> str:
    return size(values[rank]) if rank < len(values) else UNKNOWN


def _crew(told: Mapping[str, Mapping[str, Any]]) -> Table:
    order = sorted(told.items(), key=lambda each: -each[1]["seconds"])
    made = [
        Row([f"worker {name}", f"{one['pushes']:,}", f"{one['samples']:,}",
             short_time(one["seconds"]), f"{one['dropped']:,}"])
        for name, one in order[:_ROWS]
    ]  # fmt: skip
    left = len(order) - len(made)
    caption = "The slowest first." + (f" {left} quicker ones are not listed." if left else "")
    return Table(["worker", "pushes", "samples", "time of a push", "dropped"], made, (), caption)


def happenings(run: RunRecord) -> Table | None:
    """What happened beside training, in order; None where nothing did."""
    found = [each for each in run.happenings if each.kind not in _HUMDRUM]
    if not found:
        return None
    rows = [
        Row([duration(each.time), each.kind.replace("_", " "), each.text])
        for each in found[:_EVENTS]
    ]
    count = sum(number for kind, number in run.counts.items() if kind not in _HUMDRUM)
    left = count - len(rows)
    caption = f"{left} more are in events.jsonl." if left else ""
    return Table(["after", "what", ""], rows, (1, 2), caption)


# --- several runs -------------------------------------------------------------------------------


def beside(runs: Sequence[RunRecord]) -> Table:
    """Several runs, one in each column."""
    metrics = list(dict.fromkeys(name for run in runs for name in last_values(run)))
    lines: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("strategy", lambda run: str(run.told("strategy", UNKNOWN))),
        ("mathematics", lambda run: mathematics(run).partition(":")[0]),
        ("workers", lambda run: str(run.told("world_size", UNKNOWN))),
        ("hosts", lambda run: str(len(run.told("hosts", [])) or UNKNOWN)),
        ("batch size", lambda run: _told(run.start.get("batch_size"), _rate)),
        ("how it ended", lambda run: _ENDINGS[run.ending]),
        ("steps", lambda run: f"{len(run.steps.step):,}"),
        ("wall-clock", lambda run: duration((run.summary or {}).get("seconds", run.last))),
        ("samples/s", lambda run: _told(speed(run), _rate)),
        ("samples/s predicted", lambda run: _told(
            ((run.summary or {}).get("predicted") or {}).get("samples_per_second"), _rate)),
        ("time of a step", lambda run: _told(step_seconds(run), short_time)),
        *((f"of it {name}", lambda run, name=name: _told((split(run) or {}).get(name), short_time))
          for name in ("compute", "exchange", "waiting", "data")),
        ("sent in a step", lambda run: _told(sent_per_step(run), size)),
        ("memory at the peak", lambda run: _told(peak(run), size)),
        ("training loss", lambda run: _told(
            (run.summary or {}).get("train_loss"), "{:.4g}".format)),
        *((f"validation {name}",
           lambda run, name=name: _told(last_values(run).get(name), "{:.4g}".format))
          for name in metrics),
    ]  # fmt: skip
    rows = [Row([name, *(tell(run) for run in runs)]) for name, tell in lines]
    rows = [row for row in rows if any(cell != UNKNOWN for cell in row.cells[1:])]
    return Table(["", *(run.name for run in runs)], rows)
