"""Tables and pictures of `async_training.py`."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.async_cell import Cell
from benchmarks.async_tasks import CLUSTERS, CONTENDERS, MODELS, SERVER

mpl.use("agg")  # there is no screen
from matplotlib import pyplot as plt

BASELINE = "data-parallel"
POINTS = 200
Found = Mapping[str, Mapping[str, tuple[float, bool]]]
"""Model -> contender -> learning rate, and whether it was searched for."""


def groups(cells: Iterable[Cell]) -> dict[tuple[str, str], dict[str, list[Cell]]]:
    """(model, cluster) -> contender -> its cells, one per seed."""
    made: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        made.setdefault((cell.model, cell.cluster), {}).setdefault(cell.contender, []).append(cell)
    order = [contender.name for contender in CONTENDERS]
    return {key: dict(sorted(each.items(), key=lambda item: order.index(item[0])))
            for key, each in made.items()}  # fmt: skip


def spread(values: Sequence[float], digits: int) -> str:
    """Median (min to max)."""
    if not values:
        return ""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def median(cells: Sequence[Cell], figure: Callable[[Cell], float | None]) -> float | None:
    """Over the seeds; None where one of them has no such figure."""
    values = [figure(cell) for cell in cells]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def ratio(mine: float | None, theirs: float | None) -> str:
    """How many times, or nothing."""
    return f"{mine / theirs:.2f}" if mine is not None and theirs else ""


def table(each: Mapping[str, list[Cell]], rates: Mapping[str, tuple[float, bool]]) -> list[str]:
    """Markdown rows of one model on one cluster."""
    model = MODELS[next(iter(each.values()))[0].model]
    base = [cell for cell in each.get(BASELINE, []) if cell.good]
    lines = [
        f"| contender | rate | samples/s | of {BASELINE} | of {BASELINE} in its steps | s to "
        f"{model.metric} {model.target:g} | of {BASELINE} | {model.metric} at the end "
        "| staleness | p99 | most |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in each.items():
        good = [cell for cell in cells if cell.good]
        if not good:
            lines.append(f"| {name} | | failed: {cells[0].ended} | | | | | | | | |")
            continue
        reached = [at for cell in good if (at := cell.seconds_to_target()) is not None]
        missed = ""
        if len(reached) < len(good):
            missed = f"{len(good) - len(reached)} of {len(good)} not within {good[0].limit:.0f} s"
        finals = [value for cell in good if (value := cell.final()) is not None]
        stale = [found for cell in good if (found := cell.staleness()) is not None]
        speed = median(good, lambda cell: cell.samples_per_second)
        to_target = ratio(
            median(good, Cell.seconds_to_target), median(base, Cell.seconds_to_target)
        )
        fields = [
            name + (f" ({len(cells) - len(good)} failed)" if len(good) < len(cells) else ""),
            f"{good[0].rate:g}" + ("" if rates[name][1] else " (not tuned)"),
            spread([cell.samples_per_second for cell in good], 0),
            ratio(speed, median(base, lambda cell: cell.samples_per_second)),
            ratio(speed, median(base, lambda cell: cell.samples_per_busy_second)),
            "; ".join(
                filter(None, [spread(reached, 1), missed if len(reached) < len(good) else ""])
            ),
            to_target,
            spread(finals, 3),
            spread([found["mean"] for found in stale], 2),
            spread([found["p99"] for found in stale], 0),
            spread([found["max"] for found in stale], 0),
        ]
        lines.append("| " + " | ".join(fields) + " |")
    failures = [f"- {cell.name}: {cell.ended}" for cells in each.values() for cell in cells
                if not cell.good]  # fmt: skip
    return [*lines, "", *failures, ""]


def asked_for(each: Mapping[str, list[Cell]], hosts: int = 4) -> list[str]:
    """What was asked of figures, and what they are, for one model with the slow host."""
    base = [cell for cell in each.get(BASELINE, []) if cell.good]
    down = [cell for cell in each.get("downpour", []) if cell.good]
    lines = []
    if base and down:
        speed = ratio(
            median(down, lambda cell: cell.samples_per_second),
            median(base, lambda cell: cell.samples_per_second),
        )
        lines.append(f"- samples/s of downpour / {BASELINE}: **{speed}** (asked: 2.50 or more)")
        mine, theirs = median(down, Cell.seconds_to_target), median(base, Cell.seconds_to_target)
        took = ratio(mine, theirs)
        if not took and mine is not None:
            took = f"{mine:.1f} s against more than {base[0].limit:.0f} s"
        lines.append(f"- time to target of downpour / {BASELINE}: **{took or 'not reached'}** "
                     "(asked on MNIST: 0.50 or less)")  # fmt: skip
    lines += _quickest(each)
    bounded = [found["max"] for cell in each.get("ssp-2", []) if (found := cell.staleness())]
    if bounded:
        most = (2 + 1) * (hosts - 1)
        lines.append(f"- largest staleness under ssp:2: **{max(bounded):.0f}** (s + 1 pushes of "
                     f"each of {hosts - 1} peers: at most {most})")  # fmt: skip
    return lines


def _quickest(each: Mapping[str, list[Cell]]) -> list[str]:
    """Which of those that wait for nobody comes to the target first, against the baselines."""
    apart = [
        one.name for one in CONTENDERS if one.strategy == SERVER and not one.settings.get("backup")
    ]
    known = {name: median(cells, Cell.seconds_to_target) for name, cells in each.items()}
    there = {name: at for name in apart if (at := known.get(name)) is not None}
    if not there:
        return []
    first = min(there, key=there.__getitem__)
    against = [f"{ratio(there[first], known[name])} of {name}"
               for name in (BASELINE, "balanced") if known.get(name)]  # fmt: skip
    return [f"- first of the {len(apart)} asynchronous ways at the target: {first}, "
            f"**{there[first]:.1f}** s, {', '.join(against)}"]  # fmt: skip


def page(
    cells: Sequence[Cell],
    origin: Mapping[str, Any],
    rates: Found,
    pictures: Mapping[tuple[str, str], Path],
    cpus: float,
    link: str,
) -> str:
    """The whole Markdown page."""
    slow = ", ".join(f"host {host} with {share:g} of that" for host, share in
                     CLUSTERS["slow"].items())  # fmt: skip
    text = [
        f"# Asynchronous training, {time.strftime('%Y-%m-%d')}", "",
        f"4 hosts of a test bed on one machine, {cpus:g} core each (slow: {slow}), links of "
        f"{link}. {origin['machine']}; Python {origin['python']}, torch {origin['torch']}; commit "
        f"{origin['commit']}.", "",
        f"    {origin['command']}", "",
        "Median (min to max) over seeds, contenders in turns, fresh "
        "processes each time. All train for the same time, which begins when all hosts are at "
        "work: starting processes is not in it; validations and checkpoints are. "
        f"\"In its steps\" holds a contender against {BASELINE} without these. Server shards and "
        "coordinator are on host 0, beside its worker. Learning rates are the same in every step, "
        "searched for each contender on equal hosts with a seed of its own (`--tune`; what was "
        "tried is in benchmarks/async_rates.json); balanced and backup-1 have that of "
        f"{BASELINE}, ssp-2 that of downpour. Staleness: updates between the version that a "
        "gradient was taken at and the one that it made.", "",
    ]  # fmt: skip
    for key, each in groups(cells).items():
        model, cluster = key
        some = next(iter(each.values()))[0]
        seen = ", ".join(map(str, sorted({cell.seed for cells in each.values() for cell in cells})))
        text += [f"## {model}, {cluster} hosts, {some.limit:.0f} s, seeds {seen}", ""]
        text += table(each, rates[model])
        if cluster == "slow":
            text += [*asked_for(each), ""]
        if key in pictures:
            text += [f"![validation against time]({pictures[key].name})", ""]
    return "\n".join(text)


def draw(cells: Sequence[Cell], file: Path) -> dict[tuple[str, str], Path]:
    """A picture for each model and cluster: median over seeds, and from least to most."""
    pictures = {}
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    names = [contender.name for contender in CONTENDERS]
    for (model, cluster), each in groups(cells).items():
        figure, axes = plt.subplots(figsize=(9, 5.5), dpi=90)
        for name, runs in each.items():
            curves = [cell.curve() for cell in runs if cell.good and cell.curve()]
            if not curves:
                continue
            drawn = on_grid(curves, max(cell.limit for cell in runs))
            times = [at for at, _ in drawn]
            colour = colours[names.index(name) % len(colours)]
            axes.plot(times, [statistics.median(values) for _, values in drawn],
                      label=name, color=colour, linewidth=1.5)  # fmt: skip
            axes.fill_between(times, [min(values) for _, values in drawn],
                              [max(values) for _, values in drawn],
                              color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        chosen = MODELS[model]
        axes.axhline(chosen.target, color="black", linewidth=0.8, linestyle=":")
        if chosen.rising:
            axes.set_ylim(bottom=0.7, top=1.0)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(f"validation {chosen.metric}")
        axes.set_title(f"{model}, {cluster} hosts")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, ncols=2)
        figure.tight_layout()
        place = file.with_name(f"{file.name}-{model}-{cluster}.png")
        figure.savefig(place)
        plt.close(figure)
        pictures[model, cluster] = place
    return pictures


def on_grid(
    curves: Sequence[Sequence[tuple[float, float]]], limit: float
) -> list[tuple[float, list[float]]]:
    """What each curve last showed, at times at which all of them have shown something."""
    start = max(curve[0][0] for curve in curves)
    grid = [start + (limit - start) * point / POINTS for point in range(POINTS + 1)]
    ends = [[at for at, _ in curve] for curve in curves]
    return [
        (at, [curve[bisect.bisect_right(times, at) - 1][1]
              for curve, times in zip(curves, ends, strict=True)])
        for at in grid
    ]  # fmt: skip
