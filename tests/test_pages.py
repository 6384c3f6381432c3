"""The pages of docs/ say what is: settings, pictures, figures, and links that lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs import pictures
from tests.commands import ROOT
from wagontrain.cli_start import meanings
from wagontrain.registry import built_in
from wagontrain.strategy import Strategy

DOCS = ROOT / "docs"
STRATEGIES = built_in()
SECTIONS = [
    "A step", "Bytes", "When it wins, and when it loses", "Settings", "What it refuses", "Sources",
]  # fmt: skip
ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \| (.*) \|$", re.MULTILINE)


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def settings_of(text: str) -> dict[str, str]:
    """The table of settings on a page: name -> the cell with the default."""
    (table,) = re.findall(r"^\| setting \| default \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    found = {}
    for names, default, _ in ROW.findall(table):
        names = re.findall(r"`(\w+)`", names)
        cells = default.split(", ")
        cells = cells if len(cells) == len(names) else [default] * len(names)
        found |= dict(zip(names, cells, strict=True))
    return found


def as_told(value: Any) -> str:
    """A default as a page has it."""
    if isinstance(value, bool):
        return json.dumps(value)
    return (value or "none") if isinstance(value, str) else f"{value:,}"


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_setting_is_on_the_page_with_its_default(strategy: type[Strategy]) -> None:
    told = settings_of(page(strategy.name))
    fields = {field.name: field.default for field in dataclasses.fields(strategy)}
    assert told.keys() == fields.keys()
    for name, default in fields.items():
        if default is not None:  # else the page says what happens then
            assert told[name].strip("`") == as_told(default), name


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_setting_is_in_the_docstring(strategy: type[Strategy]) -> None:
    told = meanings(strategy)
    assert list(told) == [field.name for field in dataclasses.fields(strategy)]
    assert all(told.values())


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"auto"}))
def test_every_strategy_has_a_page_of_the_same_shape(name: str) -> None:
    text = page(name)
    assert text.startswith(f"# {name}\n")
    titles = [title for title in re.findall(r"^## (.*)$", text, re.MULTILINE) if title in SECTIONS]
    assert titles == SECTIONS
    assert f"](pictures/{name}.svg)" in text
    for which in ("**When it wins:**", "**When it loses:**"):
        assert which in text


def test_every_strategy_of_the_package_is_in_the_navigation_and_the_readme() -> None:
    for name in STRATEGIES:
        assert f"]({name}.md)" in page("index")
        assert f"](docs/{name}.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_the_simulator_says(name: str) -> None:
    drawn = pictures.draw(pictures.PICTURES[name]())
    assert (pictures.FOLDER / f"{name}.svg").read_text() == drawn, "run `make pictures`"


def test_every_strategy_has_a_picture() -> None:
    assert pictures.PICTURES.keys() == STRATEGIES.keys() - {"auto"}


CITED = re.compile(r"\]\(((?:\.\./)?(?:docs/)?benchmarks/results/[\w.-]+\.md)\)")


def cited() -> list[tuple[str, str, str]]:
    """Figures in bold, of a line or row that names a file of results: page, figure, file."""
    found = []
    for name in ("README.md", "docs/choose.md", "docs/results.md", "docs/hybrid.md"):
        file = ROOT / name
        for block in re.split(r"\n(?=\||\n|- )", file.read_text()):
            sources = CITED.findall(block)
            for figure in re.findall(r"\*\*(\d[\d.,]*)\*\*", block):
                assert sources, f"{name}: {figure} has no source"
                whole = "".join((file.parent / source).read_text() for source in sources)
                found.append((name, figure, whole))
    return found


def test_figures_are_those_of_the_files_that_they_cite() -> None:
    figures = cited()
    assert len(figures) > 20
    for name, figure, text in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", text), f"{name}: {figure}"


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the links below a folder, as `make check` does those of the repository."""
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going",
         "-c", "docs", ".", "out", "-b", "dummy", "-t", "links"],
        cwd=folder, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copy(DOCS / "conf.py", folder)
    (folder / "index.md").write_text("# Index\n\n## One\n\n- [Here](here.md)\n")
    (folder / "here.md").write_text("# Here\n\n[no page](none.md), [no heading](index.md#two)\n")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "'none.md'" in done.stderr
    assert "'two'" in done.stderr
    (folder / "here.md").write_text("# Here\n\n[a heading](index.md#one)\n")
    (folder / "new.md").write_text("# A page that no list names\n")
    done = build(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
