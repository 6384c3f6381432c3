"""Figures of one step: as predicted at other bandwidths, and where its time goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wagontrain.plan import Curve, Piece, Plan
from wagontrain.report.figure import (
    ACCENT,
    INK,
    Figure,
    axis,
    layout,
    line,
    log_axis,
    run_colour,
    text,
)
from wagontrain.report.reading import RankStep, RankTimes
from wagontrain.units import short_time

RANKS = 16
_PARTS = {"data": "@data", "compute": "@compute", "waiting": "@waiting", "exchange": "@exchange"}


# --- by bandwidth -------------------------------------------------------------------------------


def by_bandwidth(plan: Plan) -> Figure | None:
    """Step time of each strategy against bandwidth, and where the own network is.

    None where the plan has no curves.
    """
    curves = [curve for curve in plan.curves if len(curve.points) > 1]
    if not curves or plan.bandwidth is None:
        return None
    times = [seconds for curve in curves for _, seconds in curve.points]
    unit, factor = ("ms", 1e3) if min(times) < 1 else ("s", 1.0)
    least, most = min(times) * factor / 1.15, max(times) * factor * 1.3
    bottom, top = math.log10(least), math.log10(most)
    ends = [math.log10(curve.points[-1][1] * factor) for curve in curves]
    height = 360
    apart_by = 18 / (height - 70) * (top - bottom)
    spread = apart(ends, apart_by)
    # A label beyond the axis would not be drawn.
    bottom, top = min(bottom, min(spread) - apart_by / 2), max(top, max(spread) + apart_by / 2)
    data, labels = [], []
    for number, (curve, place) in enumerate(zip(curves, spread, strict=True)):
        chosen = number == 0
        colour = ACCENT if chosen else run_colour(number)[0]
        dash = "solid" if chosen else ("dash", "dot", "dashdot", "longdash")[number % 4]
        x = [rate / 1e9 for rate, _ in curve.points]
        y = [seconds * factor for _, seconds in curve.points]
        hover = f"%{{text}}<br>%{{y:.3g}} {unit} at %{{x:.3g}} Gbit/s<extra></extra>"
        data.append(
            line(x, y, curve.strategy, colour, line={"width": 3 if chosen else 1.5, "dash": dash},
                 text=text(curve.title), hovertemplate=hover)
        )  # fmt: skip
        name = f"<b>{text(curve.strategy)}</b>" if chosen else text(curve.strategy)
        labels.append({
            "x": 1, "xref": "paper", "xanchor": "left", "xshift": 6, "y": place, "text": name,
            "showarrow": False, "font": {"color": colour, "size": 12},
        })  # fmt: skip
    turns = crossings(curves)
    if turns:
        data.append({
            "type": "scatter", "mode": "markers", "name": "the quickest changes",
            "x": [rate / 1e9 for rate, _, _ in turns], "y": [s * factor for _, s, _ in turns],
            "text": [text(f"from here on {title} is quicker") for _, _, title in turns],
            "hovertemplate": "%{text}: about %{x:.2g} Gbit/s<extra></extra>", "showlegend": False,
            "marker": {"size": 9, "color": "@paper", "line": {"color": INK, "width": 2}},
        })  # fmt: skip
    own = plan.bandwidth / 1e9
    here = "between these workers" if plan.hosts == 1 else "your network"
    mark = {
        "x": math.log10(own), "y": 1, "yref": "paper", "yanchor": "top", "xanchor": "left",
        "xshift": 4, "text": f"{here}: {own:.3g} Gbit/s", "showarrow": False,
        "font": {"color": INK, "size": 12},
    }  # fmt: skip
    stroke = {
        "type": "line", "x0": own, "x1": own, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": INK, "width": 1, "dash": "dot"},
    }  # fmt: skip
    rates = [rate / 1e9 for curve in curves for rate, _ in curve.points]
    across = log_axis("bandwidth of the links, Gbit/s", min(rates), max(rates))
    up = log_axis(f"step, {unit}", least, most, range=[bottom, top])
    drawn = layout(across, up, annotations=[*labels, mark], shapes=[stroke])
    drawn["margin"] = {"l": 52, "r": 118, "t": 12, "b": 44}
    narrow = {
        "annotations": [mark], "showlegend": True, "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
    }  # fmt: skip
    caption = (
        "As predicted, before trials correct it: the best setting that each strategy has today, "
        "over links as wide as told. Latency stays as it is."
    )
    if turns:
        caption += " Circles: from there on another is the quickest."
    return Figure("Step time by bandwidth", data, drawn, caption, height, narrow)


def apart(values: Sequence[float], least: float) -> list[float]:
    """Values moved as little as is needed so that neighbours are so far apart, in order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    # Groups of neighbours around their own mean, joined where they would overlap.
    groups: list[list[int]] = []

    def edges(group: Sequence[int]) -> tuple[float, float]:
        middle = sum(values[each] for each in group) / len(group)
        half = least * (len(group) - 1) / 2
        return middle - half, middle + half

    for number in order:
        groups.append([number])
        while len(groups) > 1 and edges(groups[-1])[0] - edges(groups[-2])[1] < least:
            groups[-2:] = [groups[-2] + groups[-1]]
    found = [0.0] * len(values)
    for group in groups:
        low, _ = edges(group)
        for place, number in enumerate(group):
            found[number] = low + place * least
    return found


