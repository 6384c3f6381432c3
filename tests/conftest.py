from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import TASK
from tests.gang import Gang
from tests.hosts import Nursery
from wagontrain.testbed.bed import why_not


@pytest.fixture(scope="session")
def gang() -> Iterator[Gang]:
    """Processes shared by all tests."""
    shared = Gang()
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def nursery(request: pytest.FixtureRequest) -> Iterator[Nursery]:
    """Hosts of a test bed, in which torch is imported already: so many as HOSTS in the module."""
    made = Nursery(request.module.HOSTS, rate="1gbit")
    yield made
    made.down()


@pytest.fixture
def hosts(nursery: Nursery, task_file: Path) -> Iterator[Nursery]:
    """The hosts, with nothing left of the test before, and a task file."""
    yield nursery
    nursery.reset()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What joining a job sets for Gloo and NCCL ends with the test that joined."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A task file with a few tasks, good ones and bad ones."""
    file = tmp_path / "job.py"
    file.write_text(TASK)
    return file


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if item.get_closest_marker("testbed"):
        problem = why_not()
        if problem:
            pytest.skip(problem)


LONGEST = ("test_ray", "test_conformance", "test_strips", "test_lost_hosts", "test_crew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: two at a time, they would be waited for at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
