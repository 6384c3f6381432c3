"""What a person sees while a run goes on: a live display, or plain lines without a terminal.

It takes events and nothing else, from the run in this process or from the run's file.
"""

from __future__ import annotations

import textwrap
import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wagontrain import events
from wagontrain.events import Event, Sink
from wagontrain.plan import Plan
from wagontrain.plan_view import view
from wagontrain.units import duration, off_by, size

PLAIN_SECONDS = 10.0
"""Time between two plain lines within an epoch."""

EPOCH_SECONDS = 0.5
"""Least time between two plain lines, however short the epochs are."""


class Progress(Sink):
    """Shows a run on a console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.folder: Path | None = None
        """The run's, once it has one."""
        self._live: Live | None = None
        self._start: Event = {}
        self._step: Event = {}
        self._known_loss: float | None = None
        self._split: dict[str, float] = {}
        self._speed = _Smooth()
        self._crew = ""
        self._printed = 0.0

    def take(self, event: Event) -> None:
        """Show one event."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def close(self) -> None:
        """End the live display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print(self, text: str) -> None:
        """A line above the display, say something that a worker printed."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _on_start(self, event: Event) -> None:
        self._start = event
        self._printed = event["time"]
        if "plan" in event:
            plan = Plan.from_json(event["plan"])
            self.console.print(view(plan), highlight=False)
            self.print("")
        for line in headline(event):
            self.print(line)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()

    def _on_step(self, event: Event) -> None:
        self._step = event
        self._on_loss(event)
        self._speed.add("step", event["seconds"] + event["data_seconds"])
        self._speed.add("data", event["data_seconds"])
        last = event["step"] + 1
        if self._live is not None:
            self._live.update(self._panel())
        else:
            since = event["time"] - self._printed
            whole_epoch = last % self._start["steps_per_epoch"] == 0 and since >= EPOCH_SECONDS
            if whole_epoch or last == self._start["steps"] or since >= PLAIN_SECONDS:
                self._line(event)

    def _on_loss(self, event: Event) -> None:
        if event["loss"] is not None:
            self._known_loss = event["loss"]

    def _on_times(self, event: Event) -> None:
        workers = len(event["compute"])
        self._speed.add("compute", sum(event["compute"]) / workers)
        self._speed.add("exchange", event["exchange"])
        self._speed.add("waiting", sum(event["waiting"]) / workers)

    def _on_workers(self, event: Event) -> None:
        if "leases" in event:
            self._crew = crew_line(event)

    def _on_validation(self, event: Event) -> None:
        values = ", ".join(f"{name} {value:.4f}" for name, value in event["values"].items())
        if self._live is not None:
            self.print(f"epoch {event['epoch'] + 1}/{self._start['epochs']}: validation {values}")
        else:
            self.print(f"  validation {values}")

    def _on_end(self, event: Event) -> None:
        self.close()

    def _on_failed(self, event: Event) -> None:
        self.close()

    def _line(self, event: Event) -> None:
        self._printed = event["time"]
        self.print(
            f"epoch {event['epoch'] + 1}/{self._start['epochs']}  {self._place()}  "
            f"{self._loss()}  {self._samples_per_second():,.0f} samples/s"
        )
        self.print(f"  {self._step_split()}, {self._eta()}")
        if self._crew:
            self.print(f"  {self._crew}")

    def _panel(self) -> Table:
        event, start = self._step, self._start
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=start["steps"], completed=event["step"] + 1, width=24)
        grid.add_row(
            Text(f"epoch {event['epoch'] + 1}/{start['epochs']}"), bar,
            Text(f"{self._place()}  {self._eta()}"),
        )  # fmt: skip
        table = Table.grid()
        table.add_row(grid)
        table.add_row(
            Text(f"{self._loss()}  {self._samples_per_second():,.0f} samples/s", style="bold")
        )
        table.add_row(Text(self._step_split(), style="dim"))
        if self._crew:
            table.add_row(Text(self._crew, style="dim"))
        return table

    def _place(self) -> str:
        return f"step {self._step['step'] + 1}/{self._start['steps']}"

    def _loss(self) -> str:
        """The last that is known: some strategies do not ask all ranks in every step."""
        return "loss -" if self._known_loss is None else f"loss {self._known_loss:.4f}"

    def _samples_per_second(self) -> float:
        return float(self._start["batch_size"] / max(self._speed["step"], 1e-9))

    def _step_split(self) -> str:
        parts = [
            f"{name} {self._speed[name] * 1e3:.1f}"
            for name in ("compute", "exchange", "waiting", "data")
            if name in self._speed
        ]
        return f"{self._speed['step'] * 1e3:.1f} ms a step: {', '.join(parts)}"

    def _eta(self) -> str:
        left = self._start["steps"] - self._step["step"] - 1
        return f"{duration(left * self._speed['step'])} left"


def headline(start: Event) -> list[str]:
    """What is going to be run, in lines of under 80 characters."""
    workers, threads = start["world_size"], start["threads"]
    where = "" if len(start["hosts"]) == 1 else f" on {len(start['hosts'])} hosts"
    each = f"{start['device']}, {threads} thread{'s' * (threads > 1)} each"
    relaxed = "" if start["exact"] else " (relaxed: not the same mathematics as one process)"
    return [
        f"{start['strategy']} over {workers} worker{'s' * (workers > 1)}{where} ({each}){relaxed}",
        f"{start['samples']:,} samples in batches of {start['batch_size']:,}, "
        f"{start['steps']:,} steps",
        *_invitation(start),
    ]


def _invitation(start: Event) -> list[str]:
    """How others take part, where workers may come and go."""
    if "join" not in start:
        return []
    how = f"{start['join']} --secret-file {start['secret']}"
    lines = ["more workers may join, on this host or where it can be reached:",
             f"  wagontrain join {how}"]  # fmt: skip
    if shards := start.get("elsewhere"):
        lines += [f"server shards are waited for, {shards} of them; on a host for each:",
                  f"  wagontrain serve {how}"]  # fmt: skip
    return lines


def crew_line(event: Event) -> str:
    """What workers that come and go have done in the last second or so; of 80 characters or so."""
    speeds = sorted(
        samples / (batches * seconds)
        for batches, samples, seconds, _ in event["work"].values()
        if batches and seconds
    )
    ends = dict.fromkeys(f"{speed:.0f}" for speed in speeds[:1] + speeds[-1:])
    each = f" at {'-'.join(ends)} samples/s" if ends else ""
    workers = len(event["work"])
    return (
        f"{workers} worker{'s' * (workers != 1)}{each}; "
        f"{event['pushes_per_second']:.1f} pushes/s, {size(event['bytes_per_second'])}/s, "
        f"{event['leases']['out']} leases out"
    )


def result_lines(summary: dict[str, Any], folder: Path | None) -> list[str]:
    """How a run ended, in lines of under 80 characters."""
    values = ", ".join(f"{name} {value:.4f}" for name, value in summary["validation"].items())
    loss = summary["train_loss"]
    lines = [f"done in {duration(summary['seconds'])}: {summary['steps']:,} steps"]
    if summary.get("stopped"):
        lines += textwrap.wrap(
            f"  stopped     {summary['stopped']}", 79, subsequent_indent=" " * 14
        )
    if loss is not None:
        lines.append(f"  training    loss {loss:.4f} (mean over the last epoch)")
    if values:
        lines.append(f"  validation  {values}")
    lines.append(f"  speed       {summary['samples_per_second']:,.0f} samples/s")
    sent = summary["bytes_sent_per_rank"]
    if summary["world_size"] > 1 and sent is not None:
        each = size(_per_step(sent, summary))
        lines.append(f"  travelled   {size(max(sent))} sent by each worker, {each} a step")
    rows = summary.get("row_bytes")
    if rows and rows["touched"]:
        up, down = rows["sent"] / rows["touched"], rows["received"] / rows["touched"]
        lines.append(
            f"  tables      {size(rows['touched'])} of rows touched, {down:.2f} times that "
            f"received, {up:.2f} sent"
        )
    staleness = summary.get("staleness")
    if staleness and staleness["max"]:
        lines.append(
            f"  staleness   mean {staleness['mean']:.1f} updates, 99 % within {staleness['p99']}, "
            f"most {staleness['max']}"
        )
    if told := summary.get("minimised"):
        lines.append(
            f"  minimised   {told['iterations']} iterations, {told['evaluations']} evaluations; "
            f"{told['given_twice']} portions given twice, {told['not_counted']} pushes not counted"
        )
    if summary.get("lost"):
        lines.append(f"  lost        {summary['lost']} updates on a server that was started again")
    if summary.get("straggler"):
        lines += textwrap.wrap(
            summary["straggler"],
            76,
            initial_indent="  straggler   ",
            subsequent_indent=" " * 14,
        )
    lines.append(f"  memory      {size(max(summary['peak_memory_per_rank']))} at most in a worker")
    if told := summary.get("predicted"):
        lines += _held_to(told, summary)
    if folder is not None:
        lines.append(f"  files       {folder}")
    return lines


def _held_to(told: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """What was foretold beside what happened."""
    lines = [
        f"  foretold    {told['samples_per_second']:,.0f} samples/s, "
        f"{size(told['bytes_sent_per_step'])} a step, {size(told['peak_memory'])}"
    ]
    off = [f"speed {off_by(summary['samples_per_second'], told['samples_per_second'])}"]
    if sent := summary.get("bytes_sent_in_steps_per_rank"):
        off.append(f"bytes {off_by(_per_step(sent, summary), told['bytes_sent_per_step'])}")
    off.append(f"memory {off_by(max(summary['peak_memory_per_rank']), told['peak_memory'])}")
    return [*lines, f"              against that, {', '.join(off)}"]


def _per_step(sent: list[int], summary: dict[str, Any]) -> float:
    """Bytes of the worker that sends most, in a step: a run that was resumed has made the last."""
    made: int = summary["steps"] - summary["first_step"]
    return max(sent) / max(made, 1)


class _Smooth:
    """Exponentially smoothed figures by name."""

    def __init__(self, keep: float = 0.9) -> None:
        self._keep = keep
        self._values: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        before = self._values.get(name, value)
        self._values[name] = self._keep * before + (1 - self._keep) * value

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values


class Follower:
    """Feeds a display from a run's files while other processes write them.

    Within a `with`: events go to the display as they come, and what rank 0 prints appears
    above it.
    """

    SECONDS = 0.1

    def __init__(self, display: Progress, event_file: Path, log: Path) -> None:
        self._display = display
        self._event_file = event_file
        self._log = log
        self._event_bytes = 0
        self._log_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="follow-run")

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._display.close()

    def _follow(self) -> None:
        while not self._stop.wait(self.SECONDS):
            self._read()
        self._read()

    def _read(self) -> None:
        for line in self._new_lines():
            self._display.print(line)
        for event, stop in events.read(self._event_file, self._event_bytes):
            self._event_bytes = stop
            self._display.take(event)

    def _new_lines(self) -> list[str]:
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._log_bytes)
            text = file.read()
        whole = text if self._stop.is_set() else text[: text.rfind(b"\n") + 1]
        self._log_bytes += len(whole)
        return whole.decode(errors="replace").splitlines()
