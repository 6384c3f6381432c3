from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from wagontrain.progress import Follower, Progress, duration, headline, result_lines, size

START = {
    "kind": "start", "time": 0.0, "strategy": "data-parallel", "settings": {}, "exact": True,
    "world_size": 2, "hosts": ["a"], "device": "cpu", "threads": 1, "epochs": 2, "steps": 4,
    "steps_per_epoch": 2, "batch_size": 128, "samples": 256,
}  # fmt: skip


def step(number: int, seconds: float = 0.1, when: float | None = None) -> dict[str, Any]:
    return {
        "kind": "step", "time": float(number) if when is None else when, "step": number,
        "epoch": number // 2, "samples": 128, "loss": 1.0 / (number + 1), "seconds": seconds,
        "data_seconds": 0.0, "sent": 5,
    }  # fmt: skip


TIMES = {
    "kind": "times", "time": 1.0, "step": 0, "compute": [0.06, 0.08], "exchange": 0.01,
    "waiting": [0.02, 0.0],
}  # fmt: skip
VALIDATION = {"kind": "validation", "time": 2.0, "epoch": 0, "step": 2, "values": {"accuracy": 0.9}}


def shown(*events: dict[str, Any], terminal: bool = False) -> str:
    output = io.StringIO()
    display = Progress(Console(file=output, force_terminal=terminal, width=80))
    for event in events:
        display.take(event)
    display.close()
    return output.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    text = shown(START, step(0), TIMES, step(1), VALIDATION, step(2), step(3), {"kind": "end"})
    assert "\x1b" not in text
    assert text.splitlines() == [
        "data-parallel over 2 workers (cpu, 1 thread each)",
        "256 samples in batches of 128, 4 steps",
        "epoch 1/2  step 2/4  loss 0.5000  1,280 samples/s",
        "  100.0 ms a step: compute 70.0, exchange 10.0, waiting 10.0, data 0.0, 0.2 s left",
        "  validation accuracy 0.9000",
        "epoch 2/2  step 4/4  loss 0.2500  1,280 samples/s",
        "  100.0 ms a step: compute 70.0, exchange 10.0, waiting 10.0, data 0.0, 0.0 s left",
    ]


def test_workers_that_come_and_go() -> None:
    work = {"1": [10, 80, 0.1, 4000], "2": [2, 16, 0.4, 800], "5": [0, 0, 0.0, 0]}
    told = {
        "kind": "workers", "time": 0.5, "doing": {}, "silent": {}, "every": 1.0, "work": work,
        "shards": [], "leases": {"given": 15, "again": 1, "out": 3, "waiting": 0},
        "pushes_per_second": 11.96, "bytes_per_second": 4_780_000,
    }  # fmt: skip
    line = "3 workers at 20-80 samples/s; 12.0 pushes/s, 4.8 MB/s, 3 leases out"
    assert shown(START, told, step(0), step(1)).splitlines()[-1] == f"  {line}"
    assert line in shown(START, told, step(0), terminal=True)
    assert "1 worker; " in shown(START, told | {"work": {"5": work["5"]}}, step(0), step(1))


def test_the_last_known_loss_is_shown_where_not_every_step_has_one() -> None:
    unknown = {"loss": None}
    late = {"kind": "loss", "time": 3.0, "step": 3, "epoch": 1, "loss": 0.125, "covers": 128}
    text = shown(START, step(0) | unknown, step(1), step(2) | unknown, late, step(3) | unknown)
    assert "step 2/4  loss 0.5000" in text
    assert "step 4/4  loss 0.1250" in text
    assert "loss -" in shown(START, step(0) | unknown, step(1) | unknown)


def test_a_slow_run_says_something_every_few_seconds() -> None:
    assert "step 1/4" in shown(START, step(0, when=11.0))
    assert "step 1/4" not in shown(START, step(0, when=9.0))


def test_a_terminal_sees_it_live() -> None:
    text = shown(START, step(0), TIMES, step(1), VALIDATION, terminal=True)
    assert "\x1b" in text
    assert "epoch 1/2: validation accuracy 0.9000" in text


def test_relaxed_strategies_say_so() -> None:
    assert "relaxed: not the same mathematics" in headline(START | {"exact": False})[0]
    assert "on 3 hosts" in headline(START | {"hosts": ["a", "b", "c"]})[0]


SUMMARY = {
    "seconds": 75.2, "first_step": 0, "steps": 10, "train_loss": 0.25,
    "validation": {"loss": 0.5, "accuracy": 0.97},
    "samples_per_second": 1234.5, "world_size": 2, "bytes_sent_per_rank": [1000, 2500],
    "peak_memory_per_rank": [3_000_000, 2_000_000],
}  # fmt: skip


def test_the_result_says_what_travelled() -> None:
    lines = result_lines(SUMMARY, Path("runs/x"))
    assert lines[0] == "done in 1:15 min: 10 steps"
    assert "  travelled   2.5 kB sent by each worker, 250 B a step" in lines
    assert "  files       runs/x" in lines
    assert max(map(len, lines)) < 80
    resumed = result_lines(SUMMARY | {"first_step": 5}, None)
    assert "  travelled   2.5 kB sent by each worker, 500 B a step" in resumed
    alone = result_lines(SUMMARY | {"world_size": 1, "train_loss": None, "validation": {}}, None)
    assert not any("travelled" in line or "files" in line for line in alone)
    uncounted = result_lines(SUMMARY | {"bytes_sent_per_rank": None}, None)
    assert not any("travelled" in line for line in uncounted)


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e13, "30.0 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (75, "1:15 min"), (3600 * 5 + 420, "5:07 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_in_other_processes_is_followed_through_its_files(tmp_path: Path) -> None:
    output = io.StringIO()
    events, log = tmp_path / "events.jsonl", tmp_path / "rank0.log"
    with Follower(Progress(Console(file=output, width=80)), events, log):
        log.write_text("printed by the [b]user[/b]\nunfinished")
        with events.open("w") as file:
            for event in (START, step(0), step(1)):
                file.write(json.dumps(event) + "\n")
        limit = time.monotonic() + 5
        while "step 2/4" not in output.getvalue() and time.monotonic() < limit:
            time.sleep(0.02)
        assert "unfinished" not in output.getvalue()
    lines = output.getvalue().splitlines()
    assert lines[0] == "printed by the [b]user[/b]"
    assert "epoch 1/2  step 2/4" in output.getvalue()
    assert lines[-1] == "unfinished"
