"""Coordinator, shards and workers as threads of one process: quick, and each can be got at."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import wagontrain as wt
from wagontrain import crew, events
from wagontrain.events import Events
from wagontrain.folder import RunFolder
from wagontrain.servers import serving
from wagontrain.servers.contract import Crewed
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.record import Record
from wagontrain.servers.site import Site, Terms
from wagontrain.servers.wire import Network, Secret
from wagontrain.servers.work import fingerprint
from wagontrain.state import Source

SECONDS = 60.0


@dataclass
class Outcome:
    """How a job in threads ended."""

    folder: RunFolder
    summary: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step")]

    @property
    def weights(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder.weights)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.events if event["kind"] == kind]


class Threads:
    """One job.

    Args:
        task: what to train.
        strategy: how.
        workers: how many threads work.
        folder: for the run's files.
        source: state to go on from.
        patience: seconds of silence after which a worker is given up.
    """

    def __init__(
        self,
        task: wt.Task,
        strategy: wt.Strategy,
        workers: int,
        folder: Path,
        source: Source | None = None,
        patience: float = 30.0,
    ) -> None:
        assert isinstance(strategy, Crewed)
        self.task = task
        self.strategy = strategy
        self.workers = workers
        self.secret = Secret.new()
        self.network = Network(self.secret)
        self.folder = RunFolder.create(folder, "crew")
        self.listener = self.network.listen("127.0.0.1")
        self.endpoint = self.listener.endpoint
        self.events = Events(self.folder.sinks())
        terms = Terms(
            fingerprint(task, torch.device("cpu")),
            {},
            workers,
            patience,
            SECONDS,
            strategy.shards if strategy.elsewhere else 0,
        )  # fmt: skip
        site = Site(self.listener, self.folder, self.events, terms, workers, None, source)
        self.coordinator: Coordinator
        self.record: Record
        try:
            self.coordinator, self.record = strategy.coordinator(task, site)
        except wt.UsageError:
            self.events.close()
            self.network.close()
            raise
        self.failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run something beside the coordinator."""

        def guarded() -> None:
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001  the test is told
                self.failures.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self._threads.append(thread)

    def work(self) -> None:
        """Start one more worker."""
        self.start(crew.take_part, self.task, self.strategy, self.endpoint, self.secret)

    def serve(self, number: int) -> None:
        """Start a shard's process, so to speak."""
        place = ("127.0.0.1", 0, self.folder.path)
        self.start(serving.serve, self.endpoint, number, self.secret, *place)

    def run(self, look_after: Callable[[], None] = lambda: None) -> Outcome:
        """Coordinate until all is done."""
        beside = 0 if self.strategy.elsewhere else self.strategy.shards
        for number in range(beside):
            self.serve(number)
        for _ in range(self.workers):
            self.work()

        def watch() -> None:
            if self.failures:
                raise self.failures[0]
            look_after()

        self.record.begin(self.workers)
        try:
            self.coordinator.run(watch)
        finally:
            self.coordinator.stop()
            limit = time.monotonic() + 10
            while (still := [each for each in self._threads if each.is_alive()]) and (
                time.monotonic() < limit
            ):
                self.coordinator.say_over(0.1)
            summary = self.record.end(self.workers)
            self.network.close()
        assert not still, _stacks()
        assert not self.failures
        kept = [event for event, _ in events.read(self.folder.events)]
        return Outcome(self.folder, summary, kept)


def _stacks() -> str:
    """Where all threads of this process are."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    )
