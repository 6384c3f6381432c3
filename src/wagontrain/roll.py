"""Who has been heard of when, and who is to be called lost: decisions without network or clock.

Every rank sends a pulse once in a while: how often it has beaten, and what it is doing. A rank
whose pulse stands still for too long is lost: dead, stopped, or cut off. Times are those of the
rank that listens, so clocks of hosts need not agree.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Pulse:
    """What one rank says of itself.

    Args:
        rank: which rank.
        host: the name of its host.
        beats: how many pulses it has sent; one that stands still says it hangs.
        doing: what it is doing.
        seconds: for how long it has been doing that.
        patient: whether it does something that may take long without a pulse, such as running
            the user's own code to build data, which can hold up every thread of the process.
        left: whether it has ended in good order, and will not be heard of again.
    """

    rank: int
    host: str
    beats: int
    doing: str
    seconds: float
    patient: bool = False
    left: bool = False

    def encode(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Pulse:
        """From text."""
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """The rank and its host, to be read by a person."""
        return f"rank {self.rank} on host {self.host}"


@dataclass(frozen=True)
class Limits:
    """After how many seconds of silence a rank is lost.

    Args:
        usual: at work.
        hasty: when some connection has broken already, so that it is known that something is
            wrong and only not yet where.
        patient: while it does something that may take long without a pulse.
    """

    usual: float
    hasty: float
    patient: float

    def of(self, pulse: Pulse | None, broken: float | None = None) -> float:
        """The limit for a rank last heard of with this pulse.

        Args:
            pulse: the last one; None where there was none.
            broken: for how many seconds some connection has been known to be broken; None where
                none is. Then somebody has ended. If after `hasty` it was none of those that are
                at work, it was one that was given more time.
        """
        hasty = min(self.hasty, self.usual)
        if pulse is not None and pulse.patient and (broken is None or broken <= hasty):
            return max(self.patient, self.usual)
        return self.usual if broken is None else hasty


class Roll:
    """What one rank has heard of the others."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._heard: dict[int, tuple[Pulse, float]] = {}

    def hear(self, pulse: Pulse, now: float) -> None:
        """Take a pulse that was read at `now`; one read before says nothing new."""
        before = self._heard.get(pulse.rank)
        if before is None or before[0].beats != pulse.beats:
            self._heard[pulse.rank] = (pulse, now)

    def pulse(self, rank: int) -> Pulse | None:
        """The last pulse of a rank."""
        return self._heard[rank][0] if rank in self._heard else None

    @property
    def ranks(self) -> list[int]:
        """Ranks heard of so far."""
        return sorted(self._heard)

    def signs(self, now: float) -> list[tuple[Pulse, float]]:
        """The last pulse of every rank heard of, and how many seconds ago that was."""
        return [(pulse, now - when) for _, (pulse, when) in sorted(self._heard.items())]

    @property
    def all_others_left(self) -> bool:
        """Whether all heard of have ended in good order, rank 0 aside."""
        return all(pulse.left for rank, (pulse, _) in self._heard.items() if rank != 0)

    def lost(self, now: float, broken: float | None = None) -> str | None:
        """Say which ranks are lost, where they are and what they did last; None if none is.

        Args:
            now: by this rank's clock.
            broken: as in `Limits.of`.
        """
        silent = [
            (pulse, now - when)
            for _, (pulse, when) in sorted(self._heard.items())
            if now - when > self.limits.of(pulse, broken) and not pulse.left
        ]
        if not silent:
            return None
        sayings = [
            f"{pulse.name} has not been heard of for {seconds:.0f} s (last seen {pulse.doing})"
            for pulse, seconds in silent[:3]
        ]
        more = f", and {len(silent) - 3} more" if len(silent) > 3 else ""
        return "; ".join(sayings) + more

    def phases(self) -> str:
        """What all are doing, those of one mind together: the odd one out shows."""
        together: dict[str, list[Pulse]] = defaultdict(list)
        for pulse, _ in self._heard.values():
            together[pulse.doing].append(pulse)
        return "; ".join(
            f"{_names(pulses)} {doing} for {min(pulse.seconds for pulse in pulses):.0f} s"
            for doing, pulses in sorted(together.items(), key=lambda item: len(item[1]))
        )


def _names(pulses: list[Pulse]) -> str:
    if len(pulses) == 1:
        return pulses[0].name
    ranks = ", ".join(str(pulse.rank) for pulse in sorted(pulses, key=lambda pulse: pulse.rank))
    return f"ranks {ranks}"
