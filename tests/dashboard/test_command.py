"""`wagontrain dashboard`, as it is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.dashboard import recorded
from wagontrain import cli_dashboard
from wagontrain.cli import app
from wagontrain.dashboard import beside
from wagontrain.dashboard.serving import Server
from wagontrain.errors import UsageError


def typed(*words: Any) -> Result:
    return CliRunner().invoke(app, ["dashboard", *map(str, words)])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "run", lambda server: server.socket.close())


def test_it_says_where_the_page_is(tmp_path: Path) -> None:
    recorded.write(tmp_path / "run", recorded.start(1, 1.0))
    result = typed(tmp_path / "run", "--port", 0)
    assert result.exit_code == 0
    assert "http://127.0.0.1:" in result.stdout
    assert "token" not in result.stdout
    assert "nothing is there yet" not in result.stdout
    assert "nothing is there yet" in typed(tmp_path / "later", "--port", 0).stdout


def test_elsewhere_the_address_has_a_token_in_it(tmp_path: Path) -> None:
    for words in (("--host", "0.0.0.0"), ("--token",)):
        assert "/?token=" in typed(tmp_path, "--port", 0, *words).stdout


def test_without_its_packages_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "find_spec", lambda name: None)
    result = typed(tmp_path)
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).count("\n") == 0
    with pytest.raises(UsageError, match="pip install"):
        cli_dashboard.beside_run(None, "job", print, wanted=True)


def test_a_run_without_a_page_is_left_alone() -> None:
    folder, page = cli_dashboard.beside_run(None, "job", print, wanted=False)
    assert folder is None
    with page:
        pass
