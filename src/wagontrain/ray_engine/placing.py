"""Actors for the ranks, spread over the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayError,
)
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from wagontrain.errors import UsageError, WorkerError
from wagontrain.ray_engine.rank import Rank, Where, versions

PLACED_SECONDS = 60
"""Longest wait for the cluster to reserve what the ranks need."""

STARTED_SECONDS = 120
"""Longest wait for the actors to start, each of which has to import torch."""

END_SECONDS = 5
"""Time that actors have to end their workers before they are ended themselves."""


@dataclass(frozen=True)
class Member:
    """A rank and its actor.

    Args:
        actor: Ray's handle of it.
        where: the node it is on.
        local_rank: its number among those of the node.
        local_size: how many there are on the node.
        gpus: those of all ranks of the node, in order of local rank.
    """

    actor: Any
    where: Where
    local_rank: int
    local_size: int
    gpus: tuple[str, ...]


@contextlib.contextmanager
def placed(workers: int) -> Iterator[list[Member]]:
    """Actors in order of rank, one for each; gone afterwards with all that they started.

    Raises:
        UsageError: the cluster has not the CPUs or GPUs, does not give them in time, or has
            other versions installed.
    """
    each = needs(workers)
    group = placement_group([each] * workers, strategy="SPREAD")
    actors: list[Any] = []
    try:
        if not group.wait(PLACED_SECONDS):
            raise UsageError(
                f"{workers} workers were asked for, and the Ray cluster did not give "
                f"{text_of(each)} for each within {PLACED_SECONDS} s (free now: "
                f"{text_of(_free(each))}): wait until other jobs have ended, or give fewer "
                "--workers"
            )
        make = ray.remote(Rank)
        for bundle in range(workers):
            strategy = PlacementGroupSchedulingStrategy(group, bundle)
            options = {"num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0)}
            actors.append(make.options(scheduling_strategy=strategy, **options).remote())
        found = _where(actors)
        require_alike(found)
        yield members(actors, found)
    finally:
        end_all(actors)
        remove_placement_group(group)


def needs(workers: int) -> dict[str, float]:
    """What each worker needs: a CPU, and a GPU where the cluster has any.

    Raises:
        UsageError: the cluster has not so many.
    """
    there = ray.cluster_resources()
    each = {"CPU": 1.0}
    if there.get("GPU", 0) > 0:
        each["GPU"] = 1.0
    for resource in each:
        most = int(there.get(resource, 0))
        if most < workers:
            nodes = sum(node["Alive"] for node in ray.nodes())
            raise UsageError(
                f"{workers} workers were asked for, each with {text_of(each)}; the Ray cluster has "
                f"{most} {resource}{'s' * (most != 1)} on {nodes} node{'s' * (nodes != 1)}: give "
                f"--workers {most}, or add nodes with `ray start`"
            )
    return each


def spread(nodes: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """Nodes in turns, for so many shards: a shard and the next one, its mirror, are not on one.

    The last one's mirror is the first. Where that cannot be, with an odd number of shards on two
    nodes, these two are on one.

    Ray's own SPREAD may put them there: it counts resources, of which shards take none.

    Args:
        nodes: as `ray.nodes()` tells of them.
        count: how many shards.
    """
    alive = sorted(
        (node for node in nodes if node["Alive"]), key=lambda node: node["NodeManagerAddress"]
    )
    working = [node for node in alive if node["Resources"].get("CPU", 0) > 0] or alive
    turns = [number % len(working) for number in range(count)]
    if len(working) > 2 and count > 1 and turns[-1] == 0:  # the last one's mirror is the first
        turns[-1] = 1
    # From the last on: the first is the head's as a rule, and has most to do.
    return [working[-1 - turn]["NodeID"] for turn in turns]


def _free(each: dict[str, float]) -> dict[str, float]:
    free = ray.available_resources()
    return {resource: free.get(resource, 0.0) for resource in each}


def text_of(resources: dict[str, float]) -> str:
    """Resources, for a message."""
    parts = [f"{count:g} {name}{'s' * (count != 1)}" for name, count in resources.items()]
    return " and ".join(parts)


def _where(actors: Sequence[Any]) -> list[Where]:
    try:
        found: list[Where] = ray.get(
            [actor.where.remote() for actor in actors], timeout=STARTED_SECONDS
        )
    except GetTimeoutError:
        raise WorkerError(
            f"not all of {len(actors)} Ray actors started within {STARTED_SECONDS} s: look at the "
            "nodes with `ray status`"
        ) from None
    except RayError as error:
        raise startup_error(error) from error
    return found


def startup_error(error: RayError) -> UsageError | WorkerError:
    """What to raise where an actor did not start."""
    if "No module named" in str(error):
        return UsageError(
            "a node of the Ray cluster cannot import wagontrain or what it needs: install on all "
            f"nodes what is installed here ({one_line(error)})"
        )
    return WorkerError(f"a Ray actor could not start: {one_line(error)}")


def require_alike(found: Sequence[Where]) -> None:
    """Check that nodes have installed what this machine has.

    Raises:
        UsageError: one has another version.
    """
    own = versions()
    for where in found:
        for name, version in where.versions.items():
            if version != own[name]:
                raise UsageError(
                    f"{where.host} has {name} {version}, and this machine {own[name]}: install "
                    "the same version on all nodes"
                )


def members(actors: Sequence[Any], found: Sequence[Where]) -> list[Member]:
    """Ranks for actors, those of a node next to each other."""
    nodes: dict[str, list[int]] = {}
    for index, where in enumerate(found):
        nodes.setdefault(where.node, []).append(index)
    return [
        Member(
            actors[index],
            found[index],
            local_rank,
            len(here),
            tuple(gpu for other in here for gpu in found[other].gpus),
        )
        for here in nodes.values()
        for local_rank, index in enumerate(here)
    ]


def end_all(actors: Sequence[Any]) -> None:
    """End the actors, and their workers before, however they are."""
    if actors:
        ends = [actor.end.remote() for actor in actors]
        ray.wait(ends, num_returns=len(ends), timeout=END_SECONDS)
    for actor in actors:
        ray.kill(actor)


def one_line(error: BaseException) -> str:
    """What Ray says, in a line: of a traceback the last."""
    if isinstance(error, OutOfMemoryError):
        return "Ray ended it because the node's memory was almost full"
    if isinstance(error, ActorUnavailableError):
        return "its node cannot be reached"
    if isinstance(error, ActorDiedError):
        return "its node is down" if "node has died" in str(error) else "its process ended"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
