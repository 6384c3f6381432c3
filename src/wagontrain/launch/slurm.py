"""A process's place among the tasks of a Slurm job step, from the variables that srun sets.

Source: srun(1), "Output environment variables". Only those of a *step* count: the batch script
itself also has SLURM_NTASKS, but runs once, and would wait for tasks that nobody started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from wagontrain.errors import UsageError

_FIRST_PORT, _PORTS = 20_000, 20_000


def host_names(compressed: str) -> list[str]:
    """The hosts in a list such as `node[01-03,7],gpu2`.

    Raises:
        UsageError: the list is not one.
    """
    names: list[str] = []
    for item in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", compressed):
        names += _expand(item)
    if not names:
        raise UsageError(f"Slurm's list of hosts {compressed!r} names none")
    return names


def _expand(item: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
    if match is None:
        return [item]
    before, ranges, after = match.groups()
    numbers = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"Slurm's list of hosts {item!r} cannot be read")
        width = len(first)
        numbers += [f"{n:0{width}d}" for n in range(int(first), int(last or first) + 1)]
    return [before + number + rest for number in numbers for rest in _expand(after)]


def tasks_per_host(compressed: str) -> list[int]:
    """Tasks on each host, from a list such as `2(x3),1`.

    Raises:
        UsageError: the list is not one.
    """
    counts: list[int] = []
    for part in compressed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(f"Slurm's list of tasks {compressed!r} cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What torchrun would have set for this task; None outside a step of several tasks.

    MASTER_ADDR and MASTER_PORT are heeded where they are set; else the first host of the step is
    the master, on a port made from the job's number.

    Raises:
        UsageError: a variable is missing or cannot be read.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) <= 1:
        return None
    needed = (
        "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID",
        "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE",
    )  # fmt: skip
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UsageError(f"Slurm did not set {', '.join(missing)}: start the tasks with srun")
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    counts = tasks_per_host(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = int(environment["SLURM_NODEID"])
    if node >= len(counts):
        raise UsageError(f"Slurm's variables contradict each other: SLURM_NODEID={node}")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or host_names(environment["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(_FIRST_PORT + (job * 31 + step) % _PORTS),
    }
