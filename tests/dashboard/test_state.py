from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dashboard import recorded
from wagontrain.dashboard.curves import POINTS
from wagontrain.dashboard.feed import message
from wagontrain.dashboard.log import LINES
from wagontrain.dashboard.state import STALEST, Cursor, State
from wagontrain.dashboard.tiles import GONE, named_in

NOW = 1_000_000.0
KILLED = "worker rank 2 on bert was killed by SIGKILL (if nobody did that, ...); the others stopped"


def state_of(*events: dict[str, Any], now: float = NOW) -> State:
    state = State()
    for event in events:
        state.take(event)
    state.judge(now)
    assert not state.unreadable
    return state


def conditions(state: State) -> dict[int, str]:
    return {number: tile.condition for number, tile in state.tiles.of.items()}


# --- how it is ----------------------------------------------------------------------------------


def test_figures_are_those_of_the_events() -> None:
    events = recorded.synchronous(3, 450, until=NOW)
    shown = state_of(*events).since(Cursor())
    steps = [event for event in events if event["kind"] == "step"]
    assert shown["now"]["step"] == 449
    assert shown["now"]["loss"] == steps[-1]["loss"]
    assert shown["now"]["samples"] == sum(event["samples"] for event in steps)
    last = [event for event in events if event["kind"] == "validation"][-1]
    assert shown["now"]["validation"] == last["values"]
    loss = shown["curves"]["loss"]["points"]
    assert [row[0] for row in loss] == [event["step"] for event in steps]
    assert [row[2] for row in loss] == [pytest.approx(e["loss"], rel=1e-5) for e in steps]
    seconds = sum(event["seconds"] + event["data_seconds"] for event in steps)
    speed = shown["curves"]["speed"]["points"]
    covered = sum(row[5] for row in speed)
    assert covered == pytest.approx(seconds, abs=1.2)
    mean = sum(row[2] * row[5] for row in speed) / covered
    assert mean == pytest.approx(512 * len(steps) / seconds, rel=0.01)
    assert shown["status"] == {"status": "running", "message": ""}


def test_updates_in_bursts_are_not_taken_for_speed() -> None:
    state = State()
    state.take(recorded.start(2, NOW, crewed=True))
    for number in range(400):  # pairs of updates, the second at once after the first
        seconds = 0.2 if number % 2 else 0.0001
        state.take(recorded.step(number, NOW + number / 10, seconds=seconds, data_seconds=0.0))
    rates = [bucket.high for bucket in state.curves["speed"].buckets]
    assert len(rates) > 30
    assert max(rates) < 1.3 * 512 / 0.1


def test_a_smaller_last_batch_is_not_taken_for_a_slow_one() -> None:
    steps = [recorded.step(n, NOW + n, samples=8, seconds=0.1, data_seconds=0.0) for n in range(50)]
    last = recorded.step(50, NOW + 50, samples=1, seconds=0.0125, data_seconds=0.0)
    shown = state_of(recorded.start(1, NOW), *steps, last, now=NOW + 50).since(Cursor())
    assert shown["now"]["samples_per_second"] == pytest.approx(80)


def test_a_slow_rank_that_others_wait_for() -> None:
    state = state_of(*recorded.synchronous(3, 100, until=NOW, slow=1))
    assert conditions(state) == {0: "working", 1: "slow", 2: "working"}
    assert state.tiles.of[1].slower == pytest.approx(1.8, abs=0.15)


def test_slow_by_itself_is_not_slow_where_nobody_waits() -> None:
    events = recorded.synchronous(3, 100, until=NOW, slow=1)
    for event in events:
        if event["kind"] == "times":
            event["waiting"] = [0.0] * 3
    assert set(conditions(state_of(*events)).values()) == {"working"}


def test_the_one_that_was_killed_is_dead_and_the_others_only_stopped() -> None:
    events = [*recorded.synchronous(4, 50, until=NOW), recorded.failed(KILLED, NOW + 1)]
    state = state_of(*events)
    assert conditions(state) == {0: "stopped", 1: "stopped", 2: "dead", 3: "stopped"}
    assert state.tiles.of[2].why == "was killed by SIGKILL"
    assert state.status == "failed"
    assert state.message == KILLED


def test_ctrl_c_is_nobodys_fault() -> None:
    events = [*recorded.synchronous(2, 50, until=NOW), recorded.failed("KeyboardInterrupt: ", NOW)]
    state = state_of(*events)
    assert state.message == "stopped by Ctrl-C"
    assert set(conditions(state).values()) == {"stopped"}


@pytest.mark.parametrize(
    ("message", "ranks"),
    [
        ("WorkerError: rank 1 on host b has not been heard of for 31 s (last seen in step 8); "
         "rank 3 on host c has not been heard of for 30 s", [1, 3]),
        ("WorkerError: an exchange failed, though all ranks answer: rank 1 on host b in step 3 for "
         "9 s; ranks 0, 2 in step 4 for 9 s", []),
        ("LossError: the loss is nan", []),
        ("rank 0: the loss is nan", [0]),
    ],
)  # fmt: skip
def test_whom_an_error_names(message: str, ranks: list[int]) -> None:
    assert list(named_in(message)) == ranks


