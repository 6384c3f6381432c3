"""Traces are such as viewers open."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import START, crew, plan, run_directory, step, times, usual, whole
from wagontrain.errors import UsageError
from wagontrain.report import tracing
from wagontrain.report.reading import read_run

Record = dict[str, Any]


def traced(folder: Path, steps: int = tracing.STEPS) -> list[Record]:
    """The records of a run's trace, which are checked to be as the format has them."""
    file = folder / "trace.json"
    tracing.write(read_run(folder), file, steps)
    found: list[Record] = json.loads(file.read_text())["traceEvents"]
    timed = [each for each in found if each["ph"] != "M"]
    assert [each["ts"] for each in timed] == sorted(each["ts"] for each in timed)
    assert all(each["ts"] >= 0 for each in timed)
    lanes: dict[tuple[int, int], float] = defaultdict(float)
    for each in timed:
        if each["ph"] == "X":
            assert each["dur"] >= 0
            lane = (each["pid"], each["tid"])
            assert each["ts"] >= lanes[lane], each  # a row has one thing at a time
            lanes[lane] = each["ts"] + each["dur"]
    assert {each["pid"] for each in timed} <= {each["pid"] for each in found if each["ph"] == "M"}
    return found


def names(found: list[Record]) -> dict[int, str]:
    return {each["pid"]: each["args"]["name"] for each in found if each["name"] == "process_name"}


def test_a_run_with_its_plan(tmp_path: Path) -> None:
    found = traced(whole(tmp_path / "run"))
    assert list(names(found).values()) == ["rank 0", "rank 1", "run", "predicted step"]
    rank_0 = [each for each in found if each["ph"] == "X" and each["pid"] == 1]
    fifth = [each for each in rank_0 if each["args"]["step"] == 5]
    assert [each["name"] for each in fifth] == ["data", "compute", "exchange"]
    assert [each["args"]["seconds"] for each in fifth] == [0.1, pytest.approx(0.206), 0.05]
    assert fifth[0]["ts"] == pytest.approx(2.6e6)  # it ended after 3 s, and took 0.4
    assert {each["args"]["step"] for each in rank_0} == set(range(19))
    run = next(pid for pid, name in names(found).items() if name == "run")
    instants = [each for each in found if each["ph"] == "i"]
    assert [each["name"] for each in instants] == ["validation", "checkpoint"] * 2
    assert {each["pid"] for each in instants} == {run}
    predicted = [each for each in found if each["ph"] == "X" and each["pid"] == run + 1]
    assert [each["name"] for each in predicted] == ["forward", "backward", "sum"]
    assert [each["dur"] for each in predicted] == pytest.approx([1e5, 1.5e5, 1.2e5])


def test_a_crew_has_its_joins_and_deaths(tmp_path: Path) -> None:
    found = traced(crew(tmp_path / "run"))
    instants = [(each["name"], each["ts"]) for each in found if each["ph"] == "i"]
    assert instants == [
        ("joined", pytest.approx(1e6)), ("joined", pytest.approx(1e6)),
        ("left", pytest.approx(6.6e6)), ("restarted", pytest.approx(6.7e6)),
    ]  # fmt: skip
    assert sum(each["name"].startswith("step") and each["ph"] == "X" for each in found) == 20


def test_a_crashed_run_has_a_trace(tmp_path: Path) -> None:
    found = traced(run_directory(tmp_path / "run", usual(7), tail='{"kind": "st'))
    assert sum(each["name"] == "step 6" for each in found) == 1


def test_what_reaches_into_the_next_step_is_cut(tmp_path: Path) -> None:
    events = [START, step(0, 0.5), step(1, 0.9), times(0, 0.9, compute=[5.0, 0.1])]
    found = traced(run_directory(tmp_path / "run", events))
    (long,) = [
        each for each in found
        if each["ph"] == "X" and each["name"] == "compute" and each["pid"] == 1
    ]  # fmt: skip
    assert long["args"]["seconds"] == 5.0
    assert long["ts"] + long["dur"] == pytest.approx(0.5e6)


def test_the_last_steps_of_a_long_run(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run", usual(), None, plan())
    found = traced(folder, steps=4)
    kept = [each["name"] for each in found if each["name"].startswith("step ")]
    assert kept == ["step 16", "step 17", "step 18", "step 19"]
    assert {each["args"]["step"] for each in found if each["name"] == "compute"} == {16, 17, 18}
    with pytest.raises(UsageError, match="give at least 1"):
        tracing.write(read_run(folder), tmp_path / "x.json", 0)


def test_nothing_gives_an_empty_trace(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    assert [each["ph"] for each in traced(tmp_path)] == ["M", "M"]
