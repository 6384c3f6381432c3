"""Taking one's place: meeting the other ranks, and parting from them."""

from __future__ import annotations

import atexit
import errno
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from wagontrain.errors import UsageError, WagontrainError, WorkerError
from wagontrain.launch import network
from wagontrain.launch.ending import await_gloo
from wagontrain.launch.network import Interface
from wagontrain.launch.place import Place, device_for, threads_per_worker
from wagontrain.launch.rendezvous import store_at
from wagontrain.mesh import World
from wagontrain.transport import Context, SentBytes
from wagontrain.watch import RankWatch, Watch

WAIT = timedelta(seconds=300)
"""Longest time any rank waits for another, at start and in an exchange."""

_STORE_WAIT = timedelta(seconds=10)


@dataclass(frozen=True)
class Terms:
    """On what terms ranks meet.

    Args:
        interface: the network interface to use; where not given the one that leads to the
            master.
        patience: seconds of silence after which a rank is lost.
        last_resort: what to do with the error about a lost rank when the training cannot be
            ended otherwise; where not given it is printed. The process ends after it.
        stacks: where to write what each thread was doing when a rank is lost.
    """

    interface: str | None = None
    patience: float = 30.0
    last_resort: Callable[[WagontrainError], None] | None = None
    stacks: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.patience < math.inf:
            raise UsageError(f"patience is {self.patience} s: give 1 or more")


def join(place: Place | None, terms: Terms | None = None) -> Context:
    """Take one's place: choose device, threads and network interface, and meet the other ranks.

    Raises:
        UsageError: the port to meet at is in use, the devices do not suffice, or the others
            cannot reach this host by the interface.
        WorkerError: not all ranks came in time.
    """
    if place is None or place.size == 1:
        return Context(World(device=device_for(Place()), threads=torch.get_num_threads()))
    terms = terms or Terms()
    device = device_for(place)
    torch.set_num_threads(threads_per_worker(place))
    own = _use_interface(place, terms.interface)
    holds = place.rank == 0 and not place.held
    address = own.address if holds else place.address
    try:
        base = store_at(address, place.port, WAIT, host=holds)
        # A restarted job, or the second one of a script, meets at the same store.
        number = base.add(f"joined/{place.attempt}/{place.rank}", 1)
        prefix = f"wagontrain/{place.attempt}/{number}"
        watch = _watch(place, terms, lambda: _connect(address, base.port, prefix))
        watch.wait_for_all(WAIT.total_seconds())
        with watch.doing("forming groups"):
            return meet(dist.PrefixStore(prefix, base), place, device, watch)
    except (dist.DistError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {place.port} is in use by another program: give a free MASTER_PORT "
                "(torchrun --master-port)"
            ) from error
        raise WorkerError(
            f"rank {place.rank} could not meet the other {place.size - 1} at "
            f"{place.address}:{place.port} within {WAIT.total_seconds():.0f} s: start all of "
            f"them, and check that they reach this address ({str(error).splitlines()[0]})"
        ) from error


def _watch(place: Place, terms: Terms, connect: Callable[[], Store]) -> RankWatch:
    watch = RankWatch(
        place.rank,
        place.size,
        socket.gethostname(),
        connect,
        terms.patience,
        place.rank == 0 and not place.held,
        *([terms.last_resort] if terms.last_resort else []),
    )
    watch.stacks = terms.stacks
    return watch


def _connect(address: str, port: int, prefix: str) -> Store:
    store = store_at(address, port, _STORE_WAIT, host=False)
    return dist.PrefixStore(f"{prefix}/watch", store)


def _use_interface(place: Place, name: str | None) -> Interface:
    """The interface to talk by, which Gloo and NCCL are told of."""
    given = name or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    own = network.named(given) if given else network.reaching(place.address, place.port)
    if own.is_loopback and place.size > place.local_size:
        raise UsageError(
            f"{place.size} workers on several hosts would talk by interface {own.name!r} of "
            f"{socket.gethostname()}, loopback, which other hosts cannot reach: give the master's "
            "network address as MASTER_ADDR, or another --interface (GLOO_SOCKET_IFNAME)"
        )
    if own.name:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if name or variable not in os.environ:
                os.environ[variable] = own.name
    return own


def meet(store: Store, place: Place, device: torch.device, watch: Watch | None = None) -> Context:
    """Form the process groups with the ranks that come to the same store."""
    watch = watch or Watch()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sent = SentBytes()
    watch.interrupt = sent.shut
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=WAIT,
    )
    side = dist.new_group(timeout=WAIT)
    atexit.unregister(await_gloo)
    atexit.register(await_gloo)
    world = World(
        place.rank, place.size, place.local_rank, place.local_size, device, torch.get_num_threads()
    )
    group = dist.group.WORLD
    assert group is not None
    if device.type == "cuda":
        watch.interrupt = partial(_abort, group, side)
    return Context(world, group, side, sent, watch)


def _abort(*groups: dist.ProcessGroup) -> None:
    for group in groups:
        group.abort()


def leave(context: Context) -> None:
    """Part from the other ranks in good order."""
    if context.group is not None:
        with context.watch.doing("waiting for the others at the end"):
            context.barrier()
        context.watch.close()
        context.sent.close()
        dist.destroy_process_group()
