"""Many workers on one shard, each of which pushes and pulls as fast as it can.

    python -m benchmarks.crowd WORKERS MIB SECONDS

Prints how many rounds of push, commit and pull each of them had.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.contender_server import LIMIT, OneShard, OneWorker
from benchmarks.serving import say
from wagontrain.servers.messages import Done, Hello, Stop
from wagontrain.servers.orders import Applied
from wagontrain.servers.parts import Entry
from wagontrain.servers.wire import Network, Secret


def work(coordinator: str, shard: str, number: int, size: int) -> None:
    """One worker, until the coordinator says stop."""
    entries = [Entry("w", (size * 256, 1024), "float32", 0)]
    with Network(Secret(sys.stdin.readline().strip())) as network:
        line = network.connect(coordinator)
        worker = OneWorker(network, shard, entries, number)
        worker.pull()
        line.send(Hello("worker", "", "", number))
        if line.receive(2 * LIMIT) is None:  # all begin together
            raise SystemExit("nobody says when to begin")
        while True:
            worker.push()
            line.send(Done(number, worker.sequence - 1, (), 0, 1.0, 1, 0.0))
            incoming = line.receive(0)
            if incoming is not None and isinstance(incoming.message, Stop):
                return
            worker.pull()


def lead(workers: int, size: int, seconds: float) -> None:
    """Start the shard and the workers, and count what each of them does."""
    secret = Secret.new()
    with Network(secret) as network:
        coordinator = OneShard(network, size, "127.0.0.1")
        shard = coordinator.start()
        endpoint = coordinator.set_up().endpoint
        listener = coordinator.listener
        started = []
        for number in range(workers):
            words = [listener.endpoint, endpoint, str(number), str(size)]
            command = [sys.executable, "-m", "benchmarks.crowd", "work", *words]
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
            pipe = started[-1].stdin
            assert pipe is not None
            pipe.write(secret.text + "\n")
            pipe.flush()
        peers: list[bytes] = []
        counts = [0] * workers
        ends = time.monotonic() + 2 * LIMIT  # to come, at first
        while time.monotonic() < ends:
            incoming = listener.receive(1.0)
            message = None if incoming is None else incoming.message
            if isinstance(message, Done):
                counts[message.worker] += 1
                coordinator.commit(message.worker, message.sequence)
            elif isinstance(message, Hello) and incoming is not None:
                peers.append(incoming.peer)
                if len(peers) == workers:
                    ends = time.monotonic() + seconds
                    for peer in peers:
                        listener.send(peer, Applied(0, 0))
        if len(peers) < workers:
            raise SystemExit(f"{workers - len(peers)} of {workers} workers did not come")
        for peer in peers:
            listener.send(peer, Stop())
        for process in started:  # which may still be asking the shard
            process.wait(60)
        listener.send(coordinator.peer, Stop())
        shard.wait(60)
        say(counts=counts)


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        lead(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
