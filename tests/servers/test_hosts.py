"""Shards on hosts of their own: who holds which, and what happens when such a host is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import wagontrain as wt
from tests.commands import SCRIPTS, clean_environment
from tests.forks import Fork
from tests.hosts import Nursery
from tests.servers import counting
from tests.servers.crews import Threads
from wagontrain import crew, events, hosting
from wagontrain.hands import shard_command
from wagontrain.servers.fleet import Shard
from wagontrain.servers.hosts import NONE, Hosts
from wagontrain.servers.messages import Beat, Hello, Hold, Message, Stop, Unknown
from wagontrain.servers.wire import Network, Secret

HOSTS = 3
PATIENCE = 10.0
EPOCHS = 6


class Side:
    """Two shards that hosts are to hold, and all that the hosts were told."""

    def __init__(self, wanted: bool = True) -> None:
        self.told: list[tuple[str, Message]] = []
        self.noted: list[tuple[str, dict[str, Any]]] = []
        self.shards = [Shard(), Shard()]
        self.hosts = Hosts(self.shards, self.send, self.note, PATIENCE, wanted)

    def send(self, peer: bytes, message: Message, tensors: Sequence[Tensor]) -> None:
        self.told.append((peer.decode(), message))

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        self.noted.append((kind, fields))

    def hello(self, name: str, now: float = 0.0, index: int = NONE, peer: str = "") -> None:
        message = Hello("host", "1", name, 1, index=index, client=name)
        self.hosts.hello((peer or name).encode(), message, now)

    def new(self) -> list[tuple[str, Message]]:
        """What was told since."""
        told, self.told = self.told, []
        return told


def test_a_shard_goes_to_who_comes_first_and_others_wait() -> None:
    side = Side()
    assert side.hosts.missing() == {0, 1}
    for name in ("a", "b", "c"):
        side.hello(name)
    assert side.new() == [("a", Hold(0)), ("b", Hold(1)), ("c", Hold(NONE))]
    assert side.hosts.missing() == set()
    assert [fields["host"] for kind, fields in side.noted if kind == "shard_placed"] == ["a", "b"]


def test_hosts_of_one_name_are_two() -> None:
    """Containers may all be called the same, and have 1 as their process's number."""
    side = Side()
    for client in ("a", "b"):
        hello = Hello("host", "1", "box", 1, client=client)
        side.hosts.hello(client.encode(), hello, 0.0)
    assert side.new() == [("a", Hold(0)), ("b", Hold(1))]
    assert side.hosts.missing() == set()


def test_one_that_waits_takes_up_what_a_silent_host_had() -> None:
    side = Side()
    for name in ("a", "b", "c"):
        side.hello(name)
    side.new()
    late = PATIENCE + 1
    for name in (b"a", b"c"):
        assert side.hosts.beat(name, late)
    side.hosts.look(late)
    assert side.new() == [("c", Hold(1))]
    assert side.noted[-2:] == [
        ("shard_lost", {"shard": 1, "host": "b", "why": "nothing heard for 11 s"}),
        ("shard_placed", {"shard": 1, "host": "c", "process": 1}),
    ]
    # It was only cut off: it is told to say what it holds, and that it holds nothing any longer.
    assert side.hosts.beat(b"b", late + 1)
    assert side.new() == [("b", Unknown())]
    side.hello("b", late + 1, index=1)
    assert side.new() == [("b", Hold(NONE))]
    side.hosts.bye(b"a", late + 2)
    assert side.new() == [("b", Hold(0))]


def test_a_shard_that_is_heard_of_stays_and_one_without_a_spare_is_missing() -> None:
    side = Side()
    side.hello("a")
    side.hello("b")
    side.shards[0].seen = PATIENCE  # its process beats, though its host's other one has ended
    side.hosts.look(PATIENCE + 1)
    assert side.hosts.missing() == {1}
    side.hello("b", PATIENCE + 2, index=1, peer="b again")  # back, under another name
    assert side.hosts.missing() == set()
    side.new()
    side.hello("d", PATIENCE + 3)
    assert side.new() == [("d", Hold(NONE))]


