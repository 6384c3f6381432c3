"""Measures what the cluster can do: every worker takes part, at the same time, as in training.

    arithmetic      of each worker while all are at it
    exchanges       of each kind, in groups of two and of all, by size
    interference    what computing and exchanging at once costs either
    crowding        how much slower all compute at once than one by itself

Isolated exchanges are quicker than those of a step, which compute beside them: the last says by
how much.
"""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wagontrain.axes import Axis, exchange
from wagontrain.building import usable_bytes
from wagontrain.cluster import KINDS, Cluster, Host, Kind, Measured
from wagontrain.errors import UsageError
from wagontrain.planner.profiling import arithmetic
from wagontrain.simulate import Interference
from wagontrain.transport import Context

_SIZES = tuple(2**power for power in (10, 14, 17, 20, 22, 24))
_REPEATS = 5
_ENOUGH = 0.4
"""Seconds: no larger size is tried after an exchange that took as long."""
_ALIKE = 0.15
"""Workers whose paces differ by less count as alike."""


def probe(context: Context, name: str, speeds: Sequence[float] | None = None) -> Cluster:
    """Measure the cluster. Every rank has to call this.

    Args:
        context: this rank's place in the job.
        name: of the cluster, for people.
        speeds: of each rank, where known; measured where not given.

    Raises:
        UsageError: ranks of a host do not lie side by side.
    """
    world = context.world
    if speeds is None:
        speeds = [row[0] for row in context.gather([arithmetic(world.device)])]
    names = context.gather_text(socket.gethostname())
    device = "cpu"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    devices = context.gather_text(device)
    memory = [row[0] for row in context.gather_integers([_memory(context)])]
    _require_side_by_side(names)
    between: dict[Kind, Measured] = {}
    within: dict[Kind, Measured] = {}
    slowed = Interference()
    if world.size > 1:
        measured = _Exchanges(context)
        largest = 0
        for ranks in _groups(names):
            points = measured.of(ranks)
            place = between if len({names[rank] for rank in ranks}) > 1 else within
            for kind, rows in points.items():
                known = place[kind].points if kind in place else ()
                place[kind] = Measured((*known, *rows))
            largest = max(row[1] for row in points["all_reduce"])
        slowed = replace(_interference(context, min(largest, 2**22)), crowded=_crowded(context))
        measured.close()
    workers = [
        _Worker(host, kind, space, speed)
        for host, kind, space, speed in zip(names, devices, memory, speeds, strict=True)
    ]
    return Cluster(name, tuple(_hosts(workers, slowed)), between, within)


def _memory(context: Context) -> int:
    """Bytes that this worker may take, with what it has."""
    world = context.world
    usable = usable_bytes(world.device)
    if usable is None:
        raise UsageError(
            "this system does not say how much memory a worker may take: write a cluster file "
            "with memory_gb, and give --cluster"
        )
    return usable if world.device.type == "cuda" else usable // world.local_size


def _require_side_by_side(names: Sequence[str]) -> None:
    blocks = [name for name, _ in itertools.groupby(names)]
    if len(blocks) != len(set(blocks)):
        raise UsageError(
            f"ranks of one host do not lie side by side ({', '.join(names)}): number them host by "
            "host, as torchrun does"
        )


