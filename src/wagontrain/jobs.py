"""`fit` and `connect`: training from a script, a notebook, or under torchrun."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle
import safetensors.torch
from rich.console import Console
from torch import Tensor

from wagontrain import checkpoint, launch, ray_engine
from wagontrain.engines import Engine, Local, make_engine
from wagontrain.errors import UsageError, WorkerError
from wagontrain.events import Sink
from wagontrain.folder import RunFolder
from wagontrain.launch import Failure, Place, Terms
from wagontrain.mesh import World
from wagontrain.progress import Follower, Progress, result_lines
from wagontrain.registry import make_strategy
from wagontrain.strategy import Strategy
from wagontrain.task import Task, TaskSource, load_task, make_task
from wagontrain.trainer import Run, train
from wagontrain.transport import Context

_TERMS = Terms()
_RESUME = "resume"


@dataclass(frozen=True)
class Result:
    """How a run ended, and where its files are."""

    summary: dict[str, Any]
    run_dir: Path

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, under the plain model's names."""
        return safetensors.torch.load_file(RunFolder(self.run_dir).weights)


@dataclass(frozen=True)
class Job:
    """All that a worker has to know, as one file that the launching process writes.

    Args:
        kind: what to do: "train" or "trace".
        strategy: name of the strategy, where it was not pickled beside.
        settings: its settings.
        overrides: fields of the task to replace.
        task_file: `FILE:NAME` to load the task from; None where task and strategy were pickled.
        run_dir: the run's folder. Paths that are not absolute start at the job's own folder.
        options: what else the kind of job needs.
    """

    kind: str
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    task_file: str | None = None
    run_dir: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(
        self, folder: Path, source: TaskSource, strategy: Strategy, travels: bool = False
    ) -> None:
        """Leave the job in a folder that only this user can read.

        A job that travels to other hosts holds its Python files, too, and is told its paths as
        they are in the folder.

        A task from a script or a notebook travels by cloudpickle, which takes functions and
        classes of `__main__` along; it goes to this user's own processes through this folder
        and nowhere else.

        Raises:
            UsageError: the task cannot be pickled.
        """
        if self.task_file is None:
            try:
                (folder / "task.pkl").write_bytes(cloudpickle.dumps((source, strategy)))
            except Exception as error:  # pickling runs whatever the user's objects define
                raise UsageError(
                    f"the task cannot be sent to worker processes ({error}): put it into a file "
                    "of its own and start it with `wagontrain run FILE`"
                ) from error
        job = self._carried(folder) if travels else self._in_place()
        content = {"job": job.__dict__, "path": sys.path}
        (folder / "job.json").write_text(json.dumps(content))

    def _in_place(self) -> Job:
        file, colon, name = (self.task_file or "").partition(":")
        return replace(
            self,
            task_file=f"{Path(file).absolute()}{colon}{name}" if file else None,
            run_dir=str(Path(self.run_dir).absolute()) if self.run_dir else None,
        )

    def _carried(self, folder: Path) -> Job:
        file, colon, name = (self.task_file or "").partition(":")
        main = file or getattr(sys.modules["__main__"], "__file__", None)
        ray_engine.carry(folder, Path(main).absolute() if main else None)
        inside = f"{ray_engine.SOURCES}/{Path(file).name}{colon}{name}" if file else None
        options = dict(self.options)
        if options.get("resume"):
            shutil.copytree(options["resume"], folder / _RESUME)
            options["resume"] = _RESUME
        return replace(self, task_file=inside, run_dir=ray_engine.RUN, options=options)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job in a folder."""
        content = json.loads((folder / "job.json").read_text())
        sys.path.insert(0, str(folder / ray_engine.SOURCES))
        # What the launching process can import, its workers can: before anything is unpickled.
        sys.path.extend(entry for entry in content["path"] if entry not in sys.path)
        return cls(**content["job"])

    def load(self, folder: Path) -> tuple[Task, Strategy]:
        """The task to train, and how."""
        if self.task_file is not None:
            strategy = make_strategy(self.strategy, self.settings)
            return make_task(load_task(str(folder / self.task_file)), self.overrides), strategy
        source, strategy = cloudpickle.loads((folder / "task.pkl").read_bytes())
        return make_task(source, self.overrides), strategy


@contextlib.contextmanager
def job_folder() -> Iterator[Path]:
    """A folder for a job, which only this user can enter, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="wagontrain-") as name:
        yield Path(name)


