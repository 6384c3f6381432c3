"""Every snippet of the README and of docs/ runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import ROOT, SCRIPTS, python
from wagontrain.testbed.bed import why_not

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_no_snippet_is_of_a_kind_that_nobody_runs() -> None:
    for page in PAGES:
        kinds = set(re.findall(r"^```(\S+)$", page.read_text(), re.MULTILINE))
        assert kinds <= {"python", "sh", "diff", "text"}, page


WITH_PYTHON = [page for page in PAGES if snippets(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_snippets(page: Path, tmp_path: Path) -> None:
    program = "\n".join(snippets(page, "python"))
    file = tmp_path / f"{page.stem}.py"
    file.write_text(program)
    done = python(file, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_both_sides_of_the_diff_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (diff,) = snippets(ROOT / "README.md", "diff")
    for side in "+-":
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (side, " ")]
        names: dict[str, Any] = {}
        exec(PREAMBLE, names)  # noqa: S102
        exec("\n".join(lines), names)  # noqa: S102
        if side == "-":
            assert next(names["model"].parameters()).grad is not None
        else:
            assert list((tmp_path / "runs").iterdir())


PREAMBLE = """
from functools import partial
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
Net = partial(torch.nn.Linear, 4, 2)
data = TensorDataset(torch.randn(80, 4), torch.randint(0, 2, (80,)))
"""


def commands() -> list[str]:
    return [
        line
        for page in PAGES
        for snippet in snippets(page, "sh")
        for line in snippet.splitlines()
        if line
    ]


FIRST_RUN = [
    line for snippet in snippets(ROOT / "docs" / "start.md", "sh") for line in snippet.splitlines()
]
ELSEWHERE = {
    f"wagontrain run examples/mnist.py {how}": "test_examples, with what it has to reach"
    for how in ("--workers 2", "--strategy local-sgd --workers 4")
} | dict.fromkeys(FIRST_RUN, "the next test, one after the other")


@pytest.mark.whole
@pytest.mark.parametrize("command", [line for line in commands() if line not in ELSEWHERE])
def test_commands(command: str, tmp_path: Path) -> None:
    program, *arguments = command.split()
    if arguments[0] == "testbed" and (problem := why_not()):
        pytest.skip(problem)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = python(SCRIPTS / program, *arguments, folder=tmp_path, limit=180)
    assert done.returncode == 0, done.stderr


@pytest.mark.whole
def test_the_first_five_minutes(tmp_path: Path) -> None:
    assert FIRST_RUN[0] == "wagontrain init train.py"
    for command in FIRST_RUN:
        if " plan " in command:  # the run on two workers plans as well
            continue
        program, *arguments = command.split()
        done = python(SCRIPTS / program, *arguments, folder=tmp_path, limit=120)
        assert done.returncode == 0, done.stderr
        if arguments[0] == "run":
            accuracy = re.findall(r"accuracy (\d\.\d+)", done.stdout)
            assert float(accuracy[-1]) > 0.9
        if arguments[0] == "verify":
            assert "passed: the same training as one process" in done.stdout


def test_what_runs_elsewhere_is_in_a_page() -> None:
    assert ELSEWHERE.keys() <= set(commands())


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_tree_of_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^      (\w+\.py) ", text, re.MULTILINE))
    there = {path.name for path in (ROOT / "src" / "wagontrain").glob("*.py")}
    assert named == there - {"__init__.py", "__main__.py", "version.py"}


def test_every_folder_of_the_package_is_in_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^      (\w+)/ ", text, re.MULTILINE))
    folders = {path.name for path in (ROOT / "src" / "wagontrain").iterdir() if path.is_dir()}
    assert named == folders - {"__pycache__"}


def test_make_runs_what_the_readme_says() -> None:
    for target in ("demo", "test"):
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, text=True, capture_output=True, check=True
        )
        assert ("wagontrain run examples/mnist.py --workers 2" in done.stdout) == (target == "demo")
    help_text = subprocess.run(["make"], cwd=ROOT, text=True, capture_output=True, check=True)
    assert re.search(r"^demo +train LeNet", help_text.stdout, re.MULTILINE)


def test_torch_is_the_tested_one() -> None:
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert torch.__version__.split("+")[0] == pinned[1]
