"""What tests of servers use: a network, and coordinators of shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.shards import LOCAL, SECRET, Coordinator, Make
from wagontrain.servers.wire import Line, Listener, Network


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(SECRET) as made:
        yield made


@pytest.fixture
def make(network: Network) -> Iterator[Make]:
    """Coordinators, whose processes end with the test."""
    made: list[Coordinator] = []

    def coordinator(shards: int = 1, **job: Any) -> Coordinator:
        made.append(Coordinator(network, shards, **job))
        return made[-1]

    yield coordinator
    for each in made:
        each.close()


@pytest.fixture
def listener(network: Network) -> Listener:
    return network.listen(LOCAL)


@pytest.fixture
def line(network: Network, listener: Listener) -> Line:
    return network.connect(listener.endpoint)
