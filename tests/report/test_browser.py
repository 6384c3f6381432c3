"""The page in headless Chromium: all figures are drawn, without a network, on any width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium
from tests.report.made import plan, run_directory, usual, whole
from wagontrain.report import page
from wagontrain.report.reading import read_run

pytestmark = chromium.needed

DRAWN = """() => [...document.querySelectorAll('.js-plotly-plot')].map(one => ({
    traces: one.data.length,
    marks: one.querySelectorAll('.trace, .bars, .point, .hm, .annotation, .shapelayer path').length,
    left: one.getBoundingClientRect().left,
    right: one.getBoundingClientRect().right,
}))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium.opened(tmp_path_factory.mktemp("profile")) as context:
        yield context


def figures(browser: Any, file: Path, width: int) -> list[dict[str, Any]]:
    """What is drawn; whatever the page complains of or fetches is an error."""
    view = browser.new_page()
    trouble: list[str] = []
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("console", lambda said: said.type == "error" and trouble.append(said.text))
    view.on("request", lambda asked: asked.url != file.as_uri() and trouble.append(asked.url[:80]))
    view.set_viewport_size({"width": width, "height": 900})
    view.goto(file.as_uri())
    view.wait_for_load_state("load")
    drawn: list[dict[str, Any]] = view.evaluate(DRAWN)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    view.close()
    assert trouble == []
    return drawn


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_of_a_run_is_drawn(browser: Any, tmp_path: Path, width: int) -> None:
    run = read_run(whole(tmp_path / "run"))
    file = tmp_path / "report.html"
    page.write([run], file)
    drawn = figures(browser, file, width)
    count = sum(len(row) for section in page.one(run) for row in section.figures)
    assert len(drawn) == count > 3
    for figure in drawn:
        assert figure["marks"] > 0, figure
        assert figure["traces"] > 0, figure
        assert 0 <= figure["left"] < figure["right"] <= width


def test_runs_beside_each_other_are_drawn(browser: Any, tmp_path: Path) -> None:
    runs = [read_run(run_directory(tmp_path / name, usual(), None, plan())) for name in "ab"]
    page.write(runs, tmp_path / "report.html")
    drawn = figures(browser, tmp_path / "report.html", 1280)
    assert drawn
    assert all(figure["marks"] for figure in drawn)
