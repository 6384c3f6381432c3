"""The command line: `wagontrain run`, `verify`, `join`, `serve`, `export`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from wagontrain import (
    checkpoint,
    cli_dashboard,
    cli_plan,
    cli_report,
    cli_start,
    cli_testbed,
    launch,
)
from wagontrain import verify as verification
from wagontrain.cli_help import (
    CHOOSE,
    FILES,
    HOW,
    LENGTH,
    MACHINES,
    PLACE,
    TRAIN,
    Commands,
    Coordinator,
    Interface,
    Patience,
    SecretFile,
    Sectioned,
    TaskFile,
    Workers,
    setting_names,
    strategy_names,
)
from wagontrain.engines import make_engine
from wagontrain.errors import StoppedError, UsageError, WagontrainError
from wagontrain.jobs import USUAL, read_plan, start
from wagontrain.launch import Terms
from wagontrain.progress import Progress
from wagontrain.registry import make_strategy
from wagontrain.task import load_task
from wagontrain.version import __version__

app = typer.Typer(
    help="Train one PyTorch model over the machines you have.",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_start.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_dashboard.app)
app.add_typer(cli_report.app)
app.add_typer(
    cli_testbed.app,
    name="testbed",
    short_help="Rehearse a cluster: hosts on this machine, slow links.",
    rich_help_panel=MACHINES,
)

StrategyName = Annotated[
    str,
    typer.Option(
        help="How to distribute; see `strategies`.",
        autocompletion=strategy_names,
        rich_help_panel=HOW,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A setting of the strategy; repeatable.",
        autocompletion=setting_names,
        rich_help_panel=HOW,
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Global batch size.", rich_help_panel=LENGTH)]
Seed = Annotated[
    int | None, typer.Option(help="Seed of weights and sample order.", rich_help_panel=LENGTH)
]


@app.command(
    cls=Sectioned,
    rich_help_panel=TRAIN,
    epilog="Example: wagontrain run examples/mnist.py --workers 2",
)
def run(
    file: TaskFile,
    workers: Workers = None,
    strategy: StrategyName = USUAL,
    settings: Settings = None,
    trial: Annotated[
        bool, typer.Option(help="Whether auto tries the best three.", rich_help_panel=HOW)
    ] = True,
    allow: cli_plan.Allow = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Follow a plan that `wagontrain plan --json` wrote.", rich_help_panel=HOW
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What starts the workers: local or ray.", rich_help_panel=PLACE)
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster; default the one that Ray finds.", rich_help_panel=PLACE
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data.", rich_help_panel=LENGTH)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Stop after so many steps.", rich_help_panel=LENGTH)
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the run's files go; default a new one in runs/.", rich_help_panel=FILES
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run directory or checkpoint to go on from.", rich_help_panel=FILES),
    ] = None,
    interface: Interface = None,
    patience: Patience = 30.0,
    dashboard: Annotated[
        bool,
        typer.Option(
            "--dashboard", help="Show the run in the browser meanwhile.", rich_help_panel=FILES
        ),
    ] = False,
) -> None:
    """Train the task in FILE."""
    given = _settings(settings)
    if not trial:
        given = {"trial": False} | given
    if cli_plan.allows_relaxed(allow):
        if plan is not None or strategy != USUAL:
            raise UsageError(
                "--allow relaxed is for auto, which chooses: a strategy or plan that is named "
                "needs no leave"
            )
        given = {"allow": allow} | given
    chosen = make_strategy(strategy, given)
    found = read_plan(plan, strategy) if plan is not None else None
    starter = make_engine(engine, address)
    display = Progress(Console())
    label = Path(file.partition(":")[0]).stem
    run_dir, page = cli_dashboard.beside_run(run_dir, label, display.print, dashboard)
    with _stoppable(), _reported(display), page:
        start(
            load_task(file),
            chosen,
            workers=workers,
            run_dir=run_dir,
            steps=steps,
            overrides=_given(epochs=epochs, batch_size=batch_size, seed=seed),
            task_file=file,
            label=label,
            resume=resume,
            engine=starter,
            display=display,
            terms=Terms(interface, patience),
            plan=found,
        )


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: wagontrain join 10.0.0.5:41234 --secret-file secret",
)
def join(
    coordinator: Coordinator,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE[:NAME]", help="Task file; default the run's own path."),
    ] = None,
    secret_file: SecretFile = None,
) -> None:
    """Be one more worker of a run whose workers come and go."""
    from wagontrain import crew

    with _stoppable():
        crew.join(coordinator, file, secret_file)


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: wagontrain serve 10.0.0.5:41234 --secret-file secret",
)
def serve(
    coordinator: Coordinator,
    secret_file: SecretFile = None,
) -> None:
    """Hold a server shard of a run with placement=elsewhere."""
    from wagontrain import crew

    with _stoppable():
        crew.serve(coordinator, secret_file, print)


@app.command(
    rich_help_panel=TRAIN,
    epilog="Example: wagontrain export runs/mnist-20260101-120000 model.safetensors",
)
def export(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Run directory, or a checkpoint in it.")
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write: weights as safetensors.")
    ],
) -> None:
    """Write the weights of a run's last checkpoint as one file."""
    found = checkpoint.latest(run_dir)
    checkpoint.export(found, file)
    print(f"{file}: the weights after {found.steps} steps")