def test_a_silent_spare_is_given_nothing() -> None:
    side = Side()
    for name in ("a", "b", "c"):
        side.hello(name)
    side.new()
    late = 2 * PATIENCE
    side.hosts.beat(b"a", late)
    side.hosts.look(late)
    assert side.new() == []
    assert side.hosts.missing() == {1}


def test_everybody_is_told_of_the_end_and_none_is_taken_where_none_is_wanted() -> None:
    side = Side()
    side.hello("a")
    side.new()
    side.hosts.stop("a loss is nan")
    assert side.new() == [("a", Stop("a loss is nan"))]
    with pytest.raises(wt.WorkerError, match="placement=elsewhere"):
        Side(wanted=False).hello("a")


def settings(**more: object) -> wt.Strategy:
    return wt.make_strategy("parameter-server", {"placement": "elsewhere", **more})


def test_shards_that_do_not_come_are_named(tmp_path: Path) -> None:
    run = Threads(counting.task(1), settings(servers=3), 1, tmp_path / "run")
    object.__setattr__(run.coordinator.terms, "start", 1.0)
    with pytest.raises(wt.WorkerError, match=r"shards 0, 1, 2 did not come.*`wagontrain serve`"):
        run.run()


@contextlib.contextmanager
def serving(run: Threads, count: int, folder: Path) -> Iterator[list[Fork]]:
    """So many hosts of a run, each `wagontrain serve`."""
    (folder / "secret").write_text(run.secret.text)
    address = run.endpoint.removeprefix("tcp://")
    words = [SCRIPTS / "wagontrain", "serve", address, "--secret-file", "secret"]
    forks = [Fork(words, folder, clean_environment(), starts=0) for _ in range(count)]
    try:
        yield forks
    finally:
        for fork in forks:
            fork.close()


def kill(host: Fork) -> None:
    """End all processes of a host at once."""
    below = psutil.Process(host.pid).children()
    host.send_signal(signal.SIGKILL)
    for process in below:
        process.kill()


@pytest.mark.whole
def test_a_killed_host_is_replaced_by_one_that_waits(tmp_path: Path) -> None:
    """And a shard's process that dies alone is started again where it was; no sample is lost."""
    done = tmp_path / "done"
    task = counting.task(EPOCHS, partial(counting.until_there_is, done, 0.1))
    strategy = settings(servers=2, replicas=1)
    run = Threads(task, strategy, 2, tmp_path / "run", patience=5.0)
    hosts: list[Fork] = []
    harms = iter([partial(kill_shard, hosts, run), partial(kill_host, hosts, run)])
    waits: list[int] = []

    def look_after() -> None:
        told = [event for event, _ in events.read(run.folder.events)]
        back = sum(event["kind"] == "shard_restarted" for event in told)
        steps = sum(event["kind"] == "step" for event in told)
        if steps >= 5 and back == len(waits) and not done.exists():
            harm = next(harms, done.touch)
            harm()
            waits.append(back)

    with serving(run, 3, tmp_path) as forks:
        hosts += forks
        outcome = run.run(look_after)
        counting.check(outcome.weights, outcome.summary, outcome.events, EPOCHS)
        left = [host.communicate(20) for host in forks if host.poll() != -signal.SIGKILL]
    assert len(left) == 2
    assert sum("is started again" in out for out, _ in left) <= 1
    assert all("holds server shard" in out for out, _ in left)
    assert [err for _, err in left] == ["", ""]
    assert "nothing heard for" in outcome.of("shard_lost")[0]["why"]
    assert len(outcome.of("shard_placed")) >= 3


def holding(hosts: list[Fork]) -> list[tuple[Fork, psutil.Process]]:
    """The hosts that hold a shard, and the shard's process of each."""
    found = [(host, psutil.Process(host.pid).children()) for host in hosts]
    return [(host, below[0]) for host, below in found if below]


def kill_shard(hosts: list[Fork], run: Threads) -> None:
    holding(hosts)[0][1].kill()


def kill_host(hosts: list[Fork], run: Threads) -> None:
    kill(holding(hosts)[1][0])


