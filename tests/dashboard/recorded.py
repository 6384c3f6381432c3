"""Runs as their events tell them, with figures made up and times that one chooses."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

from wagontrain.signs import ranges

Event = dict[str, Any]


def start(workers: int, when: float, crewed: bool = False, **fields: Any) -> Event:
    event = {
        "kind": "start", "time": when, "strategy": "data-parallel", "settings": {"bucket_mb": 25},
        "exact": True, "world_size": workers, "hosts": ["anna", "bert"], "device": "cpu",
        "threads": 2, "epochs": 10, "steps": 2000, "steps_per_epoch": 200, "batch_size": 512,
        "samples": 102400, "first_step": 0,
    }  # fmt: skip
    if crewed:
        event |= {"strategy": "parameter-server", "settings": {"servers": 2}, "exact": False,
                  "join": "127.0.0.1:1", "secret": "run/secret"}  # fmt: skip
    else:
        event["ranks"] = [[host(rank), "cpu"] for rank in range(workers)]
    return event | fields


def host(rank: int) -> str:
    return ("anna", "bert")[rank % 2]


def step(number: int, when: float, **fields: Any) -> Event:
    loss = 2.3 * math.exp(-number / 400) + 0.05 + 0.04 * math.sin(number * 1.7)
    return {
        "kind": "step", "time": when, "step": number, "epoch": number // 200, "samples": 512,
        "loss": loss, "seconds": 0.09 + 0.01 * math.sin(number), "data_seconds": 0.004,
        "sent": 250_000,
    } | fields  # fmt: skip


def times(number: int, when: float, compute: list[float]) -> Event:
    slowest = max(compute)
    return {
        "kind": "times", "time": when, "step": number, "compute": compute, "exchange": 0.02,
        "waiting": [slowest - each for each in compute], "data": [0.004] * len(compute),
    }  # fmt: skip


def signs(doing: dict[int, str], when: float, **fields: Any) -> Event:
    alike: dict[str, list[int]] = {}
    for number, phrase in doing.items():
        alike.setdefault(phrase, []).append(number)
    spans = {phrase: ranges(numbers) for phrase, numbers in alike.items()}
    return {
        "kind": "workers", "time": when, "every": 1.0, "doing": spans, "silent": {}
    } | fields  # fmt: skip


def validation(number: int, when: float) -> Event:
    values = {"loss": 0.4 + 2 * math.exp(-number / 300), "accuracy": 1 - math.exp(-number / 500)}
    return {
        "kind": "validation", "time": when, "epoch": number // 200 - 1, "step": number,
        "values": values,
    }  # fmt: skip


def end(number: int, when: float) -> Event:
    summary = {"steps": number, "samples": number * 512, "seconds": number / 10,
               "samples_per_second": 5000.0, "train_loss": 0.1, "straggler": None}  # fmt: skip
    return {"kind": "end", "time": when, "summary": summary}


def synchronous(
    workers: int, steps: int, until: float | None = None, slow: int | None = None
) -> list[Event]:
    """So many steps, ten a second, the last of them at `until`; now where not given."""
    last = time.time() if until is None else until
    begun = last - steps / 10
    events = [start(workers, begun - 1)]
    rng = random.Random(1)
    for number in range(steps):
        when = begun + number / 10
        events.append(step(number, when))
        compute = [0.06 + 0.004 * rng.random() for _ in range(workers)]
        if slow is not None:
            compute[slow] *= 1.9
        if number % 10 == 0:
            events.append(times(number, when, compute))
            events.append(signs(dict.fromkeys(range(workers), f"in step {number}"), when))
        if number and number % 200 == 0:
            events.append(validation(number, when))
    events.append(signs(dict.fromkeys(range(workers), f"in step {steps}"), last))
    return events


def crewed(workers: int, steps: int, until: float | None = None) -> list[Event]:
    """A run whose workers come and go, of which one is killed and started again half-way."""
    last = time.time() if until is None else until
    begun = last - steps / 10
    events = [start(workers, begun - 1, crewed=True)]
    joined = [joined_(number, begun - 0.5) for number in range(1, workers + 1)]
    events += joined
    there = list(range(1, workers + 1))
    rng = random.Random(2)
    pushes = dict.fromkeys(range(1, workers + 2), 0)
    for number in range(steps):
        when = begun + number / 10
        stale = min(12, int(rng.expovariate(1 / workers)))
        events.append(step(number, when, sent=None, data_seconds=0.0, staleness=stale))
        pushes[there[number % len(there)]] += 1
        if number == steps // 2:
            gone = there.pop(1)
            why = "was killed by SIGKILL"
            events += [
                {"kind": "left", "time": when, "worker": gone, "host": host(gone), "why": why,
                 "process": 100 + gone, "doing": f"computing step {number}"},
                {"kind": "lost", "time": when, "worker": gone, "leases": [number]},
                {"kind": "restarted", "time": when, "what": f"worker {gone - 1}", "why": why,
                 "process": 100 + gone},
                joined_(workers + 1, when + 3),
            ]  # fmt: skip
            there.append(workers + 1)
        if number % 10 == 0 or number == steps - 1:
            doing = {each: f"computing step {number + each}" for each in there}
            doing[there[0]] = "pushing a gradient"
            events.append(
                signs(
                    doing,
                    when,
                    shards=shards(number),
                    work={
                        str(each): [
                            pushes[each],
                            512 * pushes[each],
                            0.2 if each != there[-2] else 0.41,
                            1_000_000 * pushes[each],
                        ]
                        for each in there
                    },
                )
            )
        if number and number % 200 == 0:
            events.append(validation(number, when))
    return events


def shards(number: int) -> list[Event]:
    return [
        {"ready": True, "behind": number % 3, "applied": number, "busy": number * 0.004, "lost": 0,
         "silent": 0.4},
        {"ready": True, "behind": 5 + number % 4, "applied": max(0, number - 6),
         "busy": number * 0.011, "lost": 2, "silent": 0.2},
    ]  # fmt: skip


def joined_(worker: int, when: float) -> Event:
    return {"kind": "joined", "time": when, "worker": worker, "host": host(worker),
            "process": 100 + worker, "device": "cpu"}  # fmt: skip


def failed(message: str, when: float | None = None) -> Event:
    return {"kind": "failed", "time": time.time() if when is None else when, "message": message}


def write(folder: Path, *events: Event) -> None:
    """Append events to the file of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))
