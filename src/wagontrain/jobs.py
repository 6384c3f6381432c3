"""`fit` and `connect`: training from a script, a notebook, or under torchrun."""

from __future__ import annotations

import contextlib
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console
from torch import Tensor

from wagontrain import checkpoint, launch, planning
from wagontrain.engines import Engine, Local, make_engine
from wagontrain.errors import UsageError, WorkerError
from wagontrain.events import Sink, note_failure
from wagontrain.folder import RunFolder
from wagontrain.job import Job, run_job
from wagontrain.launch import Failure, Place, Terms
from wagontrain.mesh import World
from wagontrain.plan import Plan
from wagontrain.planner.keeping import mark_of
from wagontrain.progress import Follower, Progress, result_lines
from wagontrain.registry import make_strategy
from wagontrain.strategy import Strategy
from wagontrain.task import Task, TaskSource, make_task
from wagontrain.trainer import Run, train
from wagontrain.transport import Context

_TERMS = Terms()
USUAL = "auto"
"""The strategy where none is named."""


@dataclass(frozen=True)
class Result:
    """How a run ended, and where its files are."""

    summary: dict[str, Any]
    run_dir: Path

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, under the plain model's names."""
        return safetensors.torch.load_file(RunFolder(self.run_dir).weights)


def fit(
    task: TaskSource,
    strategy: str | Strategy = USUAL,
    *,
    workers: int | None = None,
    run_dir: str | Path | None = None,
    steps: int | None = None,
    engine: str = "local",
    address: str | None = None,
    quiet: bool = False,
    resume: str | Path | None = None,
    interface: str | None = None,
    patience: float = 30.0,
    plan: str | Path | None = None,
) -> Result:
    """Train a task.

    Under torchrun (or anything that sets its variables) this process takes its place among the
    others. Elsewhere it trains here, or with `workers` > 1 in so many processes on this machine,
    or on a Ray cluster.

    Args:
        task: a `Task`, or a function that returns one (called in every worker).
        strategy: name of a strategy, or one with settings; where not given it is chosen by
            measurement.
        workers: processes; where not given one for each GPU, or one.
        run_dir: where the run's files go; a new folder in `runs/` where not given.
        steps: stop after so many steps.
        engine: what starts the workers: "local" or "ray".
        address: of the Ray cluster; where not given the one that Ray finds by itself.
        quiet: show nothing.
        resume: directory of a run, or a checkpoint in it, to go on from; it may have been written
            with any strategy and any number of workers.
        interface: network interface to talk to other hosts by; where not given the one that
            leads to the master.
        patience: seconds of silence after which a worker counts as lost.
        plan: file that `wagontrain plan --json` wrote, to be followed instead of a strategy.

    Raises:
        UsageError: the request cannot be honoured; nothing was started.
        TrainingError: training began and could not go on.
    """
    launch.ask_for_large_pages()
    chosen = make_strategy(strategy) if isinstance(strategy, str) else strategy
    found = read_plan(Path(plan), strategy) if plan is not None else None
    label = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "run"
    return start(
        task, chosen, workers=workers, run_dir=run_dir, steps=steps, label=label, resume=resume,
        engine=make_engine(engine, address), display=None if quiet else Progress(Console()),
        terms=Terms(interface, patience), plan=found,
    )  # fmt: skip


def read_plan(file: Path, strategy: str | Strategy) -> Plan:
    """The plan in a file, to be followed instead of `strategy`, which has to be the usual one.

    Raises:
        UsageError: it cannot be read, is none, or a strategy was named beside it.
    """
    if strategy != USUAL:
        raise UsageError(
            "a plan says itself which strategy it is for: leave out either the plan or the strategy"
        )
    try:
        return Plan.parse(file.read_text(), repr(str(file)))
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be read: {error.strerror}") from error


