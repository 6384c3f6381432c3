"""The command line's `dashboard`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from wagontrain import launch
from wagontrain.cli_help import SEE
from wagontrain.dashboard import beside
from wagontrain.folder import fresh

app = typer.Typer()


@app.command(rich_help_panel=SEE, epilog="Example: wagontrain dashboard runs/mnist-20260101-120000")
def dashboard(
    run_dir: Annotated[Path, typer.Argument(help="Of a run that goes on, ended, or will begin.")],
    port: Annotated[
        int | None, typer.Option(help="Default 8420, or any free one where that is taken.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; beyond loopback a token is asked for.")
    ] = "127.0.0.1",
    token: Annotated[bool, typer.Option("--token", help="Ask for one on loopback, too.")] = False,
) -> None:
    """Show a run in the browser while it goes on; ends with Ctrl-C."""
    beside.require()
    from wagontrain.dashboard.serving import Place, Server

    server = Server(run_dir, Place(host, port, token))
    print(f"live page of {run_dir}: {server.url}", flush=True)
    if not (run_dir / "events.jsonl").exists():
        print("  nothing is there yet; the page shows it when it is", flush=True)
    server.run()


def beside_run(
    run_dir: Path | None, label: str, say: Callable[[str], None], wanted: bool
) -> tuple[Path | None, contextlib.AbstractContextManager[None]]:
    """The page for a run that is about to begin, where it is wanted.

    Args:
        run_dir: as it was asked for.
        label: of the run, for the name of its directory where none was asked for.
        say: takes a line for the user.
        wanted: whether there is to be a page.

    Returns:
        The directory that the run has to use, and within what it has to be run.

    Raises:
        UsageError: what the server is made of is not there.
    """
    place = launch.place_from_environment()
    if not wanted or (place is not None and place.rank != 0):
        return run_dir, contextlib.nullcontext()
    beside.require()
    folder = run_dir or fresh(label)
    return folder, beside.page(folder, say)
