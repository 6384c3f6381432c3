"""The command line: what is refused, and what is listed. No process is started."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.commands import SCRIPTS, python
from wagontrain import cli, registry
from wagontrain.registry import discover
from wagontrain.task import load_task

PLAIN = ("--strategy", "data-parallel")


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: Any, *arguments: str) -> str:
    """The one line that a request is refused with, after checking that it is one line."""
    monkeypatch.setattr(sys, "argv", ["wagontrain", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    out, message = capsys.readouterr()
    assert "Traceback" not in message
    assert "report" not in out
    return str(message)


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
        (["--strategy", "sandblaster", "--workers", "2"], "give partial(torch.optim.LBFGS"),
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


def typed(capsys: Any, monkeypatch: Any, *arguments: str) -> str:
    """What a command prints that ends well, no line longer than 80 columns."""
    monkeypatch.setattr(sys, "argv", ["wagontrain", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return str(text)


def test_strategies_are_a_line_each(capsys: Any, monkeypatch: Any) -> None:
    exact, relaxed, hint = typed(capsys, monkeypatch, "strategies").split("\n\n")
    assert "  data-parallel     whole model on every worker, gradients summed (DDP)" in exact
    assert "  local-sgd  " in relaxed
    assert "strategies NAME" in hint
    assert len([*exact.splitlines(), *relaxed.splitlines()]) == 2 + len(discover())


@pytest.mark.parametrize("name", registry.names())
def test_a_strategy_is_told_with_its_settings(name: str, capsys: Any, monkeypatch: Any) -> None:
    text = typed(capsys, monkeypatch, "strategies", name)
    settings = text.partition("settings, each as")[2]
    for field in dataclasses.fields(registry.find(name)):
        assert re.search(rf"^  {field.name} +\S", settings, re.MULTILINE)


def test_a_strategy_that_there_is_not(capsys: Any, monkeypatch: Any) -> None:
    assert "did you mean 'hybrid'?" in refused(capsys, monkeypatch, "strategies", "hybird")


COMMANDS = [
    *(
        (name,)
        for name in ("run", "join", "serve", "export", "init", "verify", "strategies", "plan")
    ),
    *((name,) for name in ("probe", "report", "trace", "dashboard")),
    *(("testbed", name) for name in ("run", "up", "exec", "status", "down", "cut", "kill")),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_the_command_line_takes(
    words: tuple[str, ...], capsys: Any, monkeypatch: Any
) -> None:
    text = typed(capsys, monkeypatch, *words, "--help")
    example = re.search(r"Example: wagontrain ((?:.|\n)*)\Z", text)
    assert example is not None
    given = example[1].split()
    assert tuple(given[: len(words)]) == words
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    command.make_context(words[-1], given[len(words) :])


def test_help_groups_options(capsys: Any, monkeypatch: Any) -> None:
    text = typed(capsys, monkeypatch, "run", "--help")
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert titles == [
        "Arguments", "How to distribute", "Where", "What, and how long", "Files", "Options",
    ]  # fmt: skip
    text = typed(capsys, monkeypatch, "--help")
    assert re.search(r"^Train:\n  run ", text, re.MULTILINE)
    assert not re.search(r"\w\.\.\.$", text, re.MULTILINE)  # nothing is cut short


def completed(line: str, folder: Path) -> list[str]:
    """What a shell is told at the end of a line: the words as bash hands them over."""
    words = line.split()
    place = len(words) if line.endswith(" ") else len(words) - 1
    done = python(
        SCRIPTS / "wagontrain", folder=folder,
        more={
            "COMP_WORDS": line, "COMP_CWORD": str(place), "_WAGONTRAIN_COMPLETE": "complete_bash",
        },
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("wagontrain ver", ["verify"]),
        ("wagontrain run --st", ["--strategy", "--steps"]),
        ("wagontrain run x.py --strategy s", ["sandblaster", "sharded", "split-weights"]),
        ("wagontrain strategies hy", ["hybrid"]),
        ("wagontrain plan x.py --cluster 8", ["8-workstations-1gbe"]),
        ("wagontrain run x.py --strategy sharded --set ", ["stage=", "least="]),
    ],
)
def test_the_shell_completes(line: str, found: list[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == found


def test_what_the_shell_is_given_to_complete_with(tmp_path: Path) -> None:
    typed = f"{SCRIPTS / 'wagontrain'} --show-completion; exit $?"  # it looks which shell asks
    done = subprocess.run(
        ["bash", "-c", typed], cwd=tmp_path, timeout=60, text=True, capture_output=True, check=False
    )
    assert "_WAGONTRAIN_COMPLETE=complete_bash" in done.stdout, done.stderr


def test_init_writes_a_task_and_never_over_one(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "wagontrain run train.py --workers 2" in typed(capsys, monkeypatch, "init")
    written = Path("train.py").read_text()
    assert "wagontrain verify train.py" in written
    assert load_task("train.py")().batch_size == 100  # type: ignore[operator]
    assert "'train.py' exists: give another name" in refused(capsys, monkeypatch, "init")
    assert Path("train.py").read_text() == written
    for name, why in [
        ("my-task.py", "cannot be a task file"),
        ("none/of.py", "cannot be written: No such file"),
    ]:
        assert why in refused(capsys, monkeypatch, "init", name)
        assert not Path(name).exists()
