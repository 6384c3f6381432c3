from __future__ import annotations

import sys
from pathlib import Path

import pytest

from wagontrain.errors import UsageError
from wagontrain.ray_engine import sources
from wagontrain.task import load_task


def test_what_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, job = tmp_path / "work", tmp_path / "job"
    for name in (
        "task.py", "beside.py", "package/__init__.py", "package/inner/deep.py", "spaces/one.py",
        "unused/other.py", "venv/lib/site-packages/foreign.py", "data.csv",
    ):  # fmt: skip
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("")
    (work / "task.py").write_text("import spaces.one\ntask = print\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(work / "venv" / "lib" / "site-packages")])
    load_task(str(work / "task.py"))
    sources.carry(job, work / "task.py")
    there = job / sources.SOURCES
    assert {path.relative_to(there).as_posix() for path in there.rglob("*.py")} == {
        "task.py", "beside.py", "package/__init__.py", "package/inner/deep.py", "spaces/one.py",
    }  # fmt: skip
    assert not (there / "data.csv").exists()


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    (tmp_path / "task.py").write_text("# more than that")
    with pytest.raises(UsageError, match="into a folder of its own"):
        sources.carry(tmp_path / "job", tmp_path / "task.py")


def test_installed_programs_do_not_travel(tmp_path: Path) -> None:
    program = tmp_path / "site-packages" / "program" / "__main__.py"
    program.parent.mkdir(parents=True)
    program.touch()
    sources.carry(tmp_path / "job", program)
    assert not (tmp_path / "job").exists()
