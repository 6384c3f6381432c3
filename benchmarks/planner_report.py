"""Figures and plots of the planner's grid."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRIED = 3


@dataclass(frozen=True)
class Run:
    """A candidate that was predicted and run."""

    cell: str
    strategy: str
    title: str
    predicted: float
    measured: float
    sent: tuple[float, float]
    memory: tuple[float, float]

    @property
    def error(self) -> float:
        """Of the step time, as a share of what was measured."""
        return self.predicted / self.measured - 1


def runs_of(cell: dict[str, Any]) -> list[Run]:
    """The candidates of a cell that ran, in the order of prediction."""
    found = []
    for row in cell["rows"]:
        if row.get("seconds"):
            told = row["predicted"]
            found.append(
                Run(
                    cell["cell"], row["strategy"], row["title"], told["seconds"],
                    statistics.median(row["seconds"]),
                    (told["sent"], statistics.median(row["sent"])),
                    (sum(told["memory"].values()), max(row["peaks"])),
                )
            )  # fmt: skip
    return sorted(found, key=lambda run: run.predicted)


def tau(runs: list[Run]) -> float | None:
    """Kendall's τ between predicted and measured order; None for fewer than two."""
    pairs = [
        (one, other) for place, one in enumerate(runs) for other in runs[place + 1 :]
        if one.measured != other.measured
    ]  # fmt: skip
    if not pairs:
        return None
    agree = [
        1 if (a.predicted - b.predicted) * (a.measured - b.measured) > 0 else -1 for a, b in pairs
    ]
    return sum(agree) / len(pairs)


def regret(runs: list[Run], tried: int) -> float:
    """How much longer the choice takes than the best, when so many of the first are tried."""
    best = min(run.measured for run in runs)
    return min(run.measured for run in runs[:tried]) / best - 1


def report(folder: Path) -> str:
    """A page of all cells in a folder, with plots beside it."""
    cells = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    good = [(cell, runs) for cell in cells if (runs := runs_of(cell))]
    everything = [run for _, runs in good for run in runs]
    if not everything:
        return "no cell was measured"
    errors = sorted(abs(run.error) for run in everything)
    memory = [abs(run.memory[0] / run.memory[1] - 1) for run in everything]
    wire = [abs(run.sent[0] / run.sent[1] - 1) for run in everything if run.sent[1] > 1e5]
    regrets = [regret(runs, 1) for _, runs in good]
    tried = [regret(runs, TRIED) for _, runs in good]
    taus = [value for _, runs in good if (value := tau(runs)) is not None]
    gains = [gain for _, runs in good if (gain := against_ddp(runs)) is not None]
    lines = [
        "# `auto` against what happened", "",
        f"{len(everything)} candidates in {len(good)} cells; "
        "`python benchmarks/planner.py`, and `--report` for this page.", "",
        "| figure | to reach | measured |", "|---|---|---|",
        f"| step time, mean absolute error | ≤ 10 % | {percent(statistics.mean(errors))} |",
        f"| its 90th percentile | ≤ 25 % | {percent(errors[int(0.9 * (len(errors) - 1))])} |",
        f"| peak memory, mean absolute error | ≤ 10 % | {percent(statistics.mean(memory))} |",
        f"| bytes on the wire, mean absolute error | ≤ 5 % | {percent(mean(wire))} |",
        f"| Kendall's τ, mean over cells | ≥ 0.8 | {mean(taus):.2f} |",
        f"| regret without trials, mean | ≤ 5 % | {percent(statistics.mean(regrets))} |",
        f"| regret without trials, most | ≤ 15 % | {percent(max(regrets))} |",
        f"| regret with the first three tried, mean | ≤ 2 % | {percent(statistics.mean(tried))} |",
        f"| against always data-parallel, mean speed-up | | {geometric(gains):.2f} |",
        f"| against always data-parallel, worst cell | | {min(gains, default=math.nan):.2f} |",
        "", "| cell | chosen | measured best | regret | τ | mean error |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cell, runs in good:
        best = min(runs, key=lambda run: run.measured)
        order = tau(runs)
        lines.append(
            f"| {cell['cell']} | {runs[0].title} | {best.title} ({best.measured:.3g} s) "
            f"| {percent(regret(runs, 1))} | {'' if order is None else f'{order:.2f}'} "
            f"| {percent(statistics.mean(abs(run.error) for run in runs))} |"
        )
    lines += ["", "| strategy | candidates | mean error | mean signed error |", "|---|---|---|---|"]
    for name in sorted({run.strategy for run in everything}):
        own = [run.error for run in everything if run.strategy == name]
        lines.append(
            f"| {name} | {len(own)} | {percent(statistics.mean(map(abs, own)))} "
            f"| {percent(statistics.mean(own))} |"
        )
    failed = [f"- {cell['cell']}: {cell['failed']}" for cell in cells if "failed" in cell]
    lines += ["", "Cells that did not end well:", *failed] if failed else []
    plot(good, folder)
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text)
    return text


def against_ddp(runs: list[Run]) -> float | None:
    """How many times as fast as plain data-parallel the choice is; None where that did not run."""
    plain = [run.measured for run in runs if run.title == "data-parallel"]
    plain = plain or [run.measured for run in runs if run.strategy == "data-parallel"]
    return max(plain) / runs[0].measured if plain else None


def percent(value: float) -> str:
    """A share as people read it."""
    return f"{100 * value:.1f} %"


def mean(values: list[float]) -> float:
    """The mean; not a number of nothing."""
    return statistics.mean(values) if values else math.nan


def geometric(values: list[float]) -> float:
    """The geometric mean; not a number of nothing."""
    return statistics.geometric_mean(values) if values else math.nan


def plot(good: list[tuple[dict[str, Any], list[Run]]], folder: Path) -> None:
    """Predicted against measured, and the regret of every cell."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6))
    names = sorted({run.strategy for _, runs in good for run in runs})
    for name in names:
        own = [run for _, runs in good for run in runs if run.strategy == name]
        left.loglog([r.measured for r in own], [r.predicted for r in own], "o", ms=4, label=name)
    ends = left.get_xlim()
    left.plot(ends, ends, "k-", lw=0.8)
    for factor in (0.75, 1.25):
        left.plot(ends, [end * factor for end in ends], "k:", lw=0.6)
    left.set(xlabel="measured seconds a step", ylabel="predicted", title="step time")
    left.legend()
    cells = [cell["cell"] for cell, _ in good]
    right.barh(cells, [100 * regret(runs, 1) for _, runs in good], label="prediction alone")
    right.barh(cells, [100 * regret(runs, TRIED) for _, runs in good], label="first three tried")
    right.set(xlabel="% longer than the best", title="regret of the choice")
    right.tick_params(axis="y", labelsize=6)
    right.legend()
    figure.tight_layout()
    figure.savefig(folder / "report.png", dpi=110)
    pyplot.close(figure)
