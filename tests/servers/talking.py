"""Two ends that talk, in one process."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from tests.servers.shards import WAIT
from wagontrain.servers.wire import Incoming, Line, Listener


def heard(side: Listener | Line) -> Incoming:
    """The next message, whatever else is settled on the way."""
    limit = time.monotonic() + WAIT
    while time.monotonic() < limit:
        incoming = side.receive(1.0)
        if incoming is not None:
            return incoming
    raise AssertionError("nothing came")


def outer_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # only looks up the way; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            pytest.skip("this machine has no address besides loopback")


def alike(own):
    return [torch.zeros_like(tensor) for tensor in own]
