"""Where the workers of one machine meet, for torch.distributed.run's agent.

torch's own rendezvous listens on all addresses of the machine; this one on loopback alone.
"""

from __future__ import annotations

import socket
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

ADDRESS = "127.0.0.1"


def store_at(address: str, port: int, timeout: timedelta, host: bool) -> TCPStore:
    """The store at which ranks meet; with `host`, held by this process on that address alone.

    Raises:
        OSError: the address is not this machine's, or the port is in use.
        torch.distributed.DistError: nobody answered in time.
    """
    if not host:
        return TCPStore(address, port, timeout=timeout, wait_for_workers=False)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family)
    # The store takes the listening socket over, and closes it when it goes.
    return TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


class LoopbackRendezvous(RendezvousHandler):
    """One agent, one store, on a free port of the loopback address."""

    def __init__(self, timeout: timedelta) -> None:
        self._name = uuid.uuid4().hex
        self._store: TCPStore | None = store_at(ADDRESS, 0, timeout, host=True)
        self._port = self._store.port

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        assert self._store is not None
        store = PrefixStore(self._name, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def is_closed(self) -> bool:
        return self._store is None

    def set_closed(self) -> None:
        self._store = None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._name

    def shutdown(self) -> bool:
        self._store = None
        return True


class NoLogs(LogsSpecs):
    """Leaves the workers' output alone: `launch` has each write a file of its own."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for environment in envs.values():
            environment["TORCHELASTIC_ERROR_FILE"] = ""
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(nowhere, nowhere, {}, {}, nowhere)

    @property
    def root_log_dir(self) -> str:
        return ""
