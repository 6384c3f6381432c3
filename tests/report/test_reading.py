"""Run directories are read as they are, whatever became of the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.report.made import (
    BEGAN,
    START,
    SUMMARY,
    crew,
    plan,
    run_directory,
    step,
    times,
    usual,
    validation,
    whole,
)
from wagontrain.errors import UsageError
from wagontrain.report import reading
from wagontrain.report.reading import read_run


def test_everything_of_a_run_that_ended(tmp_path: Path) -> None:
    run = read_run(whole(tmp_path / "run"))
    assert (run.ending, run.problems, run.summary) == ("ended", [], SUMMARY)
    assert run.steps.step == list(range(20))
    assert run.steps.time == pytest.approx([0.5 * (number + 1) for number in range(20)])
    assert run.steps.samples[9] == 76  # an epoch, whose last batch is smaller
    assert run.steps.samples[-1] == SUMMARY["samples"]
    assert run.steps.seconds == pytest.approx([0.4] * 20)
    assert run.losses.loss == [2.0 / (number + 1) for number in range(20)]
    assert [each.step for each in run.validations] == [10, 20]
    assert run.validations[0].values == {"loss": 0.1, "accuracy": 0.5}
    assert run.counts == {"validation": 2, "checkpoint": 2}
    assert run.metrics == ["loss", "accuracy"]
    assert run.plan is not None
    assert run.plan.bandwidth == 1e9


def test_the_median_step_is_one_that_was_recorded(tmp_path: Path) -> None:
    run = read_run(whole(tmp_path / "run"))
    assert run.times.steps == 19  # each is told with the step after it
    assert run.times.typical is not None
    assert run.times.typical.step == 9
    assert run.times.typical.compute == (pytest.approx(0.21), 0.1)
    assert run.times.compute[0] == pytest.approx(sum(0.2 + 0.001 * n for n in range(1, 20)))


def test_a_run_that_was_cut_short(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run", usual(7), tail='{"kind": "step", "time"')
    run = read_run(folder)
    assert run.ending == "open"
    assert len(run.steps.step) == 7
    assert run.problems == ["the last event was not written to its end, and is left out"]


def test_a_run_that_says_why_it_failed(tmp_path: Path) -> None:
    failed = {"kind": "failed", "time": BEGAN + 4, "message": "LossError: the loss is nan"}
    run = read_run(run_directory(tmp_path / "run", [*usual(7), failed]))
    assert (run.ending, run.failure) == ("failed", "LossError: the loss is nan")


def test_a_run_whose_ranks_left_tracebacks(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run", usual(7))
    (folder / "logs" / "rank1.traceback").write_text("Traceback\n  line\nLookupError: gone\n")
    run = read_run(folder)
    assert (run.ending, run.tracebacks) == ("failed", {"rank1": "LookupError: gone"})


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    run = read_run(tmp_path)
    assert (run.ending, run.steps.step, run.plan) == ("open", [], None)


def test_what_makes_no_sense_is_left_out_and_counted(tmp_path: Path) -> None:
    odd = [
        START, step(0, 1.0), {"kind": "step", "time": BEGAN}, {"kind": "times", "time": BEGAN},
        times(1, 2.0), times(2, 3.0, compute=[1.0], waiting=[0.0], data=[0.0]), {"kind": "step"},
        validation(1, 3.0) | {"values": []}, step(3, 3.0, step=math.inf),
    ]  # fmt: skip
    folder = run_directory(tmp_path / "run", odd)
    with (folder / "events.jsonl").open("a") as file:
        file.write("no JSON\n[1]\n\x00\x00\n" + "[" * 100_000 + "\n")
    run = read_run(folder)
    assert (run.steps.step, run.times.steps) == ([0], 1)
    assert run.problems == [
        "5 lines of events.jsonl are no events, and are left out",
        "5 events lack what they should say, and are left out",
    ]


def test_a_resumed_run_begins_where_the_other_ended(tmp_path: Path) -> None:
    events = [START | {"first_step": 13}, step(13, 0.5)]
    run = read_run(run_directory(tmp_path / "run", events))
    assert run.steps.samples == [76 + 3 * 8 + 8]


def test_losses_of_several_steps_come_when_they_are_known(tmp_path: Path) -> None:
    events = [
        START, step(0, 0.5, loss=None), step(1, 1.0, loss=1.5, covers=16),
        {"kind": "loss", "time": BEGAN + 2, "step": 1, "epoch": 0, "loss": 1.25, "covers": 4},
    ]  # fmt: skip
    run = read_run(run_directory(tmp_path / "run", events))
    assert (run.losses.loss, run.losses.samples) == ([1.5, 1.25], [16, 16])
    assert run.losses.time == pytest.approx([1.0, 2.0])


def test_losses_that_are_no_numbers_are_read(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run", [START, step(0, 0.5, loss=math.inf)])
    assert read_run(folder).losses.loss == [math.inf]


def test_a_crew(tmp_path: Path) -> None:
    run = read_run(crew(tmp_path / "run"))
    assert run.counts == {"joined": 2, "left": 1, "restarted": 1}
    left = next(each for each in run.happenings if each.kind == "left")
    assert left.time == pytest.approx(6.6)
    assert left.text == "worker 2 on one is gone: was killed by SIGKILL"
    assert run.steps.staleness[:4] == [0, 1, 2, 0]
    assert run.times.typical is None


def test_happenings_do_not_grow_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "KEPT", 3)
    late = {"kind": "dropped", "worker": 1, "reason": "it came too late"}
    events = [late | {"time": BEGAN + n} for n in range(10)]
    run = read_run(run_directory(tmp_path / "run", [START, *events]))
    assert len(run.happenings) == 3
    assert run.counts == {"dropped": 10}


def test_a_plan_of_a_named_strategy_says_what_the_start_would(tmp_path: Path) -> None:
    own = {"strategy": "sharded", "settings": {}, "exact": True, "world_size": 3, "hosts": ["a"]}
    folder = run_directory(tmp_path / "run", [], planned=own)
    run = read_run(folder)
    assert run.plan is None
    assert (run.told("strategy"), run.told("world_size"), run.told("hosts")) == (
        "sharded",
        3,
        ["a"],
    )


def test_a_plan_that_is_none_is_left_out(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run", usual(3), planned=plan(format=99))
    assert read_run(folder).problems == ["plan.json is no plan of this version, and is left out"]


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run directory.*give one that"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="is no run directory"):
        read_run(tmp_path / "nowhere")


def test_a_summary_that_no_event_tells(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run", usual())
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_run(folder).summary == SUMMARY


def test_a_summary_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    ended = {"kind": "end", "time": BEGAN + 4, "summary": {}}
    folder = run_directory(tmp_path / "run", [*usual(3), ended])
    (folder / "summary.json").write_text("[]")
    run = read_run(folder)
    assert run.ending == "open"
    assert run.problems == [
        "1 events lack what they should say, and are left out",
        "summary.json lacks what it should say, and is left out",
    ]
