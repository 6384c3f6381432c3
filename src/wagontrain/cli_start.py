"""The command line's `init` and `strategies`: what one begins with."""

from __future__ import annotations

import dataclasses
import importlib.resources
import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from wagontrain.cli_help import CHOOSE, TRAIN, Sectioned, strategy_names
from wagontrain.errors import UsageError
from wagontrain.registry import discover, find
from wagontrain.strategy import Strategy

app = typer.Typer()


@app.command(cls=Sectioned, rich_help_panel=TRAIN, epilog="Example: wagontrain init train.py")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("train.py"),
) -> None:
    """Write a commented task file to start from."""
    if not file.stem.isidentifier() or file.suffix != ".py":
        raise UsageError(
            f"{str(file)!r} cannot be a task file: give a name such as train.py, for workers "
            "import it"
        )
    template = importlib.resources.files("wagontrain") / "starter" / "train.py"
    text = template.read_text(encoding="utf-8").replace("{file}", file.name)
    try:
        with file.open("x", encoding="utf-8") as out:  # never over what is there
            out.write(text)
    except FileExistsError:
        raise UsageError(f"{str(file)!r} exists: give another name, or move it away") from None
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    print(f"{file}: a task that runs as it is; next")
    for command in ("run", "verify", "plan"):
        print(f"  wagontrain {command} {file} --workers 2")


@app.command(
    cls=Sectioned, rich_help_panel=CHOOSE, epilog="Example: wagontrain strategies parameter-server"
)
def strategies(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One of them, with its settings.", autocompletion=strategy_names
        ),
    ] = None,
) -> None:
    """List the ways of distributing, or the settings of one."""
    for line in _everything() if name is None else _details(find(name), _width()):
        print(line)


def _width() -> int:
    """Of the terminal, within reason; 80 where there is none."""
    return min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else 80


def _everything() -> Iterator[str]:
    known = sorted(discover().items())
    column = max(len(name) for name, _ in known)
    for title, exact in (
        ("exact: the same training as one process", True),
        ("relaxed, unless settings say otherwise: not the same mathematics", False),
    ):
        yield title
        for name, strategy in known:
            if strategy().exact == exact:
                yield from _row(name, strategy.summary, column + 2, _width())
        yield ""
    yield "wagontrain strategies NAME lists the settings of one."


def _details(strategy: type[Strategy], width: int) -> Iterator[str]:
    how = "exact" if strategy().exact else "relaxed, unless settings say otherwise"
    yield f"{strategy.name}: {how}"
    yield ""
    for paragraph in inspect.cleandoc(_about(strategy)).split("\n\n"):
        yield from _paragraph(paragraph, width)
        yield ""
    fields = dataclasses.fields(strategy)
    if not fields:
        yield "It has no settings."
        return
    yield "settings, each as --set NAME=VALUE; without it what is in brackets"
    told = meanings(strategy)
    column = max(len(field.name) for field in fields) + 2
    for field in fields:
        text = told.get(field.name, "").rstrip(".")
        yield from _row(field.name, f"{text} [{_as_typed(field.default)}]".strip(), column, width)


def _about(strategy: type[Strategy]) -> str:
    """What the strategy's file says about it; where that says nothing, its summary."""
    return inspect.getdoc(sys.modules[strategy.__module__]) or strategy.summary


def _paragraph(text: str, width: int) -> Iterator[str]:
    """Prose anew in lines; tables and formulas, which are indented, line by line."""
    if not text.startswith(" "):
        yield from textwrap.wrap(text, width, break_on_hyphens=False)
        return
    for line in text.splitlines():
        yield from textwrap.wrap(
            line[2:],
            width,
            subsequent_indent=" " * 6,
            replace_whitespace=False,
            break_on_hyphens=False,
        )


def _row(name: str, text: str, column: int, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=f"  {name:<{column}}", subsequent_indent=" " * (column + 2),
        break_on_hyphens=False,
    )  # fmt: skip


def _as_typed(value: Any) -> str:
    """A default as --set takes it."""
    if value is None:
        return "not given"
    return (value or "none") if isinstance(value, str) else json.dumps(value)


def meanings(strategy: type[Strategy]) -> dict[str, str]:
    """What each setting is, as the strategy's docstring has it under "Args:"."""
    _, _, text = inspect.cleandoc(strategy.__doc__ or "").partition("Args:\n")
    block = textwrap.dedent(re.split(r"\n(?=\S)", text)[0])
    found = re.findall(r"^(\w[\w, ]*): (.*(?:\n +.*)*)", block, re.MULTILINE)
    return {name: " ".join(told.split()) for names, told in found for name in names.split(", ")}
