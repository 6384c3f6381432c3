"""Run directories, made up for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
BEGAN = 1_700_000_000.0

START: Event = {
    "kind": "start", "time": BEGAN, "strategy": "data-parallel", "settings": {"bucket_mb": 10},
    "exact": True, "world_size": 2, "hosts": ["one", "two"], "device": "cpu", "threads": 4,
    "epochs": 2, "steps": 20, "steps_per_epoch": 10, "batch_size": 8, "samples": 76,
    "first_step": 0,
}  # fmt: skip


def step(number: int, time: float, **fields: Any) -> Event:
    """The event of a step that ended so many seconds after the start."""
    return {
        "kind": "step", "time": BEGAN + time, "step": number, "epoch": number // 10,
        "samples": 8 if number % 10 < 9 else 4, "loss": 2.0 / (number + 1), "seconds": 0.3,
        "data_seconds": 0.1, "sent": 1000, **fields,
    }  # fmt: skip


def times(number: int, time: float, **fields: Any) -> Event:
    """Where the time of a step went."""
    return {
        "kind": "times", "time": BEGAN + time, "step": number, "compute": [0.2, 0.1],
        "waiting": [0.0, 0.09], "data": [0.1, 0.11], "exchange": 0.05, **fields,
    }  # fmt: skip


def validation(number: int, time: float, **values: float) -> Event:
    """A validation after so many steps."""
    return {
        "kind": "validation", "time": BEGAN + time, "epoch": 0, "step": number, "values": values,
    }  # fmt: skip


def usual(steps: int = 20) -> Iterator[Event]:
    """What happens in a run of two ranks, up to its last step: half a second each."""
    yield START | {"steps": steps}
    for number in range(steps):
        end = 0.5 * (number + 1)
        yield step(number, end)
        if number % 2:  # a sign of life of all: nothing that happened
            doing = {f"in step {number}": "0-1"}
            alive = {"doing": doing, "silent": {}, "every": 1.0}
            yield {"kind": "workers", "time": BEGAN + end, **alive}
        if number:
            # The length differs from step to step: the later, the longer.
            longer = 0.2 + 0.001 * number
            yield times(number - 1, end, compute=[longer, 0.1], waiting=[0.0, longer - 0.11])
        if number % 10 == 9:
            yield validation(number + 1, end + 0.05, loss=1.0 / (number + 1), accuracy=0.5)
            yield {"kind": "checkpoint", "time": BEGAN + end + 0.06, "step": number + 1}


SUMMARY: dict[str, Any] = {
    "strategy": "data-parallel", "settings": {"bucket_mb": 10}, "exact": True, "world_size": 2,
    "hosts": ["one", "two"], "steps": 20, "samples": 152, "seconds": 10.25,
    "samples_per_second": 19.0, "train_loss": 0.12345,
    "validation": {"loss": 0.05, "accuracy": 0.5},
    "bytes_sent_per_rank": [20_000, 21_000], "bytes_sent_in_steps_per_rank": [18_000, 19_000],
    "peak_memory_per_rank": [100_000_000, 123_000_000], "shares": None,
    "times_per_rank": [
        {"rank": 0, "host": "one", "own_seconds": 6.0, "waiting_seconds": 0.0},
        {"rank": 1, "host": "two", "own_seconds": 4.0, "waiting_seconds": 1.8},
    ],
    "straggler": "rank 0 on host one is 1.5× slower; the others waited 45% of the time for it",
    "predicted": {
        "seconds_per_step": 0.32, "samples_per_second": 25.0, "bytes_sent_per_step": 900.0,
        "peak_memory": 110e6, "tried_seconds_per_step": 0.36,
    },
    "versions": {"wagontrain": "0.1.0", "torch": "2.13.0", "python": "3.12.1"},
}  # fmt: skip

ESTIMATE: dict[str, Any] = {
    "seconds": 0.32, "compute": 0.25, "exposed": 0.06, "waiting": 0.01,
    "memory": {"weights": 60e6, "gradients": 50e6}, "sent": 900.0, "room": 1e9,
}  # fmt: skip


def candidate(strategy: str, seconds: float, **fields: Any) -> dict[str, Any]:
    """A strategy that was weighed."""
    return {
        "strategy": strategy, "settings": {}, "title": strategy, "exact": True,
        "estimate": ESTIMATE | {"seconds": seconds}, "measured": None, "corrected": None,
        "why": "", "flip": "", **fields,
    }  # fmt: skip


def plan(**fields: Any) -> dict[str, Any]:
    """What plan.json holds of a chosen strategy."""
    rates = [2e8, 1e9, 5e9]
    return {
        "strategy": "data-parallel", "settings": {"bucket_mb": 10}, "exact": True, "format": 1,
        "chosen": candidate("data-parallel", 0.32, measured=0.36),
        "others": [
            candidate("hybrid", 0.48, why="1.5× as long: reasons", flip="below 0.6 Gbit/s")
        ],
        "model": "mark", "world_size": 2, "cluster": "this cluster", "hosts": 2, "device": "cpu",
        "notes": ["a note"], "planning": {"search": 0.1}, "bandwidth": 1e9,
        "curves": [
            {"strategy": "data-parallel", "title": "data-parallel",
             "points": list(zip(rates, [0.9, 0.32, 0.27], strict=True))},
            {"strategy": "hybrid", "title": "hybrid",
             "points": list(zip(rates, [0.6, 0.48, 0.45], strict=True))},
        ],
        "timeline": [
            {"label": "forward", "rank": 0, "resource": "device", "start": 0.0, "seconds": 0.1},
            {"label": "backward", "rank": 0, "resource": "device", "start": 0.1, "seconds": 0.15},
            {"label": "sum", "rank": 0, "resource": "links", "start": 0.2, "seconds": 0.12},
        ],
        **fields,
    }  # fmt: skip


def run_directory(
    folder: Path,
    events: Iterable[Event],
    summary: dict[str, Any] | None = None,
    planned: dict[str, Any] | None = None,
    tail: str = "",
) -> Path:
    """Write a run's files; `tail` is put behind the events as it is."""
    (folder / "logs").mkdir(parents=True)
    text = "".join(json.dumps(event) + "\n" for event in events)
    if summary is not None:
        text += json.dumps({"kind": "end", "time": BEGAN + summary["seconds"], "summary": summary})
        text += "\n"
        (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "events.jsonl").write_text(text + tail)
    if planned is not None:
        (folder / "plan.json").write_text(json.dumps(planned))
    return folder


