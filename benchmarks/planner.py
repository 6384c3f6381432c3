"""`auto` held to its predictions: a grid of models and test beds, each strategy foretold and run.

    python benchmarks/planner.py                         the whole grid, resumed where it stopped
    python benchmarks/planner.py --models speech --rates 500mbit
    python benchmarks/planner.py --report                figures and plots of what there is

Every cell probes its own bed and profiles its own model, predicts every candidate, and then runs
the best settings of every strategy. Nothing measured in the runs flows back into predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import MARK
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.run import run

RESULTS = Path(__file__).resolve().parent / "results" / "planner"
MODELS = ("speech", "alexnet", "vgg16", "resnet18", "gpt", "recommender")
RATES = ("100mbit", "500mbit", "2gbit", "unshaped")
HOSTS = (2, 4)


@dataclass(frozen=True)
class Cell:
    """A model on a test bed.

    Args:
        model: of benchmarks/models.py.
        rate: of every host's link.
        hosts: how many.
        slow: host and share of a core of one that is slower.
        memory: of every host, where capped.
    """

    model: str
    rate: str
    hosts: int
    slow: tuple[int, float] | None = None
    memory: str | None = None

    @property
    def name(self) -> str:
        """For files and reports."""
        extra = "-slow" if self.slow else ""
        extra += f"-{self.memory}" if self.memory else ""
        return f"{self.model}-{self.hosts}x{self.rate}{extra}"

    @property
    def file(self) -> Path:
        """Where its outcome is kept."""
        return RESULTS / f"{self.name}.json"

    def shape(self, cpus: float) -> Shape:
        """The bed that it is run on."""
        rate = None if self.rate == "unshaped" else self.rate
        slow = {self.slow[0]: self.slow[1]} if self.slow else {}
        return Shape(self.hosts, rate, cpus, slow=slow, memory=self.memory)


def grid(asked: argparse.Namespace) -> Iterator[Cell]:
    """The cells asked for; the two odd ones where their model is."""
    for hosts in asked.hosts:
        for rate in asked.rates:
            for model in asked.models:
                yield Cell(model, rate, hosts)
    if asked.odd:
        yield Cell("speech", "500mbit", 4, slow=(3, 0.15))
        yield Cell("vgg16", "500mbit", 4, memory="900M")


def measure(cell: Cell, asked: argparse.Namespace) -> dict[str, Any]:
    """Run a cell; what went wrong is part of its outcome."""
    lines: list[str] = []
    words = [sys.executable, "-m", "benchmarks.planner_cell", "--model", cell.model]
    words += ["--steps", str(asked.steps)]
    with Bed.up(cell.shape(asked.cpus)) as bed:
        ended = run(bed, words, say=lines.append, timeout=asked.timeout)
    rows = [json.loads(line.partition(MARK)[2]) for line in lines if MARK in line]
    outcome: dict[str, Any] = {
        "cell": cell.name, "model": cell.model, "rate": cell.rate, "hosts": cell.hosts,
        "slow": cell.slow, "memory": cell.memory, "cpus": asked.cpus, "steps": asked.steps,
        "rows": rows, "at": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "cores": os.cpu_count(),
    }  # fmt: skip
    if ended.status != 0:
        last = [line for line in lines if line.partition("|")[2].strip()][-5:]
        outcome["failed"] = "timed out" if ended.timed_out else "; ".join(last)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--hosts", nargs="+", type=int, default=HOSTS)
    parser.add_argument("--odd", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cpus", type=float, default=0.45)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--again", action="store_true", help="also cells that were measured")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    cells = list(grid(asked))
    for number, cell in enumerate([] if asked.report else cells, 1):
        if cell.file.exists() and not asked.again:
            continue
        began = time.monotonic()
        outcome = measure(cell, asked)
        cell.file.write_text(json.dumps(outcome, indent=1))
        told = outcome.get("failed", f"{len(outcome['rows']) - 1} candidates")
        spent = time.monotonic() - began
        print(f"{number}/{len(cells)} {cell.name}: {told} ({spent:.0f} s)", flush=True)
    from benchmarks.planner_report import report

    print(report(RESULTS))


if __name__ == "__main__":
    main()
