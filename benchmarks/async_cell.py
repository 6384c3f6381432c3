"""One training on the hosts of a test bed, for a given time; and what its events say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.async_tasks import MODELS, Contender
from wagontrain import events
from wagontrain.testbed.bed import Bed
from wagontrain.testbed.run import variables

START = 180.0
"""Seconds that processes have to import torch, load the task and find each other."""


@dataclass
class Cell:
    """One contender on one model, cluster and seed: what is asked, and what came of it.

    Times are seconds since the end of the first step, which is not counted. `pushes` counts
    staleness -> updates; `busy` is the time in steps, without validations and checkpoints between.
    """

    model: str
    cluster: str
    contender: str
    seed: int
    rate: float
    limit: float
    ended: str = ""
    starting: float = 0.0
    seconds: float = 0.0
    busy: float = 0.0
    samples: int = 0
    steps: int = 0
    validations: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    pushes: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.model}-{self.cluster}-{self.contender}-{self.seed}-{self.rate:g}"

    @property
    def good(self) -> bool:
        """Whether it trained until its time was over."""
        return self.ended == "time is over"

    @classmethod
    def read(cls, file: Path) -> Cell:
        """A cell that was kept."""
        kept = json.loads(file.read_text())
        kept["pushes"] = {int(stale): count for stale, count in kept["pushes"].items()}
        kept["validations"] = [(at, values) for at, values in kept["validations"]]
        return cls(**kept)

    def write(self, file: Path) -> None:
        """Keep it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)) + "\n")

    # figures

    @property
    def samples_per_second(self) -> float:
        """Of training, over all the time, validations included."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def samples_per_busy_second(self) -> float:
        """Of training, over the time in steps."""
        return self.samples / self.busy if self.busy else 0.0

    def curve(self) -> list[tuple[float, float]]:
        """Seconds and the model's metric."""
        metric = MODELS[self.model].metric
        return [(at, values[metric]) for at, values in self.validations]

    def seconds_to_target(self) -> float | None:
        """When validation first showed the target; None where it did not."""
        model = MODELS[self.model]
        for at, value in self.curve():
            if value >= model.target if model.rising else value <= model.target:
                return at
        return None

    def final(self) -> float | None:
        """The metric at the end."""
        curve = self.curve()
        return curve[-1][1] if curve else None

    def late_loss(self) -> float:
        """Mean validation loss over the second half of the time: what a rate is judged by."""
        late = [values["loss"] for at, values in self.validations if at >= self.limit / 2]
        if not self.good or not late or not all(map(math.isfinite, late)):
            return math.inf
        return sum(late) / len(late)

    def staleness(self) -> dict[str, float] | None:
        """Mean, 99th percentile (nearest rank) and maximum; None where it is not counted."""
        total = sum(self.pushes.values())
        if not total:
            return None
        seen, p99 = 0, 0
        for stale in sorted(self.pushes):
            seen, p99 = seen + self.pushes[stale], stale
            if 100 * seen >= 99 * total:
                break
        mean = sum(stale * count for stale, count in self.pushes.items()) / total
        return {"mean": mean, "p99": p99, "max": max(self.pushes)}


def command(contender: Contender, cell: Cell) -> list[str]:
    """What runs on each host."""
    words = [sys.executable, "-m", "wagontrain", "run", "job.py", "--run-dir", "R"]
    words += ["--strategy", contender.strategy, "--seed", str(cell.seed)]
    for name, value in contender.settings.items():
        words += ["--set", f"{name}={value}"]
    return words


def take(bed: Bed, contender: Contender, cell: Cell, folder: Path, data: Path) -> None:
    """Train, and fill the cell.

    Args:
        bed: hosts, as fast as the cell wants them.
        contender: the one that the cell names.
        cell: what is asked.
        folder: a new one, for the run's files.
        data: where `write_data` has written.
    """
    folder.mkdir(parents=True)
    optimizer = contender.optimizer or MODELS[cell.model].usual
    (folder / "job.py").write_text(
        "from benchmarks import async_tasks\n\n\ndef task():\n"
        f"    return async_tasks.task({cell.model!r}, {optimizer!r}, {cell.rate!r}, "
        f"{str(data.resolve())!r})\n"
    )
    began = time.monotonic()
    running = []
    try:
        for host in range(bed.shape.hosts):
            with (folder / f"host{host}.log").open("w") as log:
                running.append(
                    bed.start(
                        host, command(contender, cell), variables(bed, host, 0, 1), cwd=folder,
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        cell.ended = watch(running, folder, cell, began)
    finally:
        for host in range(bed.shape.hosts):
            bed.kill(host)
        for process in running:
            process.wait(10)
    fill(cell, folder / "R" / "events.jsonl")


def watch(running: list[Any], folder: Path, cell: Cell, began: float) -> str:
    """Wait until the time is over, or all has ended before; returns why."""
    file = folder / "R" / "events.jsonl"
    place, first = 0, None
    while True:
        for event, after in events.read(file, place):
            place = after
            if event["kind"] == "step" and first is None:
                first = time.monotonic()
                cell.starting = first - began
        now = time.monotonic()
        if first is not None and now > first + cell.limit:
            return "time is over"
        if first is None and now > began + START:
            return f"no step within {START:.0f} s"
        statuses = [process.poll() for process in running]
        if any(statuses) or None not in statuses:
            said = [last_line(folder / f"host{host}.log") for host in range(len(running))]
            return f"ended with {statuses}: {' | '.join(filter(None, said))}"
        time.sleep(0.2)


def last_line(file: Path) -> str:
    """What a host said last."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return next((line for line in reversed(lines) if line), "")


def fill(cell: Cell, file: Path) -> None:
    """Take the figures from the events up to the limit."""
    first: float | None = None
    pushes: Counter[int] = Counter()
    for event, _ in events.read(file):
        if event["kind"] == "step" and first is None:
            first = event["time"]
            continue
        if first is None or event["time"] - first > cell.limit:
            continue
        at = event["time"] - first
        if event["kind"] == "step":
            cell.seconds = at
            cell.busy += event["seconds"] + event["data_seconds"]
            cell.samples += event["samples"]
            cell.steps += 1
            if event.get("staleness") is not None:
                pushes[event["staleness"]] += 1
        elif event["kind"] == "validation":
            cell.validations.append((round(at, 3), event["values"]))
    cell.pushes = dict(sorted(pushes.items()))
