"""The command line: what is refused, and what is listed. No process is started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from wagontrain import cli

PLAIN = ("--strategy", "data-parallel")


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: Any, *arguments: str) -> str:
    """The one line that a request is refused with, after checking that it is one line."""
    monkeypatch.setattr(sys, "argv", ["wagontrain", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "data-paralel"], "no strategy 'data-paralel'; did you mean"),
        ([*PLAIN, "--set", "bukket_mb=3"], "no setting 'bukket_mb'; did you mean 'bucket_mb'?"),
        (["--set", "bucket_mb"], "--set 'bucket_mb' is not FIELD=VALUE"),
        ([*PLAIN, "--set", "compression=zip"], "cannot take compression=zip"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--batch-size", "65"], "batch_size is 65, but the data set has 64 samples"),
        (["--epochs", "0"], "epochs is 0"),
        (["--steps", "0"], "0 steps were asked for"),
        (["--workers", "0"], "0 workers were asked for"),
        ([*PLAIN, "--workers", "9"], "9 workers cannot share a batch of 8"),
        (["--workers", "100000"], "each would be starved"),
        (["--workers", "two"], "Invalid value for '--workers'"),
    ],
)  # fmt: skip
def test_slips_are_one_line(
    task_file: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
    arguments: list[str],
    message: str,
) -> None:
    folder = tmp_path / "run"
    found = refused(
        capsys, monkeypatch, "run", str(task_file), "--run-dir", str(folder), *arguments
    )
    assert message in found
    assert not folder.exists()
    if not message.startswith("Invalid"):
        assert found.startswith("wagontrain: ")
        assert len(found.splitlines()) == 1


def test_a_file_without_a_task_is_one_line(
    task_file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert "has no 'nothing'" in refused(capsys, monkeypatch, "run", f"{task_file}:nothing")
    assert "does not exist" in refused(capsys, monkeypatch, "run", str(tmp_path / "none.py"))


def test_a_folder_that_holds_a_run_is_left_alone(
    task_file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "summary.json").write_text("precious")
    for workers in ("1", "2"):
        arguments = ("run", str(task_file), "--run-dir", str(tmp_path), "--workers", workers)
        assert "already holds a run" in refused(capsys, monkeypatch, *arguments)
    assert (tmp_path / "summary.json").read_text() == "precious"
    assert not (tmp_path / "events.jsonl").exists()


def test_verify_refuses_what_it_does_not_know(
    task_file: Path, capsys: Any, monkeypatch: Any
) -> None:
    arguments = ("verify", str(task_file), "--dtype", "int8")
    assert "dtype 'int8': give one of" in refused(capsys, monkeypatch, *arguments)


def test_strategies_are_listed_with_their_settings(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["wagontrain", "strategies"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "data-parallel (exact): whole model on every worker" in text
    assert "    powersgd_rank = 1" in text