@app.command(
    cls=Sectioned,
    rich_help_panel=CHOOSE,
    epilog="Example: wagontrain verify examples/mnist.py --workers 3",
)
def verify(
    file: TaskFile,
    strategy: StrategyName = "data-parallel",
    workers: Annotated[int, typer.Option(help="Worker processes.", rich_help_panel=HOW)] = 2,
    steps: Annotated[
        int, typer.Option(help="Steps to train and compare.", rich_help_panel=LENGTH)
    ] = 10,
    settings: Settings = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="What to compute in: float64, float32 or bfloat16.", rich_help_panel=LENGTH
        ),
    ] = "float64",
    batch_size: BatchSize = None,
    seed: Seed = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a strategy with one process: is it the same training?"""
    if dtype not in verification.TOLERANCE:
        raise UsageError(f"dtype {dtype!r}: give one of {', '.join(verification.TOLERANCE)}")
    with _stoppable():
        verdict = verification.verify(
            load_task(file),
            make_strategy(strategy, _settings(settings)),
            workers=workers,
            steps=steps,
            dtype=cast(verification.Dtype, dtype),
            task_file=file,
            overrides=_given(batch_size=batch_size, seed=seed),
        )
    if json:
        print(verdict.to_json())
    else:
        for line in _verdict_lines(verdict):
            print(line)
    if verdict.exact and not verdict.passed:
        raise typer.Exit(1)


def _verdict_lines(verdict: verification.Verdict) -> list[str]:
    what = f"{verdict.strategy} over {verdict.workers} workers, {verdict.steps} steps"
    lines = [f"{what}, {verdict.dtype}, against one process", "largest deviation of"]
    known = verdict.exact or math.isfinite(verdict.max_loss_deviation)
    loss = f"{verdict.max_loss_deviation:.1e}" if known else "not known of every step"
    lines.append(f"  loss        {loss}")
    lines.append(f"  parameters  {verdict.max_parameter_deviation:.1e}  {verdict.worst_parameter}")
    if verdict.max_buffer_deviation is not None:
        lines.append(f"  buffers     {verdict.max_buffer_deviation:.1e}")
    lines.append(f"  tolerance   {verdict.tolerance:.1e}")
    if verdict.dropout_turned_off:
        lines.append("dropout was turned off to compare: no two splits draw the same masks")
    if verdict.random_forward:
        lines.append("two runs of one process differ as well: the model draws random numbers")
    if verdict.passed:
        lines.append("passed: the same training as one process")
    elif verdict.exact:
        lines.append("FAILED: not the training that one process would do")
    else:
        lines.append("not the same, as expected: the strategy is relaxed with these settings")
    return lines


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Within, Ctrl-C is an error like others: a line, and an exit status."""
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError("stopped by Ctrl-C; all workers were ended") from None


@contextlib.contextmanager
def _reported(display: Progress) -> Iterator[None]:
    """Within, a run goes on; afterwards, however it ended, there is a report of it."""
    try:
        yield
    finally:
        if display.folder is not None:
            cli_report.at_the_end(display.folder)


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    result = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair!r} is not FIELD=VALUE: write, say, --set bucket_mb=10")
        result[key] = value
    return result


def _given(**values: int | None) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if show:
        print(f"wagontrain {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors become one line and an exit status."""
    launch.ask_for_large_pages()
    try:
        app()
    except WagontrainError as error:
        print(f"wagontrain: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except SystemExit as asked:
        if asked.code or launch.place_from_environment() is None:
            raise
        launch.end(0)  # it was a rank among others
