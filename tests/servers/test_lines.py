"""A worker's lines to two shards: which answer belongs to which question."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import pytest

from tests.servers.shards import MODEL, SECRET, WAIT, Coordinator
from wagontrain.errors import LossError
from wagontrain.servers.lines import GivenUpError, Lines, RefusedError
from wagontrain.servers.orders import Commit, Forget, Release, Snapshot
from wagontrain.servers.parts import PUSHED, Whole
from wagontrain.servers.wire import Network


class Two:
    """Two shards that are ready, and a worker's lines to them.

    Args:
        network: for all of them.
        patience: seconds that a question waits at a shard.
    """

    def __init__(self, network: Network, patience: float) -> None:
        self.shards = Coordinator(network, 2)
        for index in range(2):
            self.shards.start(index, patience=patience)
            self.shards.set_up(index)
        self.lines = Lines(network, list(self.shards.endpoints.values()), WAIT)
        self.values = Whole(MODEL, 2, PUSHED, network.arena.memory)
        self.gradients = Whole(MODEL, 2, PUSHED, network.arena.memory)

    def tell(self, *messages: Snapshot | Release | Forget | Commit) -> None:
        """Both are told, and have heard it."""
        for message in messages:
            for index in range(2):
                self.shards.say(index, message)
        self.shards.commit()

    def pull(self, at_least: int = 0, snapshot: int | None = None) -> int:
        def slices(shard: int) -> list[object]:
            return self.values.slices(shard, PUSHED)

        return self.lines.pull(slices, 1, at_least, snapshot)  # type: ignore[arg-type]

    def push(self, sequence: int, **special: float) -> None:
        for name, view in self.gradients.views.items():
            view.fill_(special.get(name, 1.0))
        self.lines.push(self.gradients.slices, 1, sequence, lambda shard: ())

    def on(self, name: str) -> list[int]:
        """Which shards have a part of a tensor."""
        jobs = self.shards.jobs
        return [job.index for job in jobs if any(part.name == name for part in job.parts)]


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(SECRET) as made:
        yield made


@pytest.fixture(params=[WAIT])
def two(request: pytest.FixtureRequest, network: Network) -> Iterator[Two]:
    made = Two(network, request.param)
    yield made
    made.lines.close()
    made.shards.close()


def test_both_refuse_a_snapshot_and_the_next_pull_is_answered(two: Two) -> None:
    """One that was released is refused by both shards; the second refusal is of the same pull."""
    two.tell(Snapshot(0), Release(0))
    for _ in range(2):
        with pytest.raises(RefusedError, match="has no snapshot 0"):
            two.pull(snapshot=0)
        assert two.pull() == 1


def test_both_refuse_a_push_and_the_next_is_put_aside(two: Two) -> None:
    assert two.on("w") == [0, 1]
    for sequence in (1, 3):
        with pytest.raises(LossError, match="the gradient of 'w' is not finite"):
            two.push(sequence, w=math.nan)
        two.push(sequence + 1)
    two.shards.commit((1, 2))
    assert two.pull(at_least=1) == 1


def test_who_is_given_up_need_not_wait_for_the_others(two: Two) -> None:
    two.tell(Forget(1))
    with pytest.raises(GivenUpError):
        two.push(1)


@pytest.mark.parametrize("two", [0.2], indirect=True)
def test_a_commit_that_is_long_in_coming_is_asked_for_again(two: Two) -> None:
    """While another shard is started again, the norm of a gradient cannot be told, say."""
    late = threading.Timer(1.0, two.shards.commit)
    late.start()
    began = time.monotonic()
    assert two.pull(at_least=1) == 1
    assert time.monotonic() - began > 0.5
    late.join()
