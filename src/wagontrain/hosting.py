"""A host that holds server shards of a run whose workers are elsewhere: `wagontrain serve`.

It tells the run's coordinator that it is there, and is told which shard to hold, or to wait until
one is to be taken up. The shard is a process of its own, as beside the workers; it is started again
here when it dies.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from wagontrain.errors import UsageError, WorkerError
from wagontrain.hands import GRACE, Hand, begun, how_it_ended, shard_command
from wagontrain.launch import reaching
from wagontrain.launch.network import free_port
from wagontrain.servers.hosts import NONE
from wagontrain.servers.messages import Beat, Bye, Hello, Hold, Message, Refusal, Stop, Unknown
from wagontrain.servers.serving import BEAT, PATIENCE
from wagontrain.servers.wire import Line, Network, Secret
from wagontrain.version import __version__

_LOOK = 0.25
_COMES = 300.0
"""Seconds in which the coordinator has to be there at first."""


def hold(coordinator: str, secret: Secret, say: Callable[[str], None] = lambda line: None) -> None:
    """Hold a shard, or wait for one to take up, until the run has ended.

    Args:
        coordinator: where it listens, `tcp://ADDRESS:PORT`.
        secret: of the job.
        say: who is told what this host does.

    Raises:
        UsageError: the coordinator does not take this host.
        WorkerError: it cannot be reached any longer, the run has failed, or the shard ends again
            and again.
    """
    address, _, port = coordinator.removeprefix("tcp://").rpartition(":")
    own = reaching(address.strip("[]"), int(port)).address
    with tempfile.TemporaryDirectory(prefix="wagontrain-") as folder, Network(secret) as network:
        host = _Host(network.connect(coordinator), secret, own, Path(folder), say)
        try:
            host.run()
        finally:
            host.end()


class _Host:
    """This host at work.

    Args:
        line: to the coordinator.
        secret: of the job.
        address: of this host, at which workers reach its shard.
        folder: for the shard's state and log.
        say: who is told.
    """

    def __init__(
        self, line: Line, secret: Secret, address: str, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._line = line
        self._secret = secret
        self._address = address
        self._folder = folder
        self._say = say
        self._client = secrets.token_hex(8)
        self._hand: Hand | None = None
        self._command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._connections = 0
        self._next_beat = 0.0
        self._over = False

    def run(self) -> None:
        """Until the coordinator says stop."""
        while not self._over:
            connections = self._line.connections()
            if connections > self._connections:
                self._say_hello()
            self._connections = connections
            incoming = self._line.receive(_LOOK)
            if incoming is not None:
                incoming.drop()
                self._hear(incoming.message)
            self._look_after()

    def _say_hello(self) -> None:
        index = NONE if self._hand is None else self._hand.number
        here = socket.gethostname(), os.getpid()
        self._line.send(Hello("host", __version__, *here, index=index, client=self._client))

    def _hear(self, message: Message) -> None:
        if isinstance(message, Hold):
            self._hold(message.index)
        elif isinstance(message, Unknown):
            self._say_hello()
        elif isinstance(message, Refusal):
            raise UsageError(f"this host cannot serve: {message.reason}")
        elif isinstance(message, Stop):
            if message.reason:
                raise WorkerError(message.reason)
            self._over = True

    def _hold(self, index: int) -> None:
        if self._hand is not None and self._hand.number == index:
            return
        self._end_shard(0.0)  # another host has taken it up
        if index == NONE:
            self._say("all server shards have a host: this one waits to take one up")
            return
        self._hand = Hand(index, serves=True)
        place = (self._address, free_port(self._address), self._folder)
        self._command = shard_command(self._line.endpoint, index, *place)
        self._process = begun(self._hand, self._command, self._folder, self._secret)
        self._say(f"this host holds server shard {index}, at {place[0]}:{place[1]}")

    def _look_after(self) -> None:
        """Say that this host is still there, and start again what has died."""
        now, apart = time.monotonic(), self._line.apart()
        if apart > (PATIENCE if self._connections else _COMES):
            raise WorkerError(
                f"this host has not reached the coordinator at {self._line.endpoint} for "
                f"{apart:.0f} s: is the run still going on?"
            )
        if self._connections and now >= self._next_beat:  # not before it has said hello
            self._next_beat = now + BEAT
            self._line.send(Beat("host"))
        status = None if self._process is None else self._process.poll()
        if status is None or apart or self._hand is None:
            return
        if status == 0:  # it was told to stop: the run is over, or another has its place
            self._hand = self._process = None
            self._say_hello()
            return
        self._hand.ended(how_it_ended(status), self._folder)
        self._say(f"server shard {self._hand.number} {how_it_ended(status)}: it is started again")
        self._process = begun(self._hand, self._command, self._folder, self._secret)

    def end(self) -> None:
        """The run is over, or this host can hold nothing any longer: then others are to know."""
        self._end_shard(GRACE if self._over else 0.0)
        if not self._over and self._connections:
            self._line.send(Bye())
        self._line.close(_LOOK)

    def _end_shard(self, seconds: float) -> None:
        """Wait for its process, which was told to end, and kill it if it is late."""
        process, self._process, self._hand = self._process, None, None
        if process is None:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(GRACE)
