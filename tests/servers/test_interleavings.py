"""Whatever happens in whatever order: every sample counts once, and it comes to an end."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers.fleet import Fleet
from wagontrain.servers.descent import Course, Gate
from wagontrain.servers.messages import Done, Lease

COURSES = st.builds(
    Course,
    samples=st.integers(1, 120),
    batch_size=st.integers(1, 12),
    epochs=st.integers(1, 3),
    steps=st.none() | st.integers(1, 30),
    validation_samples=st.integers(0, 7),
    validation_batch=st.integers(1, 4),
)
WARM = st.just(0) | st.integers(0, 5)
GATES = {
    "asynchronous": st.builds(Gate, st.just("asynchronous"), warm_start=WARM),
    "stale": st.builds(
        Gate, st.just("stale-synchronous"), bound=st.integers(0, 3), warm_start=WARM
    ),
    "synchronous": st.just(Gate("synchronous")),
    "backups": st.builds(Gate, st.just("synchronous"), backups=st.integers(1, 2)),
}
CALM = [*["ask", "work", "push"] * 3, *["round"] * 7]
EVENTS = [
    *CALM * 2, *["join"] * 3,
    "leave", "late", "spoil", "replay", "foreign", "wrong version", "mislay", "retake", "resume",
]  # fmt: skip
# Two bytes for an event: hypothesis makes bytes many times quicker than tuples. Left to itself,
# it makes lists of five or ten.
ACTIONS = st.binary(max_size=80) | st.binary(min_size=150, max_size=400)


def act(fleet: Fleet, event: str, which: int, turn: int) -> None:
    """Let the event happen to one of those it can happen to, if there is any."""
    workers = list(fleet.workers.values())
    if event == "join":
        return fleet.join() if len(workers) < 6 else None
    if event == "replay" and fleet.sent:
        return fleet.replay(fleet.sent[which % len(fleet.sent)])
    if event == "mislay" and fleet.gate.mode == "synchronous":
        return fleet.mislay()
    if event == "retake":
        return fleet.retake()
    if event == "resume" and which < 50:
        return fleet.resume()
    able = {
        "round": workers,
        "ask": [one for one in workers if len(one.hand) < 2],
        "work": [one for one in workers if one.hand and len(one.added) < fleet.together],
        "push": [one for one in workers if one.added],
        "wrong version": [one for one in workers if one.added],
        "leave": workers,
        "spoil": [one for one in workers if one.hand and not fleet.was_spoiled(one.hand[0])],
        "foreign": workers,
        "late": workers,
    }.get(event, [])
    if not able:
        return None
    # The product of two draws: some workers are quick, others slow, and it changes.
    worker = able[((which % 16) * (which // 16) * len(able) // 256 + turn // 12) % len(able)]
    lag = (0, 1, 99, 99)[which % 4]
    match event:
        case "round":
            if worker.added:
                fleet.push(worker)
            if not fleet.finished and not worker.asking and len(worker.hand) < 2:
                fleet.ask(worker)
            if not fleet.finished and worker.hand:
                fleet.work(worker, lag)
        case "ask":
            fleet.ask(worker)
        case "work":
            fleet.work(worker, lag)
        case "push":
            fleet.push(worker)
        case "wrong version":
            oldest = min(lease.version for lease, _ in worker.added)
            version = fleet.version
            fleet.push(worker, fetched=oldest - 1 if which % 2 else fleet.version + 1)
            assert fleet.version == version
        case "leave":
            fleet.leave(worker)
        case "spoil":
            fleet.spoil(worker)
        case "foreign":
            others = [one for one in workers if one is not worker and one.hand]
            if others:
                steal(fleet, worker.number, worker.sequence + 500, others[0].hand[0])
        case "late" if worker.hand:
            lease = worker.hand[0]
            fleet.leave(worker)
            steal(fleet, worker.number, worker.sequence + 1, lease)
    return None


def steal(fleet: Fleet, number: int, sequence: int, lease: Lease) -> None:
    """A push for a lease that is not, or no longer, the worker's: not applied, and forgotten."""
    version, staged = fleet.version, dict(fleet.staged)
    message = Done(number, sequence, (lease.number,), fleet.version, 1, 1, 3.0)
    fleet.stage(message, (lease,))
    assert fleet.version == version
    assert fleet.staged == staged


def play(fleet: Fleet, workers: int, actions: bytes, events: list[str]) -> None:
    for _ in range(workers):
        fleet.join()
    for turn, (event, which) in enumerate(zip(actions[::2], actions[1::2], strict=False)):
        if fleet.finished:
            break
        act(fleet, events[event % len(events)], which, turn)
    fleet.to_the_end()
    fleet.check_end()


@pytest.mark.parametrize("kind", GATES)
@given(st.data())
@settings(
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_every_sample_counts_once(kind: str, data: st.DataObject) -> None:
    gate = data.draw(GATES[kind])
    together = 1 if gate.mode == "synchronous" else data.draw(st.just(1) | st.integers(1, 3))
    fleet = Fleet(data.draw(COURSES), gate, together)
    events = data.draw(st.sampled_from([EVENTS, CALM]))
    play(fleet, data.draw(st.integers(0, 4)), data.draw(ACTIONS), events)
