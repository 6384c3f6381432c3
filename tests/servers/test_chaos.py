"""Harm at random: processes die, stop, are given up and cut off; every sample counts once."""

from __future__ import annotations

import dataclasses
import math
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import wagontrain as wt
from tests.servers import counting
from tests.servers.crews import Threads
from tests.servers.proxy import Proxy
from wagontrain.servers.messages import Done
from wagontrain.servers.serving import Server
from wagontrain.servers.wire import Network

LOCAL = "127.0.0.1"
SEED = 1


class Harmed(Threads):
    """A job in threads to which something happens several times a second.

    Shards and workers reach the coordinator, and workers the shards, by ways that can be broken.

    Args:
        seed: of what happens, and when.
        harms: how much of it, before the run is left in peace.
        ways: kinds of harm.
        details: of `Threads`.
    """

    def __init__(self, seed: int, harms: int, ways: tuple[str, ...], **details: Any) -> None:
        self.calm = threading.Event()
        task = counting.task(details.pop("epochs"), self.pace)
        super().__init__(task, **details)
        self.random = random.Random(seed)
        self.left = harms
        self.ways = ways
        self.happened: Counter[str] = Counter()
        self.said: list[Done] = []
        self.servers: dict[int, Server] = {}
        self.killed: set[int] = set()
        self.proxies = {-1: Proxy(self.listener.endpoint)}
        self.endpoint = self.proxies[-1].endpoint
        self._done = self.coordinator.decisions.done
        self.coordinator.decisions.done = self._hear_done  # type: ignore[method-assign]

    def pace(self) -> None:
        """Slow enough that there is time for what is to happen."""
        if not self.calm.is_set():
            time.sleep(0.03)

    def _hear_done(self, message: Done) -> Any:
        self.said.append(message)
        return self._done(message)

    def serve(self, number: int) -> None:
        self.start(self._serve, number)

    def _serve(self, number: int) -> None:
        port = 0
        while True:
            with Network(self.secret) as network:
                line, listener = network.connect(self.endpoint), network.listen(LOCAL, port)
                port = int(listener.endpoint.rpartition(":")[2])
                if number not in self.proxies:
                    self.proxies[number] = Proxy(listener.endpoint)
                listener.endpoint = self.proxies[number].endpoint  # what it tells others
                self.servers[number] = Server(network, line, listener, number)
                self.servers[number].run()
            if number not in self.killed:
                return
            self.killed.remove(number)

    def harm(self) -> None:
        """Something happens, or the run is left in peace at last."""
        coordinator = self.coordinator
        if not self.left:
            self.calm.set()
        # A shard that is lost while another is down is lost for good: there is one copy.
        if not (self.left and coordinator.members and coordinator.fleet.ready and not self.killed):
            return
        if self.random.random() < 0.4:
            return
        way = self.random.choice(self.ways)
        if way == "give up":
            coordinator.remove(self.random.choice(sorted(coordinator.members)), "at random")
        elif way == "kill a shard":
            number = self.random.choice(sorted(self.servers))
            self.killed.add(number)
            self.servers[number]._over = True
        elif way == "cut":
            self.proxies[self.random.choice(sorted(self.proxies))].cut()
        elif way == "say again" and self.said:
            coordinator._obey(self._done(self.random.choice(self.said)))
        self.left -= 1
        self.happened[way] += 1

    def check(self) -> None:
        """Run, and look at what came of it."""
        try:
            outcome = self.run(self.harm)
        finally:
            for proxy in self.proxies.values():
                proxy.close()
        assert not self.left, "the run ended before all had happened"
        counting.check(outcome.weights, outcome.summary, outcome.events, self.task.epochs)


GIVE_UP, CUT, KILL = ("give up", "say again"), ("cut",), ("kill a shard",)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("consistency", "ways", "harms", "epochs"),
    [
        ("asynchronous", GIVE_UP, 12, 10),
        ("asynchronous", KILL, 5, 10),
        ("asynchronous", CUT, 12, 10),
        ("synchronous", (*GIVE_UP, *KILL, *CUT), 8, 6),
        ("ssp:1", (*GIVE_UP, *KILL, *CUT), 10, 10),
    ],
    ids=str,
)
def test_whatever_happens_every_sample_counts_once(
    consistency: str, ways: tuple[str, ...], harms: int, epochs: int, tmp_path: Path
) -> None:
    settings = {"consistency": consistency, "servers": 2, "replicas": 1}
    strategy = wt.make_strategy("parameter-server", settings)
    details = {"epochs": epochs, "strategy": strategy, "workers": 3, "folder": tmp_path / "run"}
    Harmed(SEED, harms, ways, **details).check()


def test_a_shard_lost_when_its_state_is_asked_for_is_asked_again(tmp_path: Path) -> None:
    """The checkpoint and the validation are of a state that both shards have."""
    strategy = wt.make_strategy("parameter-server", {"servers": 2, "replicas": 1})
    details = {"epochs": 3, "strategy": strategy, "workers": 2, "folder": tmp_path / "run"}
    job = Harmed(SEED, 0, (), **details)
    asked = job.coordinator.fleet.pull_state

    def kill_and_ask(number: int) -> None:
        if not job.happened:
            job.happened["killed"] += 1
            job.killed.add(1)
            job.servers[1]._over = True
            while job.killed:  # until it has ended: the question comes to nobody
                time.sleep(0.01)
        asked(number)

    job.coordinator.fleet.pull_state = kill_and_ask  # type: ignore[method-assign]
    job.check()


def test_an_infinite_validation_loss_is_told(tmp_path: Path) -> None:
    task = counting.task(1)
    task = dataclasses.replace(task, metrics={"far": lambda output, _: output[0].sum() / 0})
    strategy = wt.make_strategy("parameter-server")
    outcome = Threads(task, strategy, 1, tmp_path / "run").run()
    assert outcome.summary["validation"]["far"] == math.inf
