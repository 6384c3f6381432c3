"""Workers and server shards as a person sees them, and how each is."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wagontrain.sentences import OWN_WILL, clipped
from wagontrain.signs import SLOWER, WAITED, numbers_in, ranges

Condition = Literal[
    "starting", "working", "slow", "silent", "dead", "stopped", "left", "ended", "unknown"
]
"""
starting    there, and has done nothing yet
slow        takes clearly longer than the others, who wait for it or do its part
silent      not heard of for longer than usual, and not given up yet
dead        killed, given up, or named as the one that failed
stopped     ended because others failed
left        gone of its own will
ended       the run has ended well
unknown     nobody writes any more: the whole run is silent
"""

GONE = 32
"""Workers kept that take part no longer; of the others there is the number."""

MOST = 20_000
"""Workers shown at most."""

_KEEP = 0.8
_NOBODY = "though all ranks answer"
_NAMED = re.compile(
    r"(?:^|; |Error: )(?:worker )?rank (\d+)\b(?: on (?:host )?[^\s:]+)?([^;]*?)(?= \(if|;|$)",
    re.MULTILINE,
)


@dataclass
class Tile:
    """One worker.

    Args:
        number: its rank, or its number where workers come and go.
        host, device: where it computes.
        condition: how it is.
        why: why it is so, where there is something to say.
        doing: what it did when last heard of.
        seen: when that was, in seconds since the epoch.
        compute, exchange, waiting, data: seconds of a step.
        rate: samples a second that it computes, where that is known of each.
        slower: its time over the median of the others', where it is slow.
        changed: revision at which any of these changed last.
    """

    number: int
    host: str = ""
    device: str = ""
    condition: Condition = "starting"
    why: str = ""
    doing: str = ""
    seen: float = 0.0
    compute: float = 0.0
    exchange: float = 0.0
    waiting: float = 0.0
    data: float = 0.0
    rate: float | None = None
    slower: float | None = None
    changed: int = 0
    timed: bool = False
    process: int = -1
    sent: float = 0.0
    _work: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def own(self) -> float:
        """Seconds of a step on its own work."""
        return self.compute + self.data

    @property
    def here(self) -> bool:
        """Whether it takes part."""
        return self.condition not in ("dead", "stopped", "left", "ended")

    def plain(self) -> dict[str, Any]:
        """For the page; what changes all the time is sent apart."""
        times = (self.compute, self.exchange, self.waiting, self.data)
        return {
            "number": self.number, "host": self.host, "device": self.device,
            "condition": self.condition, "why": self.why,
            "times": [float(f"{value:.3g}") for value in times] if self.timed else None,
            "rate": None if self.rate is None else float(f"{self.rate:.4g}"),
            "slower": None if self.slower is None else round(self.slower, 1),
        }  # fmt: skip

    def worked(self, samples: float, seconds: float) -> None:
        """It has computed so much in all."""
        more, took = samples - self._work[0], seconds - self._work[1]
        self._work = samples, seconds
        if more > 0 and took > 0:
            now = more / took
            self.rate = now if self.rate is None else _KEEP * self.rate + (1 - _KEEP) * now


class Tiles:
    """All workers.

    `revision` is that of the state, and goes up with each event.
    """

    def __init__(self) -> None:
        self.of: dict[int, Tile] = {}
        self.lineup = 0  # revision at which somebody came or went
        self.forgotten = 0
        self.comes_and_goes = False
        self.every = 1.0
        self.heard = 0.0

    def begin(self, event: Mapping[str, Any], revision: int) -> None:
        """A run begins: those that are there from the beginning."""
        self.comes_and_goes = "join" in event
        if self.comes_and_goes:
            return
        count = min(MOST, int(event["world_size"]))
        places = event.get("ranks") or [["", event.get("device", "")]] * count
        for rank, (host, device) in enumerate(places[:MOST]):
            self.of[rank] = Tile(rank, clipped(host, 80), clipped(device, 20), changed=revision)
        self.lineup = revision

    def join(self, event: Mapping[str, Any], revision: int) -> None:
        """One more takes part."""
        number = int(event["worker"])
        if len(self.of) >= MOST:
            return
        self.of[number] = Tile(
            number, clipped(event.get("host", ""), 80), clipped(event.get("device") or "", 20),
            seen=float(event["time"]), changed=revision, process=int(event.get("process", -1)),
        )  # fmt: skip
        self.lineup = revision
        gone = [each for each in self.of.values() if not each.here]
        for each in gone[: max(0, len(gone) - GONE)]:
            del self.of[each.number]
            self.forgotten += 1

    def leave(self, event: Mapping[str, Any], revision: int) -> None:
        """One takes part no longer."""
        tile = self.of.get(int(event["worker"]))
        if tile is None:
            return
        why = clipped(event.get("why", ""))
        tile.condition = "left" if why == OWN_WILL else "dead"
        tile.why, tile.seen = why, float(event["time"])
        tile.doing = clipped(event.get("doing") or "", 80)
        tile.changed = self.lineup = revision

    def hear(self, event: Mapping[str, Any], revision: int) -> None:
        """What all are doing."""
        now = float(event["time"])
        self.every, self.heard = max(0.1, float(event.get("every", 1.0))), now
        silent = event.get("silent") or {}
        for phrase, span in event["doing"].items():
            for number in numbers_in(span):
                tile = self.of.get(number)
                if tile is not None and tile.here:
                    tile.doing = clipped(phrase, 80)
                    tile.seen = now - float(silent.get(str(number), 0.0))
        for key, work in (event.get("work") or {}).items():
            tile = self.of.get(int(key))
            if tile is not None:
                batches, samples, seconds, sent = map(float, work)
                tile.worked(samples, batches * seconds)
                tile.sent = sent
                tile.changed = revision

    def time(self, event: Mapping[str, Any], revision: int) -> None:
        """What each rank spent on a step."""
        exchange = float(event["exchange"])
        data = event.get("data") or [0.0] * len(event["compute"])
        columns = zip(event["compute"], event["waiting"], data, strict=True)
        for rank, (compute, waiting, reading) in enumerate(columns):
            tile = self.of.get(rank)
            if tile is None:
                continue
            keep = _KEEP if tile.timed else 0.0
            tile.compute = keep * tile.compute + (1 - keep) * float(compute)
            tile.exchange = keep * tile.exchange + (1 - keep) * exchange
            tile.waiting = keep * tile.waiting + (1 - keep) * float(waiting)
            tile.data = keep * tile.data + (1 - keep) * float(reading)
            tile.timed, tile.changed = True, revision

    def step(self, when: float) -> bool:
        """A step was made, which shows that whoever is alone is at work; returns whether it is."""
        if len(self.of) != 1 or self.heard:
            return False
        for tile in self.of.values():
            tile.seen, tile.doing = when, "in its steps"
        return True

    def end(self, when: float, revision: int, message: str | None) -> None:
        """The run is over; `message` says why where it failed."""
        guilty = named_in(message or "")
        for tile in self.of.values():
            if not tile.here:
                continue
            if tile.number in guilty:
                tile.condition, tile.why = "dead", guilty[tile.number]
            else:
                tile.condition = "ended" if message is None else "stopped"
                tile.seen = max(tile.seen, when if message is None else 0.0)
            tile.changed = revision

    def judge(self, now: float, revision: int, running: bool) -> bool:
        """Say how each is at `now`; returns whether any is otherwise than before."""
        slow = self._slow()
        limit = 5.0 + 3 * self.every
        changed = False
        for tile in self.of.values():
            if not tile.here:
                continue
            factor = slow.get(tile.number)
            condition: Condition
            if not running:
                condition = "unknown"
            elif self.heard and now - tile.seen > limit:
                condition = "silent"
            elif factor is not None:
                condition = "slow"
            else:
                condition = "working" if tile.doing or tile.timed else "starting"
            if condition != tile.condition or (factor is None) != (tile.slower is None):
                tile.condition, tile.changed, changed = condition, revision, True
            tile.slower = factor
        return changed

    def _slow(self) -> dict[int, float]:
        """Those that are clearly slower than the median, and by what factor."""
        there = [tile for tile in self.of.values() if tile.here]
        cost: dict[int, float]
        if self.comes_and_goes:
            cost = {tile.number: 1 / tile.rate for tile in there if tile.rate}
        else:
            cost = {tile.number: tile.own for tile in there if tile.timed and tile.own > 0}
        if len(cost) < 2:
            return {}
        usual = _median_of_others(cost)
        slow = {
            number: cost[number] / usual[number]
            for number in cost
            if cost[number] > SLOWER * usual[number]
        }
        others = [tile for tile in there if tile.number in cost and tile.number not in slow]
        if slow and not self.comes_and_goes and _waited(others) < WAITED:
            return {}
        return slow


def _median_of_others(cost: Mapping[int, float]) -> dict[int, float]:
    """For each the median of the others; of many that is the median of all."""
    if len(cost) > 32:
        return dict.fromkeys(cost, statistics.median(cost.values()))
    return {
        number: statistics.median(value for other, value in cost.items() if other != number)
        for number in cost
    }


def _waited(tiles: Sequence[Tile]) -> float:
    """Part of their time that these wait for others."""
    whole = sum(tile.own + tile.exchange + tile.waiting for tile in tiles)
    return sum(tile.waiting for tile in tiles) / whole if whole > 0 else 0.0


def named_in(message: str) -> dict[int, str]:
    """Ranks that an error names as those that failed, and what it says of each.

    Such a message begins with them: "rank 1 on host b has not been heard of for 31 s".
    """
    if _NOBODY in message:
        return {}
    return {int(found[1]): clipped(found[2].strip(" :")) for found in _NAMED.finditer(message)}


def doing_now(tiles: Iterable[Tile]) -> list[list[Any]]:
    """What all do and when each was seen, those alike together: phrase, time, and numbers."""
    alike: dict[tuple[str, float], list[int]] = {}
    for tile in tiles:
        alike.setdefault((tile.doing, round(tile.seen, 1)), []).append(tile.number)
    return [[phrase, seen, ranges(numbers)] for (phrase, seen), numbers in alike.items()]
