"""Why workers ended, as they say themselves, and which of it was the cause."""

from __future__ import annotations

import json
import re
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wagontrain.errors import TrainingError, UsageError, WagontrainError, WorkerError
from wagontrain.watch import lost_peer


@dataclass(frozen=True)
class Failure:
    """Why a worker ended, as it says itself.

    kind: "usage", "training" (a message for the user), "crash" (an unexpected exception), "lost"
    (it knows which other rank is lost) or "peer" (it lost contact with one, and does not know);
    the last two are consequences and not causes.
    """

    rank: int
    kind: str
    message: str
    traceback: str
    time: float

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What `error` means for the job."""
        if isinstance(error, WorkerError):
            kind = "lost"
        elif lost_peer(error):
            kind = "peer"
        elif isinstance(error, UsageError):
            kind = "usage"
        elif isinstance(error, WagontrainError | SystemExit):
            kind = "training"
        else:
            kind = "crash"
        message = str(error) or type(error).__name__
        if isinstance(error, SystemExit):
            message = f"the task ended the process by sys.exit({error.code!r})"
        if kind == "peer":
            message = f"lost contact with another worker ({brief(message)})"
        trace = "".join(traceback.format_exception(error))
        return cls(rank, kind, message, trace, time.time())

    def leave(self, folder: Path) -> None:
        """Leave this in a folder for the launching process."""
        part = folder / f"failure-{self.rank}.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(part.with_suffix(".json"))

    @property
    def follows(self) -> bool:
        """Whether it is a consequence of another rank's end."""
        return self.kind in ("peer", "lost")

    @property
    def exit_status(self) -> int:
        """The exit status of a process that ends with this."""
        return UsageError.exit_status if self.kind == "usage" else WagontrainError.exit_status

    def error(self, prefix: str = "") -> WagontrainError:
        """The error to raise in the launching process."""
        if self.kind == "usage":
            return UsageError(prefix + self.message)
        if self.kind == "lost":
            return WorkerError(self.message)
        if self.kind == "training":
            return TrainingError(prefix + self.message)
        return TrainingError(f"worker rank {self.rank} failed:\n{self.traceback.rstrip()}")


def brief(text: str) -> str:
    """The first line of an error of Gloo or a store, without where in its source it arose."""
    line = text.splitlines()[0] if text else "no reason given"
    return re.sub(r"^(\[[^\]]*\]\s*)+", "", line).split(". ")[0]


def read_failures(folder: Path) -> list[Failure]:
    """What workers left about their ends."""
    return [Failure(**json.loads(path.read_text())) for path in folder.glob("failure-*.json")]


def cause(
    codes: Mapping[int, int],
    failures: Sequence[Failure],
    logs: Path,
    early: Sequence[int] = (),
    hosts: Mapping[int, str] | None = None,
) -> WagontrainError:
    """The error to raise for a job in which several workers ended: the first cause of all.

    A worker that was killed cannot say so, while its peers notice within milliseconds; so a
    signal goes before losing contact with a peer. SIGTERM is what the agent sends to the rest,
    and SIGKILL what a stopped one gets after it.

    Args:
        codes: exit status of each rank that ended, negative for a signal, in the order in which
            the agent noticed.
        failures: what workers said.
        logs: folder of what they printed.
        early: ranks that ended with status 0 while others failed.
        hosts: where the ranks are, if not on this machine.
    """
    in_time = sorted(failures, key=lambda item: item.time)
    own = [item for item in in_time if not item.follows]
    lost = [item for item in in_time if item.kind == "lost"]
    seen = list(codes)
    killed = [rank for rank in seen if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
    sayings = {item.rank for item in own + lost}
    if killed and not any(rank in sayings for rank in seen[: seen.index(killed[0])]):
        rank = killed[0]
        name = signal.Signals(-codes[rank]).name
        hint = " (if nobody did that, the machine ran out of memory)" if name == "SIGKILL" else ""
        return WorkerError(
            f"worker rank {rank}{_on(rank, hosts)} was killed by {name}{hint}; the other workers "
            f"were stopped. What it printed is in {logs / f'rank{rank}.log'}"
        )
    if own:
        alike = len({item.message for item in own}) == 1 and len(own) == len(codes)
        return own[0].error("" if alike else f"rank {own[0].rank}: ")
    if lost:
        return lost[0].error()
    said = {failure.rank for failure in failures}
    silent = [rank for rank in seen if rank not in said]
    if silent:
        rank = silent[0]
        how = (
            f"was ended by {signal.Signals(-codes[rank]).name}"
            if codes[rank] < 0
            else f"ended with status {codes[rank]} without saying why"
        )
        return WorkerError(
            f"worker rank {rank}{_on(rank, hosts)} {how}; the other workers were stopped. What it "
            f"printed last, from {logs}:\n{last_words(logs, f'rank{rank}')}"
        )
    if early:
        return WorkerError(
            f"worker rank {early[0]} ended early, with status 0, and the others lost it. What it "
            f"printed last, from {logs}:\n{last_words(logs, f'rank{early[0]}')}"
        )
    return WorkerError(f"worker rank {in_time[0].rank} {in_time[0].message}")


def _on(rank: int, hosts: Mapping[int, str] | None) -> str:
    return f" on {hosts[rank]}" if hosts else ""


def last_words(logs: Path, name: str, lines: int = 10) -> str:
    """The end of what a process printed."""
    file = logs / f"{name}.log"
    printed = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(printed[-lines:]) or "(nothing)"
