"""A shard's process: it answers workers, and does what the coordinator says, in its order.

With replicas, a process also holds a mirror of the shard before its own: the same pushes and the
same commits, from which that shard is filled when its process is started again.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zmq

from wagontrain.errors import UsageError, WagontrainError, WorkerError
from wagontrain.servers.answers import Answers, send_state
from wagontrain.servers.contents import Contents, empty, read, room, take_up
from wagontrain.servers.job import Job
from wagontrain.servers.keeping import Keeper
from wagontrain.servers.messages import Beat, Hello, Message, Refusal, Stop
from wagontrain.servers.mirror import Mirror
from wagontrain.servers.orders import (
    Applied,
    Commit,
    Fill,
    Forget,
    Moved,
    Norm,
    PullState,
    Ready,
    Release,
    Setup,
    Snapshot,
    Squares,
)
from wagontrain.servers.shard import Shard
from wagontrain.servers.wire import BadMessage, Incoming, Line, Listener, Network, Secret
from wagontrain.version import __version__

BEAT = 1.0
"""Seconds between signs of life."""

PATIENCE = 60.0
"""Seconds that a question waits for its commit, and the process for the coordinator to be back."""


@dataclass
class Filling:
    """A shard whose state is to come from another process."""

    line: Line
    wanted: PullState
    until: float
    connections: int = 0


class Server:
    """A shard's process at work.

    Args:
        network: its sockets.
        line: to the coordinator.
        listener: for workers.
        index: which shard is its own.
        patience: seconds that a question waits for its commit.
        folder: from which the files of shards are named.
    """

    def __init__(
        self,
        network: Network,
        line: Line,
        listener: Listener,
        index: int,
        patience: float = PATIENCE,
        folder: Path = Path(),
    ) -> None:
        self.network = network
        self.line = line
        self.listener = listener
        self.index = index
        self.patience = patience
        self.folder = folder
        self.empty: dict[int, Shard] = {}  # what is still to be filled
        self.shards: dict[int, Shard] = {}
        self.answers = Answers(listener, self.shards, patience)
        self._filling: dict[int, Filling] = {}
        self._attempts: dict[int, int] = {}
        self._keeper: Keeper | None = None
        self._over = False
        self._next_beat = 0.0
        self._connections = 0

    def run(self) -> None:
        """Serve until the coordinator says stop.

        Raises:
            WorkerError: the coordinator cannot be reached any longer.
        """
        self._say_hello()
        while not self._over:
            connections = self.line.connections()
            if connections > self._connections > 0:  # what was said meanwhile is lost
                self._say_hello()
            self._connections = connections
            due = min(self._keep_time(), self.answers.expire())
            ready = self._ready_within(due)
            # Commits first: they let questions go on, and make room for pushes.
            while not self._over and (incoming := self._from_coordinator()):
                self._obey(incoming)
            self._go_on_filling()
            self.answers.hear_mirror()
            if self.listener.socket in ready:
                self.answers.answer_one()
        if self._keeper is not None:
            self._keeper.close()

    def _say_hello(self) -> None:
        """Tell the coordinator that this shard is there, and what it has if it has all."""
        whole = self.index in self.shards and not self.empty
        applied = min(shard.version for shard in self.shards.values()) if whole else None
        self.line.send(
            Hello(
                "shard", __version__, socket.gethostname(), os.getpid(),
                endpoint=self.listener.endpoint, index=self.index, applied=applied,
            )
        )  # fmt: skip

    def _ready_within(self, seconds: float) -> dict[Any, int]:
        poller = zmq.Poller()
        poller.register(self.line.socket, zmq.POLLIN)
        if self.index in self.shards and not self.empty:
            poller.register(self.listener.socket, zmq.POLLIN)
        if self.answers.mirror is not None:
            poller.register(self.answers.mirror.line.socket, zmq.POLLIN)
        for filling in self._filling.values():
            poller.register(filling.line.socket, zmq.POLLIN)
        return dict(poller.poll(int(max(0.0, seconds) * 1000) + 1))

    def _from_coordinator(self) -> Incoming | None:
        try:
            return self.line.receive(0)
        except BadMessage as error:
            self._complain(str(error))
            return None

    def _complain(self, reason: str, **more: Any) -> None:
        self.line.send(Refusal(f"shard {self.index}: {reason}", self.index, **more))

    def _keep_time(self) -> float:
        """Do what is due; seconds until more is."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT
            self.line.send(Beat(f"shard {self.index}"))
            self.network.atlas.prune()
            if self.line.apart() > self.patience:
                raise WorkerError(
                    f"shard {self.index} ends: it has not reached the coordinator at "
                    f"{self.line.endpoint} for {self.patience:g} s"
                )
            if self._keeper is not None:
                self._keeper.look()
                if self._keeper.problem is not None:
                    self._complain(self._keeper.problem, then="go on")
                    self._keeper.problem = None
        return self._next_beat - now

    # What the coordinator says

    def _obey(self, incoming: Incoming) -> None:
        message = incoming.message
        try:
            if isinstance(message, Fill):
                self._fill(incoming, message)
            elif isinstance(message, Stop):
                self._over = True
            elif handler := self._HANDLERS.get(type(message)):
                handler(self, message)
            elif not isinstance(message, Beat | Refusal):
                raise WorkerError(f"a shard has no use for a {message.kind} message")
        except WagontrainError as error:
            self._complain(str(error))
        finally:
            incoming.drop()

    def _set_up(self, message: Setup) -> None:
        job = Job.of(message.job)
        own = job.index == self.index
        if message.mirror == self.listener.endpoint:
            raise UsageError("a shard cannot be its own mirror: use 2 servers or more")
        if message.mirror and job.rule == "dc-asgd":
            raise UsageError(
                "dc-asgd keeps what each worker fetched, which a mirror does not see: use "
                "replicas=0, or staleness-aware"
            )
        self.shards.pop(job.index, None)
        shard = self.empty[job.index] = Shard(job)
        self._attempts[job.index] = message.attempt
        if (filling := self._filling.pop(job.index, None)) is not None:
            filling.line.close()
        if own:
            if self.answers.mirror is not None:
                self.answers.mirror.close()
            line = self.network.connect(message.mirror) if message.mirror else None
            types = {table.name: table.id_type for table in job.tables}
            self.answers.mirror = None if line is None else Mirror(line, job.index, types)
        if message.source == "file":
            shard.forgiving = True
            self._take_up(shard, read(self.folder / job.file, shard.values.now.regions))
        elif message.source:
            line = self.network.connect(message.source)
            wanted = PullState(None, job.index, message.version)
            line.send(wanted)
            self._filling[job.index] = Filling(line, wanted, time.monotonic() + self.patience)

    def _fill(self, incoming: Incoming, message: Fill) -> None:
        index = self.index if message.shard < 0 else message.shard
        if index not in self.empty:
            raise WorkerError(f"a state came for shard {index}, which was not set up before")
        shard = self.empty[index]
        values, tensors = empty(shard), room(message.state)
        incoming.into([*values, *tensors.values()])
        incoming.end()
        plain = dict(message.state.get("plain", {}))
        self._take_up(shard, Contents(message.version, values, tensors, plain))

    def _take_up(self, shard: Shard, content: Contents) -> None:
        take_up(shard, content)
        index = shard.job.index
        del self.empty[index]
        self.shards[index] = shard
        if index == self.index:
            file = self.folder / shard.job.file
            self._keeper = Keeper(shard, file) if shard.job.file else None
        self.line.send(Ready(index, shard.version, index != self.index, self._attempts[index]))

    def _go_on_filling(self) -> None:
        """Take what other processes sent of a state."""
        for index, filling in list(self._filling.items()):
            try:
                connections = filling.line.connections()
                if connections > filling.connections > 0:
                    filling.line.send(filling.wanted)
                filling.connections = connections
                incoming = filling.line.receive(0)
                if incoming is None and time.monotonic() < filling.until:
                    continue
                message = None if incoming is None else incoming.message
                if incoming is None or not isinstance(message, Fill):
                    said = message.reason if isinstance(message, Refusal) else "nothing"
                    raise WorkerError(f"{filling.line.endpoint} gave no state of {index}: {said}")
                self._fill(incoming, message)
            except WagontrainError as error:
                self._complain(str(error))
            del self._filling[index]
            filling.line.close()

    def _commit(self, message: Commit) -> None:
        for index, shard in self.shards.items():
            began, lost = time.perf_counter(), shard.lost
            try:
                shard.commit(message)
            except WorkerError as error:  # of one of them; the other may go on
                self._complain(str(error))
                continue
            seconds = time.perf_counter() - began
            lost, mirror = shard.lost - lost, index != self.index
            numbers = tuple(shard.numbers)
            self.line.send(Applied(index, message.version, seconds, lost, mirror, numbers))
        self.answers.go_on()

    def _keep(self, message: Snapshot) -> None:
        self._own().keep(message.number)
        self.answers.go_on()

    def _release(self, message: Release) -> None:
        self._own().release(message.number)
        self.answers.go_on()

    def _tell_state(self, message: PullState) -> None:
        try:
            send_state(self.line, b"", self._own(), message)
        except WorkerError as error:  # it was lost here, with its connection or its process
            self._complain(str(error), snapshot=message.snapshot)

    def _norm(self, message: Norm) -> None:
        value = self._own().norm(message.pushes, message.divide)
        self.line.send(Squares(self.index, message.number, value))

    def _move(self, message: Moved) -> None:
        if self.answers.mirror is not None:
            self.answers.mirror.move(self.network.connect(message.mirror))

    def _forget(self, message: Forget) -> None:
        for shard in self.shards.values():
            shard.forget(message.worker, message.sequences)
        self.answers.go_on()

    def _own(self) -> Shard:
        if self.index not in self.shards:
            raise WorkerError("it holds nothing yet")
        return self.shards[self.index]

    _HANDLERS: dict[type[Message], Callable[[Server, Any], None]] = {  # noqa: RUF012
        Setup: _set_up,
        Commit: _commit,
        Norm: _norm,
        Forget: _forget,
        Moved: _move,
        Snapshot: _keep,
        Release: _release,
        PullState: _tell_state,
    }


def serve(
    coordinator: str,
    index: int,
    secret: Secret,
    address: str = "127.0.0.1",
    port: int = 0,
    folder: Path = Path(),
) -> None:
    """Be shard `index` until the coordinator says stop.

    Args:
        coordinator: where it listens, `tcp://ADDRESS:PORT`.
        index: which shard this is.
        secret: of the job.
        address, port: to listen on for workers; port 0 takes a free one.
        folder: from which the file that it keeps its state in is named.

    Raises:
        UsageError: it cannot listen there, or the coordinator does not know the secret.
        WorkerError: the coordinator cannot be reached any longer.
    """
    with Network(secret) as network:
        line, listener = network.connect(coordinator), network.listen(address, port)
        Server(network, line, listener, index, folder=folder).run()


def main() -> None:
    """`python -m wagontrain.servers.serving COORDINATOR INDEX ADDRESS PORT FOLDER`.

    The job's secret is read from standard input, so that no list of processes shows it.
    """
    coordinator, index, address, port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    secret = Secret(sys.stdin.readline().strip())
    try:
        serve(coordinator, int(index), secret, address, int(port), Path(folder))
    except WagontrainError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
