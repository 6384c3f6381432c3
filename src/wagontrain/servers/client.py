"""A worker's side of the conversation: work from the coordinator, parameters and gradients.

Three activities that wait for each other only where they must, as in Downpour: computing in the
caller's thread, fetching parameters in a second, pushing gradients in a third. A fourth says
that the worker is still there.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from os import getpid
from typing import TypeVar

import torch
from torch import Tensor

from wagontrain.building import peak_memory
from wagontrain.errors import UsageError, WorkerError
from wagontrain.servers.lines import GivenUpError, Lines, RowsOf
from wagontrain.servers.messages import (
    Ask,
    Beat,
    Bye,
    Done,
    Hello,
    Lease,
    Measured,
    Message,
    Refusal,
    RowBytes,
    Spoiled,
    Stop,
    Unknown,
    Welcome,
)
from wagontrain.servers.wire import Network
from wagontrain.version import __version__

BEAT = 1.0
"""Seconds between two signs of life."""

_GOOD_BYE = 0.25
"""Seconds for the last word to be sent."""

_CPU = torch.device("cpu")

_T = TypeVar("_T")


class OverError(Exception):
    """There is nothing more to do."""


class Client:
    """One worker's lines.

    Args:
        network: of this process.
        coordinator: where it listens.
        fingerprint: of the task as this process has it.
        seconds: longest time to wait for any answer.
        device: that it computes on, to be told to people.
        client: its own name, by which the coordinator knows it when it comes back.

    Raises:
        UsageError: the coordinator refuses this worker, or does not answer.
    """

    def __init__(
        self,
        network: Network,
        coordinator: str,
        fingerprint: str,
        seconds: float = 300.0,
        device: str = "",
        client: str = "",
    ) -> None:
        self._network = network
        self.memory = network.arena.memory
        self._endpoint = coordinator
        self._seconds = seconds
        self._inbox: deque[Lease] = deque()
        self._control = network.connect(coordinator)
        self._reports = network.connect(coordinator)
        self.doing = "starting"
        # Each is counted in a thread of its own.
        self._sent_in_pushes = self._sent_for_rows = 0
        self.welcome = self._say_hello(
            Hello(
                "worker", __version__, socket.gethostname(), getpid(), fingerprint=fingerprint,
                device=device, client=client,
            )
        )  # fmt: skip
        self._closing = threading.Event()
        self._fetching = ThreadPoolExecutor(1, "fetch")
        self._pushing = ThreadPoolExecutor(1, "push")
        self._asking = ThreadPoolExecutor(1, "rows")
        self._lines = [Lines(network, self.welcome.shards, seconds) for _ in range(2)]
        self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._heart.start()

    @property
    def number(self) -> int:
        """What the coordinator calls this worker."""
        return self.welcome.worker

    @property
    def sent(self) -> int:
        """Bytes sent to shards so far: requests for rows, ids, gradients."""
        return self._sent_in_pushes + self._sent_for_rows

    def _say_hello(self, hello: Hello) -> Welcome:
        incoming, limit, seen = None, time.monotonic() + self._seconds, -1
        while incoming is None and time.monotonic() < limit:
            now = self._control.connections()
            if seen < 0 or now > max(seen, 1):  # what was on its way may be lost with a connection
                self._control.send(hello)
            seen = now
            incoming = self._control.receive(1.0)
        if incoming is None:
            raise UsageError(
                f"nobody answers at {self._endpoint}: is the run still going on, and does this "
                "host reach that address?"
            )
        incoming.drop()
        message = incoming.message
        if isinstance(message, Stop):
            raise OverError(message.reason)
        if not isinstance(message, Welcome):
            reason = message.reason if isinstance(message, Refusal) else message.kind
            raise UsageError(f"this worker cannot take part: {reason}")
        return message

    # --- work -----------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask for a lease."""
        self._control.send(Ask(self.number))

    def lease(self, seconds: float) -> Lease | None:
        """The next lease; None if none came in time.

        Raises:
            OverError: there is nothing more to do.
            GivenUpError: this worker takes part no longer.
        """
        if not self._inbox:
            self._hear(seconds)
        return self._inbox.popleft() if self._inbox else None

    def _hear(self, seconds: float) -> None:
        if max(self._control.connections(), self._reports.connections()) > 1:
            # A lease or a push may be lost with a connection, and nobody would miss it.
            self._control.send(Bye(self.number))
            raise GivenUpError("the connection to the coordinator was lost for a while")
        incoming = self._control.receive(seconds)
        if incoming is None:
            return
        incoming.drop()
        message = incoming.message
        if isinstance(message, Lease):
            self._inbox.append(message)
        elif isinstance(message, Stop):
            if message.reason:
                raise WorkerError(message.reason)
            raise OverError
        elif isinstance(message, Unknown):
            raise GivenUpError("the coordinator has not heard of this worker for too long")
        elif isinstance(message, Refusal):
            raise WorkerError(f"the coordinator refused: {message.reason}")

    def measured(self, lease: int, weight: float, sums: dict[str, float]) -> None:
        """Tell what validation gave."""
        self._control.send(Measured(self.number, lease, weight, sums))

    def spoiled(
        self, lease: int, reason: str, gone: bool = False, sequence: int | None = None
    ) -> None:
        """Tell that a lease has no finite gradient, or that its snapshot is gone; see `Spoiled`."""
        self._control.send(Spoiled(self.number, lease, reason, gone, sequence))

    def await_(self, future: Future[_T]) -> _T:
        """A result of `fetch` or `push`; meanwhile the coordinator may say that all is over."""
        while not wait([future], 0.2).done:
            self._hear(0)
        return future.result()

    # --- parameters and gradients ---------------------------------------------------------------

    def fetch(
        self,
        slices: Callable[[int], Sequence[Tensor]],
        at_least: int = 0,
        snapshot: int | None = None,
        whole: bool = False,
        own: bool = False,
    ) -> Future[int]:
        """Begin to fetch parameters into slices; the result is their version.

        Args:
            slices: of a shard, in the order in which they travel.
            at_least: commits that have to be in it.
            snapshot: to fetch, instead of what is there now.
            whole: with what never changes, too.
            own: not before all that this worker has pushed counts, or never will.
        """
        return self._fetching.submit(
            self._lines[0].pull, slices, self.number, at_least, snapshot, whole, own
        )

    def push(
        self,
        slices: Callable[[int], Sequence[Tensor]],
        done: Done,
        without: Callable[[int], tuple[str, ...]],
        rows: RowsOf = lambda shard: {},
    ) -> Future[None]:
        """Begin to push a gradient, and to tell the coordinator when all shards have it."""
        return self._pushing.submit(self._push, slices, done, without, rows)

    def rows(
        self, wanted: RowsOf, at_least: int = 0, snapshot: int | None = None
    ) -> Future[RowBytes]:
        """Begin to fetch rows of tables into place; the result says what that moved."""
        return self._asking.submit(self._pull_rows, wanted, at_least, snapshot)

    def _pull_rows(self, wanted: RowsOf, at_least: int, snapshot: int | None) -> RowBytes:
        if len(self._lines) < 3:  # few need them
            self._lines.append(Lines(self._network, self.welcome.shards, self._seconds))
        moved = self._lines[2].pull_rows(wanted, self.number, at_least, snapshot)
        self._sent_for_rows += moved.sent
        return moved

    def _push(
        self,
        slices: Callable[[int], Sequence[Tensor]],
        done: Done,
        without: Callable[[int], tuple[str, ...]],
        rows: RowsOf,
    ) -> None:
        shards = range(len(self.welcome.shards))
        sent = sum(each.nbytes for shard in shards for each in slices(shard))
        of_rows = sum(_bytes_of(rows(shard)) for shard in shards)
        self._sent_in_pushes += sent + of_rows
        self._lines[1].push(slices, done.worker, done.sequence, without, rows)
        moved = replace(done.rows, sent=done.rows.sent + of_rows)
        self._report(replace(done, sent=self.sent, rows=moved))

    def _report(self, message: Message) -> None:
        self._reports.send(message)

    def _beat(self) -> None:
        line = self._network.connect(self._endpoint)
        while not self._closing.wait(BEAT):
            line.send(Beat(self.doing, self.number, self.sent, peak_memory(_CPU)))
        line.close()

    def close(self, leave: bool = False) -> None:
        """End all lines; with `leave`, say good-bye first."""
        if leave:
            self._control.send(Bye(self.number))
        self._closing.set()
        for lines in self._lines:
            lines.closing.set()
        for pool in (self._fetching, self._pushing, self._asking):
            pool.shutdown(wait=True, cancel_futures=True)
        self._heart.join()
        for lines in self._lines:
            lines.close()
        self._control.close(_GOOD_BYE if leave else 0.0)
        self._reports.close()


def _bytes_of(rows: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """What rows add to a push: ids, gradients, and in its header their tables and counts."""
    said = len(json.dumps({name: len(ids) for name, (ids, _) in rows.items()})) if rows else 0
    return said + sum(ids.nbytes + gradients.nbytes for ids, gradients in rows.values())
