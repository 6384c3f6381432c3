"""Figures of how training went: of one run, or of several on the same axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from wagontrain.report import series
from wagontrain.report.figure import (
    ACCENT,
    FAINT,
    Figure,
    axis,
    layout,
    line,
    log_axis,
    run_colour,
    text,
)
from wagontrain.report.reading import RunRecord

By = Literal["samples", "time"]

_STEEP = 20.0
"""From this ratio of the greatest to the least loss on, the axis is logarithmic."""
_FEW = 100
"""Points of a curve that lies among others."""
_NAMES: dict[By, str] = {"samples": "samples", "time": "wall-clock"}
_LANES = {
    "joined": "joins", "left": "leaves", "lost": "lost work", "restarted": "restarts",
    "shard_restarted": "shard restarts", "dropped": "dropped", "failed": "failed",
    "validation": "validation", "checkpoint": "checkpoint",
}  # fmt: skip
"""Events on the axis of time, from the top; others come after, under their own names."""


def clock(runs: Sequence[RunRecord]) -> tuple[str, float]:
    """The unit of an axis of time that all of the runs fit on, and its seconds."""
    longest = max((run.last for run in runs), default=0.0)
    if longest < 300:
        return "s", 1.0
    return ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)


def _across(runs: Sequence[RunRecord], by: By) -> tuple[dict[str, Any], float]:
    """The axis across, and what to divide its values by."""
    if by == "samples":
        return axis("samples", rangemode="tozero"), 1.0
    unit, seconds = clock(runs)
    return axis(f"wall-clock, {unit}", rangemode="tozero"), seconds


def loss(runs: Sequence[RunRecord], by: By) -> Figure | None:
    """Training and validation loss; None where none is known."""
    x, divisor = _across(runs, by)
    data: list[dict[str, Any]] = []
    drawn: list[float] = []
    left_out, each = 0, 1
    for number, run in enumerate(runs):
        single = len(runs) == 1
        colour, dash = (ACCENT, "solid") if single else run_colour(number)
        most = series.POINTS if single else _FEW
        across = [at / divisor for at in getattr(run.losses, by)]
        found = series.thin(across, run.losses.loss, most)
        left_out, each = left_out + found.left_out, max(each, found.each)
        if found.low is not None and found.high is not None and single:
            data += _band(found.x, found.low, found.high, colour)
        name = "training" if single else run.name
        # Runs with equal curves lie on each other: the first ones are wider.
        width = 1.5 + 2.5 * (len(runs) - 1 - number) / max(1, len(runs) - 1) * (not single)
        data.append(line(found.x, found.y, name, colour, line={"width": width, "dash": dash},
                         hovertemplate="%{y:.4g}"))  # fmt: skip
        drawn += found.y
        measured = _metric(run, "loss", by, divisor) if single else None
        if measured is not None:
            ends, values = measured
            drawn += values
            data.append(_points(ends, values, "validation", "@second"))
    if not drawn:
        return None
    y = _up("loss", drawn, steep=True)
    caption = []
    if each > 1 and len(runs) == 1:
        caption.append(
            f"A point of the training loss is the mean of up to {each} steps, and the band lies "
            "between the least and the greatest of them."
        )
    elif each > 1:
        caption.append(f"A point of the training loss is the mean of up to {each} steps.")
    if left_out:
        caption.append(f"{left_out} losses are not finite, and are not drawn.")
    title = f"{'Loss' if len(runs) == 1 else 'Training loss'} by {_NAMES[by]}"
    return Figure(title, data, layout(x, y, showlegend=len(runs) == 1), " ".join(caption))


def _up(name: str, values: Sequence[float], steep: bool) -> dict[str, Any]:
    """The axis up; logarithmic where it may be `steep`, and the values are."""
    if steep and _STEEP < series.spread(values) < math.inf:
        return log_axis(text(name), min(values), max(values))
    return axis(text(name))


def _band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str
) -> list[dict[str, Any]]:
    """Between which values neighbours lie."""
    bare: dict[str, Any] = {
        "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "opacity": 0.5,
    }  # fmt: skip
    return [
        line(x, low, "least", colour, **bare),
        line(x, high, "greatest", colour, fill="tonexty", fillcolor=f"{colour}-soft", **bare),
    ]


def _points(
    x: Sequence[float], y: Sequence[float], name: str, colour: str, lined: bool = True
) -> dict[str, Any]:
    found = line(x, y, name, colour, marker={"color": colour, "size": 6}, line={"width": 1})
    few = len(x) <= series.POINTS
    found["mode"] = ("lines+markers" if few else "lines") if lined else "markers"
    found["hovertemplate"] = "%{y:.4g}"
    return found


def _metric(
    run: RunRecord, name: str, by: By, divisor: float
) -> tuple[list[float], list[float]] | None:
    measured = [
        (getattr(each, by) / divisor, each.values[name])
        for each in run.validations
        if math.isfinite(each.values.get(name, math.nan))
    ]
    if not measured:
        return None
    found = series.thin([at for at, _ in measured], [value for _, value in measured])
    return found.x, found.y


def metric(runs: Sequence[RunRecord], name: str, by: By) -> Figure | None:
    """A metric of validation; None where no run has it."""
    x, divisor = _across(runs, by)
    data: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        measured = _metric(run, name, by, divisor)
        if measured is not None:
            colour = "@second" if len(runs) == 1 else run_colour(number)[0]
            data.append(_points(*measured, run.name, colour))
    if not data:
        return None
    title = f"Validation {name} by {_NAMES[by]}"
    y = _up(name, [value for each in data for value in each["y"]], steep=name == "loss")
    return Figure(title, data, layout(x, y), height=240)


def throughput(runs: Sequence[RunRecord]) -> Figure | None:
    """Samples a second, and of a single run what happened meanwhile."""
    x, divisor = _across(runs, "time")
    data: list[dict[str, Any]] = []
    each = 1
    for number, run in enumerate(runs):
        found = series.throughput(run.steps, 120 if len(runs) == 1 else _FEW // 2)
        if not found.x:
            continue
        each = max(each, found.each)
        colour, dash = (ACCENT, "solid") if len(runs) == 1 else run_colour(number)
        data.append(
            line([at / divisor for at in found.x], found.y, run.name, colour,
                 line={"width": 1.5, "dash": dash}, hovertemplate="%{y:.4g} samples/s")
        )  # fmt: skip
    if not data:
        return None
    y = axis("samples/s", rangemode="tozero")
    caption = f"Each point: the samples of up to {each} steps, over the seconds spent in them."
    if len(runs) > 1 or not runs[0].happenings:
        return Figure("Throughput", data, layout(x, y), caption)
    return _with_happenings(runs[0], data, x, y, divisor, caption)


def _with_happenings(
    run: RunRecord, data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any],
    divisor: float, caption: str,
) -> Figure:  # fmt: skip
    """Throughput above, and below it what happened, on the same axis of time."""
    kinds = [kind for kind in (*_LANES, *sorted(run.counts)) if kind in run.counts]
    kinds = list(dict.fromkeys(kinds))
    for place, kind in enumerate(kinds):
        these = [each for each in run.happenings if each.kind == kind]
        usual = FAINT if kind in ("validation", "checkpoint") else "@good"
        data.append({
            "type": "scatter", "mode": "markers", "yaxis": "y2",
            "name": text(_LANES.get(kind, kind)),
            "x": [each.time / divisor for each in these], "y": [place] * len(these),
            "text": [text(each.text) for each in these], "hovertemplate": "%{text}",
            "marker": {
                "size": 8, "color": ["@bad" if each.trouble else usual for each in these],
                "symbol": ["x" if each.trouble else "circle" for each in these],
            },
        })  # fmt: skip
    lanes = 20 * len(kinds) + 10
    height = 250 + lanes
    part = lanes / (height - 56)
    below = axis(
        tickvals=list(range(len(kinds))), ticktext=[text(_LANES.get(kind, kind)) for kind in kinds],
        range=[len(kinds) - 0.4, -0.6], domain=[0, part], fixedrange=True,
    )  # fmt: skip
    y = {**y, "domain": [min(0.9, part + 0.08), 1]}
    more = [
        f"{run.counts[kind] - shown} more of {_LANES.get(kind, kind)} are not drawn."
        for kind in kinds
        if run.counts[kind] > (shown := sum(each.kind == kind for each in run.happenings))
    ]
    return Figure(
        "Throughput, and what happened", data,
        layout({**x, "anchor": "y2"}, y, yaxis2=below), " ".join([caption, *more]), height,
    )  # fmt: skip


def staleness(run: RunRecord) -> Figure | None:
    """How many pushes, or of a run without a summary updates, had which staleness."""
    told = (run.summary or {}).get("staleness") or {}
    counts = {int(value): int(count) for value, count in told.get("histogram", {}).items()}
    what = "pushes"
    if not counts:
        counts, what = series.histogram(run.steps), "updates"
    if not counts:
        return None
    caption = "The staleness of a push is how many updates were made that it did not know of."
    if told.get("mean") is not None:
        caption += (
            f" Mean {told['mean']:.2f}, median {told['p50']}, 99 % within {told['p99']}, at most "
            f"{told['max']}."
        )
    bars = {
        "type": "bar", "x": list(counts), "y": list(counts.values()), "marker": {"color": ACCENT},
        "hovertemplate": f"staleness %{{x}}: %{{y}} {what}<extra></extra>",
    }  # fmt: skip
    x = axis("staleness, updates", rangemode="tozero")
    if len(counts) <= 12:
        x |= {"dtick": max(1, math.ceil(max(counts) / 12))}
    return Figure(
        "Staleness", [bars], layout(x, axis(what), bargap=0.2), caption, height=240, small=True
    )
