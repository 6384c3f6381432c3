"""What each process runs that the agent starts: `python -m wagontrain.worker JOB_FOLDER PARENT`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from wagontrain import jobs, launch, planning, verify
from wagontrain.job import Job
from wagontrain.launch import Place


def _work(job: Job, folder: Path, place: Place | None) -> None:
    from wagontrain import crew  # few strategies need what it brings along

    dtype = job.options["dtype"]
    if dtype is None:
        crew.work_job(job, folder, lambda task: task)
        return
    with verify.computing_in(dtype):
        crew.work_job(job, folder, lambda task: verify.prepared(task, dtype)[0])


JOBS: dict[str, Callable[[Job, Path, Place | None], None]] = {
    "train": jobs.train_job,
    "trace": verify.trace_job,
    "plan": planning.plan_job,
    "probe": planning.probe_job,
    "work": _work,
}


def main() -> None:
    """Run the job in the given folder and end the process with its status."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])

    def run(place: Place | None) -> None:
        job = Job.read(folder)
        JOBS[job.kind](job, folder, place)

    status = launch.work(folder, parent, run)
    if status:
        # Threads may wait for ranks that are gone: nobody waits for the threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    launch.end(status)


if __name__ == "__main__":
    main()
