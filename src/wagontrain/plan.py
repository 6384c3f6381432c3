"""A plan: the chosen strategy, what it is expected to take, and why the others lost. Plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wagontrain.errors import UsageError

FORMAT = 1


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to take.

    Args:
        seconds: of a step.
        compute: of these, the slowest worker computes.
        exposed: it waits for an exchange that nothing hides.
        waiting: both its device and its links are idle: a bubble, or others are slower.
        memory: bytes at the peak of the worker that takes most, by what they are for.
        sent: bytes that the worker which sends most sends in a step.
        room: bytes that a worker may take, of the one with the least to spare.
        least_steps, most_steps: steps to the same loss for each of exact training, from and to; see
            `wagontrain.convergence`.
        statistics: why they may be more than one.
    """

    seconds: float
    compute: float
    exposed: float
    waiting: float
    memory: Mapping[str, float]
    sent: float
    room: float
    least_steps: float = 1.0
    most_steps: float = 1.0
    statistics: str = ""

    @property
    def peak(self) -> float:
        """Bytes of all that is held."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether every worker has room for it."""
        return self.peak <= self.room


@dataclass(frozen=True)
class Candidate:
    """A strategy that was weighed.

    Args:
        strategy: its name.
        settings: of it.
        title: the name with those settings that are not its defaults, for people.
        exact: whether it is the same mathematics as one process.
        estimate: None where it cannot be.
        measured: seconds of a step in a trial, where there was one.
        corrected: seconds of a step as estimated, times what trials of the same strategy, or of
            others, took of their estimates.
        why: it was not chosen; empty for the one that was.
        flip: what would have to change for it to be chosen, where something would.
    """

    strategy: str
    settings: Mapping[str, Any]
    title: str
    exact: bool
    estimate: Estimate | None
    measured: float | None = None
    corrected: float | None = None
    why: str = ""
    flip: str = ""

    @property
    def seconds(self) -> float | None:
        """Of a step: as measured where it was, else as corrected, else as estimated."""
        if self.measured is not None or self.corrected is not None:
            return self.measured if self.measured is not None else self.corrected
        return self.estimate.seconds if self.estimate else None

    @property
    def to_loss(self) -> float | None:
        """Seconds to the loss that a step of exact training comes to, at worst: what candidates
        are compared by."""
        if self.seconds is None or self.estimate is None:
            return None
        return self.seconds * self.estimate.most_steps


@dataclass(frozen=True)
class Curve:
    """Seconds of a strategy's step, as predicted, by the bandwidth of the links.

    Args:
        strategy: its name.
        title: with settings, for people.
        points: (bits a second, seconds of a step), the slowest link first.
    """

    strategy: str
    title: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of the predicted step.

    Args:
        label: what it is.
        rank: whose; it may stand for others that do the same.
        resource: what is busy: "device", "links" both ways, "out" or "in" one way, "server".
        start: seconds from the beginning of the step.
        seconds: that it lasts.
    """

    label: str
    rank: int
    resource: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Args:
        chosen: the winner.
        others: those that lost, the best first.
        model: fingerprint of the model and task that it is for.
        world_size: workers that it is for.
        cluster: name of the cluster.
        hosts: that the workers are on.
        device: of the workers: "cpu" or "cuda".
        notes: what else is worth knowing, a line each.
        planning: seconds that the choice took, by what they were spent on.
        curves: step time by bandwidth, of the best setting of each strategy that fits.
        bandwidth: of the links as they are, in bits a second; None where there are none.
        timeline: the predicted step of the chosen strategy, of some ranks.
    """

    chosen: Candidate
    others: tuple[Candidate, ...]
    model: str
    world_size: int
    cluster: str
    hosts: int
    device: str
    notes: tuple[str, ...] = ()
    planning: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    bandwidth: float | None = None
    timeline: tuple[Piece, ...] = ()

    def require(self, world_size: int, hosts: int, device: str) -> None:
        """Refuse to be followed where it was not made for.

        Args:
            world_size: workers that there are.
            hosts: that they are on.
            device: "cpu" or "cuda".

        Raises:
            UsageError: it is for other workers.
        """
        own = (self.world_size, self.hosts, self.device)
        if own != (world_size, hosts, device):
            raise UsageError(
                f"the plan is for {_workers(*own)}, and here are "
                f"{_workers(world_size, hosts, device)}: make another with `wagontrain plan`"
            )

    def foretold(self, batch_size: int) -> dict[str, Any] | None:
        """Its figures, to be held against what a run's summary says: of a step, in seconds and
        bytes; None where it has none."""
        found = self.chosen.estimate
        if found is None:
            return None
        return {
            "seconds_per_step": found.seconds,
            "samples_per_second": batch_size / found.seconds,
            "bytes_sent_per_step": found.sent,
            "peak_memory": found.peak,
            "tried_seconds_per_step": self.chosen.measured,
        }

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, name: str = "the plan") -> Plan:
        """What `to_json` gave.

        Args:
            content: the parsed JSON.
            name: of the file, for messages.

        Raises:
            UsageError: it is no plan.
        """
        try:
            given = {key: content[key] for key in content if key not in _OF_RUNS}
            if given.pop("format") != FORMAT:
                raise KeyError("format")
            chosen = _candidate(given.pop("chosen"))
            others = tuple(_candidate(each) for each in given.pop("others"))
            given["notes"] = tuple(given["notes"])
            # Plans of an earlier day have none of these.
            given["curves"] = tuple(_curve(each) for each in given.get("curves", ()))
            given["timeline"] = tuple(Piece(**each) for each in given.get("timeline", ()))
            return cls(chosen=chosen, others=others, **given)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{name} is no plan of this version: write one with `wagontrain plan FILE --json`"
            ) from error

    @classmethod
    def parse(cls, text: str, name: str) -> Plan:
        """The plan in a file's text.

        Raises:
            UsageError: it is none.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{name} is no JSON: {error}") from error
        return cls.from_json(content, name)


_OF_RUNS = ("strategy", "settings", "exact")
"""What the plan.json of a run says besides."""


def _workers(count: int, hosts: int, device: str) -> str:
    return f"{count} workers ({device}) on {hosts} host{'s' * (hosts > 1)}"


def _curve(content: Mapping[str, Any]) -> Curve:
    points = tuple((float(rate), float(seconds)) for rate, seconds in content["points"])
    return Curve(content["strategy"], content["title"], points)


def _candidate(content: Mapping[str, Any]) -> Candidate:
    given = dict(content)
    estimate = given.pop("estimate")
    return Candidate(estimate=Estimate(**estimate) if estimate else None, **given)
