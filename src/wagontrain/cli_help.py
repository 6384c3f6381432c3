"""What the commands have in common: arguments, help in sections, what the shell completes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from wagontrain import cluster, registry
from wagontrain.errors import UsageError

HOW, LENGTH, FILES, PLACE = "How to distribute", "What, and how long", "Files", "Where"
"""Sections of options."""
TRAIN, CHOOSE, SEE, MACHINES = "Train", "Choose and check", "Look at runs", "Machines"
"""Sections of commands."""

TaskFile = Annotated[str, typer.Argument(metavar="FILE[:NAME]", help="Task file, and task in it.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Worker processes; default one for each GPU, or one.", rich_help_panel=HOW),
]
Patience = Annotated[
    float,
    typer.Option(
        help="Seconds of silence after which a worker counts as lost.", rich_help_panel=PLACE
    ),
]
Coordinator = Annotated[str, typer.Argument(metavar="HOST:PORT", help="As the run says it.")]
SecretFile = Annotated[
    Path | None, typer.Option(help="The run's secret; default $WAGONTRAIN_SECRET.")
]
Interface = Annotated[
    str | None,
    typer.Option(
        help="Network interface; default the one that leads to rank 0.", rich_help_panel=PLACE
    ),
]


class Sectioned(TyperCommand):
    """A command whose help has options under the headings that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then each section in the order of its first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                named = "Arguments" if argument else getattr(parameter, "rich_help_panel", None)
                sections.setdefault(named or "Options", []).append(record)
        options = sections.pop("Options", [])
        for title, rows in [*sections.items(), ("Options", options)]:
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Commands(TyperGroup):
    """Commands under the headings that they name."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each section in the order of its first command."""
        sections: dict[str, list[tuple[str, str]]] = {}
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        room = formatter.width - 6 - max(len(name) for name, _ in found)
        for name, command in found:
            if command is not None and not command.hidden:
                named = getattr(command, "rich_help_panel", None)
                title = named if isinstance(named, str) else "More commands"
                sections.setdefault(title, []).append((name, command.get_short_help_str(room)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def strategy_names(incomplete: str) -> list[str]:
    """Strategies that begin so."""
    return [name for name in registry.names() if name.startswith(incomplete)]


def cluster_names(incomplete: str) -> list[str]:
    """Clusters that come with wagontrain and begin so."""
    return [name for name in cluster.shipped() if name.startswith(incomplete)]


def setting_names(ctx: Any, incomplete: str) -> list[str]:
    """Settings, as FIELD=, of the strategy that the line names before."""
    try:
        strategy = registry.find(str(ctx.params.get("strategy")))
    except UsageError:
        return []
    found = [f"{field.name}=" for field in dataclasses.fields(strategy)]
    return [name for name in found if name.startswith(incomplete)]
