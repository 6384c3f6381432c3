"""What worker processes are told: one job, as files in a folder that only this user can enter."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle

from wagontrain import ray_engine
from wagontrain.engines import Engine
from wagontrain.errors import UsageError
from wagontrain.folder import RunFolder
from wagontrain.registry import make_strategy
from wagontrain.strategy import Strategy
from wagontrain.task import Task, TaskSource, load_task, make_task

_RESUME = "resume"


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
