"""What happens in a run, as a stream of plain records, and where they are kept.

An event is a dict with `kind` and `time` (seconds since the epoch) that goes to every sink as it
happens. `events.jsonl` holds them all, one JSON object a line; TensorBoard gets the curves.

| kind       | fields                                                                         |
|------------|--------------------------------------------------------------------------------|
| start      | strategy, settings, exact, world_size, hosts, device, threads, epochs, steps,   |
|            | steps_per_epoch, batch_size, samples, first_step; plan, where one was made;     |
|            | ranks: host and device of each, where they do not come and go; join and secret, |
|            | where they do; elsewhere, the number of server shards that hosts are to hold    |
| step       | step, epoch, samples, loss, seconds, data_seconds, sent; covers, where the loss |
|            | is the mean over so many samples, those of several steps                        |
| loss       | step, epoch, loss, covers: a mean that became known after its steps             |
| times      | step, compute, waiting, data: one number per rank; exchange: one for all;       |
|            | means of a step                                                                 |
| validation | epoch, step, values                                                             |
| workers    | about once a second: doing, phrase -> the ranks, such as "0-3,7"; silent, rank  |
|            | -> seconds since it was heard of, where that is long; every, seconds after      |
|            | which the next such event is due (see `signs`)                                  |
| checkpoint | step: steps that it holds                                                       |
| stopped    | step, reason: why training ends before its last step                            |
| end        | summary                                                                         |
| failed     | message                                                                         |

Where workers come and go (see `servers`) their numbers stand for ranks, and there are also

| kind       | fields                                                                         |
|------------|--------------------------------------------------------------------------------|
| workers    | beside the above: work, worker -> batches, samples, seconds of computing a      |
|            | batch, bytes sent; shards, one each: ready, behind (updates still to apply),    |
|            | applied, busy (seconds of work so far), lost, silent; leases: given, again,     |
|            | out, waiting (see `servers.roster.Roster.plain`); pushes_per_second and         |
|            | bytes_per_second of all workers since the event before                          |
| step       | beside the above: staleness, updates that the oldest gradient did not know of   |
| joined     | worker, host, process, device                                                   |
| left       | worker, host, process, why, doing                                               |
| restarted  | what, process, why: a worker or server shard that was started again             |
| shard_restarted | shard, version                                                             |
| shard_placed | shard, host, process: where one is that is elsewhere (see `servers.hosts`)    |
| shard_lost | shard, host, why                                                                |
| dropped, lost, spoiled, again, mislaid, too_far, refused | see `servers.commands.Note`       |
"""

from __future__ import annotations

import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Sink(ABC):
    """Something that takes events."""

    @abstractmethod
    def take(self, event: Event) -> None:
        """One event."""

    def close(self) -> None:  # noqa: B027  most sinks have nothing to close
        """No more events will come."""


class Events:
    """Sends events to sinks."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = list(sinks)

    def send(self, kind: str, **fields: Any) -> None:
        """Stamp an event with the time and give it to every sink."""
        event = {"kind": kind, "time": time.time(), **fields}
        for sink in self.sinks:
            sink.take(event)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()


class JsonLines(Sink):
    """Keeps events in a file, one JSON object a line, each line written at once.

    They may come from several threads, and in one of them after the end: then they are left out.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()
        self._text = json.JSONEncoder(default=str).encode

    def take(self, event: Event) -> None:
        """Append one line."""
        line = self._text(event) + "\n"
        with self._lock:
            if not self._file.closed:
                self._file.write(line)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def read(path: Path, start: int = 0) -> Iterator[tuple[Event, int]]:
    """Events in a JSON-lines file from byte `start` on, each with the byte after it.

    A last line that is still being written is left for the next call.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield json.loads(line), start


MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)
"""What taking fields from an event raises that is not what it says."""


def parsed(line: bytes) -> Event | None:
    """The event of a line of a file that may hold anything; None where it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    when = event.get("time")
    return event if isinstance(when, int | float) and abs(when) < 1e12 else None


def finite(value: Any) -> Any:
    """The same with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def note_failure(path: Path, error: BaseException) -> None:
    """Add a "failed" event to a file whose writer could not say so itself: it was killed, say.

    A line that it had not written to its end is taken away. Nothing is added where the run has
    said how it ended, or has not begun to write.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        if last.startswith((b'{"kind": "failed"', b'{"kind": "end"')) or (start and not whole):
            return
        file.truncate(start + len(whole))
    sink = JsonLines(path)
    Events([sink]).send("failed", message=str(error) or type(error).__name__)
    sink.close()


_TAIL_BYTES = 1 << 20


class TensorBoard(Sink):
    """Curves for TensorBoard: loss and throughput about twice a second, every validation."""

    SECONDS = 0.5

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._last = 0.0
        self._waiting: Event | None = None

    def take(self, event: Event) -> None:
        """Draw what belongs into a curve."""
        if "covers" in event:  # rare, so that none is left out
            self._writer.add_scalar("train/loss", event["loss"], event["step"])
        if event["kind"] == "step":
            self._waiting = event
            if event["time"] - self._last >= self.SECONDS:
                self._draw_step()
        elif event["kind"] == "validation":
            for name, value in event["values"].items():
                self._writer.add_scalar(f"validation/{name}", value, event["step"])
        elif event["kind"] == "end":
            self._draw_step()

    def _draw_step(self) -> None:
        event = self._waiting
        if event is None:
            return
        self._last, self._waiting = event["time"], None
        seconds = event["seconds"] + event["data_seconds"]
        curves = {
            "train/samples_per_second": event["samples"] / seconds,
            "train/step_seconds": seconds,
        }
        if event["loss"] is not None and "covers" not in event:
            curves["train/loss"] = event["loss"]
        for name, value in curves.items():
            self._writer.add_scalar(name, value, event["step"])

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()
