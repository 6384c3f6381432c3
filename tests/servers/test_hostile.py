"""A coordinator at work, and somebody who knows the secret and says what cannot be."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wagontrain as wt
from tests.servers import counting
from tests.servers.crews import Outcome, Threads
from wagontrain.servers.frames import FRAME
from wagontrain.servers.messages import (
    Ask,
    Beat,
    Bye,
    Done,
    Hello,
    Lease,
    Measured,
    Message,
    Pull,
    Refusal,
    Spoiled,
    Unknown,
    Welcome,
)
from wagontrain.servers.orders import Applied, Commit, Fill, Ready, Squares
from wagontrain.servers.wire import Line, Network
from wagontrain.version import __version__

EPOCHS = 2
SECONDS = 20.0


class Visited(Threads):
    """A job that stays in its first steps until a visit is over."""

    def __init__(self, folder: Path, **details: Any) -> None:
        self.over, self.under_way = threading.Event(), threading.Event()
        self.taken = itertools.count()
        self.heard: list[Done] = []
        strategy = wt.make_strategy("parameter-server", {"servers": 2})
        super().__init__(counting.task(EPOCHS, self.pace), strategy, 2, folder, **details)
        self._done = self.coordinator.decisions.done
        self.coordinator.decisions.done = self.hear_done  # type: ignore[method-assign]

    def pace(self) -> None:
        if next(self.taken) >= 6:
            self.over.wait(SECONDS)

    def hear_done(self, message: Done) -> Any:
        self.heard.append(message)
        self.under_way.set()
        return self._done(message)

    def visited_by(self, visit: Callable[[Network], None]) -> Outcome:
        """How it ends, which has to be as if nobody had come."""

        def come() -> None:
            try:
                with Network(self.secret) as network:
                    assert self.under_way.wait(SECONDS)
                    visit(network)
            finally:
                self.over.set()

        self.start(come)
        outcome = self.run()
        counting.check(outcome.weights, outcome.summary, outcome.events, EPOCHS)
        return outcome

    def hello(self, **changes: Any) -> Hello:
        fingerprint = self.coordinator.terms.fingerprint
        usual = Hello("worker", __version__, "elsewhere", os.getpid(), fingerprint=fingerprint)
        return dataclasses.replace(usual, **changes)


def answer(line: Line) -> Message:
    incoming = line.receive(SECONDS)
    assert incoming is not None
    incoming.drop()
    return incoming.message


def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    job = Visited(tmp_path / "run")

    def visit(network: Network) -> None:
        line = network.connect(job.endpoint)
        for message, why in [
            (job.hello(version="0.0.1"), "elsewhere runs wagontrain 0.0.1, this job"),
            (job.hello(protocol=99), "install the same version on all hosts"),
            (job.hello(fingerprint="other"), "another model, other data"),
            (job.hello(role="shard", index=7), "shard 7 is none of this job's 2"),
            (job.hello(role="shard", index=0, version="0.0.1"), "runs wagontrain 0.0.1"),
            (Pull(0), "a pull message is not for the coordinator"),
            (Commit(1, (), 1.0), "a commit message is not for the coordinator"),
            (Ready(0, 5), "this comes from no shard"),
            (Fill(0, 99), "this comes from no shard"),
            (Fill(10**9, 0, {"tensors": [["w", "float32", [10**18]]]}, 0), "comes from no shard"),
            (Applied(99, 5), "this comes from no shard"),
            (Applied(0, 10**9), "this comes from no shard"),
            (Squares(0, 1, math.nan), "this comes from no shard"),
            (Beat("here"), "this comes from no shard"),
        ]:
            line.send(message)
            said = answer(line)
            assert isinstance(said, Refusal), message
            assert why in said.reason
        for frames in ([b"garbage", b"more"], [b'{"kind": "hello"}'], [b""]):
            line.socket.send_multipart(frames)
            said = answer(line)
            assert isinstance(said, Refusal)
            assert said.reason.startswith("a message was refused")
        line.send(Refusal("of no shard's"))
        line.send(Refusal("of no shard's", snapshot=0))
        line.socket.send(b"x" * (2 * FRAME))  # ends the connection, which is made anew
        limit = time.monotonic() + SECONDS
        while line.connections() < 2:  # what is sent earlier may be lost with it
            assert time.monotonic() < limit
            time.sleep(0.01)
        line.send(Ask(99))
        line.send(Bye(99))
        assert answer(line) == Unknown()

    outcome = job.visited_by(visit)
    refused = " ".join(event["reason"] for event in outcome.of("refused"))
    assert "other data" in refused
    assert "Invalid JSON" in refused


def test_what_was_said_before_or_is_not_its_own_counts_for_nothing(tmp_path: Path) -> None:
    job = Visited(tmp_path / "run")

    def visit(network: Network) -> None:
        line = network.connect(job.endpoint)
        mine, theirs = job.heard[0], job.heard[-1]
        for message in (mine, theirs, dataclasses.replace(mine, sequence=900), mine):
            line.send(message)
        line.send(Spoiled(mine.worker, 10**6, "so it is said"))
        line.send(Measured(mine.worker, 10**6, math.nan, {}))
        line.send(job.hello())
        welcome = answer(line)
        assert isinstance(welcome, Welcome)
        line.send(Ask(welcome.worker))
        lease = answer(line)
        assert isinstance(lease, Lease)
        # Nothing of the kind is on any shard.
        line.send(Done(welcome.worker, 0, (lease.number,), lease.version, 8.0, 8, math.nan))
        line.send(Bye(welcome.worker))

    outcome = job.visited_by(visit)
    reasons = [event["reason"] for event in outcome.of("dropped")]
    assert reasons.count("it was sent before") == 3
    assert "it is of leases that are not its worker's" in reasons
    assert any("its loss is nan" in reason for reason in reasons)


def test_who_speaks_in_a_workers_name_holds_nobody_up(tmp_path: Path) -> None:
    """Names of pushes are used before the worker does; its samples are given to somebody again."""
    job = Visited(tmp_path / "run")

    def visit(network: Network) -> None:
        line = network.connect(job.endpoint)
        last = {message.worker: message.sequence for message in job.heard}
        for worker, sequence in last.items():
            for later in range(1, 4):
                line.send(Done(worker, sequence + later, (10**6,), 0, 8.0, 8, 1.0))
                line.send(Spoiled(worker, 10**6, "so it is said", sequence=sequence + later + 3))
        line.send(job.hello())
        welcome = answer(line)  # what was sent before has been heard
        assert isinstance(welcome, Welcome)
        line.send(Bye(welcome.worker))

    outcome = job.visited_by(visit)
    reasons = [event["reason"] for event in outcome.of("dropped")]
    assert reasons.count("it was sent before") >= 6


def test_who_stays_silent_costs_nothing(tmp_path: Path) -> None:
    job = Visited(tmp_path / "run", patience=2.0)

    def visit(network: Network) -> None:
        for asks in (0, 1):
            line = network.connect(job.endpoint)
            line.send(job.hello())
            welcome = answer(line)
            assert isinstance(welcome, Welcome)
            if asks:
                line.send(Ask(welcome.worker))
                assert isinstance(answer(line), Lease)

    outcome = job.visited_by(visit)
    silent = [event for event in outcome.of("left") if event["host"] == "elsewhere"]
    assert all(event["why"].startswith("nothing heard for") for event in silent)
    # The one that had a lease was waited for.
    assert any(event["leases"] for event in outcome.of("lost"))
