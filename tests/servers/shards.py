"""Shards' processes as threads, and a coordinator and workers that tests speak for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from wagontrain.errors import WagontrainError
from wagontrain.servers.job import Job
from wagontrain.servers.messages import (
    Beat,
    Hello,
    Message,
    Pull,
    Push,
    Refusal,
    Staged,
    Stop,
    Values,
)
from wagontrain.servers.orders import Applied, Commit, Fill, Ready, Setup
from wagontrain.servers.parts import PUSHED, WHOLE, Entry, Whole, divide
from wagontrain.servers.serving import Server
from wagontrain.servers.tables import Table
from wagontrain.servers.wire import Incoming, Line, Listener, Network, Secret

SECRET = Secret("ab" * 32)
LOCAL = "127.0.0.1"
WAIT = 20.0
MODEL = [
    Entry("w", (6, 4), "float32", 0),
    Entry("b", (6,), "float32", 0),
    Entry("mean", (4,), "float32", "assigned"),
    Entry("frozen", (5,), "float64", "constant"),
]
M = TypeVar("M", bound=Message)


class Process:
    """A shard's process, as a thread."""

    def __init__(self, coordinator: str, index: int, port: int = 0, patience: float = WAIT) -> None:
        self.error: WagontrainError | None = None
        self.server: Server | None = None
        self.index = index
        self._arguments = (coordinator, index, port, patience)
        self.thread = threading.Thread(target=self._run, name=f"shard {index}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        coordinator, index, port, patience = self._arguments
        try:
            with Network(SECRET) as network:
                listener = network.listen(LOCAL, port)
                line = network.connect(coordinator)
                self.server = Server(network, line, listener, index, patience)
                self.server.run()
        except WagontrainError as error:
            self.error = error

    def ended(self) -> None:
        """Return when it has."""
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


class Coordinator:
    """What the coordinator would say, and what shards say to it.

    Args:
        network: for its sockets, and those of workers.
        shards: how many there are.
        job: what is not as usual in their jobs.
    """

    def __init__(self, network: Network, shards: int = 1, **job: Any) -> None:
        self.network = network
        self.listener = network.listen(LOCAL)
        self.shards = shards
        self.jobs = [
            Job(
                index, shards, tuple(parts), groups=({"lr": 1.0},), **{"rule": "momentum"} | job
            )
            for index, parts in enumerate(divide(MODEL, shards))
        ]  # fmt: skip
        self.first = Whole(MODEL, shards)
        for number, view in enumerate(self.first.views.values()):
            view.fill_(number + 10)
        self.processes: dict[int, Process] = {}
        self.peers: dict[int, bytes] = {}
        self.endpoints: dict[int, str] = {}
        self._heard: deque[tuple[Incoming, list[Tensor]]] = deque()
        self.version = 0

    def start(self, index: int = 0, port: int = 0, patience: float = WAIT) -> None:
        """Start a process, and hear its hello."""
        self.processes[index] = Process(self.listener.endpoint, index, port, patience)
        hello = self.hear(Hello)
        assert (hello.message.role, hello.message.index) == ("shard", index)
        self.peers[index], self.endpoints[index] = hello.peer, hello.message.endpoint

    def set_up(self, index: int = 0, **setup: Any) -> None:
        """Give a process its shard, filled, and hear that it is ready."""
        self.say(index, Setup(self.jobs[index].plain(), **setup))
        if not setup.get("source"):
            self.fill(index, index)
        assert self.hear(Ready).message == Ready(index, self.version)

    def fill(self, process: int, index: int) -> None:
        """Send a shard's first state."""
        self.say(process, Fill(0, index), self.first.slices(index, WHOLE))

    def mirrored(self) -> None:
        """Start two processes, each of which mirrors the other's shard."""
        for index in range(2):
            self.start(index)
        for index in range(2):
            self.set_up(index, mirror=self.endpoints[1 - index])
        for index in range(2):
            self.say(1 - index, Setup(self.jobs[index].plain()))
            self.fill(1 - index, index)
            assert self.hear(Ready).message == Ready(index, 0, mirror=True)

    def say(self, index: int, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """To a process."""
        self.listener.send(self.peers[index], message, tensors)

    def hear(self, kind: type[M]) -> Any:
        """The next message of a kind; what is of another kind is an error."""
        return hear(self.listener, kind)

    def commit(self, *pushes: tuple[int, int], divide: float = 1.0, lost: int = 0) -> None:
        """Have all processes apply one more commit."""
        self.version += 1
        for index in self.peers:
            self.say(index, Commit(self.version, pushes, divide))
        held = sum(
            len(process.server.shards) for process in self.processes.values() if process.server
        )
        for _ in range(held):
            applied = self.hear(Applied).message
            assert (applied.version, applied.lost) == (self.version, lost)

    def worker(self, number: int = 1, index: int = 0) -> Worker:
        """A worker's line to one shard."""
        return Worker(self.network, self.endpoints[index], self.shards, number, index)

    def kill(self, index: int) -> int:
        """End a process; the port it had."""
        self.say(index, Stop())
        self.processes.pop(index).ended()
        del self.peers[index]
        return int(self.endpoints[index].rpartition(":")[2])

    def close(self) -> None:
        """End all."""
        for index in list(self.processes):
            self.kill(index)


class Worker:
    """One worker's line to one shard."""

    def __init__(
        self, network: Network, endpoint: str, shards: int, number: int, index: int
    ) -> None:
        self.line = network.connect(endpoint)
        self.number = number
        self.index = index
        memory = network.arena.memory
        self.values = Whole(MODEL, shards, memory=memory)
        self.gradients = Whole(MODEL, shards, PUSHED, memory)

    def push(self, sequence: int, value: float = 1.0, **special: float) -> None:
        """Send a gradient that is one value everywhere."""
        for name, view in self.gradients.views.items():
            view.fill_(special.get(name, value))
        self.line.send(Push(self.index, self.number, sequence), self.gradients.slices(self.index))

    def pushed(self, sequence: int, value: float = 1.0) -> None:
        """... and hear that it is put aside."""
        self.push(sequence, value)
        assert self.hear(Staged).message == Staged(self.index, self.number, sequence)

    def ask(self, at_least: int = 0, whole: bool = False, **pull: Any) -> None:
        """Ask for values."""
        slices = self.values.slices(self.index, WHOLE if whole else PUSHED)
        self.line.send(Pull(self.index, self.number, whole, at_least, **pull), slices)

    def take(self, whole: bool = False) -> Values:
        """Hear values."""
        incoming = self.hear(Values)
        incoming.into(self.values.slices(self.index, WHOLE if whole else PUSHED))
        incoming.end()
        message: Values = incoming.message
        return message

    def pull(self, at_least: int = 0, **pull: Any) -> dict[str, float]:
        """First element of each tensor, of those that change."""
        self.ask(at_least, **pull)
        self.take()
        return {name: float(self.values.views[name].view(-1)[0]) for name in ("w", "b", "mean")}

    def refused(self) -> str:
        """Hear why something was refused."""
        reason: str = self.hear(Refusal).message.reason
        return reason

    def silent(self, seconds: float = 0.2) -> bool:
        """Whether nothing is heard for so long."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.line.receive(0.02) is not None:
                return False
        return True

    def hear(self, kind: type[M]) -> Any:
        """The next message, of a kind."""
        return hear(self.line, kind)


def hear(side: Line | Listener, kind: type[M]) -> Any:
    """The next message besides signs of life, which has to be of a kind."""
    limit = time.monotonic() + WAIT
    while time.monotonic() < limit:
        incoming = side.receive(1.0)
        if incoming is not None and not isinstance(incoming.message, Beat):
            assert isinstance(incoming.message, kind), incoming.message
            return incoming
    raise AssertionError(f"no {kind.__name__} came")


def random_rows(table: Table, ids: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids as they travel, and gradients of their rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((len(ids), table.dim), generator=generator)
    return torch.tensor(list(ids), dtype=table.id_type), rows


Make = Callable[..., Coordinator]
"""Makes a coordinator of so many shards, whose processes end with the test."""
