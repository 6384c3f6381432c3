"""wagontrain's server shard as a contender of `server_throughput.py`."""

from __future__ import annotations

import subprocess
import sys
from typing import TypeVar

from benchmarks.serving import Sides, follow
from wagontrain.servers.job import Job
from wagontrain.servers.messages import Beat, Hello, Message, Pull, Push, Staged, Stop, Values
from wagontrain.servers.orders import Applied, Commit, Fill, Ready, Setup
from wagontrain.servers.parts import PUSHED, WHOLE, Entry, Whole, divide
from wagontrain.servers.wire import Incoming, Line, Listener, Network, Secret

_M = TypeVar("_M", bound=Message)


def wait_for(line: Line | Listener, kind: type[_M]) -> tuple[_M, Incoming]:
    """The next message of a kind."""
    while True:
        incoming = line.receive(60)
        if incoming is None:
            raise SystemExit("no answer")
        if isinstance(incoming.message, kind):
            return incoming.message, incoming
        if not isinstance(incoming.message, Beat):
            raise SystemExit(f"unexpected: {incoming.message}")


def main() -> None:
    size, address = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    secret = Secret.new()
    entries = [Entry("w", (size * 256, 1024), "float32", 0)]
    with Network(secret) as network:
        coordinator = network.listen(address)
        command = [sys.executable, "-m", "wagontrain.servers.serving", coordinator.endpoint, "0"]
        server = subprocess.Popen([*command, address, "0"], stdin=subprocess.PIPE, text=True)
        assert server.stdin is not None
        server.stdin.write(secret.text + "\n")
        server.stdin.flush()
        hello, incoming = wait_for(coordinator, Hello)
        peer = incoming.peer
        job = Job(0, 1, tuple(divide(entries, 1)[0]), "sgd", groups=({"lr": 0.1},))
        memory = network.arena.memory
        values = Whole(entries, 1, memory=memory)
        gradients = Whole(entries, 1, PUSHED, memory)
        coordinator.send(peer, Setup(job.plain()))
        coordinator.send(peer, Fill(0), values.slices(0, WHOLE))
        wait_for(coordinator, Ready)
        line = network.connect(hello.endpoint)
        count = 0

        def push() -> None:
            line.send(Push(0, 0, count), gradients.slices(0))
            wait_for(line, Staged)

        def commit() -> None:
            nonlocal count
            count += 1
            coordinator.send(peer, Commit(count, ((0, count - 1),), 1.0))
            wait_for(coordinator, Applied)

        def pull() -> None:
            line.send(Pull(0, 0), values.slices(0))
            _, answer = wait_for(line, Values)
            answer.into(values.slices(0))
            answer.end()

        follow(Sides(push, pull, server.pid, commit))
        coordinator.send(peer, Stop())
        server.wait(30)


if __name__ == "__main__":
    main()
