"""The shards as the coordinator sees them: what each holds, and what it has still to be told.

Commits are kept until every shard has applied them, so that one that was started again can be
brought up to where the others are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from wagontrain.errors import TrainingError, WorkerError
from wagontrain.servers.contents import Contents
from wagontrain.servers.job import Job
from wagontrain.servers.messages import Hello, Message, Stop
from wagontrain.servers.operations import Reduction, reductions
from wagontrain.servers.orders import (
    Applied,
    Commit,
    Fill,
    Forget,
    Moved,
    Norm,
    PullState,
    Ready,
    Release,
    Setup,
    Snapshot,
    Squares,
)
from wagontrain.servers.parts import Buffer

Send = Callable[[bytes, Message, Sequence[Tensor]], None]


_LOG = 20_000
"""Commits that are kept for a shard that is started again: some MB."""


@dataclass
class Shard:
    """One shard: where it is, and up to which commit it has come.

    `started` is how often its process was told what to hold. `holds` are the shards that it has
    of what it was told last, its own and one as a mirror, and the version of each; `lost` counts
    commits that changed nothing there, because their pushes were gone.
    """

    endpoint: str = ""
    peer: bytes = b""
    ready: bool = False
    applied: int = 0
    holds: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    seen: float = 0.0
    started: int = 0
    lost: int = 0


@dataclass
class _Norm:
    """A commit that waits for the norm of its gradient."""

    commit: Commit
    squares: dict[int, float] = field(default_factory=dict)


@dataclass
class _Asked:
    """A commit whose operations find something out; a shard or its mirror may tell it."""

    reductions: list[Reduction]
    numbers: dict[int, tuple[float, ...]] = field(default_factory=dict)


class Fleet:
    """All shards of a job.

    Args:
        jobs: what each shard is to hold.
        first: the state each begins with.
        send: how to reach a peer of the coordinator's listener.
        version: commits that are in that state.
        largest_norm: to which gradients are clipped before a commit; None for not at all.
        mirrored: whether each shard's process holds a mirror of the shard before.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        first: Callable[[int], Contents],
        send: Send,
        version: int = 0,
        largest_norm: float | None = None,
        mirrored: bool = False,
    ) -> None:
        self.shards = [Shard(applied=version) for _ in jobs]
        self.version = self._begun = version
        self._jobs = jobs
        self._first = first
        self._send = send
        self._largest_norm = largest_norm
        self.mirrored = mirrored
        self._begun_all = False
        self._left: set[str] = set()  # where shards were that are elsewhere now
        self._log: deque[Commit] = deque(maxlen=_LOG)
        self._waiting: deque[_Norm | Message] = deque()
        self._asked: dict[int, _Asked] = {}
        self._numbers = 0

    @property
    def ready(self) -> bool:
        """Whether every shard has what it is to hold."""
        return all(shard.ready for shard in self.shards)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where workers find them."""
        return tuple(shard.endpoint for shard in self.shards)

    def plain(self, now: float) -> list[dict[str, Any]]:
        """How each shard is at `now`, as plain data, for people."""
        return [
            {"ready": shard.ready, "behind": max(0, self.version - shard.applied),
             "applied": shard.applied, "busy": round(shard.seconds, 3), "lost": shard.lost,
             "silent": round(now - shard.seen, 1) if shard.seen else None}
            for shard in self.shards
        ]  # fmt: skip

    def of(self, peer: bytes) -> Shard:
        """The shard that speaks by this name.

        Raises:
            WorkerError: none does.
        """
        for shard in self.shards:
            if shard.peer == peer:
                return shard
        raise WorkerError("this comes from no shard of the job")

    def hello(self, peer: bytes, message: Hello, now: float) -> bool:
        """A shard is there, for the first time or again; whether it is one that was only cut off.

        Raises:
            WorkerError: there is no such shard in this job.
        """
        if not 0 <= message.index < len(self.shards):
            raise WorkerError(f"shard {message.index} is none of this job's {len(self.shards)}")
        shard = self.shards[message.index]
        if message.endpoint in self._left:  # cut off for so long that another took its place
            self._send(peer, Stop(), ())
            return False
        same = shard.ready and shard.endpoint == message.endpoint
        moved = shard.endpoint not in ("", message.endpoint)
        if moved:
            self._left.add(shard.endpoint)
            self._send(shard.peer, Stop(), ())
        shard.peer, shard.endpoint, shard.seen = peer, message.endpoint, now
        if moved and self._begun_all:
            before = self.shards[message.index - 1]
            self._send(before.peer, Moved(message.endpoint), ())
        if same and message.applied is not None:
            self._bring_up(shard, message.applied)
            return True
        shard.ready, shard.holds = False, {}
        shard.started += 1
        if not self.mirrored or self._begun_all:
            self._set_up(message.index)
        elif all(each.peer for each in self.shards):  # each is told where its mirror is
            self._begun_all = True
            for index in range(len(self.shards)):
                self._set_up(index, beginning=True)
        return False

    def _set_up(self, index: int, beginning: bool = False) -> None:
        """Tell a process what to hold, and give it, or say where that is."""
        shard = self.shards[index]
        again = shard.started > 1 and not beginning
        if not self.mirrored:
            source = "file" if again and self._jobs[index].file else ""
            setup = Setup(self._jobs[index].plain(), source=source, attempt=shard.started)
            self._send(shard.peer, setup, ())
            if not source:
                self._fill(index, shard)
            return
        after, before = (index + 1) % len(self.shards), (index - 1) % len(self.shards)
        mirror = self.shards[after].endpoint
        for held, other in ((index, after), (before, before)):
            source = self.shards[other].endpoint if again else ""
            setup = Setup(
                self._jobs[held].plain(), mirror if held == index else "", source, self.version,
                shard.started,
            )  # fmt: skip
            self._send(shard.peer, setup, ())
            if not again:
                self._fill(held, shard)

    def _fill(self, index: int, process: Shard) -> None:
        content = self._first(index)
        fill = Fill(self._begun, index, content.announced())
        self._send(process.peer, fill, [*content.values, *content.tensors.values()])

    def knows(self, peer: bytes) -> bool:
        """Whether a shard speaks by this name."""
        return any(shard.peer == peer for shard in self.shards)

    def begin_anew(self, peer: bytes, reason: str) -> None:
        """A shard that was started again has no file to go on from: it begins anew.

        Raises:
            TrainingError: it has a mirror, and that has nothing either; or it was not started
                again.
        """
        shard = self.of(peer)
        index = self.shards.index(shard)
        if shard.started == 1:
            raise TrainingError(f"server {reason}")
        if self.mirrored:
            raise TrainingError(
                f"server shard {index} was lost, and so was what its mirror had ({reason}): resume "
                "from the run's checkpoint"
            )
        self._fill(index, shard)

    def room(self, index: int) -> list[Tensor]:
        """Memory for a shard's values."""
        if not 0 <= index < len(self._jobs):
            raise WorkerError(f"there is no shard {index}")
        return Buffer(self._jobs[index].parts).regions

    def is_ready(self, message: Ready) -> bool:
        """A process has one of the shards it is to hold; whether that was the last.

        It is sent the commits since. Its part of what was kept is gone: see `Descent.retake`. One
        that was told meanwhile to hold them anew is not ready by what it was told before.

        Raises:
            TrainingError: they are not known any longer.
        """
        process = message.index
        if message.mirror:
            process = (message.index + 1) % len(self.shards)
        shard = self.shards[process]
        if message.attempt != shard.started:
            return False
        shard.holds[message.index] = message.version
        if len(shard.holds) < 1 + self.mirrored:
            return False
        self._bring_up(shard, min(shard.holds.values()))
        return True

    def _bring_up(self, shard: Shard, version: int) -> None:
        """Send a shard what it has missed.

        Raises:
            TrainingError: that is not known any longer.
        """
        if self._log and version < self._log[0].version - 1:
            raise TrainingError(
                f"server shard {self.shards.index(shard)} went on from update {version}, and what "
                "came after it is not known any longer: resume from the run's checkpoint"
            )
        shard.ready, shard.applied = True, version
        for commit in self._log:
            if commit.version > version:
                self._send(shard.peer, commit, ())
        head = self._waiting[0] if self._waiting else None
        if isinstance(head, _Norm):
            head.squares.clear()
            self._ask_norm(head.commit)

    def commit(self, commit: Commit) -> None:
        """Have every shard apply a commit, clipped first where that is wanted."""
        if self._largest_norm is None:
            self._apply(commit)
            return
        self._waiting.append(_Norm(commit))
        if len(self._waiting) == 1:
            self._ask_norm(commit)

    def snapshot(self, number: int) -> None:
        """Have every shard keep its state as it is after the commits so far."""
        self._in_turn(Snapshot(number))

    def release(self, number: int) -> None:
        """Have every shard let go of a snapshot."""
        self._in_turn(Release(number))

    def forget(self, worker: int, sequences: tuple[int, ...] | None) -> None:
        """Have every shard let go of gradients that will not be applied."""
        self._in_turn(Forget(worker, sequences))

    def pull_state(self, number: int) -> None:
        """Ask every shard for all of a snapshot; each answers with Fill."""
        self._in_turn(PullState(number))

    def _in_turn(self, message: Message) -> None:
        """Tell it after the commits before it, some of which may wait for their norm."""
        if self._waiting:
            self._waiting.append(message)
        else:
            self._tell(message)

    def applied(self, message: Applied) -> tuple[float, ...] | None:
        """A shard has applied a commit.

        Returns:
            What its operations found out, of all shards together, once the last one has told.
        """
        shard = self.shards[message.index]
        if not message.mirror:
            shard.applied = max(shard.applied, message.version)
            shard.seconds += message.seconds
            shard.lost += message.lost
        asked = self._asked.get(message.version)
        if asked is None:
            return None
        asked.numbers[message.index] = message.numbers
        if len(asked.numbers) < len(self.shards):
            return None
        del self._asked[message.version]
        parts = zip(*(asked.numbers[index] for index in sorted(asked.numbers)), strict=True)
        return tuple(one(each) for one, each in zip(asked.reductions, parts, strict=True))

    def squares(self, message: Squares) -> None:
        """A shard's part of the norm that the first commit in line waits for."""
        head = self._waiting[0] if self._waiting else None
        if not isinstance(head, _Norm) or message.number != self._numbers:
            return
        head.squares[message.index] = message.value
        if len(head.squares) < len(self.shards):
            return
        assert self._largest_norm is not None
        norm = sum(head.squares.values()) ** 0.5
        # As torch.nn.utils.clip_grad_norm_ has it.
        factor = min(1.0, self._largest_norm / (norm + 1e-6))
        self._waiting.popleft()
        self._apply(replace(head.commit, factor=factor))
        while self._waiting:
            head = self._waiting[0]
            if isinstance(head, _Norm):
                self._ask_norm(head.commit)
                return
            self._waiting.popleft()
            self._tell(head)

    def _ask_norm(self, commit: Commit) -> None:
        self._numbers += 1
        self._tell(Norm(self._numbers, commit.pushes, commit.divide))

    def _apply(self, commit: Commit) -> None:
        self.version = commit.version
        self._log.append(commit)
        if commit.operations:
            self._asked[commit.version] = _Asked(reductions(commit.operations))
        self._tell(commit)

    def _tell(self, message: Message) -> None:
        for shard in self.shards:
            if shard.ready:
                self._send(shard.peer, message, ())
