"""One page that holds everything: text, tables, figures, and the script that draws them.

It needs no network, and nothing beside it. What comes from files is escaped: in text and tables
by Jinja, in figures as JSON within the page, and there as text of plotly's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from wagontrain.errors import UsageError
from wagontrain.events import finite
from wagontrain.report import curves, steps, tables
from wagontrain.report.figure import Figure, run_colour
from wagontrain.report.reading import RunRecord
from wagontrain.report.tables import Table
from wagontrain.version import __version__

_METRICS = 6


@dataclass
class Section:
    """A part of the page: a heading, and what stands below it, in rows."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[list[Figure]] = field(default_factory=list)
    """Rows of figures; those of a row stand side by side where there is room."""

    def add(self, *row: Figure | None) -> None:
        """A row of figures, of those that there are."""
        there = [figure for figure in row if figure is not None]
        if there:
            self.figures.append(there)

    def __bool__(self) -> bool:
        return bool(self.text or self.tables or self.figures)


def write(runs: Sequence[RunRecord], file: Path) -> None:
    """Write the page of one run, or of several beside each other.

    Raises:
        UsageError: the file cannot be written.
    """
    text = render(runs)
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise UsageError(
            f"{str(file)!r} cannot be written: {error.strerror}; give another place with -o"
        ) from error


def render(runs: Sequence[RunRecord]) -> str:
    """The page's text."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(here),
    )  # fmt: skip
    sections = one(runs[0]) if len(runs) == 1 else several(runs)
    sections = [section for section in sections if section]
    drawn = [figure for section in sections for row in section.figures for figure in row]
    names = {id(figure): f"figure-{number}" for number, figure in enumerate(drawn)}
    return environment.get_template("page.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=[
            {"name": run.name, "colour": run_colour(number), "ending": tables.ending(run),
             "how": run.ending, "problems": run.problems}
            for number, run in enumerate(runs)
        ],
        highlights=tables.highlights(runs[0]) if len(runs) == 1 else [],
        sections=sections, name_of=lambda figure: names[id(figure)], version=__version__,
        figures={names[id(figure)]: finite(figure.plain()) for figure in drawn},
        style=(here / "page.css").read_text(),
        script=(here / "page.js").read_text(),
        plotly=get_plotlyjs(),
    )  # fmt: skip


def one(run: RunRecord) -> list[Section]:
    """The sections of a single run."""
    what = Section("What was run")
    what.tables.append(Table((), [tables.Row(pair) for pair in tables.facts(run)], (1,)))
    chosen = Section("Why this strategy")
    if run.plan is not None:
        chosen.text += [f"{note[:1].upper()}{note[1:]}." for note in run.plan.notes]
        chosen.tables.append(tables.plan(run.plan))
        chosen.add(steps.by_bandwidth(run.plan))
    measured = Section("Predicted and measured" if run.plan is not None else "Measured")
    measured.tables.append(tables.against(run))
    measured.add(steps.step(run.plan, run.times))
    training = Section("Training")
    _training(training, [run])
    workers = Section("Workers")
    straggler = (run.summary or {}).get("straggler")
    found = tables.workers(run)
    if found is not None:
        if straggler:
            workers.text.append(f"{straggler}.")
        elif not (run.summary or {}).get("workers") and run.told("world_size", 1) > 1:
            workers.text.append("No worker stands out as slower than the others.")
        workers.tables.append(found)
    workers.add(curves.staleness(run))
    happened = Section("What happened")
    if (table := tables.happenings(run)) is not None:
        happened.tables.append(table)
    return [what, chosen, measured, training, workers, happened]


def several(runs: Sequence[RunRecord]) -> list[Section]:
    """The sections of several runs."""
    beside = Section("Side by side")
    beside.tables.append(tables.beside(runs))
    training = Section("Training")
    _training(training, runs)
    return [beside, training]


def _training(section: Section, runs: Sequence[RunRecord]) -> None:
    section.add(curves.loss(runs, "samples"), curves.loss(runs, "time"))
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    if len(runs) == 1:
        metrics.pop("loss", None)  # it is beside the training loss
    for name in list(metrics)[:_METRICS]:
        section.add(curves.metric(runs, name, "samples"), curves.metric(runs, name, "time"))
    if len(metrics) > _METRICS:
        section.text.append(f"{len(metrics) - _METRICS} more metrics are in events.jsonl.")
    section.add(curves.throughput(runs))
