"""A run's file followed, and what is new of it sent to each browser.

There are no queues: a browser is sent what has changed since it was sent something last. One that
is slow is sent less often, and how much is kept for it is one cursor.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from wagontrain.dashboard.state import Cursor, State
from wagontrain.dashboard.tail import Tail
from wagontrain.events import finite

PERIOD = 0.4
"""Seconds between two messages to a browser, and between two looks at the file."""

HEARTBEAT = 10.0
"""Seconds after which a browser hears something though nothing has changed."""

MOST_STREAMS = 64


class Feed:
    """One run, for any number of browsers.

    Args:
        folder: of the run; it need not be there yet.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.state = State()
        self.streams = 0
        self.left = 0
        self.problem = ""
        self.closing = False
        self._tail = Tail(folder / "events.jsonl")
        self._clock = clock

    async def follow(self) -> None:
        """Read what comes, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(0 if self.left else PERIOD)

    async def look(self) -> None:
        """Read what has come; not all at once where that is much."""
        try:
            read = await asyncio.to_thread(self._tail.read)
            self.problem = ""
        except OSError as error:
            self.problem = f"{self._tail.path} cannot be read: {error.strerror}"
            return
        if read.again:
            self.state = State(self.state.number + 1)
        for event in read.events:
            self.state.take(event)
        self.state.skipped(read.unreadable)
        self.left = read.left
        if not self.left:
            self.state.judge(self._clock())

    async def messages(self) -> AsyncIterator[str]:
        """What a browser is sent, in the form of server-sent events."""
        cursor, spoken, told = Cursor(), 0.0, None
        self.streams += 1
        try:
            yield "retry: 2000\n\n"
            while True:
                over = self.closing
                news = self.state.since(cursor)
                about = self._about()
                if news or about != told:
                    yield message({**about, **news, "clock": self._clock(), "over": over})
                    spoken, told = time.monotonic(), about
                elif over:
                    yield message({"clock": self._clock(), "over": True})
                elif time.monotonic() - spoken > HEARTBEAT:
                    yield message({"clock": self._clock()})
                    spoken = time.monotonic()
                if over:
                    return
                await asyncio.sleep(PERIOD)
        finally:
            self.streams -= 1

    def _about(self) -> dict[str, Any]:
        """What there is to say of the reading."""
        state = self.state
        return {
            "folder": str(self.folder), "left": self.left, "problem": self.problem,
            "events": state.events, "unreadable": state.unreadable, "last": state.last,
        }  # fmt: skip


def message(content: dict[str, Any]) -> str:
    """One server-sent event: a line of JSON, which has no NaN."""
    try:
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(content), allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n"
