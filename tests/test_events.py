from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wagontrain import events
from wagontrain.errors import UsageError
from wagontrain.events import Event, Events, JsonLines, Sink, TensorBoard, note_failure, read
from wagontrain.folder import RunFolder


class Kept(Sink):
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def take(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def test_events_reach_every_sink(tmp_path: Path) -> None:
    kept = Kept()
    stream = Events([kept, JsonLines(tmp_path / "events.jsonl")])
    stream.send("step", step=1, loss=0.5)
    stream.send("end", summary={})
    stream.close()
    assert kept.closed
    assert [event["kind"] for event in kept.events] == ["step", "end"]
    assert [event for event, _ in events.read(tmp_path / "events.jsonl")] == kept.events


def test_a_line_being_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert list(events.read(file)) == []
    file.write_text('{"kind": "a"}\n{"kind": ')
    (first,) = events.read(file)
    assert first == ({"kind": "a"}, 14)
    with file.open("a") as end:
        end.write('"b"}\n')
    assert [event for event, _ in events.read(file, first[1])] == [{"kind": "b"}]


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in range(3):
        event = {"kind": "step", "time": 10.0 + step, "step": step, "samples": 10}
        board.take(event | {"loss": 1.0 - step / 10, "seconds": 0.5, "data_seconds": 0.0})
    few = {"kind": "step", "samples": 10, "seconds": 0.25, "data_seconds": 0.0}
    board.take(few | {"time": 20.0, "step": 3, "loss": None})
    for number in (4, 5):  # a mean over several steps is always drawn, close as they may come
        board.take(few | {"time": 20.1, "step": number, "loss": 0.5, "covers": 20})
    board.take({"kind": "loss", "time": 20.2, "step": 6, "epoch": 0, "loss": 0.25, "covers": 10})
    board.take({"kind": "validation", "step": 3, "values": {"accuracy": 0.9}})
    board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [point.step for point in read.Scalars("train/loss")] == [0, 1, 2, 4, 5, 6]
    assert read.Scalars("train/loss")[2].value == pytest.approx(0.8)
    assert read.Scalars("train/loss")[5].value == pytest.approx(0.25)
    speeds = [(point.step, point.value) for point in read.Scalars("train/samples_per_second")]
    assert speeds == [(0, 20), (1, 20), (2, 20), (3, 40)]
    assert read.Scalars("validation/accuracy")[0].value == pytest.approx(0.9)


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "deep" / "run", "x")
    folder.write_plan({"strategy": "s"})
    with pytest.raises(UsageError, match=r"already holds a run \(plan.json\): give another"):
        RunFolder.create(folder.path, "x")
    assert json.loads((folder.path / "plan.json").read_text()) == {"strategy": "s"}
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is a file: give another"):
        RunFolder.create(file, "x")
    assert file.read_text() == "mine"


def test_two_runs_in_a_second_get_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder.create(None, "job"), RunFolder.create(None, "job")
    assert first.path != second.path
    assert first.path.parent == second.path.parent == Path("runs")


def test_a_failure_that_the_writer_could_not_tell(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    note_failure(file, ValueError("nobody began"))
    assert not file.exists()
    file.write_text('{"kind": "start", "time": 1}\n{"kind": "step", "ti')
    note_failure(file, ValueError("rank 1 was killed"))
    found = [event for event, _ in read(file)]
    assert [event["kind"] for event in found] == ["start", "failed"]
    assert found[1]["message"] == "rank 1 was killed"
    note_failure(file, ValueError("what followed from it"))
    assert [event for event, _ in read(file)] == found


def test_a_run_that_has_ended_has_not_failed(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"kind": "start", "time": 1}\n{"kind": "end", "time": 2}\n')
    note_failure(file, KeyboardInterrupt())
    assert [event["kind"] for event, _ in read(file)] == ["start", "end"]


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    sink = JsonLines(file)

    def write(number: int) -> None:
        for _ in range(200):
            sink.take({"kind": "step", "number": number, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    sink.take({"kind": "workers"})  # late
    assert Counter(event["number"] for event, _ in read(file)) == dict.fromkeys(range(4), 200)
