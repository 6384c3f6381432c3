from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from wagontrain.errors import UsageError
from wagontrain.registry import discover, find, make_strategy
from wagontrain.strategies.data_parallel import DataParallel

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import wagontrain as wt

@dataclass(frozen=True)
class Alone(wt.Strategy):
    speed: int = 3
    name: ClassVar[str] = "{name}"
    summary: ClassVar[str] = "everybody for himself"
    exact = False
    def check(self, task, world): pass
    def setup(self, task, context): raise RuntimeError
"""


def install(folder: Path, monkeypatch: Any, name: str, target: str = "Alone") -> None:
    """Another package with a strategy file and an entry point, as pip would lay it down."""
    module = f"other_package_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(PLUGIN.format(name=name))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[wagontrain.strategies]\n{name} = {module}:{target}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_strategy_file_is_found() -> None:
    assert discover()["data-parallel"] is DataParallel


def test_a_strategy_of_another_package_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    install(tmp_path, monkeypatch, "alone")
    assert "alone" in discover()
    assert make_strategy("alone", {"speed": "5"}).settings == {"speed": 5}
    with pytest.raises(UsageError, match=r"no setting 'sped'; did you mean 'speed'\?"):
        make_strategy("alone", {"sped": "5"})


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("missing", "Nobody", "strategy 'missing' of package .* cannot be loaded"),
        ("wrong", "dataclass", "has to name a subclass of wagontrain.Strategy"),
        ("data-parallel", "Alone", "has the name of another"),
    ],
)
def test_a_wrong_entry_point_is_named(
    tmp_path: Path, monkeypatch: Any, name: str, target: str, message: str
) -> None:
    install(tmp_path, monkeypatch, name, target)
    with pytest.raises(UsageError, match=message):
        discover()
    assert find("data-parallel") is DataParallel


def test_file_name_is_strategy_name() -> None:
    for name, strategy in discover().items():
        module = sys.modules[strategy.__module__]
        if module.__name__.startswith("wagontrain.strategies."):
            assert module.__name__.rpartition(".")[2].replace("_", "-") == name


def test_unknown_strategies_name_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no strategy 'data-paralel'; did you mean 'data-par"):
        find("data-paralel")


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10.0), ("0.5", 0.5)],
)
def test_settings_from_text(text: str, value: float) -> None:
    assert make_strategy("data-parallel", {"bucket_mb": text}) == DataParallel(bucket_mb=value)


def test_settings_of_all_kinds() -> None:
    made = make_strategy(
        "data-parallel",
        {"shares": "[1, 2.5]", "find_unused_parameters": "true", "compression": "bf16"},
    )
    assert made == DataParallel(shares=(1.0, 2.5), find_unused_parameters=True, compression="bf16")
    assert make_strategy("data-parallel", made.settings) == made
    assert make_strategy("data-parallel", {"find_unused_parameters": "null"}) == DataParallel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": "zip"}, "cannot take compression=zip: Input should be 'none', 'bf16'"),
        ({"bucket_mb": "big"}, "cannot take bucket_mb=big"),
        ({"bucket_mb": "-1"}, "bucket_mb is -1.0: give a number above 0"),
        ({"powersgd_rank": "1.5"}, "cannot take powersgd_rank=1.5"),
        ({"powersgd_rank": 0}, "powersgd_rank is 0: give 1 or more"),
    ],
)
def test_settings_that_are_not_taken(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_strategy("data-parallel", settings)
