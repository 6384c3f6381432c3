"""Messages as frames of a socket, in both directions of use: what is sent, and how."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from torch import Tensor

from wagontrain.errors import WorkerError
from wagontrain.layout import as_bytes

FRAME = 1 << 20
"""Bytes of a frame: as fast as larger ones, and what is on its way needs little memory."""
_LOOK = 250
_LONGEST = 300.0
"""Seconds after which somebody who takes nothing counts as gone."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    memory: Any = as_bytes(tensor.detach()).numpy()
    return memoryview(memory)


def frames_of(tensors: Sequence[Tensor]) -> list[memoryview]:
    """Frames to send tensors with; a tensor of no elements is one empty frame."""
    frames = []
    for tensor in tensors:
        memory = bytes_of(tensor)
        frames += [memory[at : at + FRAME] for at in range(0, max(1, len(memory)), FRAME)]
    return frames


Sent = Callable[[], bool]
"""Says whether the memory that a message was sent from is needed no longer."""


def send_frames(
    sock: zmq.Socket[bytes],
    frames: Sequence[bytes | memoryview],
    look: Callable[[], None] | None = None,
) -> Sent:
    """Send without copying, except small frames, for which telling the end of it costs more.

    Args:
        sock: to send by.
        frames: of one message; the first one is small.
        look: called while there is nobody to send to; it may raise.

    Raises:
        WorkerError: nothing was taken for minutes.
    """
    large = [at for at, frame in enumerate(frames) if len(frame) >= zmq.COPY_THRESHOLD]
    tracker: Any = None
    for at, frame in enumerate(frames):
        more = zmq.SNDMORE if at + 1 < len(frames) else 0
        if at == 0 and look is not None:
            _begin(sock, frame, more, look)
        elif at not in large:
            sock.send(frame, more, copy=True)
        elif at == large[-1]:  # frames are sent in order: with the last one all are
            tracker = sock.send(frame, more, copy=False, track=True)
        else:
            sock.send(frame, more, copy=False)
    return (lambda: True) if tracker is None else (lambda: bool(tracker.done))


def _begin(
    sock: zmq.Socket[bytes], frame: bytes | memoryview, more: int, look: Callable[[], None]
) -> None:
    """Send a first frame: where nobody is there, zmq would wait for ever, and say nothing."""
    limit = time.monotonic() + _LONGEST
    while True:
        try:
            sock.send(frame, more | zmq.NOBLOCK, copy=True)
            return
        except zmq.Again:
            look()
            if time.monotonic() > limit:
                raise WorkerError(
                    f"the other end has taken nothing for {_LONGEST:.0f} s: is its host gone?"
                ) from None
            sock.poll(_LOOK, zmq.POLLOUT)