def start(
    source: TaskSource,
    strategy: Strategy,
    *,
    workers: int | None = None,
    run_dir: str | Path | None = None,
    steps: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    task_file: str | None = None,
    label: str = "run",
    resume: str | Path | None = None,
    engine: Engine | None = None,
    display: Progress | None = None,
    terms: Terms = _TERMS,
    plan: Plan | None = None,
) -> Result:
    """Train a task here, or in processes that an engine starts; see `fit`."""
    engine = engine or Local()
    place = launch.place_from_environment()
    count = engine.count(workers, place)
    task = make_task(source, overrides)
    if steps is not None and steps < 1:
        raise UsageError(f"{steps} steps were asked for: give at least 1")
    foregone = plan is None and strategy.plans_first and place is None and not engine.travels
    if foregone and count > 1:
        _say_first(strategy, count, display)
        plan = planning.plan(
            source, workers=workers, overrides=overrides, task_file=task_file, terms=terms,
            trial=bool(strategy.settings.get("trial", True)), relaxed=True,
        )  # fmt: skip
    if plan is not None:
        strategy = _followed(plan, task, count)
    strategy.check(task, World(size=count))
    found = None
    if resume is not None and (place is None or place.rank == 0):
        found = checkpoint.latest(Path(resume)).path.absolute()
    if strategy.crewed:
        from wagontrain import crew  # few strategies need what it brings along
        from wagontrain.servers.contract import Crewed

        assert isinstance(strategy, Crewed)
        order = crew.Order(
            source, strategy, overrides or {}, task_file, steps, found, terms, plan=plan
        )
        with _one_voice(place):
            summary, path = crew.start(order, task, count, place, run_dir, label, display, engine)
        result = Result(summary, path)
        if summary:  # the others have worked for the one that has it
            _show(result, display)
        return result
    if place is not None or (count == 1 and not engine.travels):
        with _one_voice(place) as voice:
            folder = RunFolder.create(run_dir, label) if not place or place.rank == 0 else None
            if display is not None and folder is not None:
                display.folder = folder.path
            _say_first(strategy, count, display if folder else None)
            terms = replace(terms, stacks=folder.path / "stacks" if folder else None)
            try:
                voice.context = launch.join(place, terms)
            except UsageError:
                if folder:
                    folder.discard()
                raise
            ahead = Path(resume) if resume is not None else None
            return _train_here(task, strategy, voice.context, folder, steps, display, ahead, plan)
    del task  # its data would be held here as long as the workers train
    folder = RunFolder.create(run_dir, label)
    job = Job(
        "train", strategy.name, strategy.settings, dict(overrides or {}), task_file,
        str(folder.path),
        {"steps": steps, "patience": terms.patience, "resume": str(found) if found else None,
         "plan": plan.to_json() if plan else None},
    )  # fmt: skip
    display_ = display or Progress(Console(quiet=True))
    display_.folder = folder.path
    if not engine.travels:  # which may take a while, too, and be refused
        _say_first(strategy, count, display)
    try:
        with Follower(display_, folder.events, folder.logs / "rank0.log"):
            run_job(job, source, strategy, count, folder, engine)
    except UsageError:
        folder.discard()
        raise
    except BaseException as error:
        note_failure(folder.events, error)  # whoever writes events was ended with the others
        raise
    if not folder.has_ended():
        raise WorkerError(
            "all workers ended with status 0 before the training did: something in the task ends "
            f"the process; what they printed is in {folder.logs}"
        )
    result = Result(folder.read_summary(), folder.path)
    _show(result, display)
    return result


def _followed(plan: Plan, task: Task, workers: int) -> Strategy:
    """The strategy that a plan chose, for a task that it was made for.

    Raises:
        UsageError: it was made for another model or number of workers.
    """
    if plan.world_size != workers:
        raise UsageError(
            f"the plan is for {plan.world_size} workers, and here are {workers}: start as many, or "
            "make another with `wagontrain plan`"
        )
    if plan.model != mark_of(task):
        raise UsageError(
            "the plan was made for another model, optimizer or batch size: make another with "
            "`wagontrain plan`"
        )
    return make_strategy(plan.chosen.strategy, plan.chosen.settings)


