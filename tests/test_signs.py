from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wagontrain import signs
from wagontrain.events import Event, Events, Sink
from wagontrain.signs import Signs, numbers_in, ranges


class Kept(Sink):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def take(self, event: Event) -> None:
        self.events.append(event)


class Full(Sink):
    def take(self, event: Event) -> None:
        raise OSError("no space left on device")


@given(st.lists(st.integers(0, 300), unique=True))
def test_ranges_say_which_numbers(numbers: list[int]) -> None:
    assert numbers_in(ranges(numbers)) == sorted(numbers)


def test_ranges_are_short() -> None:
    assert ranges(range(1000)) == "0-999"
    assert ranges([7, 1, 2, 3]) == "1-3,7"


@pytest.mark.parametrize("text", ["x", "1-", "-1", "1--2", "0-99999999", "0-99999999999"])
def test_what_are_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"no range|too many"):
        numbers_in(text)


def test_those_that_do_the_same_stand_together() -> None:
    kept = Kept()
    doing = {0: "in step 8", 1: "in step 8", 2: "in validation"}
    Signs(Events([kept])).send(doing, {0: 0.3, 1: 7.06, 2: 0.1}, work={"0": [1, 2]})
    (event,) = kept.events
    assert event["doing"] == {"in step 8": "0-1", "in validation": "2"}
    assert event["silent"] == {"1": 7.1}
    assert event["work"] == {"0": [1, 2]}
    assert event["kind"] == "workers"


def test_how_often_follows_from_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    kept = Kept()
    telling = Signs(Events([kept]))
    for workers, different in ((1000, False), (1000, True)):
        began, written = now[0], 0
        while now[0] < began + 200:
            if telling.due():
                doing = {n: f"in step {n * different}" for n in range(workers)}
                telling.send(doing, dict.fromkeys(doing, 0.1))
                written += len(json.dumps(kept.events[-1]))
            now[0] += 0.1
        assert written / 200 < 1.2 * signs.BYTES_PER_SECOND
    alike = [event for event in kept.events if len(event["doing"]) == 1]
    assert len(alike) == pytest.approx(200 / signs.SECONDS, rel=0.1)
    assert kept.events[-1]["every"] > 5


def test_training_goes_on_where_they_cannot_be_written() -> None:
    telling = Signs(Events([Full()]))
    telling.send({0: "in step 1"}, {0: 0.0})
    assert not telling.due()
