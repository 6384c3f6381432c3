"""Finding strategies: by file in `wagontrain.strategies`, by entry point in other packages."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from wagontrain.errors import UsageError, nearest
from wagontrain.strategy import Strategy
from wagontrain.task import origin

ENTRY_POINTS = "wagontrain.strategies"
PACKAGE = "wagontrain.strategies"
"""Found by name: strategies may look each other up here, and so this module imports none."""


def built_in() -> dict[str, type[Strategy]]:
    """The strategies of `wagontrain.strategies` by name."""
    found: dict[str, type[Strategy]] = {}
    for name in _files():
        found |= dict(_strategies_in(f"{PACKAGE}.{name}"))
    return found


def _files() -> list[str]:
    return [each.name for each in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)]


def names() -> list[str]:
    """The names of all strategies, as `discover` has them, without loading any."""
    others = (entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))
    return sorted({*(name.replace("_", "-") for name in _files()), *others})


def discover() -> dict[str, type[Strategy]]:
    """All strategies by name: the files of `wagontrain.strategies`, then entry points.

    Raises:
        UsageError: an entry point that cannot be loaded, is no strategy or takes a name twice.
    """
    found = built_in()
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"strategy {entry.name!r} of package {_package(entry)} cannot be loaded: "
                f"{origin(error)}"
            ) from error
        if not (inspect.isclass(loaded) and issubclass(loaded, Strategy)):
            raise UsageError(
                f"strategy {entry.name!r} of package {_package(entry)} is {loaded!r}: an entry "
                f"point of {ENTRY_POINTS} has to name a subclass of wagontrain.Strategy"
            )
        if found.setdefault(loaded.name, loaded) is not loaded:
            raise UsageError(
                f"strategy {loaded.name!r} of package {_package(entry)} has the name of another: "
                "rename it"
            )
    return found


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _strategies_in(module: str) -> Iterator[tuple[str, type[Strategy]]]:
    for value in vars(importlib.import_module(module)).values():
        own = inspect.isclass(value) and value.__module__ == module
        if own and issubclass(value, Strategy) and not inspect.isabstract(value):
            yield value.name, value


def find(name: str) -> type[Strategy]:
    """The strategy called `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    own = _files()
    file = name.replace("-", "_")
    # The others' engines need not be loaded: a process with several of them starts seconds later.
    known = dict(_strategies_in(f"{PACKAGE}.{file}")) if file in own else {}
    if name not in known:
        known = built_in()
    if name not in known:  # another package that is broken must not be in the way of our own
        known = discover()
    if name not in known:
        raise UsageError(f"there is no strategy {name!r}; {nearest(name, known)}")
    return known[name]


def make_strategy(name: str, settings: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name` with the given settings, as values or as text.

    Raises:
        UsageError: no such strategy or setting, or a value it does not take.
    """
    strategy = find(name)
    known = [item.name for item in dataclasses.fields(strategy)]
    kinds = typing.get_type_hints(strategy)
    values = {}
    for key, value in (settings or {}).items():
        if key not in known:
            raise UsageError(f"strategy {name!r} has no setting {key!r}; {nearest(key, known)}")
        try:
            values[key] = _as_kind(kinds[key], value)
        except pydantic.ValidationError as error:
            raise UsageError(
                f"strategy {name!r} cannot take {key}={value}: {error.errors()[0]['msg']}"
            ) from error
    return strategy(**values)


def _as_kind(kind: Any, value: Any) -> Any:
    """`value` as the type `kind`; text is read as JSON where that fits, else as it stands."""
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(kind)
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError, pydantic.ValidationError):
            return adapter.validate_python(json.loads(value))
    return adapter.validate_python(value)
