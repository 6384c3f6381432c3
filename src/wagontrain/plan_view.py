"""A plan as people read it: one table, and a reason for each that lost."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from wagontrain.plan import Candidate, Estimate, Plan
from wagontrain.units import short_time, size

_LISTED = 10


def view(plan: Plan, everything: bool = False) -> RenderableType:
    """A plan as something to print.

    Args:
        plan: to show.
        everything: also settings that are neither the best of their strategy nor among the first.
    """
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("strategy", overflow="fold")
    listed = [plan.chosen, *shown(plan, everything)]
    relaxed = any(not each.exact for each in listed)
    names = ["step", "compute", "exposed", "waiting", "memory", "sent/step"]
    for name in [*names, "steps", "to loss"] if relaxed else names:
        table.add_column(name, justify="right", no_wrap=True)
    for each in listed:
        table.add_row(*_row(each, each is plan.chosen, relaxed))
    lines: list[RenderableType] = [table, Text("")]
    first = listed[0]
    lines.append(Text.assemble((first.title, "bold"), f" over {_workers(plan)} wins"))
    for each in listed[1:]:
        flip = f"; would win {each.flip}" if each.flip else ""
        lines.append(Text(f"  {each.title}: {each.why}{flip}"))
    left = len(plan.others) - len(listed) + 1
    if left:
        lines.append(Text(f"  and {left} more settings that are slower or do not fit"))
    lines += [Text(note) for note in plan.notes]
    return Group(*lines)


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


def _row(each: Candidate, chosen: bool, relaxed: bool = False) -> list[Text]:
    style = "bold" if chosen else ""
    name = Text(each.title, style)
    found = each.estimate
    if found is None:
        return [name, Text("cannot be")]
    took = short_time(found.seconds)
    if each.seconds is not None and (each.measured is not None or each.corrected is not None):
        took = f"{short_time(each.seconds)} ({took})"
    if not found.fits:
        took = "no room"
    cells = [
        took, short_time(found.compute), short_time(found.exposed), short_time(found.waiting),
        size(found.peak), size(found.sent),
    ]  # fmt: skip
    if relaxed:
        cells += _to_loss(each, found)
    return [name, *(Text(cell, style) for cell in cells)]


def _to_loss(each: Candidate, found: Estimate) -> list[str]:
    """Steps for each of exact training, and seconds that such a step's worth takes: ranges."""
    if each.seconds is None or not found.fits:
        return []
    if found.most_steps == found.least_steps == 1:
        return ["1", short_time(each.seconds)]
    ends = [found.least_steps, found.most_steps]
    took = [short_time(each.seconds * end) for end in ends]
    return [f"{ends[0]:.3g} to {ends[1]:.3g}", f"{took[0]} to {took[1]}"]


def _workers(plan: Plan) -> str:
    return f"{plan.world_size} worker{'s' * (plan.world_size > 1)} of {plan.cluster}"


def write_page(plan: Plan, file: Path) -> None:
    """Write a plan as a page of its own."""
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(view(plan, everything=True))
    console.save_html(str(file))
