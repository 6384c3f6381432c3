"""Ranks that are threads of this process, with a real store between them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import Store

from wagontrain.errors import WagontrainError, WorkerError
from wagontrain.events import Event, Events, Sink
from wagontrain.launch.rendezvous import store_at
from wagontrain.signs import Signs
from wagontrain.watch import RankWatch, Watch, lost_peer

PEER = RuntimeError("[/x/gloo/transport/tcp/pair.cc:538] Connection closed by peer")


class Ranks:
    """A few watches at one store."""

    def __init__(self) -> None:
        self.store: Any = store_at("127.0.0.1", 0, timedelta(seconds=10), host=True)
        self.port = self.store.port
        self.watches: list[RankWatch] = []
        self.last_words: list[WagontrainError] = []
        self.ended: list[int] = []  # would have ended the process, that is, the tests

    def connect(self) -> Store:
        return store_at("127.0.0.1", self.port, timedelta(seconds=2), host=False)

    def start(
        self, count: int, patience: float = 1.5, size: int | None = None, holds: bool = False
    ) -> list[RankWatch]:
        self.watches = [
            RankWatch(
                rank,
                size or count,
                f"tb{rank}",
                self.connect,
                patience,
                holds=holds and rank == 0,
                last_resort=self.last_words.append,
            )
            for rank in range(count)
        ]
        for watch in self.watches:
            watch.end = self.ended.append
        return self.watches

    def close(self) -> None:
        for watch in self.watches:
            watch.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr("wagontrain.watch._GRACE_SECONDS", 60)  # no process ends here
    made = Ranks()
    yield made
    made.close()
    assert not made.ended


def failing(watch: Watch, error: BaseException, doing: str = "in step 7") -> BaseException:
    with (
        pytest.raises(type(error) if not lost_peer(error) else Exception) as caught,
        watch.doing(doing),
    ):
        raise error
    return caught.value


def until(done: Callable[[], Any], seconds: float = 10) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_all_come(ranks: Ranks) -> None:
    for watch in ranks.start(3):
        watch.wait_for_all(10)


def test_who_does_not_come_is_named(ranks: Ranks) -> None:
    first, _ = ranks.start(2, size=4)
    ranks.store.wait(["pulse/0", "pulse/1"], timedelta(seconds=10))
    with pytest.raises(WorkerError, match="rank 2, 3 of 4 did not come within 1 s"):
        first.wait_for_all(1)


def test_a_silent_rank_is_named_to_all_and_their_waits_are_ended(
    ranks: Ranks, tmp_path: Path
) -> None:
    watches = ranks.start(3)
    for watch in watches:
        watch.wait_for_all(10)
    ended = [threading.Event() for _ in watches]
    for watch, event in zip(watches, ended, strict=True):
        watch.interrupt = event.set
        watch.stacks = tmp_path
    watches[1].at("in validation")
    until(lambda: watches[0]._roll.pulse(1).doing == "in validation")  # type: ignore[union-attr]
    began = time.monotonic()
    watches[1]._stop_threads()
    for number in (0, 2):
        assert ended[number].wait(5)
        error = failing(watches[number], PEER)
        assert isinstance(error, WorkerError)
        assert str(error).startswith("rank 1 on host tb1 has not been heard of for ")
        assert "(last seen in validation)" in str(error)
        assert "in ended.wait" not in (tmp_path / f"rank{number}.txt").read_text()
        assert (
            f"rank {number} on host tb{number} was" in (tmp_path / f"rank{number}.txt").read_text()
        )
    assert 1 < time.monotonic() - began < 6
    assert not ended[1].is_set()
    assert not ranks.last_words


def test_what_all_are_doing_is_among_the_events(ranks: Ranks) -> None:
    watches = ranks.start(3, patience=20)
    for watch in watches:
        watch.wait_for_all(10)
    told: list[dict[str, Any]] = []

    class Kept(Sink):
        def take(self, event: Event) -> None:
            told.append(event)

    for number, watch in enumerate(watches):
        watch.at("in validation" if number == 1 else "in step 3")
    watches[0].signs = Signs(Events([Kept()]))
    until(lambda: told and told[-1]["doing"] == {"in step 3": "0,2", "in validation": "1"})
    assert told[-1]["silent"] == {}
    watches[1]._stop_threads()
    until(lambda: "1" in told[-1]["silent"])
    assert set(told[-1]["silent"]) == {"1"}


def test_rank_zero_silent_with_a_store_that_lives_is_named_by_the_others(ranks: Ranks) -> None:
    first, second = ranks.start(2)
    second.wait_for_all(10)
    first._stop_threads()
    until(lambda: second._concluded.is_set())
    error = failing(second, PEER)
    assert "rank 0 on host tb0 has not been heard of" in str(error)


def test_an_error_of_ones_own_is_told_to_the_others(ranks: Ranks) -> None:
    first, second = ranks.start(2, patience=20)
    second.wait_for_all(10)
    own = failing(second, ValueError("bad\nworse"))
    assert isinstance(own, ValueError)
    error = failing(first, PEER)
    assert str(error) == "rank 1 on host tb1 failed: bad"


def test_ctrl_c_is_told_to_the_others(ranks: Ranks) -> None:
    first, second = ranks.start(2, patience=20)
    second.wait_for_all(10)
    failing(second, KeyboardInterrupt())
    assert str(failing(first, PEER)) == "rank 1 on host tb1 was stopped (KeyboardInterrupt)"


def test_a_training_that_does_not_end_is_ended(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wagontrain.watch._GRACE_SECONDS", 0.5)
    first, second = ranks.start(2)
    first.wait_for_all(10)
    second._stop_threads()
    until(lambda: ranks.ended)
    assert ranks.ended == [1]
    assert ["rank 1 on host tb1" in str(error) for error in ranks.last_words] == [True]
    ranks.ended.clear()


def test_a_store_that_never_answers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is cut off neither answers nor breaks a connection."""

    class Mute:
        def set(self, *_: Any) -> None:
            threading.Event().wait()  # for ever, in a daemon thread

    said: list[WagontrainError] = []
    monkeypatch.setattr("wagontrain.watch._GRACE_SECONDS", 60)
    watch = RankWatch(1, 2, "tb1", lambda: Mute(), 1.0, last_resort=said.append)  # type: ignore[arg-type,return-value]
    watch.end = said.append  # type: ignore[assignment]
    until(lambda: watch._concluded.is_set())
    assert "the master cannot be reached from rank 1 on host tb1 for" in str(failing(watch, PEER))
    watch._stop.set()