class Leader:
    """What a host hears from a coordinator, and says to it, in one thread.

    Args:
        monkeypatch: has the host start something else than a shard.
        program: what that is.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
        def command(*place: object) -> list[str]:
            python, *_ = shard_command("", 0, "", 0, Path())
            return [python, "-S", "-c", program]

        monkeypatch.setattr(hosting, "shard_command", command)
        self.secret = Secret.new()
        self.network = Network(self.secret)
        self.listener = self.network.listen("127.0.0.1")
        self.said: list[str] = []
        self.failed: list[Exception] = []
        self.heard: list[Message] = []
        self.thread = threading.Thread(target=self._host, daemon=True)
        self.thread.start()

    def _host(self) -> None:
        try:
            hosting.hold(self.listener.endpoint, self.secret, self.said.append)
        except wt.WagontrainError as error:
            self.failed.append(error)

    def until(self, holds: Callable[[], object]) -> None:
        limit = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < limit, (self.heard, self.said)
            incoming = self.listener.receive(0.1)
            if incoming is not None:
                incoming.drop()
                self.peer = incoming.peer
                if not isinstance(incoming.message, Beat):
                    self.heard.append(incoming.message)

    def end(self) -> None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.network.close()


def test_a_host_says_what_it_holds_and_lets_it_go(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Leader(monkeypatch, "import time; time.sleep(60)")
    side.until(lambda: side.heard)
    assert (side.heard[0].role, side.heard[0].index) == ("host", NONE)  # type: ignore[union-attr]
    side.listener.send(side.peer, Hold(2))
    side.until(lambda: side.said)
    assert side.said[0].startswith("this host holds server shard 2, at 127.0.0.1:")
    side.listener.send(side.peer, Unknown())
    side.until(lambda: len(side.heard) == 2)
    assert side.heard[1].index == 2  # type: ignore[union-attr]
    side.listener.send(side.peer, Hold(NONE))
    side.until(lambda: len(side.said) == 2)
    assert "waits to take one up" in side.said[1]
    side.listener.send(side.peer, Stop("a loss is nan"))
    side.end()
    assert [str(error) for error in side.failed] == ["a loss is nan"]
    assert not [each for each in psutil.Process(os.getpid()).children() if "-S" in each.cmdline()]


def test_a_shard_that_ends_again_and_again_ends_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Leader(monkeypatch, "print('no memory'); raise SystemExit(1)")
    side.until(lambda: side.heard)
    side.listener.send(side.peer, Hold(0))
    side.until(lambda: any(message.kind == "bye" for message in side.heard))
    side.end()
    (error,) = side.failed
    assert "server shard 0 ended with status 1, 3 times" in str(error)
    assert "no memory" in str(error)


def test_the_address_is_looked_at_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(Secret.new().text)
    for where, message in (("nowhere", "is not HOST:PORT"), ("no.such.host.:5", "is unknown here")):
        with pytest.raises(wt.UsageError, match=message):
            crew.serve(where, tmp_path / "secret", print)


@pytest.mark.testbed
def test_the_last_host_of_a_job_holds_the_shard(hosts: Nursery, tmp_path: Path) -> None:
    """As torchrun and Slurm start it: one process on each host, connections encrypted."""
    (tmp_path / "job.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.servers import counting\n"
        "def task(): return counting.task(2)\n"
    )
    words = ("run", "job.py", "--strategy", "parameter-server", "--set", "placement=elsewhere")
    children = [hosts.run(rank, 3, tmp_path, *words, "--run-dir", "R") for rank in range(3)]
    ended = [child.end(within=60) for child in children]
    assert [status for status, _ in ended] == [0, 0, 0], ended
    told = [event for event, _ in events.read(tmp_path / "R" / "events.jsonl")]
    (placed,) = [event for event in told if event["kind"] == "shard_placed"]
    assert placed["host"] == "tb2"
    assert {event["host"] for event in told if event["kind"] == "joined"} == {"tb0", "tb1"}
    assert told[-1]["summary"]["samples"] == 2 * counting.SAMPLES
    assert torch.isfinite(torch.tensor(told[-1]["summary"]["validation"]["error"]))
