"""Whatever happens in whatever order: every sample counts once, and it comes to an end."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers.fleet import Fleet
from wagontrain.servers.descent import Course, Gate

COURSES = st.builds(
    Course,
    samples=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    epochs=st.integers(1, 3),
    steps=st.none() | st.integers(1, 12),
    validation_samples=st.integers(0, 7),
    validation_batch=st.integers(1, 4),
)
GATES = st.one_of(
    st.builds(Gate, st.just("asynchronous"), warm_start=st.integers(0, 5)),
    st.builds(
        Gate,
        st.just("stale-synchronous"),
        bound=st.integers(0, 3),
        warm_start=st.just(0) | st.integers(0, 5),
    ),
    st.builds(Gate, st.just("synchronous"), backups=st.integers(0, 2)),
)
EVENTS = [
    "ask", "ask", "ask", "work", "work", "work", "push", "push", "push", "join", "leave", "spoil",
    "replay", "foreign", "wrong version", "late", "mislay", "resume",
]  # fmt: skip
ACTIONS = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.integers(0, 99), st.integers(0, 9)), max_size=80
)


def act(fleet: Fleet, event: str, which: int, lag: int) -> None:
    """Let the event happen to one of those it can happen to, if there is any."""
    workers = list(fleet.workers.values())
    if event == "join":
        return fleet.join() if len(workers) < 6 else None
    if event == "replay" and fleet.sent:
        return fleet.replay(fleet.sent[which % len(fleet.sent)])
    if event == "mislay" and fleet.gate.mode == "synchronous":
        return fleet.mislay()
    if event == "resume" and which < 20:
        return fleet.resume()
    able = {
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
    worker = able[which % len(able)]
    match event:
        case "ask":
            fleet.ask(worker)
        case "work":
            fleet.work(worker, lag)
        case "push":
            fleet.push(worker)
        case "wrong version":
            oldest = min(lease.version for lease, _ in worker.added)
            fleet.push(worker, fetched=oldest - 1 if lag % 2 else fleet.version + 1)
        case "leave":
            fleet.leave(worker)
        case "spoil":
            fleet.spoil(worker)
        case "foreign":
            others = [one for one in workers if one is not worker and one.hand]
            if others:
                thief_of(fleet, worker.number, worker.sequence + 500, others[0].hand[0])
        case "late" if worker.hand:
            lease = worker.hand[0]
            fleet.leave(worker)
            thief_of(fleet, worker.number, worker.sequence + 1, lease)
    return None


def thief_of(fleet: Fleet, number: int, sequence: int, lease: object) -> None:
    """A push for a lease that is not, or no longer, the worker's: not applied, and forgotten."""
    from wagontrain.servers.messages import Done, Lease

    assert isinstance(lease, Lease)
    version, staged = fleet.version, dict(fleet.staged)
    message = Done(number, sequence, (lease.number,), fleet.version, 1, 1, 3.0)
    fleet.stage(message, (lease,))
    assert fleet.version == version
    assert fleet.staged == staged


def play(fleet: Fleet, actions: list[tuple[str, int, int]]) -> None:
    fleet.join()
    for event, which, lag in actions:
        if fleet.finished:
            break
        act(fleet, event, which, lag)
    fleet.to_the_end()
    fleet.check_end()


QUICK = settings(
    deadline=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(COURSES, GATES, st.integers(1, 3), ACTIONS)
@QUICK
def test_every_sample_counts_once(
    course: Course, gate: Gate, together: int, actions: list[tuple[str, int, int]]
) -> None:
    play(Fleet(course, gate, 1 if gate.mode == "synchronous" else together), actions)
