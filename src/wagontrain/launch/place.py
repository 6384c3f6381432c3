"""A process's place in a job, from what torchrun, srun or a launcher of ours has set.

The one module that reads environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wagontrain.errors import UsageError
from wagontrain.launch import slurm
from wagontrain.launch.cores import cores


@dataclass(frozen=True)
class Place:
    """This process's place in a job that somebody has launched.

    Args:
        rank: this process's number among all.
        size: how many there are.
        local_rank: its number among those of this host.
        local_size: how many this host has.
        address: of the host where the ranks meet.
        port: where they meet.
        held: whether the launcher holds the store there; otherwise rank 0 does.
        attempt: how often the launcher has restarted the job.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    held: bool = False
    attempt: int = 0


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where what took time to find out is kept between runs, as the XDG specification has it."""
    given = environment.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "wagontrain"


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun's variables give, or those of a Slurm job step; None without.

    Raises:
        UsageError: some are there and others missing, or they contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        given = slurm.torchrun_variables(environment)
        if given is None:
            return None
        environment = given
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UsageError(
            f"the environment sets some of torchrun's variables but not {', '.join(missing)}: "
            "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    try:
        size, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
        place = Place(
            rank,
            size,
            int(environment.get("LOCAL_RANK", rank)),
            int(environment.get("LOCAL_WORLD_SIZE", size)),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            # torchrun's agent holds the store already.
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    except ValueError as error:
        raise UsageError(f"torchrun's variables in the environment are wrong: {error}") from error
    if not 0 <= rank < size or not 0 <= place.local_rank < place.local_size:
        raise UsageError(
            f"RANK={rank} is not among WORLD_SIZE={size} ranks, or LOCAL_RANK={place.local_rank} "
            f"not among LOCAL_WORLD_SIZE={place.local_size}: count from 0"
        )
    if not 0 < place.port < 65536:
        raise UsageError(f"MASTER_PORT={place.port} is not a port: give a number from 1 to 65535")
    return place


def threads_per_worker(place: Place, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads for each worker: the cores divided among this machine's workers.

    OMP_NUM_THREADS is heeded, save for the 1 that torchrun sets for whoever did not set it.
    """
    given = environment.get("OMP_NUM_THREADS", "")
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in environment and place.local_size > 1
    if given.isdigit() and int(given) > 0 and not by_torchrun:
        return int(given)
    return max(1, cores() // place.local_size)


def device_for(place: Place) -> torch.device:
    """One GPU for each local rank where there are GPUs, the CPU otherwise.

    Raises:
        UsageError: there are GPUs, but fewer than local ranks.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu")
    if place.local_size > gpus:
        raise UsageError(
            f"{place.local_size} workers were asked for on a machine with {gpus} GPU(s): use at "
            f"most {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", place.local_rank)


SECRET = "WAGONTRAIN_SECRET"
"""Variable in which a process finds the secret of a job that workers may join."""


def secret_of_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The secret of the job that this process takes part in, if it was given one."""
    return environment.get(SECRET)


def environment_of(
    number: int, workers: int, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What a worker of a job that workers may join is started with: its share of this host.

    Args:
        number: of the worker among those of this host.
        workers: how many this host has.
        environment: of this process.
    """
    own = dict(environment)
    own.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    gpus = torch.cuda.device_count()
    if gpus and "CUDA_VISIBLE_DEVICES" not in environment:
        own["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    return own