def test_a_rank_that_is_silent_for_long_stands_out_before_it_is_given_up() -> None:
    events = recorded.synchronous(3, 50, until=NOW)
    events.append(recorded.signs({0: "in step 50", 1: "in step 49", 2: "in step 50"}, NOW + 20,
                                 silent={"1": 14.0}))  # fmt: skip
    assert conditions(state_of(*events, now=NOW + 20)) == {0: "working", 1: "silent", 2: "working"}


def test_a_run_that_stops_writing_is_silent_and_comes_back() -> None:
    events = recorded.synchronous(2, 50, until=NOW)
    state = state_of(*events, now=NOW + 3)
    assert state.status == "running"
    state.judge(NOW + 60)
    assert state.status == "silent"
    assert set(conditions(state).values()) == {"unknown"}
    state.take(recorded.step(50, NOW + 61))
    state.take(recorded.signs({0: "in step 51", 1: "in step 51"}, NOW + 61))
    state.judge(NOW + 62)
    assert state.status == "running"
    assert set(conditions(state).values()) == {"working"}


def test_a_run_with_long_steps_is_not_called_silent_between_them() -> None:
    slow = [recorded.step(number, NOW + 60 * number) for number in range(4)]
    state = state_of(recorded.start(1, NOW - 60), *slow, now=NOW + 180 + 65)
    assert state.status == "running"


def test_one_process_is_seen_by_its_steps() -> None:
    state = state_of(recorded.start(1, NOW - 2), recorded.step(0, NOW - 1), now=NOW)
    (tile,) = state.tiles.of.values()
    assert (tile.condition, tile.seen, tile.doing) == ("working", NOW - 1, "in its steps")


def test_all_are_done_at_the_end() -> None:
    events = [*recorded.synchronous(2, 50, until=NOW), recorded.end(50, NOW + 1)]
    state = state_of(*events, now=NOW + 1e6)
    assert state.status == "ended"
    assert set(conditions(state).values()) == {"ended"}


# --- workers that come and go -------------------------------------------------------------------


def test_a_killed_worker_is_dead_at_once_and_another_takes_its_place() -> None:
    events = recorded.crewed(4, 300, until=NOW)
    state = state_of(*events)
    found = conditions(state)
    assert found[2] == "dead"
    assert state.tiles.of[2].why == "was killed by SIGKILL"
    assert found[5] == "working"
    assert [number for number, how in found.items() if how == "slow"] == [4]
    killed = next(at for at, event in enumerate(events) if event["kind"] == "left")
    assert conditions(state_of(*events[: killed + 1], now=events[killed]["time"]))[2] == "dead"


def test_queues_and_staleness() -> None:
    events = recorded.crewed(4, 300, until=NOW)
    state = state_of(*events)
    last = [event for event in events if event["kind"] == "workers"][-1]
    assert [shard["behind"] for shard in state.shards] == [s["behind"] for s in last["shards"]]
    stale = [event["staleness"] for event in events if event["kind"] == "step"]
    assert state.staleness == {each: stale.count(each) for each in set(stale)}
    sent = state.curves["sent"].buckets[-1]
    assert sent.mean == pytest.approx(1e7, rel=0.2)  # ten pushes of a megabyte a second


def test_who_left_of_its_own_will_is_not_dead() -> None:
    gone = {"kind": "left", "time": NOW, "worker": 1, "host": "anna", "process": 1, "doing": "",
            "why": "left of its own will"}  # fmt: skip
    events = [recorded.start(1, NOW, crewed=True), recorded.joined_(1, NOW), gone]
    assert conditions(state_of(*events)) == {1: "left"}


def test_those_that_are_gone_are_forgotten_in_the_end() -> None:
    state = State()
    state.take(recorded.start(1, NOW, crewed=True))
    for number in range(1, 500):
        state.take(recorded.joined_(number, NOW + number))
        state.take({"kind": "left", "time": NOW + number, "worker": number, "host": "anna",
                    "process": 1, "doing": "", "why": "was killed by SIGKILL"})  # fmt: skip
    assert len(state.tiles.of) <= GONE + 1
    assert state.tiles.forgotten + len(state.tiles.of) == 499


# --- bounds -------------------------------------------------------------------------------------


def test_hundreds_of_thousands_of_events_take_bounded_room() -> None:
    state = State()
    state.take(recorded.start(2, NOW, steps=10**6))
    rng = random.Random(0)
    sizes = []
    for number in range(200_000):
        when = NOW + number / 20
        state.take(recorded.step(number, when, staleness=rng.randrange(200)))
        if number % 50 == 0:
            state.take({"kind": "dropped", "time": when, "worker": 1, "reason": "late",
                        "leases": []})  # fmt: skip
            state.take({"kind": f"odd{number}", "time": when, "text": "x" * 5000})
        if number % 50_000 == 49_999:
            sizes.append(len(message(state.since(Cursor()))))
    assert sizes[-1] < 1.3 * sizes[0]
    assert sizes[-1] < 400_000
    assert all(len(curve.buckets) <= POINTS for curve in state.curves.values())
    assert max(state.staleness) == STALEST
    assert len(state.log.since(0)) <= LINES
    assert state.log.before + sum(line["times"] for line in state.log.since(0)) == state.log.count


