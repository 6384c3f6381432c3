from __future__ import annotations

import importlib.util

import pytest

from wagontrain.engines import Local, Ray, make_engine
from wagontrain.errors import UsageError
from wagontrain.launch import Place


def test_engines_by_name() -> None:
    assert isinstance(make_engine("local"), Local)
    assert isinstance(make_engine("ray", "10.0.0.1:6379"), Ray)
    with pytest.raises(UsageError, match="did you mean 'ray'"):
        make_engine("rya")
    with pytest.raises(UsageError, match="give --engine ray with it"):
        make_engine("local", "10.0.0.1:6379")


@pytest.mark.parametrize(
    ("workers", "place", "address", "said"),
    [
        (None, None, None, "give --workers"),
        (0, None, None, "at least 1"),
        (2, Place(0, 2, 0, 2), None, "in a job of 2 that torchrun or Slurm started"),
        (2, None, "ray://head:10001", "Ray Client is not supported"),
    ],
)
def test_what_ray_refuses_without_a_cluster(
    workers: int | None, place: Place | None, address: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        Ray(address).count(workers, place)


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'wagontrain\[ray\]'"):
        Ray().count(2, None)