def train_job(job: Job, folder: Path, place: Place | None) -> None:
    """The worker's side of a job of the kind "train"."""
    assert job.run_dir is not None
    keep = RunFolder(folder / job.run_dir)
    rank = place.rank if place else 0
    terms = Terms(
        patience=job.options["patience"],
        last_resort=lambda error: Failure.of(rank, error).leave(folder),
        stacks=keep.path / "stacks",
    )
    context = launch.join(place, terms)
    with context.watch.doing("loading the task", patient=True):
        task, strategy = job.load(folder)
    resume = job.options.get("resume")
    ahead = folder / resume if resume else None
    given = job.options.get("plan")
    plan = Plan.from_json(given) if given else None
    run = Run(
        task, strategy, context, keep, max_steps=job.options["steps"], resume=ahead, plan=plan
    )
    with run:
        train(run)
    launch.leave(context)


def connect(
    task: TaskSource,
    strategy: str | Strategy = USUAL,
    *,
    run_dir: str | Path | None = None,
    sinks: Sequence[Sink] = (),
    resume: str | Path | None = None,
    interface: str | None = None,
    patience: float = 30.0,
) -> Run:
    """A run for a loop of one's own, in this process's place among torchrun's or alone.

        run = wt.connect(task)
        for batch in run.batches():
            report = run.step(batch)
        run.finish()

    Args:
        task: a `Task`, or a function that returns one.
        strategy: name of a strategy, or one with settings.
        run_dir: where the run's files go; none are kept where not given.
        sinks: who takes the run's events on rank 0.
        resume: directory of a run, or a checkpoint, to go on from.
        interface: network interface to talk to other hosts by.
        patience: seconds of silence after which a worker counts as lost.

    Raises:
        UsageError: the request cannot be honoured.
    """
    launch.ask_for_large_pages()
    chosen = make_strategy(strategy) if isinstance(strategy, str) else strategy
    built = make_task(task)
    context = launch.join(launch.place_from_environment(), Terms(interface, patience))
    keep = run_dir is not None and context.world.rank == 0
    folder = RunFolder.create(run_dir, "run") if keep else None
    ahead = Path(resume) if resume is not None else None
    return Run(built, chosen, context, folder, sinks, resume=ahead)


def _train_here(
    task: Task,
    strategy: Strategy,
    context: Context,
    folder: RunFolder | None,
    steps: int | None,
    display: Progress | None,
    resume: Path | None,
    plan: Plan | None,
) -> Result:
    first = context.world.rank == 0
    sinks = [display] if display is not None and first else []
    try:
        run = Run(task, strategy, context, folder, sinks, steps, resume, plan)
        with run:
            summary = train(run)
        launch.leave(context)
    except Exception as error:
        if folder is not None:
            folder.write_traceback(0, "".join(traceback.format_exception(error)))
            if isinstance(error, UsageError):
                context.watch.stacks = None  # the others refuse as well, and are not lost
                folder.discard()
        raise
    finally:
        if display is not None:
            display.close()
    result = Result(summary, Path(run.path))
    _show(result, display if first else None)
    return result


def _say_first(strategy: Strategy, count: int, display: Progress | None) -> None:
    """What goes on before there is anything to show."""
    if display is not None and (words := strategy.preparing(count)):
        display.print(words)


def _show(result: Result, display: Progress | None) -> None:
    if display is not None:
        for line in result_lines(result.summary, result.run_dir):
            display.print(line)


@dataclass
class _Voice:
    """Who speaks when several ranks fail; what settles it is there once they have met."""

    context: Context | None = None

    def is_first(self) -> bool:
        """Whether no other rank of this host has failed before; each speaks before they met."""
        deed = f"fail/{socket.gethostname()}"
        return self.context is None or self.context.watch.first_to(deed)


@contextlib.contextmanager
def _one_voice(place: Place | None) -> Iterator[_Voice]:
    """Under torchrun, let the first to fail on each host speak and the others end quietly."""
    voice = _Voice()
    if place is None or place.size == 1:
        yield voice
        return
    try:
        yield voice
    except Exception as error:
        failure = Failure.of(place.rank, error)
        first = voice.is_first()
        if failure.kind == "crash" and first:
            raise
        if first:
            print(f"wagontrain: rank {place.rank}: {failure.message}", file=sys.stderr, flush=True)
        raise SystemExit(failure.exit_status) from None