def test_many_alike_stand_in_one_line() -> None:
    state = State()
    dropped = {"kind": "dropped", "worker": 3, "reason": "it came too late", "leases": [1]}
    cursor = Cursor()
    for number in range(50):
        state.take({**dropped, "time": NOW + number})
        if number == 20:
            state.since(cursor)
    (line,) = state.since(cursor)["log"]["lines"]
    assert (line["first"], line["times"], line["number"]) == (0, 50, 49)


# --- what is hostile, damaged or of another version ---------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = ("step", "epoch", "samples", "loss", "seconds", "data_seconds", "sent", "staleness",
          "worker", "doing", "silent", "every", "work", "shards", "values", "compute", "waiting",
          "exchange", "message", "summary", "world_size", "hosts", "ranks", "plan", "join",
          "leases", "what", "why", "process", "host", "covers", "batch_size")  # fmt: skip
KINDS = ("start", "step", "loss", "times", "validation", "workers", "joined", "left", "end",
         "failed", "dropped", "restarted", "shard_restarted", "lost", "other")  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    junk=st.lists(
        st.tuples(
            st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), JUNK), st.booleans()
        ),
        max_size=12,
    )
)
def test_no_event_breaks_it_and_what_is_sent_is_json(
    junk: list[tuple[str, dict[str, Any], bool]],
) -> None:
    state, cursor = State(), Cursor()
    good = {event["kind"]: event for event in recorded.crewed(2, 30, until=NOW)}
    good |= {event["kind"]: event for event in recorded.synchronous(2, 30, until=NOW)}
    state.take(recorded.start(2, NOW))
    for kind, fields, mixed in junk:
        state.take({**(good.get(kind, {}) if mixed else {}), "time": NOW, **fields, "kind": kind})
        state.judge(NOW + 1)
        text = message(state.since(cursor)).removeprefix("data: ")
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_numbers_of_ranks_that_cannot_be_take_no_memory() -> None:
    state = State()
    state.take(recorded.start(2, NOW))
    state.take(recorded.signs({}, NOW) | {"doing": {"in step 1": f"0-{10**12}"}})
    assert state.unreadable == 1
    assert len(state.tiles.of) == 2
    state = State()
    state.take(recorded.start(2, NOW) | {"world_size": sys.maxsize, "ranks": None})
    assert len(state.tiles.of) <= 20_000


# --- who looks now and then ---------------------------------------------------------------------


def shown_after(news: dict[str, Any], had: dict[str, Any]) -> dict[str, Any]:
    """What a browser makes of it."""
    if news.get("whole"):
        had = {"curves": {}, "tiles": {}, "log": []}
    for name in ("run", "status", "now", "doing", "shards", "staleness"):
        if name in news:
            had[name] = news[name]
    for name, curve in news.get("curves", {}).items():
        had["curves"][name] = [*had["curves"].get(name, [])[: curve["from"]], *curve["points"]]
    had["tiles"] |= {tile["number"]: tile for tile in news.get("tiles", [])}
    if "lineup" in news:
        there = news["lineup"]["numbers"]
        had["tiles"] = {number: had["tiles"][number] for number in there}
    for line in news.get("log", {"lines": []})["lines"]:
        if had["log"] and had["log"][-1]["first"] == line["first"]:
            had["log"].pop()
        had["log"] = [*had["log"], line][-LINES:]
    return had


@settings(max_examples=30, deadline=None)
@given(looks=st.sets(st.integers(0, 400), max_size=40), crewed=st.booleans())
def test_increments_come_to_the_same_as_opening_it_anew(looks: set[int], crewed: bool) -> None:
    made = recorded.crewed if crewed else recorded.synchronous
    events = [*made(3, 300, until=NOW), recorded.failed(KILLED, NOW)]
    state, cursor = State(), Cursor()
    had: dict[str, Any] = {}
    for number, event in enumerate(events):
        state.take(event)
        state.judge(event["time"])
        if number in looks:
            had = shown_after(json.loads(json.dumps(state.since(cursor))), had)
    had = shown_after(json.loads(json.dumps(state.since(cursor))), had)
    anew = shown_after(json.loads(json.dumps(state.since(Cursor()))), {})
    assert had == anew


def test_nothing_new_is_nothing_sent() -> None:
    state, cursor = state_of(*recorded.synchronous(3, 50, until=NOW)), Cursor()
    state.since(cursor)
    state.judge(NOW + 0.5)
    assert state.since(cursor) == {}
