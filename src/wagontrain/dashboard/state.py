"""Events folded into all that the page shows, and what of it somebody has not seen yet.

No clock, no file, no network: events and times come in, plain data goes out. However long a run
is, this grows to a bound: curves are thinned, the log has an end, workers that are gone are
forgotten in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wagontrain.dashboard.curves import Curve, Rate
from wagontrain.dashboard.log import Log
from wagontrain.dashboard.tiles import Tiles, doing_now
from wagontrain.events import MALFORMED
from wagontrain.sentences import FIGURES, cause, clipped

Status = Literal["waiting", "running", "silent", "failed", "ended"]

LEAST_PATIENCE = 10.0
"""Seconds without a word after which a run is called silent, where it is not usual for it."""

STALEST = 64
"""Staleness from which on gradients are counted together."""

CURVES = 24
"""At most: loss, speed, bytes, and what is measured in validation."""

_KEEP = 0.9


@dataclass
class Cursor:
    """What one browser has.

    Args:
        revision: of the state.
        curves: of each, its generation and how many buckets.
        log: lines up to this number.
        run: which run's state it was: another one is sent as a whole.
    """

    revision: int = -1
    curves: dict[str, tuple[int, int]] = field(default_factory=dict)
    log: int = 0
    run: int = -1


class State:
    """All that the page shows of a run."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.revision = 0
        self.events = self.unreadable = 0
        self.status: Status = "waiting"
        self.message = ""
        self.run: dict[str, Any] = {}
        self.now: dict[str, Any] = {}
        self.shards: list[dict[str, Any]] = []
        self.staleness: dict[int, int] = {}
        self.curves: dict[str, Curve] = {}
        self._rates: dict[str, Rate] = {}
        self.tiles = Tiles()
        self.log = Log()
        self.last = 0.0
        self.patience = LEAST_PATIENCE
        self._longest = 0.0
        self._changed: dict[str, int] = {}
        self._recent: tuple[float, float] | None = None  # samples and seconds of a step, smoothed
        self._sent = (0.0, 0.0)

    # --- events in ------------------------------------------------------------------------------

    def take(self, event: Mapping[str, Any]) -> None:
        """Fold one event in; one that is not what it says is counted, and left out."""
        self.revision += 1
        self.events += 1
        try:
            handler = self._HANDLERS.get(event["kind"])
            if handler is not None:
                handler(self, event)
            if event["kind"] not in FIGURES:
                self.log.add(event)
                self._mark("log")
        except MALFORMED:
            self.unreadable += 1
        when = float(event["time"])
        if self.last and self.status == "running":
            # What is usual is forgotten in the end: one long validation is not for ever.
            self._longest = max(0.999 * self._longest, when - self.last)
        self.last = max(self.last, when)
        self.patience = LEAST_PATIENCE + 3 * min(self._longest, 600.0)

    def skipped(self, lines: int) -> None:
        """So many lines were no events."""
        self.unreadable += lines

    def judge(self, now: float) -> None:
        """Say how the run and everybody in it is at `now`, in seconds since the epoch."""
        if self.status not in ("running", "silent"):
            return
        silent = now - self.last > self.patience
        status: Status = "silent" if silent else "running"
        self.revision += 1
        if status != self.status:
            self.status = status
            self._mark("status")
        if self.tiles.judge(now, self.revision, running=not silent):
            self._mark("tiles")

    def _mark(self, *sections: str) -> None:
        for section in sections:
            self._changed[section] = self.revision

    def _on_start(self, event: Mapping[str, Any]) -> None:
        shown = (
            "strategy", "settings", "exact", "world_size", "hosts", "device", "threads", "epochs",
            "steps", "steps_per_epoch", "batch_size", "samples", "first_step",
        )  # fmt: skip
        self.run = {key: event.get(key) for key in shown} | {"started": float(event["time"])}
        self.run["hosts"] = [clipped(host, 80) for host in list(event["hosts"])[:1000]]
        self.run["settings"] = {
            clipped(key, 40): clipped(value, 80)
            for key, value in list(dict(event.get("settings") or {}).items())[:50]
        }
        self.run["crewed"] = "join" in event
        self.run["foretold"] = _foretold(event)
        self.status, self.message = "running", ""
        self.now = {"samples": 0}
        self.tiles.begin(event, self.revision)
        self._mark("run", "now", "status", "tiles")

    def _on_step(self, event: Mapping[str, Any]) -> None:
        step, samples = int(event["step"]), float(event["samples"])
        seconds = float(event["seconds"]) + float(event["data_seconds"])
        before = self._recent or (samples, seconds)
        self._recent = made, smooth = (
            _KEEP * before[0] + (1 - _KEEP) * samples, _KEEP * before[1] + (1 - _KEEP) * seconds,
        )  # fmt: skip
        self.now |= {
            "step": step, "epoch": int(event["epoch"]), "time": float(event["time"]),
            "samples": self.now.get("samples", 0) + int(samples),
            "step_seconds": smooth,
            "samples_per_second": made / smooth if smooth > 0 else None,
        }  # fmt: skip
        self._add("speed", event, samples, seconds, rate=True)
        if event.get("sent") is not None:
            self._add("sent", event, float(event["sent"]), seconds, rate=True)
        if event.get("staleness") is not None:
            stale = min(STALEST, max(0, math.ceil(float(event["staleness"]))))
            self.staleness[stale] = self.staleness.get(stale, 0) + 1
            self._mark("staleness")
        self._on_loss(event)
        if self.tiles.step(float(event["time"])):
            self._mark("doing")
        self._mark("now")

    def _on_loss(self, event: Mapping[str, Any]) -> None:
        if event["loss"] is None:
            return
        loss, weight = float(event["loss"]), float(event.get("covers") or event.get("samples", 1))
        self.now |= {"loss": loss, "loss_step": int(event["step"])}
        self._add("loss", event, loss * weight, weight)
        self._mark("now")

    def _on_times(self, event: Mapping[str, Any]) -> None:
        self.tiles.time(event, self.revision)
        self._mark("tiles")

    def _on_validation(self, event: Mapping[str, Any]) -> None:
        values = {
            clipped(name, 40): float(value) if math.isfinite(value) else None
            for name, value in list(event["values"].items())[:12]
        }
        self.now |= {"validation": values, "validated": int(event["step"])}
        for name, value in values.items():
            if value is not None:
                self._add(f"validation/{name}", event, value)
        self._mark("now")

    def _on_workers(self, event: Mapping[str, Any]) -> None:
        self.tiles.hear(event, self.revision)
        self.shards = [
            {"ready": bool(shard["ready"]), "behind": int(shard["behind"]),
             "applied": int(shard["applied"]), "busy": float(shard["busy"]),
             "lost": int(shard["lost"]), "silent": _number(shard["silent"])}
            for shard in (event.get("shards") or [])[:1000]
        ]  # fmt: skip
        if "work" in event:
            self._of_all(event)
        self._mark("doing", "shards", "tiles")

    def _of_all(self, event: Mapping[str, Any]) -> None:
        """Bytes that all workers together have sent, where each says so for itself."""
        when, before = float(event["time"]), self._sent
        total = sum(tile.sent for tile in self.tiles.of.values())
        self._sent = when, total
        if before[0] and when > before[0] and total >= before[1] and "step" in self.now:
            at = {"step": self.now["step"], "time": when}
            self._add("sent", at, total - before[1], when - before[0])

    def _on_joined(self, event: Mapping[str, Any]) -> None:
        self.tiles.join(event, self.revision)
        self._mark("tiles", "doing")

    def _on_left(self, event: Mapping[str, Any]) -> None:
        self.tiles.leave(event, self.revision)
        self._mark("tiles", "doing")

    def _on_end(self, event: Mapping[str, Any]) -> None:
        self.status = "ended"
        self.tiles.end(float(event["time"]), self.revision, None)
        self._mark("status", "tiles", "doing")

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self.status, self.message = "failed", cause(clipped(event["message"], 2000))
        self.tiles.end(float(event["time"]), self.revision, self.message)
        self._mark("status", "tiles", "doing")

    def _add(
        self,
        name: str,
        event: Mapping[str, Any],
        above: float,
        below: float = 1.0,
        rate: bool = False,
    ) -> None:
        if name not in self.curves:
            if len(self.curves) >= CURVES:
                return
            self.curves[name] = Curve()
            self._rates[name] = Rate(self.curves[name])
        since = float(event["time"]) - self.run.get("started", 0.0)
        curve = self._rates[name] if rate else self.curves[name]
        curve.add(int(event["step"]), since, above, below)

    _HANDLERS: dict[str, Callable[[State, Mapping[str, Any]], None]] = {  # noqa: RUF012
        "start": _on_start, "step": _on_step, "loss": _on_loss, "times": _on_times,
        "validation": _on_validation, "workers": _on_workers, "joined": _on_joined,
        "left": _on_left, "end": _on_end, "failed": _on_failed,
    }  # fmt: skip

    # --- what there is to see -------------------------------------------------------------------

    def since(self, cursor: Cursor) -> dict[str, Any]:
        """What has changed since the cursor, which is moved on; all, for a new one.

        What it gives can be written as JSON without NaN, and is put in place of what the browser
        has under the same name, save for `curves`, `tiles` and `log`, which say what is new.
        """
        if cursor.run != self.number:
            cursor.__dict__.update(Cursor(run=self.number).__dict__)
        first = cursor.revision < 0
        news: dict[str, Any] = {"whole": True} if first else {}
        for name, section in self._SECTIONS.items():
            if first or self._changed.get(name, 0) > cursor.revision:
                news[name] = section(self)
        curves = self._new_points(cursor)
        if curves:
            news["curves"] = curves
        if first or self._changed.get("tiles", 0) > cursor.revision:
            news |= self._new_tiles(cursor.revision)
        lines = self.log.since(cursor.log)
        if lines:
            news["log"] = {"lines": lines, "before": self.log.before}
            cursor.log = self.log.count
        cursor.revision = self.revision
        return news

    def _new_points(self, cursor: Cursor) -> dict[str, Any]:
        news = {}
        for name, curve in self.curves.items():
            generation, count = cursor.curves.get(name, (0, 0))
            start, points = curve.since(generation, count)
            if not points:
                continue
            last = len(points) == 1 and start == count - 1
            if last and self._changed.get("now", 0) <= cursor.revision:
                continue
            news[name] = {"from": start, "points": points}
            cursor.curves[name] = (curve.generation, len(curve.buckets))
        return news

    def _new_tiles(self, revision: int) -> dict[str, Any]:
        tiles = self.tiles.of.values()
        news: dict[str, Any] = {
            "tiles": [tile.plain() for tile in tiles if tile.changed > revision]
        }
        if self.tiles.lineup > revision:
            news["lineup"] = {"numbers": list(self.tiles.of), "forgotten": self.tiles.forgotten}
        return news

    def _status(self) -> dict[str, Any]:
        return {"status": self.status, "message": self.message}

    def _staleness(self) -> dict[str, Any]:
        return {"counts": sorted(self.staleness.items()), "open": STALEST}

    _SECTIONS: dict[str, Callable[[State], Any]] = {  # noqa: RUF012
        "run": lambda self: self.run, "status": _status, "now": lambda self: self.now,
        "doing": lambda self: doing_now(self.tiles.of.values()),
        "shards": lambda self: self.shards, "staleness": _staleness,
    }  # fmt: skip


def _foretold(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the plan says of a step, where one was made."""
    chosen = (event.get("plan") or {}).get("chosen") or {}
    seconds = float((chosen.get("estimate") or {}).get("seconds") or 0.0)
    if seconds <= 0:
        return None
    return {"seconds": seconds, "samples_per_second": event["batch_size"] / seconds}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