def _groups(names: Sequence[str]) -> list[tuple[int, ...]]:
    """Groups to measure in: pairs and all, of one host and of several."""
    everyone = tuple(range(len(names)))
    blocks = [tuple(ranks) for _, ranks in itertools.groupby(everyone, names.__getitem__)]
    wanted = [everyone]
    if len(blocks) > 1:
        wanted.insert(0, (blocks[0][0], blocks[1][0]))
    largest = max(blocks, key=len)
    if len(largest) > 1:
        wanted[:0] = [largest[:2], largest]
    if len(everyone) >= 8:
        wanted.append(everyone[: len(everyone) // 2])
    return list(dict.fromkeys(wanted))


@dataclass(frozen=True)
class _Worker:
    host: str
    device: str
    memory: int
    speed: float


def _hosts(workers: Sequence[_Worker], slowed: Interference) -> list[Host]:
    """Kinds of hosts: those that are alike and lie side by side."""
    kinds: list[list[list[_Worker]]] = []
    for _, block in itertools.groupby(workers, lambda each: each.host):
        host = list(block)
        if kinds and _alike(kinds[-1][0], host):
            kinds[-1].append(host)
        else:
            kinds.append([host])
    made = []
    for hosts in kinds:
        everybody = [worker for host in hosts for worker in host]
        made.append(
            Host(
                len(hosts), len(hosts[0]), everybody[0].device,
                min(worker.memory for worker in everybody),
                statistics.mean(worker.speed for worker in everybody), slowed,
            )
        )  # fmt: skip
    return made


def _alike(one: Sequence[_Worker], other: Sequence[_Worker]) -> bool:
    first, second = (statistics.mean(each.speed for each in host) for host in (one, other))
    return (
        len(one) == len(other)
        and one[0].device == other[0].device
        and abs(first - second) <= _ALIKE * max(first, second)
        and abs(one[0].memory - other[0].memory) <= _ALIKE * max(one[0].memory, other[0].memory)
    )


class _Exchanges:
    """Times exchanges; every rank has to do the same with it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.made: list[Any] = []

    def close(self) -> None:
        for group in self.made:
            dist.destroy_process_group(group)

    def of(self, ranks: tuple[int, ...]) -> dict[Kind, list[tuple[int, int, float]]]:
        """(ranks, bytes, seconds) of every kind of exchange among some ranks."""
        world = self.context.world
        if len(ranks) == world.size:
            group = self.context.group
        else:
            group = dist.new_group(list(ranks))
            if world.rank in ranks:
                self.made.append(group)
        axis = None
        if world.rank in ranks:
            axis = Axis(ranks, ranks.index(world.rank), group)
        kinds = [kind for kind in KINDS if kind != "send" or len(ranks) == 2]
        return {kind: self._points(kind, ranks, axis) for kind in kinds}

    def _points(
        self, kind: Kind, ranks: tuple[int, ...], axis: Axis | None
    ) -> list[tuple[int, int, float]]:
        points = []
        for size in _SIZES:
            seconds = self._seconds(_work(kind, size, axis, self.context.world.device))
            points.append((len(ranks), size, seconds))
            if seconds > _ENOUGH:
                break
        return points

    def _seconds(self, work: Callable[[], None] | None) -> float:
        """Of the slowest rank, the median of some."""
        taken: list[float] = []
        for number in range(_REPEATS + 1):
            self.context.barrier()
            began = time.perf_counter()
            if work is not None:
                work()
                _finish(self.context.world.device)
            own = time.perf_counter() - began if work is not None else 0.0
            slowest = max(row[0] for row in self.context.gather([own]))
            if number:  # the first one connects
                taken.append(slowest)
            if number and sum(taken) > 2 * _ENOUGH:
                break
        return statistics.median(taken)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _work(
    kind: Kind, size: int, axis: Axis | None, device: torch.device
) -> Callable[[], None] | None:
    """One exchange, as the strategies do it; None for a rank that has no part in it."""
    if axis is None:
        return None
    ranks, place = axis.size, axis
    numbers = size // 4
    tensor = torch.ones(numbers, device=device)
    if kind == "all_reduce":
        return lambda: _all_reduce(tensor, place)
    if kind == "broadcast":
        return lambda: _broadcast(tensor, place)
    if kind == "exchange":
        part = torch.ones(max(1, numbers // ranks), device=device)
        room = [torch.empty_like(part) for _ in range(ranks)]
        return lambda: _exchange(place, [part] * ranks, room)
    return lambda: _send(tensor, place)


def _all_reduce(tensor: Tensor, axis: Axis) -> None:
    dist.all_reduce(tensor, group=axis.group)
    tensor.fill_(1.0)  # sums of sums overflow


def _broadcast(tensor: Tensor, axis: Axis) -> None:
    dist.broadcast(tensor, axis.ranks[0], group=axis.group)


def _exchange(axis: Axis, outgoing: list[Tensor], room: list[Tensor]) -> None:
    exchange(axis, outgoing, room)


def _send(tensor: Tensor, axis: Axis) -> None:
    """From the first to the second, which knows when it has come."""
    if axis.index == 0:
        dist.send(tensor, axis.ranks[1], group=axis.group)
    else:
        dist.recv(tensor, axis.ranks[0], group=axis.group)


def _interference(context: Context, size: int) -> Interference:
    """How much longer computing takes while all exchange, and exchanging while all compute."""
    device = context.world.device
    n = 256 if device.type == "cpu" else 2048
    left, right = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    tensor = torch.ones(size // 4, device=device)

    def compute(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right)
        _finish(device)
        return time.perf_counter() - began

    def start() -> Any:
        return dist.all_reduce(tensor, group=context.group, async_op=True)

    def slowest(own: float) -> float:
        return max(row[0] for row in context.gather([own]))

    compute(3)
    one = slowest(compute(10)) / 10
    context.barrier()
    began = time.perf_counter()
    for _ in range(3):
        start().wait()
    _finish(device)
    alone = slowest((time.perf_counter() - began) / 3)
    # As much arithmetic as takes about two exchanges, begun with each of them.
    times = max(1, min(2000, round(2 * alone / one)))
    context.barrier()
    computing = slowest(compute(times))
    beside, exchanging = [], []
    for _ in range(3):
        context.barrier()
        began = time.perf_counter()
        work = start()
        done: list[float] = []
        work.get_future().then(lambda _, done=done: done.append(time.perf_counter()))
        taken = compute(times)
        work.wait()
        _finish(device)
        ended = done[0] if done else time.perf_counter()
        beside.append(slowest(taken))
        exchanging.append(slowest(ended - began))
        tensor.fill_(1.0)
    # While the exchange lasts computing is slower; afterwards it is not.
    lasting, together = statistics.median(exchanging), statistics.median(beside)
    exchange_slowed = max(1.0, lasting / alone)
    extra = max(0.0, together - computing)
    overlap = min(lasting, together)
    compute_slowed = 1.0 if overlap <= extra else max(1.0, overlap / (overlap - extra))
    return Interference(compute_slowed, exchange_slowed)


_CROWD_SECONDS = 0.4


def _crowded(context: Context) -> float:
    """How many times as long computing takes while all do, as while only rank 0 does.

    Of ranks that share cores with others, whichever host they say they are on.
    """
    world = context.world
    if world.device.type == "cuda":  # each has its own
        return 1.0
    together, alone = [], []
    for _ in range(2):  # in turns: other jobs come and go
        context.barrier()
        together.append(context.gather([arithmetic(world.device, _CROWD_SECONDS)])[0][0])
        own = arithmetic(world.device, _CROWD_SECONDS) if world.rank == 0 else 0.0
        alone.append(context.gather([own])[0][0])
    return max(1.0, statistics.mean(alone) / statistics.mean(together))