def crossings(curves: Sequence[Curve]) -> list[tuple[float, float, str]]:
    """Where the quickest strategy changes: bandwidth, seconds, and who is quicker from there on.

    Between the points of the curves it goes in proportion, on logarithmic axes.
    """
    tables = [dict(curve.points) for curve in curves]
    rates = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
    found = []
    for left, right in itertools.pairwise(rates):
        before = min(range(len(curves)), key=lambda each: tables[each][left])
        after = min(range(len(curves)), key=lambda each: tables[each][right])
        if before == after:
            continue
        # How far below the one that wins later lies, at either end.
        gap = [math.log(tables[after][rate] / tables[before][rate]) for rate in (left, right)]
        part = gap[0] / (gap[0] - gap[1]) if gap[0] != gap[1] else 0.5
        rate = left * (right / left) ** part
        start, end = tables[before][left], tables[before][right]
        found.append((rate, start * (end / start) ** part, curves[after].title))
    return found


# --- where the time goes ------------------------------------------------------------------------


@dataclass
class _Bars:
    """Bars of one colour, in one or both of the two halves of the figure."""

    name: str
    colour: str
    axis: str
    lanes: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, lane: float, start: float, length: float, width: float, label: str) -> None:
        self.lanes.append(lane)
        self.starts.append(start)
        self.lengths.append(length)
        self.widths.append(width)
        self.labels.append(text(label))

    def plain(self, factor: float, first: bool) -> dict[str, Any]:
        return {
            "type": "bar", "orientation": "h", "y": self.lanes, "yaxis": self.axis,
            "base": [start * factor for start in self.starts],
            "x": [length * factor for length in self.lengths], "width": self.widths,
            "name": self.name, "legendgroup": self.name, "showlegend": first,
            "text": self.labels, "textposition": "none",
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": self.colour, "line": {"color": "@paper", "width": 0.5}},
        }  # fmt: skip


def step(plan: Plan | None, times: RankTimes) -> Figure | None:
    """A step rank by rank: as predicted above, as measured below; None where neither is known."""
    halves: list[tuple[str, list[str], list[_Bars]]] = []
    notes = []
    end = 0.0
    if plan is not None and plan.timeline:
        labels, bars = predicted(plan.timeline)
        end = max(piece.start + piece.seconds for piece in plan.timeline)
        halves.append((f"predicted: {short_time(end)}", labels, bars))
        notes.append("In the prediction, a rank stands for all that do the same.")
    if times.typical is not None:
        labels, bars = measured(times.typical, f"y{len(halves) + 1}".replace("y1", "y"))
        length = times.typical.length
        title = f"measured, step {times.typical.step} (the median): {short_time(length)}"
        halves.append((title, labels, bars))
        end = max(end, length)
        notes.append(
            "Measured are the lengths; they are drawn in the order in which they begin. What a "
            "rank computes after the exchange is in its computing."
        )
        if len(times.typical.compute) > RANKS:
            notes.append(
                f"Of {len(times.typical.compute)} ranks, the {RANKS} that compute longest."
            )
    if not halves:
        return None
    unit, factor = ("ms", 1e3) if end < 1 else ("s", 1.0)
    return _halves(halves, unit, factor, " ".join(notes))


