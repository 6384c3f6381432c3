"""The page of `wagontrain run --dashboard`, in its process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.dashboard import recorded
from tests.dashboard.serving import messages
from wagontrain.dashboard import beside
from wagontrain.errors import UsageError


class Said(list[str]):
    """Lines for the user."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def __call__(self, line: str) -> None:
        self.append(line)
        self.came.set()

    def url(self) -> str:
        assert self.came.wait(20)
        return self[0].removeprefix("live page: ")


def test_it_shows_the_run_to_its_end_and_ends_with_it(tmp_path: Path) -> None:
    run, said = tmp_path / "run", Said()
    shown: list[dict[str, Any]] = []

    def look() -> None:
        with httpx.stream("GET", f"{said.url()}events", timeout=10) as answer:
            for news in messages(answer):
                shown.append(news)
                looked.set()

    looked, looking = threading.Event(), threading.Thread(target=look)
    looking.start()
    with beside.page(run, said):
        assert looked.wait(20)
        recorded.write(run, *recorded.synchronous(2, 20), recorded.end(20, time.time()))
    looking.join(5)
    assert not looking.is_alive()
    assert shown[0]["status"]["status"] == "waiting"
    statuses = [news["status"]["status"] for news in shown if "status" in news]
    assert statuses[-1] == "ended"
    assert shown[-1]["over"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(said.url())


def test_what_goes_wrong_there_is_a_line_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_PROGRAM", "raise SystemExit('no such luck')")
    said = Said()
    with beside.page(tmp_path, said):
        assert said.came.wait(20)
    assert said == ["there is no live page, and training goes on without: no such luck"]


def test_it_does_without_torch(tmp_path: Path) -> None:
    program = beside._PROGRAM.replace("main(sys.argv[2])", "print('torch' in sys.modules)")
    package = Path(beside.__file__).parents[1]
    command = [sys.executable, "-c", program + "\nimport wagontrain.dashboard.serving\n"
               "print('torch' in sys.modules)", str(package)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_is_missing_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    beside.require()
    monkeypatch.setattr(
        beside, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name)
    )
    with pytest.raises(UsageError, match=r"pip install 'wagontrain\[dashboard\]'"):
        beside.require()
