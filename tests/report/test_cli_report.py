"""`report` and `trace` as people type them, and the report at the end of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from tests.commands import ROOT, TASK, wagontrain
from tests.report.made import run_directory, usual, whole
from wagontrain import cli_report
from wagontrain.events import read

RUN = ("--workers", "1", "--run-dir", "run")


def test_a_run_ends_with_its_report(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    done = wagontrain("run", "task.py:watched", *RUN, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["report", "run/report.html"]
    text = (tmp_path / "run" / "report.html").read_text().replace(get_plotlyjs(), "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"<dd>{summary['samples_per_second']:,.0f}</dd>" in text
    kinds = [event["kind"] for event, _ in read(tmp_path / "run" / "events.jsonl")]
    assert "checkpoint" in kinds


def test_a_run_that_fails_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    done = wagontrain("run", "task.py:diverges", *RUN, folder=tmp_path)
    assert done.returncode == 1
    assert "report      run/report.html" in done.stdout
    assert "Failed after" in (tmp_path / "run" / "report.html").read_text()


def test_what_was_refused_has_none(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    done = wagontrain("run", "task.py", *RUN, "--steps", "0", folder=tmp_path)
    assert done.returncode == 2
    assert "report" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.whole
def test_the_commands_of_the_page_about_it(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    text = (ROOT / "docs" / "report.md").read_text()
    commands = re.findall(r"^    wagontrain (.*)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        done = wagontrain(*command.split(), folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.html").exists()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_several_go_into_one_file_here(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    whole(tmp_path / "b")
    done = wagontrain("report", "a", "b", folder=tmp_path)
    assert done.stdout == "report.html\n"
    assert "2 runs" in (tmp_path / "report.html").read_text()


def test_a_slip_is_one_line(tmp_path: Path) -> None:
    for words in (["report", "nowhere"], ["trace", "nowhere"]):
        done = wagontrain(*words, folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "is no run directory" in done.stderr


def test_a_report_that_cannot_be_written_fails_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_directory(tmp_path / "run", usual(3))
    (folder / "report.html").mkdir()
    cli_report.at_the_end(folder)
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r"wagontrain: no report: .*cannot be written.*\n", told.err)


def test_a_very_long_run_is_told_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_report, "_AT_ONCE", 100)
    folder = run_directory(tmp_path / "run", usual(3))
    cli_report.at_the_end(folder)
    assert f"wagontrain report {folder}" in capsys.readouterr().out
    assert not (folder / "report.html").exists()