def fit(
    task: TaskSource,
    strategy: str | Strategy = "data-parallel",
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
) -> Result:
    """Train a task.

    Under torchrun (or anything that sets its variables) this process takes its place among the
    others. Elsewhere it trains here, or with `workers` > 1 in so many processes on this machine,
    or on a Ray cluster.

    Args:
        task: a `Task`, or a function that returns one (called in every worker).
        strategy: name of a strategy, or one with settings.
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

    Raises:
        UsageError: the request cannot be honoured; nothing was started.
        TrainingError: training began and could not go on.
    """
    chosen = make_strategy(strategy) if isinstance(strategy, str) else strategy
    label = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "run"
    return start(
        task, chosen, workers=workers, run_dir=run_dir, steps=steps, label=label, resume=resume,
        engine=make_engine(engine, address), display=None if quiet else Progress(Console()),
        terms=Terms(interface, patience),
    )  # fmt: skip


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
) -> Result:
    """Train a task here, or in processes that an engine starts; see `fit`."""
    engine = engine or Local()
    place = launch.place_from_environment()
    count = engine.count(workers, place)
    task = make_task(source, overrides)
    if steps is not None and steps < 1:
        raise UsageError(f"{steps} steps were asked for: give at least 1")
    strategy.check(task, World(size=count))
    found = None
    if resume is not None and (place is None or place.rank == 0):
        found = checkpoint.latest(Path(resume)).path.absolute()
    if place is not None or (count == 1 and not engine.travels):
        with _one_voice(place) as voice:
            folder = RunFolder.create(run_dir, label) if not place or place.rank == 0 else None
            terms = replace(terms, stacks=folder.path / "stacks" if folder else None)
            try:
                voice.context = launch.join(place, terms)
            except UsageError:
                if folder:
                    folder.discard()
                raise
            ahead = Path(resume) if resume is not None else None
            return _train_here(task, strategy, voice.context, folder, steps, display, ahead)
    del task  # its data would be held here as long as the workers train
    folder = RunFolder.create(run_dir, label)
    job = Job(
        "train", strategy.name, strategy.settings, dict(overrides or {}), task_file,
        str(folder.path),
        {"steps": steps, "patience": terms.patience, "resume": str(found) if found else None},
    )  # fmt: skip
    display_ = display or Progress(Console(quiet=True))
    try:
        with Follower(display_, folder.events, folder.logs / "rank0.log"):
            run_job(job, source, strategy, count, folder, engine)
    except UsageError:
        folder.discard()
        raise
    if not folder.has_ended():
        raise WorkerError(
            "all workers ended with status 0 before the training did: something in the task ends "
            f"the process; what they printed is in {folder.logs}"
        )
    result = Result(folder.read_summary(), folder.path)
    _show(result, display)
    return result


def run_job(
    job: Job,
    source: TaskSource,
    strategy: Strategy,
    workers: int,
    run: RunFolder,
    engine: Engine,
) -> None:
    """Run a job in `workers` processes, until all have ended well."""
    with job_folder() as folder:
        job.write(folder, source, strategy, engine.travels)
        engine.run(folder, workers, run)


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
    run = Run(task, strategy, context, keep, max_steps=job.options["steps"], resume=ahead)
    with run:
        train(run)
    launch.leave(context)


def connect(
    task: TaskSource,
    strategy: str | Strategy = "data-parallel",
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
) -> Result:
    first = context.world.rank == 0
    sinks = [display] if display is not None and first else []
    try:
        run = Run(task, strategy, context, folder, sinks, steps, resume)
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
