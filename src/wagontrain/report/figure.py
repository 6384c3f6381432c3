"""A figure: what plotly's script draws, as plain data.

Colours are names that begin with `@`; the page's script puts in those of its style sheet, which
differ by day and night. Text that comes from files goes through `text`: plotly takes tags in
labels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACCENT = "@accent"
INK, FAINT, GRID = "@ink", "@faint", "@grid"
RUNS = 8
"""Colours that tell runs apart."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Figure:
    """A figure with what is said of it.

    Args:
        title: what is to be seen.
        data: plotly's traces.
        layout: plotly's layout.
        caption: how it was made, and what not to conclude.
        height: in pixels.
        narrow: of the layout, what is different on a narrow page.
        small: whether it wants no more than half of a wide page.
    """

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    caption: str = ""
    height: int = 280
    narrow: Mapping[str, Any] = field(default_factory=dict)
    small: bool = False

    def plain(self) -> dict[str, Any]:
        """For the page's script."""
        layout = {**self.layout, "height": self.height}
        return {"data": list(self.data), "layout": layout, "narrow": dict(self.narrow)}


def text(value: object) -> str:
    """Text as a label of plotly's: nothing in it is a tag."""
    return html.escape(str(value), quote=False)


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis as all figures have it."""
    return {
        "title": {"text": title, "standoff": 8}, "gridcolor": GRID, "zeroline": False,
        "linecolor": GRID, "automargin": True, **more,
    }  # fmt: skip


def log_axis(title: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """A logarithmic axis, with round numbers at its ticks.

    Args:
        title: what it is of.
        low, high: what has to be on it, above zero.
        more: of plotly's axis.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], **more)


def layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A layout as all figures have it."""
    return {
        "xaxis": x, "yaxis": y, "showlegend": False, "hovermode": "closest",
        "margin": {"l": 52, "r": 16, "t": 12, "b": 44},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "dragmode": "zoom", **more,
    }  # fmt: skip


def line(
    x: Sequence[float], y: Sequence[float], name: str, colour: str, **more: Any
) -> dict[str, Any]:
    """A line."""
    style = {"color": colour, "width": 2, **more.pop("line", {})}
    return {
        "type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": text(name),
        "line": style, **more,
    }  # fmt: skip


def run_colour(number: int) -> tuple[str, str]:
    """Colour and dash by which a run is known among others."""
    return f"@run{number % RUNS}", DASHES[number // RUNS % len(DASHES)]
