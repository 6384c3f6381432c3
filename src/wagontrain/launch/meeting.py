"""Taking one's place: meeting the other ranks, and parting from them."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store

from wagontrain.errors import UsageError, WorkerError
from wagontrain.launch import network
from wagontrain.launch.network import Interface
from wagontrain.launch.place import Place, device_for, threads_per_worker
from wagontrain.launch.rendezvous import store_at
from wagontrain.mesh import World
from wagontrain.transport import Context, SentBytes

WAIT = timedelta(seconds=300)
"""Longest time any rank waits for another, at start and in an exchange."""


@dataclass(frozen=True)
class Terms:
    """On what terms ranks meet.

    Args:
        interface: the network interface to use; where not given the one that leads to the
            master.
    """

    interface: str | None = None


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
        store = store_at(address, place.port, WAIT, host=holds)
        return meet(store, place, device)
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


def _use_interface(place: Place, name: str | None) -> Interface:
    """The interface to talk by, which Gloo and NCCL are told of."""
    own = network.named(name) if name else network.reaching(place.address, place.port)
    if own.is_loopback and place.size > place.local_size:
        raise UsageError(
            f"the master {place.address!r} is loopback address {own.address} on "
            f"{socket.gethostname()}, which other hosts cannot reach: give the master's network "
            "address as MASTER_ADDR, or --interface"
        )
    if own.name:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if name or variable not in os.environ:
                os.environ[variable] = own.name
    return own


def meet(store: Store, place: Place, device: torch.device) -> Context:
    """Form the process groups with the ranks that come to the same store."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sent = SentBytes()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=WAIT,
    )
    side = dist.new_group(timeout=WAIT)
    world = World(
        place.rank, place.size, place.local_rank, place.local_size, device, torch.get_num_threads()
    )
    return Context(world, dist.group.WORLD, side, sent, store)


def leave(context: Context) -> None:
    """Part from the other ranks in good order."""
    context.sent.close()
    if context.group is not None:
        context.barrier()
        dist.destroy_process_group()