def test_who_leaves_in_good_order_is_not_lost(ranks: Ranks) -> None:
    """Also when the store goes with rank 0, and another goes on with work of its own."""
    first, second, third = ranks.start(3, holds=True)
    third.wait_for_all(10)
    second.close()
    first.close()
    ranks.store = None
    _, guard = third._threads  # which stops looking once it knows that the store may go
    guard.join(10)
    assert not guard.is_alive()
    assert not third._concluded.is_set()
    assert not ranks.last_words


def test_one_speaks_first(ranks: Ranks) -> None:
    first, second = ranks.start(2)
    answers = [first.first_to("speak"), second.first_to("speak"), second.first_to("sing")]
    assert answers == [True, False, True]
    assert Watch().first_to("anything")


def test_losing_a_peer_is_told_from_other_errors() -> None:
    assert lost_peer(dist.DistNetworkError("x"))
    assert lost_peer(PEER)
    assert not lost_peer(RuntimeError("shapes do not match"))
    assert not lost_peer(ValueError("Connection closed by peer"))


def test_shutting_the_connections_ends_a_wait_and_spares_others() -> None:
    from wagontrain.transport import SentBytes

    with socket.create_server(("127.0.0.1", 0)) as server:
        others = socket.create_connection(server.getsockname())
        others_peer, _ = server.accept()
        sent = SentBytes()
        ours = socket.create_connection(server.getsockname())
        ours_peer, _ = server.accept()
        sent.shut()
        ours.settimeout(5)
        assert ours.recv(1) == b""
        others_peer.sendall(b"x")
        assert others.recv(1) == b"x"
        later = socket.create_connection(server.getsockname())  # the listener was spared
        sent.close()
        for sock in (others, others_peer, ours, ours_peer, later):
            sock.close()
