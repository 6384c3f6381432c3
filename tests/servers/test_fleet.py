"""The coordinator's view of the shards, without sockets: what it tells them, and believes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from tests.servers.shards import MODEL
from wagontrain.errors import TrainingError
from wagontrain.servers.contents import Contents
from wagontrain.servers.fleet import Fleet
from wagontrain.servers.job import Job
from wagontrain.servers.messages import Hello, Message, Stop
from wagontrain.servers.orders import Commit, Ready, Setup, Snapshot
from wagontrain.servers.parts import Buffer, divide


class Side:
    """Two shards, and all that they were told.

    Args:
        mirrored: whether each has a mirror.
    """

    def __init__(self, mirrored: bool = False) -> None:
        self.told: list[tuple[bytes, Message]] = []
        self.jobs = [
            Job(index, 2, tuple(parts), groups=({"lr": 1.0},))
            for index, parts in enumerate(divide(MODEL, 2))
        ]

        def first(index: int) -> Contents:
            return Contents(0, Buffer(self.jobs[index].parts).regions)

        self.fleet = Fleet(self.jobs, first, self.send, mirrored=mirrored)

    def send(self, peer: bytes, message: Message, tensors: Sequence[Tensor]) -> None:
        self.told.append((peer, message))

    def hello(self, index: int, peer: bytes, applied: int | None = None, where: str = "") -> bool:
        where = where or f"tcp://127.0.0.1:{index + 1}"
        hello = Hello("shard", "1", "here", 1, endpoint=where, index=index, applied=applied)
        return self.fleet.hello(peer, hello, 0.0)

    def setups(self, peer: bytes) -> list[Setup]:
        return [each for to, each in self.told if to == peer and isinstance(each, Setup)]

    def ready(self, setup: Setup, own: int, version: int = 0) -> bool:
        """A process says that it has what this told it to hold."""
        index = int(setup.job["index"])
        return self.fleet.is_ready(Ready(index, version, index != own, setup.attempt))

    def begin(self) -> None:
        """Both are ready."""
        for index in range(2):
            self.hello(index, f"{index}".encode())
        for index in range(2):
            for setup in self.setups(f"{index}".encode()):
                self.ready(setup, index)
        assert self.fleet.ready


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_shard_that_said_hello_twice_is_ready_once_it_has_what_it_was_told_last(
    mirrored: bool,
) -> None:
    """Its connection broke before it had anything: it forgets what it was told to hold first."""
    side = Side(mirrored)
    side.begin()
    side.hello(1, b"again")
    side.hello(1, b"and again")
    for setup in side.setups(b"again"):
        assert not side.ready(setup, 1)
    assert not side.fleet.ready
    side.fleet.snapshot(3)
    assert (b"and again", Snapshot(3)) not in side.told
    answers = [side.ready(setup, 1) for setup in side.setups(b"and again")]
    assert answers == ([False, True] if mirrored else [True])
    assert side.fleet.ready


def test_a_shard_and_its_mirror_that_are_both_lost_end_the_run() -> None:
    side = Side(mirrored=True)
    side.begin()
    side.fleet.commit(Commit(1, ((1, 1),), 1.0))
    side.hello(1, b"again")
    with pytest.raises(TrainingError, match=r"shard 1 .* mirror .* resume from the run's checkp"):
        side.fleet.begin_anew(b"again", "shard 1: tcp://127.0.0.1:1 gave no state of 1: nothing")


def test_a_shard_without_a_mirror_or_file_begins_anew() -> None:
    side = Side()
    side.begin()
    side.hello(1, b"again")
    before = len(side.told)
    side.fleet.begin_anew(b"again", "the state cannot be read")
    assert [peer for peer, _ in side.told[before:]] == [b"again"]


def test_a_shard_whose_place_another_has_taken_is_told_to_end() -> None:
    """Whenever it is heard of again: two would hold the same shard."""
    side = Side()
    side.begin()
    side.hello(1, b"elsewhere", where="tcp://127.0.0.1:9")
    assert (b"1", Stop()) in side.told
    assert not side.hello(1, b"back", applied=0)
    assert side.told[-1] == (b"back", Stop())
    assert side.fleet.endpoints[1] == "tcp://127.0.0.1:9"
    assert side.fleet.of(b"elsewhere") is side.fleet.shards[1]


def test_a_mirrored_shard_that_was_replaced_before_the_others_came_begins_as_they_do() -> None:
    side = Side(mirrored=True)
    side.hello(1, b"first")
    side.hello(1, b"second")
    side.hello(0, b"0")
    assert [setup.source for setup in side.setups(b"second")] == ["", ""]
    assert side.setups(b"first") == []
