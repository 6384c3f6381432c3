from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gang import Gang


@pytest.fixture(scope="session")
def gang() -> Iterator[Gang]:
    """Processes shared by all tests."""
    shared = Gang()
    yield shared
    shared.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
