"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "wagontrain"
FILES = sorted(SOURCE.rglob("*.py"))


def test_only_launch_reads_the_environment() -> None:
    reading = {file.name for file in FILES if re.search(r"os\.(environ|getenv)", file.read_text())}
    assert reading == {"place.py", "meeting.py", "pages.py"}  # all of launch/


def test_nobody_asks_which_strategy_it_is() -> None:
    names = [file.stem for file in (SOURCE / "strategies").glob("[a-z]*.py")]
    assert names
    for file in FILES:
        if file.parent.name != "strategies":
            text = file.read_text()
            for name in names:
                compared = rf"""(==|!=|\bin\b|case)\s*\(?["']{name.replace("_", "[-_]")}["']"""
                if name != "auto":  # settings have that value, too
                    assert not re.search(compared, text), file
                assert f"strategies.{name}" not in text, file


def test_no_pickle_but_the_one_for_own_processes() -> None:
    using = {
        file.name for file in FILES if re.search(r"pickle\.(loads?|dumps?)\(", file.read_text())
    }
    assert using == {"job.py"}
    for file in FILES:
        assert not re.search(
            r"torch\.(save|load)\(|(gather|cast|scatter|send|recv)_object(_list)?\(",
            file.read_text(),
        ), file


def test_files_are_short() -> None:
    for file in FILES:
        assert len(file.read_text().splitlines()) <= 450, file
