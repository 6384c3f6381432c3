"""wagontrain's server shard as a contender of `server_throughput.py`.

    python -m benchmarks.contender_server MIB [ADDRESS]

With an address, the shard is not started here: a line of JSON says what it has to be told.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any, TypeVar

from benchmarks.serving import Sides, follow, say
from wagontrain.servers.job import Job
from wagontrain.servers.messages import Beat, Hello, Message, Pull, Push, Staged, Stop, Values
from wagontrain.servers.orders import Applied, Commit, Fill, Ready, Setup
from wagontrain.servers.parts import PUSHED, WHOLE, Entry, Whole, divide
from wagontrain.servers.wire import Line, Listener, Network, Secret

_M = TypeVar("_M", bound=Message)
LOCAL = "127.0.0.1"
LIMIT = 60.0
"""Seconds to wait for an answer."""
SHARD = [sys.executable, "-m", "wagontrain.servers.serving"]


def wait_for(side: Line | Listener, kind: type[_M]) -> Any:
    """The next message of a kind."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        incoming = side.receive(1.0)
        if incoming is None or isinstance(incoming.message, Beat):
            continue
        if isinstance(incoming.message, kind):
            return incoming
        raise SystemExit(f"unexpected: {incoming.message}")
    raise SystemExit(f"no {kind.__name__} within {LIMIT:g} s")


class OneShard:
    """The coordinator of one shard.

    Args:
        network: its sockets.
        size: MiB of parameters.
        address: to listen on.
    """

    def __init__(self, network: Network, size: int, address: str) -> None:
        self.network = network
        self.listener = network.listen(address)
        self.entries = [Entry("w", (size * 256, 1024), "float32", 0)]
        self.version = 0

    def start(self) -> subprocess.Popen[str]:
        """Start the shard beside this process."""
        command = [*SHARD, self.listener.endpoint, "0", LOCAL, "0", "."]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(self.network.secret.text + "\n")
        process.stdin.flush()
        return process

    def set_up(self) -> Hello:
        """Fill the shard, once it is there."""
        incoming = wait_for(self.listener, Hello)
        self.peer = incoming.peer
        parts = divide(self.entries, 1)[0]
        job = Job(0, 1, tuple(parts), "sgd", groups=({"lr": 0.1},))
        self.listener.send(self.peer, Setup(job.plain()))
        self.listener.send(self.peer, Fill(0), Whole(self.entries, 1).slices(0, WHOLE))
        wait_for(self.listener, Ready)
        hello: Hello = incoming.message
        return hello

    def commit(self, worker: int, sequence: int) -> None:
        """Have a push applied."""
        self.version += 1
        self.listener.send(self.peer, Commit(self.version, ((worker, sequence),), 1.0))


class OneWorker:
    """A worker's side: its values and gradients are in memory that it can show."""

    def __init__(self, network: Network, endpoint: str, entries: list[Entry], number: int) -> None:
        self.line = network.connect(endpoint)
        self.number = number
        self.sequence = 0
        memory = network.arena.memory
        self.values = Whole(entries, 1, memory=memory)
        self.gradients = Whole(entries, 1, PUSHED, memory)

    def push(self) -> None:
        """Returns when the shard has put the gradient aside."""
        self.line.send(Push(0, self.number, self.sequence), self.gradients.slices(0))
        wait_for(self.line, Staged)
        self.sequence += 1

    def pull(self, at_least: int = 0) -> None:
        """Returns when the values are here."""
        self.line.send(Pull(0, self.number, at_least=at_least), self.values.slices(0))
        incoming = wait_for(self.line, Values)
        incoming.into(self.values.slices(0))
        incoming.end()


def main() -> None:
    size, address = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else LOCAL
    with Network(Secret.new()) as network:
        coordinator = OneShard(network, size, address)
        process = coordinator.start() if address == LOCAL else None
        if process is None:
            say(coordinator=coordinator.listener.endpoint, secret=network.secret.text)
        hello = coordinator.set_up()
        worker = OneWorker(network, hello.endpoint, coordinator.entries, 0)

        def commit() -> None:
            coordinator.commit(0, worker.sequence - 1)
            wait_for(coordinator.listener, Applied)

        follow(Sides(worker.push, worker.pull, hello.process, commit))
        coordinator.listener.send(coordinator.peer, Stop())
        if process is not None:
            process.wait(30)


if __name__ == "__main__":
    main()
