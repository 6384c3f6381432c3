"""A plan as people read it: one table that fits 80 columns, and a reason for each that lost."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions
from rich.text import Text

from wagontrain.plan import Candidate, Estimate, Plan
from wagontrain.units import short_time, size

_LISTED = 10
_NAME, _CELL = 16, 9
_WIDEST = 100
"""Lines of text are no longer than that, however wide the terminal is."""


@dataclass(frozen=True)
class View:
    """A plan as something for a console to print, as wide as that is.

    Args:
        plan: to show.
        everything: also settings that are neither the best of their strategy nor among the first.
    """

    plan: Plan
    everything: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        listed = [self.plan.chosen, *shown(self.plan, self.everything)]
        width = min(options.max_width, _WIDEST)
        yield from _table(listed)
        yield Text("")
        for line in _reasons(self.plan, listed, width):
            yield Text(line)


def view(plan: Plan, everything: bool = False) -> View:
    """A plan as something to print."""
    return View(plan, everything)


def shown(plan: Plan, everything: bool = False) -> list[Candidate]:
    """The losers worth a line: the best of each strategy, and what came close or was tried."""
    if everything:
        return list(plan.others)
    found: list[Candidate] = []
    names: set[str] = {plan.chosen.strategy}
    for number, each in enumerate(plan.others):
        close = number < 2 or each.measured is not None
        if (each.strategy not in names or close) and len(found) < _LISTED:
            found.append(each)
        names.add(each.strategy)
    return found


# --- the table ----------------------------------------------------------------------------------


def _table(listed: Sequence[Candidate]) -> Iterator[Text]:
    """A line of figures for each; settings that do not fit beside the name stand below it."""
    column = max(_NAME, *(len(each.strategy) for each in listed))
    tried = any(each.measured is not None or each.corrected is not None for each in listed)
    relaxed = not all(each.exact for each in listed)
    titles = ["step", "foretold", "compute", "exposed", "waiting", "memory", "sent"]
    yield Text(_line("strategy", titles if tried else [titles[0], *titles[2:]], column))
    for number, each in enumerate(listed):
        style = "" if number else "bold"
        name, _, settings = each.title.partition(" ")
        if len(each.title) <= column:
            name, settings = each.title, ""
        found = each.estimate
        cells = ["cannot be"] if found is None else _cells(each, found, tried)
        yield Text(_line(name, cells, column), style)
        for line in textwrap.wrap(settings, column + 6 * _CELL, break_on_hyphens=False):
            yield Text(f"  {line}", style)
        if relaxed and found is not None and found.fits and each.seconds is not None:
            yield Text(f"  {_to_loss(each.seconds, found)}", style)


def _line(name: str, cells: Sequence[str], column: int) -> str:
    return f"{name:<{column}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _cells(each: Candidate, found: Estimate, tried: bool) -> list[str]:
    taken = found.seconds if each.seconds is None else each.seconds
    step = [short_time(taken) if found.fits else "no room"]
    if tried:
        step.append(short_time(found.seconds))
    parts = [short_time(part) for part in (found.compute, found.exposed, found.waiting)]
    return [*step, *parts, size(found.peak), size(found.sent)]


# --- the reasons --------------------------------------------------------------------------------


def _reasons(plan: Plan, listed: Sequence[Candidate], width: int) -> Iterator[str]:
    yield from _wrapped(f"{listed[0].title} over {_workers(plan)} wins", width, "")
    for each in listed[1:]:
        flip = f"; would win {each.flip}" if each.flip else ""
        yield from _wrapped(f"  {each.title}: {each.why}{flip}", width, "    ")
    left = len(plan.others) - len(listed) + 1
    if left:
        yield f"  and {left} more settings that are slower or do not fit"
    for note in plan.notes:
        yield from _wrapped(note, width, "")


def _wrapped(text: str, width: int, hanging: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=hanging, break_on_hyphens=False, break_long_words=False
    )


def _to_loss(seconds: float, found: Estimate) -> str:
    """Steps for each of exact training, and what such a step's worth takes to a loss: ranges."""
    if found.most_steps == found.least_steps == 1:
        return f"steps needed 1, to loss {short_time(seconds)}"
    ends = [found.least_steps, found.most_steps]
    took = [short_time(seconds * end) for end in ends]
    return f"steps needed {ends[0]:.3g} to {ends[1]:.3g}, to loss {took[0]} to {took[1]}"


def _workers(plan: Plan) -> str:
    return f"{plan.world_size} worker{'s' * (plan.world_size > 1)} of {plan.cluster}"


def write_page(plan: Plan, file: Path) -> None:
    """Write a plan as a page of its own."""
    console = Console(record=True, width=_WIDEST, file=io.StringIO())
    console.print(view(plan, everything=True))
    console.save_html(str(file))
