"""`plan` and `probe`: what would be chosen, and what the cluster can do, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wagontrain import cluster as clusters
from wagontrain import launch
from wagontrain.cluster import Cluster
from wagontrain.engines import Local
from wagontrain.errors import UsageError
from wagontrain.folder import RunFolder
from wagontrain.job import Job, job_folder, run_job
from wagontrain.launch import Failure, Place, Terms
from wagontrain.plan import Plan
from wagontrain.planner import keeping
from wagontrain.planner.choosing import Wish, choose, choose_offline
from wagontrain.planner.probing import probe
from wagontrain.registry import discover, make_strategy
from wagontrain.task import Task, TaskSource, make_task
from wagontrain.transport import Context

_RESULT = "result"


def plan(
    source: TaskSource,
    *,
    workers: int | None = None,
    trial: bool = True,
    relaxed: bool = False,
    overrides: Mapping[str, Any] | None = None,
    task_file: str | None = None,
    terms: Terms | None = None,
) -> Plan | None:
    """What `auto` would choose for a task here, with the alternatives; nothing is trained.

    Args:
        source: a `Task`, or a function that returns one.
        workers: processes on this machine; under torchrun its own.
        trial: whether the best are run for a few steps.
        relaxed: whether what is not the same mathematics as one process may be chosen.
        overrides: fields of the task to replace.
        task_file: `FILE:NAME` for workers to load the task from, where there is one.
        terms: on which workers meet.

    Returns:
        The plan; None on ranks that are not the first.

    Raises:
        UsageError: nothing can train this task here.
    """
    options = {"trial": trial, "relaxed": relaxed}
    text = _together(
        "plan", source, workers, options, overrides, task_file, terms,
        lambda context: _plan(make_task(source, overrides), context, options),
    )  # fmt: skip
    return None if text is None else Plan.parse(text, "the plan")


def plan_offline(
    source: TaskSource,
    cluster: Cluster,
    *,
    relaxed: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """What `auto` would choose on a cluster that is described in a file.

    The task is profiled on this machine, once; the file's `gflops` say how much quicker or
    slower its workers are.

    Raises:
        UsageError: nothing can train this task there, or the file lacks a measurement.
    """
    task = make_task(source, overrides)
    profile = keeping.profile_of(task, cluster.size, launch.cache_folder())
    return choose_offline(task, profile, cluster, discover().values(), relaxed)


def measure_cluster(
    *, workers: int | None = None, name: str = "probed", terms: Terms | None = None
) -> Cluster | None:
    """Measure the workers here, and what links them; None on ranks that are not the first."""
    text = _together(
        "probe", _no_task, workers, {"name": name}, None, None, terms,
        lambda context: _probe(context, name),
    )  # fmt: skip
    return None if text is None else clusters.parse(text, "the probe's result")


def _no_task() -> Task:
    raise UsageError("a probe needs no task")


def _together(
    kind: str,
    source: TaskSource,
    workers: int | None,
    options: Mapping[str, Any],
    overrides: Mapping[str, Any] | None,
    task_file: str | None,
    terms: Terms | None,
    here: Callable[[Context], str],
) -> str | None:
    """Do something in workers, or in this process's place among torchrun's."""
    place = launch.place_from_environment()
    count = Local().count(workers, place)
    if place is not None or count == 1:
        context = launch.join(place, terms or Terms())
        text = here(context)
        launch.leave(context)
        return text if context.world.rank == 0 else None
    with job_folder() as folder:
        kept = RunFolder.create(folder / "run", kind)
        strategy = make_strategy("auto")
        told = {**options, "patience": (terms or Terms()).patience}
        job = Job(kind, "auto", {}, dict(overrides or {}), task_file, str(kept.path), told)
        run_job(job, source, strategy, count, kept, Local())
        return (kept.path / _RESULT).read_text()


def plan_job(job: Job, folder: Path, place: Place | None) -> None:
    """The worker's side of a job of the kind "plan"."""
    _work(job, folder, place, lambda context: _plan(job.load(folder)[0], context, job.options))


def probe_job(job: Job, folder: Path, place: Place | None) -> None:
    """The worker's side of a job of the kind "probe"."""
    _work(job, folder, place, lambda context: _probe(context, job.options["name"]))


def _work(job: Job, folder: Path, place: Place | None, do: Callable[[Context], str]) -> None:
    rank = place.rank if place else 0
    terms = Terms(
        patience=job.options["patience"],
        last_resort=lambda error: Failure.of(rank, error).leave(folder),
    )
    context = launch.join(place, terms)
    text = do(context)
    if context.world.rank == 0:
        assert job.run_dir is not None
        (folder / job.run_dir / _RESULT).write_text(text)
    launch.leave(context)


def _probe(context: Context, name: str) -> str:
    with context.watch.doing("measuring the cluster"):  # names who drops out
        return clusters.dump(probe(context, name))


def _plan(task: Task, context: Context, options: Mapping[str, Any]) -> str:
    wish = Wish(options["trial"], options["relaxed"], crewed=True)
    found = choose(task, context, discover().values(), wish).plan
    return json.dumps(found.to_json())