def _halves(
    halves: Sequence[tuple[str, list[str], list[_Bars]]], unit: str, factor: float, caption: str
) -> Figure:
    count = sum(len(labels) for _, labels, _ in halves)
    title_height, lane = 26, 22
    inner = count * lane + len(halves) * title_height
    axes: dict[str, Any] = {}
    titles, data = [], []
    top, seen = 1.0, set()
    for number, (title, labels, bars) in enumerate(halves, 1):
        name = f"yaxis{number}".replace("axis1", "axis")
        high = top - title_height / inner
        low = max(0.0, high - len(labels) * lane / inner)
        axes[name] = axis(
            tickvals=list(range(len(labels))), ticktext=[text(label) for label in labels],
            range=[len(labels) - 0.5, -0.5], domain=[low, high], fixedrange=True, showgrid=False,
        )  # fmt: skip
        titles.append({
            "x": 0, "xref": "paper", "xanchor": "left", "y": high, "yref": "paper",
            "yanchor": "bottom", "text": text(title), "showarrow": False,
            "font": {"color": INK, "size": 13},
        })  # fmt: skip
        for each in bars:
            if each.lanes:
                data.append(each.plain(factor, each.name not in seen))
                seen.add(each.name)
        top = low
    across = axis(f"{unit} from the beginning of the step", rangemode="tozero")
    across["anchor"] = "y2" if len(halves) == 2 else "y"
    drawn = layout(
        across, axes.pop("yaxis"), **axes, annotations=titles, showlegend=True, barmode="overlay",
        bargap=0,
    )  # fmt: skip
    return Figure("One step, rank by rank", data, drawn, caption, inner + 90)


def predicted(pieces: Sequence[Piece]) -> tuple[list[str], list[_Bars]]:
    """Names of the lanes, and the bars in them: what a device computes, what a link carries."""
    lanes: list[tuple[int, str]] = []
    for piece in sorted(pieces, key=lambda each: (each.resource == "server", each.rank)):
        lane = (piece.rank, _lane(piece))
        if lane not in lanes:
            lanes.append(lane)
    lanes.sort(key=lambda lane: (lane[1] == "server", lane[0], lane[1]))
    bars = {
        "device": _Bars("compute", "@compute", "y"),
        "link": _Bars("exchange", "@exchange", "y"),
        "server": _Bars("server", "@data", "y"),
    }
    for piece in pieces:
        kind = _lane(piece)
        # A link that is used one way only has half of the lane: out above, in below.
        shift = {"out": -0.19, "in": 0.19}.get(piece.resource, 0.0)
        where = {"out": ", out", "in": ", in"}.get(piece.resource, "")
        bars[kind].add(
            lanes.index((piece.rank, kind)) + shift, piece.start, piece.seconds,
            0.34 if shift else 0.72, f"{piece.label}{where}: {short_time(piece.seconds)}",
        )  # fmt: skip
    names = {"device": "rank {}", "link": "its links", "server": "server {}"}
    return [names[kind].format(rank) for rank, kind in lanes], list(bars.values())


def _lane(piece: Piece) -> str:
    return piece.resource if piece.resource in ("device", "server") else "link"


def measured(found: RankStep, axis_name: str) -> tuple[list[str], list[_Bars]]:
    """Names of the lanes, one per rank, and the bars in them: what each spent its time on."""
    ranks: Iterable[int] = range(len(found.compute))
    if len(found.compute) > RANKS:
        longest = sorted(ranks, key=lambda rank: -found.compute[rank])[:RANKS]
        ranks = sorted(longest)
    bars = {name: _Bars(name, colour, axis_name) for name, colour in _PARTS.items()}
    labels = []
    for lane, rank in enumerate(ranks):
        labels.append(f"rank {rank}")
        at = 0.0
        for name in _PARTS:
            told = found.exchange if name == "exchange" else getattr(found, name)[rank]
            if told > 0:
                bars[name].add(lane, at, told, 0.72, f"rank {rank}, {name}: {short_time(told)}")
            at += max(0.0, told)
    return labels, list(bars.values())
