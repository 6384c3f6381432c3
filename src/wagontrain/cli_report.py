"""The command line's `report` and `trace`, and the report at the end of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wagontrain.cli_help import SEE
from wagontrain.errors import UsageError
from wagontrain.folder import RunFolder
from wagontrain.report import page, tracing
from wagontrain.report.reading import read_run

app = typer.Typer()

_AT_ONCE = 16 * 2**20
"""Bytes of events that are read at the end of a run without being asked: about a second's work."""


@app.command(rich_help_panel=SEE, epilog="Example: wagontrain report runs/mnist-20260101-120000")
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o",
            help="File to write; default report.html in the run directory, or here for several.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Write a page about a run, or about several side by side."""
    runs = [read_run(path) for path in run_dirs]
    file = output or (run_dirs[0] if len(runs) == 1 else Path()) / "report.html"
    page.write(runs, file)
    print(file)


@app.command(
    rich_help_panel=SEE,
    epilog="Example: wagontrain trace runs/mnist-20260101-120000 -o trace.json",
)
def trace(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write.")
    ] = Path("trace.json"),
    steps: Annotated[
        int, typer.Option(help="Steps to write, counted from the end.")
    ] = tracing.STEPS,
) -> None:  # fmt: skip
    """Write a run's steps for Perfetto or chrome://tracing."""
    run = read_run(run_dir)
    count = tracing.write(run, output, steps)
    print(f"{output}: {count:,} of {len(run.steps.step):,} steps")


def at_the_end(folder: Path) -> None:
    """Write the report of a run that is over, well or not, and say where it is.

    A run must not fail for want of a report: what hinders it is a line on standard error.
    """
    run = RunFolder(folder)
    if not run.events.is_file():  # nothing was begun
        return
    if run.events.stat().st_size > _AT_ONCE:
        print(f"  report      for this long run, by: wagontrain report {folder}")
        return
    file = folder / "report.html"
    try:
        page.write([read_run(folder)], file)
    except UsageError as error:
        print(f"wagontrain: no report: {error}", file=sys.stderr)
    else:
        print(f"  report      {file}")