def whole(folder: Path, **changes: Any) -> Path:
    """A run that ended well, of a strategy that was chosen."""
    return run_directory(folder, usual(), SUMMARY | changes, plan())


CREW_SUMMARY: dict[str, Any] = SUMMARY | {
    "strategy": "parameter-server", "exact": False, "times_per_rank": None, "straggler": None,
    "predicted": None, "bytes_sent_in_steps_per_rank": None,
    "staleness": {"mean": 0.9, "p50": 1, "p99": 3, "max": 4,
                  "histogram": {"0": 5, "1": 12, "3": 2, "4": 1}},
    "workers": {"1": {"pushes": 11, "samples": 88, "seconds": 0.021, "dropped": 1},
                "2": {"pushes": 9, "samples": 64, "seconds": 0.043, "dropped": 0}},
}  # fmt: skip


def crew(folder: Path) -> Path:
    """A run whose workers come and go: one dies and is started again."""

    def events() -> Iterator[Event]:
        yield START | {"strategy": "parameter-server", "exact": False}
        for worker in (1, 2):
            yield {"kind": "joined", "time": BEGAN + 1, "worker": worker, "host": "one",
                   "process": 10 + worker}  # fmt: skip
        for number in range(20):
            yield step(number, 2 + 0.5 * number, staleness=number % 3, sent=None)
            if number == 9:
                yield {"kind": "left", "time": BEGAN + 6.6, "worker": 2, "host": "one",
                       "process": 12, "why": "was killed by SIGKILL", "doing": ""}  # fmt: skip
                yield {"kind": "restarted", "time": BEGAN + 6.7, "what": "worker 2",
                       "process": 12, "why": "was killed by SIGKILL"}  # fmt: skip

    return run_directory(folder, events(), CREW_SUMMARY)
