"""A worker's lines when connections break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.servers.test_hostile import Visited, answer
from wagontrain.servers.client import Client
from wagontrain.servers.messages import Ask, Bye, Hello, Lease, Message, Welcome
from wagontrain.servers.wire import Line, Network


class Broken:
    """Stands in for a line whose first connections end at once.

    Args:
        connections: how many were made at each look.
    """

    def __init__(self, *connections: int) -> None:
        self._connections = list(connections)
        self.said: list[Message] = []

    def connections(self) -> int:
        return self._connections.pop(0)

    def send(self, message: Message) -> None:
        self.said.append(message)

    def receive(self, seconds: float) -> Any:
        return None if self._connections else Incoming()


class Incoming:
    message = Welcome(3, ("tcp://127.0.0.1:1",), 2)

    def drop(self) -> None:
        pass


def said(*connections: int) -> int:
    """How often a worker says hello until it is welcome."""
    client: Any = object.__new__(Client)
    client._control, client._seconds, client._endpoint = Broken(*connections), 5.0, "nowhere"
    assert Client._say_hello(client, Hello("worker", "1", "here", 1)).worker == 3
    return len(client._control.said)


def test_hello_is_said_again_on_every_connection_but_the_first() -> None:
    """What was said before there was one is sent on the first, and may be lost with it."""
    assert said(0, 1, 1) == 1
    assert said(0, 2) == 2
    assert said(1, 2, 2, 3) == 3


def test_who_comes_back_takes_its_own_place(tmp_path: Path) -> None:
    """Its work is not kept for it until it has been silent for long."""
    run = Visited(tmp_path / "run")

    def visit(network: Network) -> None:
        lines: list[Line] = []
        for _ in range(2):
            lines.append(network.connect(run.endpoint))
            lines[-1].send(run.hello(client="mine"))
            welcome = answer(lines[-1])
            assert isinstance(welcome, Welcome)
            lines[-1].send(Ask(welcome.worker))
            assert isinstance(answer(lines[-1]), Lease)
        assert sorted(run.coordinator.members) == [1, 2, 4]
        lines[-1].send(Bye(4))

    outcome = run.visited_by(visit)
    left = [event["worker"] for event in outcome.events if event["kind"] == "left"]
    assert left[0] == 3
