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

from benchmarks.async_tasks import CLUSTERS, MODELS, SERVER, Contender, Gate
from wagontrain import events
from wagontrain.testbed.bed import Bed
from wagontrain.testbed.run import variables

START = 180.0
"""Seconds that processes have to import torch, load the task and find each other."""

STARTING = 2.0
"""Cores of a host until then, for nobody learns from how long that takes."""


@dataclass
class Cell:
    """One contender on one model, cluster and seed: what is asked, and what came of it.

    Times are seconds since all hosts were at work, each with its part of a core; `at` is when.
    `pushes` counts staleness -> updates; `busy` is the time in steps, without validations and
    checkpoints between.
    """

    model: str
    cluster: str
    contender: str
    seed: int
    rate: float
    limit: float
    ended: str = ""
    at: float = 0.0
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
        bed: hosts; how fast they are is changed as the cell wants it.
        contender: the one that the cell names.
        cell: what is asked.
        folder: a new one, for the run's files.
        data: where `write_data` has written.
    """
    folder.mkdir(parents=True)
    optimizer = contender.optimizer or MODELS[cell.model].usual
    gate = Gate(folder) if contender.strategy == SERVER else None
    (folder / "job.py").write_text(
        "from benchmarks import async_tasks\n\n\ndef task():\n"
        f"    return async_tasks.task({cell.model!r}, {optimizer!r}, {cell.rate!r}, "
        f"{str(data.resolve())!r}, {str(folder) if gate else None!r})\n"
    )
    began = time.monotonic()
    running = []
    try:
        for host in range(bed.shape.hosts):
            bed.set_cpus(host, STARTING)
            with (folder / f"host{host}.log").open("w") as log:
                running.append(
                    bed.start(
                        host, command(contender, cell), variables(bed, host, 0, 1), cwd=folder,
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        cell.ended = _wait_for_work(running, folder, gate)
        if not cell.ended:
            for host in range(bed.shape.hosts):
                bed.set_cpus(host, bed.shape.cpus * CLUSTERS[cell.cluster].get(host, 1.0))
            if gate is not None:
                gate.open()
            cell.at, cell.starting = time.time(), time.monotonic() - began
            cell.ended = _wait_for_end(running, folder, cell.limit)
    finally:
        for host in range(bed.shape.hosts):
            bed.kill(host)
        for process in running:
            process.wait(10)
    fill(cell, folder / "R" / "events.jsonl")


def _wait_for_work(running: list[Any], folder: Path, gate: Gate | None) -> str:
    """Return when all hosts are at their first step, with an empty word, or why they are not."""
    limit = time.monotonic() + START
    while time.monotonic() < limit:
        if gate is not None and gate.ready() == len(running):
            return ""
        steps = (event["kind"] == "step" for event, _ in events.read(folder / "R/events.jsonl"))
        if gate is None and any(steps):
            return ""
        if ended := _ended(running, folder):
            return ended
        time.sleep(0.1)
    return f"no step within {START:.0f} s"


def _wait_for_end(running: list[Any], folder: Path, seconds: float) -> str:
    """Return when the time is over, or all has ended before; says which."""
    limit = time.monotonic() + seconds
    while (left := limit - time.monotonic()) > 0:
        if ended := _ended(running, folder):
            return ended
        time.sleep(min(left, 0.5))
    return "time is over"


def _ended(running: list[Any], folder: Path) -> str:
    """How the run ended, if it did."""
    statuses = [process.poll() for process in running]
    if not any(statuses) and None in statuses:
        return ""
    said = [last_line(folder / f"host{host}.log") for host in range(len(running))]
    return f"ended with {statuses}: {' | '.join(filter(None, said))}"


def last_line(file: Path) -> str:
    """What a host said last."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return next((line for line in reversed(lines) if line), "")


def fill(cell: Cell, file: Path) -> None:
    """Take the figures from the events within the time."""
    pushes: Counter[int] = Counter()
    for event, _ in events.read(file):
        at = event["time"] - cell.at
        if not 0 < at <= cell.limit:
            continue
        if event["kind"] == "step":
            cell.seconds = at
            cell.busy += min(at, event["seconds"] + event["data_seconds"])
            cell.samples += event["samples"]
            cell.steps += 1
            if event.get("staleness") is not None:
                pushes[event["staleness"]] += 1
        elif event["kind"] == "validation":
            cell.validations.append((round(at, 3), event["values"]))
    cell.pushes = dict(sorted(pushes.items()))
