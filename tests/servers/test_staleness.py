from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from wagontrain.servers.staleness import Clocks, Tally


class Plain:
    """The gate's two conditions as they are written, looking at everybody and every lease."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.clock: dict[int, int] = {}
        self.leases: dict[int, tuple[int, dict[int, int]]] = {}  # -> holder, pushes seen so far

    def in_hand(self, worker: int) -> int:
        return sum(holder == worker for holder, _ in self.leases.values())

    def may_begin(self, worker: int) -> bool:
        self.clock.setdefault(worker, min(self.clock.values(), default=0))
        mine = self.in_hand(worker)
        near = self.clock[worker] + mine - min(self.clock.values()) <= self.bound
        return near and all(
            seen.get(worker, 0) + mine + 1 <= self.bound + 1
            for holder, seen in self.leases.values()
            if holder != worker
        )

    def finish(self, worker: int, lease: int) -> None:
        del self.leases[lease]
        self.clock[worker] += 1
        for _, seen in self.leases.values():
            seen[worker] = seen.get(worker, 0) + 1


@given(st.integers(0, 3), st.binary(max_size=40) | st.binary(min_size=60, max_size=200))
@settings(deadline=None)
def test_the_gate_is_its_two_conditions(bound: int, events: bytes) -> None:
    clocks, plain = Clocks(bound), Plain(bound)
    numbers = list(range(8))
    for lease, event in enumerate(events):
        what, which = divmod(event, 32)
        place = min(which % 8, which // 8)  # the lower the place, the quicker
        worker = numbers[place]
        mine = [one for one, (holder, _) in plain.leases.items() if holder == worker]
        if what < 4:
            allowed = clocks.may_begin(worker)
            assert allowed == plain.may_begin(worker)
            if allowed:
                clocks.give(worker, lease)
                plain.leases[lease] = worker, {}
        elif what < 6 and mine:
            clocks.finish(worker, mine[0])
            plain.finish(worker, mine[0])
        elif what == 6 and mine:
            clocks.take_back(worker, mine[-1])
            del plain.leases[mine[-1]]
        elif what == 7:
            for one in mine:
                clocks.take_back(worker, one)
                del plain.leases[one]
            clocks.leave(worker)
            plain.clock.pop(worker, None)
            numbers[place] += 8  # who comes again is another
        seen = [count for _, counts in plain.leases.values() for count in counts.values()]
        assert max(seen, default=0) <= bound + 1
        if plain.clock and not plain.leases:
            slowest = min(plain.clock, key=lambda one: plain.clock[one])
            assert clocks.may_begin(slowest)


def test_without_the_second_condition_a_push_would_miss_more() -> None:
    """The first condition alone allows 2s + 1 pushes of a peer during one lease."""
    clocks = Clocks(1)
    assert clocks.may_begin(0)
    clocks.give(0, 100)
    assert clocks.may_begin(1)
    clocks.give(1, 101)
    clocks.finish(1, 101)
    assert clocks.may_begin(1)
    clocks.give(1, 102)  # begins one clock ahead of worker 0
    for lease in (100, 103):
        if lease != 100:
            assert clocks.may_begin(0)
            clocks.give(0, lease)
        clocks.finish(0, lease)
    # Worker 0 stands at 2, worker 1 at 1: near enough, but 102 has seen two pushes of 0.
    assert clocks.finished == {0: 2, 1: 1}
    assert not clocks.may_begin(0)
    clocks.finish(1, 102)
    assert clocks.may_begin(0)


def test_staleness_in_figures() -> None:
    tally = Tally()
    assert tally.plain_staleness()["mean"] is None
    for staleness in [0] * 50 + [1] * 49 + [7]:
        tally.count(3, staleness, 10, 0.25)
    assert tally.plain_staleness() == {
        "mean": 0.56,
        "p50": 0,
        "p99": 1,
        "max": 7,
        "histogram": {"0": 50, "1": 49, "7": 1},
    }
    assert tally.workers[3].plain() == {
        "pushes": 100,
        "samples": 1000,
        "seconds": 0.25,
        "samples_per_second": 40.0,
        "dropped": 0,
    }
