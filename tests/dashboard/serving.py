"""A server of the live page, for a test."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from wagontrain.dashboard.serving import Place, Server

PLACE = Place(port=0)


@contextlib.contextmanager
def serving(folder: Path, place: Place = PLACE) -> Iterator[Server]:
    """Within, the page of the run is served, on loopback."""
    server = Server(folder, place)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def messages(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """What the server sends."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
