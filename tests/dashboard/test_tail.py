from __future__ import annotations

import json
from pathlib import Path

import pytest

from wagontrain.dashboard import tail
from wagontrain.dashboard.tail import Tail


def line(**fields: object) -> str:
    return json.dumps({"kind": "step", "time": 1.0, **fields}) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def test_a_file_that_is_not_there_yet(file: Path) -> None:
    reader = Tail(file)
    assert reader.read().events == []
    file.parent.mkdir()
    assert reader.read().events == []
    file.write_text(line(step=0))
    assert [event["step"] for event in reader.read().events] == [0]


def test_a_line_that_is_being_written_is_waited_for(file: Path) -> None:
    file.parent.mkdir()
    text = line(step=1)
    reader = Tail(file)
    for cut in (0, 5, len(text) - 1):
        file.write_text(line(step=0) + text[:cut])
        reader.read()
    assert not reader.read().events
    file.write_text(line(step=0) + text)
    (event,) = reader.read().events
    assert event["step"] == 1
    assert not reader.read().events


def test_a_line_whose_rest_was_taken_away_hides_no_other(file: Path) -> None:
    file.parent.mkdir()
    reader = Tail(file)
    for end in (line(step=1)[:20], line(step=2, message="its writer was killed")):
        file.write_text(line(step=0) + end)
        read = reader.read()
    assert [event["step"] for event in read.events] == [2]
    assert (read.unreadable, read.again) == (0, False)


def test_what_is_no_event_is_counted(file: Path) -> None:
    file.parent.mkdir()
    odd = ["{", "[]", "7", '{"kind": 3, "time": 1}', '{"kind": "x"}', '{"kind":"x","time":"soon"}',
           '{"kind":"x","time":1e300}', "[" * 100_000, "\x00\xff"]  # fmt: skip
    file.write_text("".join(each + "\n" for each in odd) + line(step=3))
    read = Tail(file).read()
    assert read.unreadable == len(odd)
    assert [event["step"] for event in read.events] == [3]


def test_a_long_history_comes_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK", 1000)
    file.parent.mkdir()
    file.write_text("".join(line(step=step) for step in range(200)))
    reader, steps, turns = Tail(file), [], 0
    while True:
        read = reader.read()
        steps += [event["step"] for event in read.events]
        turns += 1
        if not read.left:
            break
    assert steps == list(range(200))
    assert turns == -(-file.stat().st_size // 1000)


def test_memory_has_an_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK", 100)
    monkeypatch.setattr(tail, "LONGEST", 300)
    file.parent.mkdir()
    file.write_text("x" * 5000 + "\n" + line(step=1))
    reader, found, unreadable = Tail(file), [], 0
    for _ in range(60):
        read = reader.read()
        found += read.events
        unreadable += read.unreadable
        assert reader._seen <= 300
    assert [event["step"] for event in found] == [1]
    assert unreadable >= 1


def test_another_file_is_begun_anew(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(line(step=0) + line(step=1))
    reader = Tail(file)
    assert not reader.read().again
    file.write_text(line(step=7))
    read = reader.read()
    assert read.again
    assert [event["step"] for event in read.events] == [7]
    file.unlink()
    other = file.with_name("other")
    other.write_text(line(step=8) + line(step=9) + line(step=10))
    other.rename(file)
    read = reader.read()
    assert read.again
    assert [event["step"] for event in read.events] == [8, 9, 10]


def test_of_much_that_comes_at_once_only_the_last_times_are_parsed() -> None:
    times = [b'{"kind": "times", "time": %d}' % number for number in range(100)]
    steps = [b'{"kind": "step", "time": %d}' % number for number in range(100)]
    mixed = [each for pair in zip(times, steps, strict=True) for each in pair]
    assert tail.without_old_news(mixed) == [*steps[:-1], times[-1], steps[-1]]
    assert tail.without_old_news(mixed[:10]) == mixed[:10]
