"""The command line's `plan` and `probe`."""

from __future__ import annotations

import json as jsons
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wagontrain import cluster as clusters
from wagontrain import plan_view, planning
from wagontrain.cli_help import (
    CHOOSE,
    HOW,
    MACHINES,
    PLACE,
    Interface,
    Patience,
    Sectioned,
    TaskFile,
    Workers,
    cluster_names,
)
from wagontrain.errors import UsageError
from wagontrain.launch import Terms
from wagontrain.task import load_task

app = typer.Typer()

Allow = Annotated[
    str | None,
    typer.Option(
        help="'relaxed' also weighs what is not the same mathematics as one process.",
        rich_help_panel=HOW,
    ),
]


def allows_relaxed(allow: str | None) -> bool:
    """Whether the user consents to strategies that are not the same mathematics as one process.

    Raises:
        UsageError: something else is to be allowed.
    """
    if allow not in (None, "relaxed"):
        raise UsageError(f"--allow {allow!r} does not exist: --allow relaxed does")
    return allow is not None


@app.command(
    cls=Sectioned,
    rich_help_panel=CHOOSE,
    epilog="Example: wagontrain plan examples/alexnet.py --workers 4",
)
def plan(
    file: TaskFile,
    workers: Workers = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Cluster file, or the name of one that is shipped; nothing is started.",
            autocompletion=cluster_names,
            rich_help_panel=PLACE,
        ),
    ] = None,
    trial: Annotated[bool, typer.Option(help="Run the best three for a few steps.")] = False,
    allow: Allow = None,
    batch_size: Annotated[int | None, typer.Option(help="Global batch size.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the plan as a page, too.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every setting.")] = False,
    interface: Interface = None,
    patience: Patience = 30.0,
) -> None:
    """Say which strategy is best for the task in FILE, and why.

    Nothing is trained.
    """
    overrides = {} if batch_size is None else {"batch_size": batch_size}
    relaxed = allows_relaxed(allow)
    source = load_task(file)
    if cluster is not None:
        if workers is not None or trial:
            raise UsageError(
                "--cluster says what workers there are, and starts none: leave out --workers "
                "and --trial"
            )
        found = planning.plan_offline(
            source, clusters.find(cluster), relaxed=relaxed, overrides=overrides
        )
    else:
        made = planning.plan(
            source, workers=workers, trial=trial, relaxed=relaxed, overrides=overrides,
            task_file=file, terms=Terms(interface, patience),
        )  # fmt: skip
        if made is None:  # another rank says it
            return
        found = made
    if html is not None:
        plan_view.write_page(found, html)
    if json:
        print(jsons.dumps(found.to_json(), indent=1))
    else:
        Console().print(plan_view.view(found, everything), highlight=False)


@app.command(
    cls=Sectioned,
    rich_help_panel=MACHINES,
    epilog="Example: wagontrain probe --workers 4 -o cluster.toml",
)
def probe(
    workers: Workers = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default to the screen.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the cluster, for people.")] = "probed",
    interface: Interface = None,
    patience: Patience = 30.0,
) -> None:
    """Measure the workers and what links them.

    What comes of it is a file that can be read, edited, and given to `plan --cluster`.
    """
    terms = Terms(interface, patience)
    found = planning.measure_cluster(workers=workers, name=name, terms=terms)
    if found is None:  # another rank says it
        return
    text = clusters.dump(found)
    if output is None:
        print(text)
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise UsageError(f"{str(output)!r} cannot be written: {error.strerror}") from error
    print(f"{output}: {found.size} workers")
