"""Knowing which rank is gone while one waits for it, and ending the wait.

An exchange in which one rank does not take part hangs in C++, where nothing names anybody. So
each rank keeps two threads beside the training:

    pulse    tells the store where ranks met what this rank is doing, and reads how rank 0 is;
             on rank 0, how all are. Rank 0 judges (see `roll`), and so does everybody about it.
    guard    looks whether the pulse thread still gets answers: with the store's host gone, reads
             from it may never return.

When a rank is lost, every other one writes down where its threads stand, shuts the connections
it waits on, and so turns the wait into an error that names the rank.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store

from wagontrain.errors import WagontrainError, WorkerError
from wagontrain.roll import Limits, Pulse, Roll
from wagontrain.signs import Signs

_HASTY_SECONDS = 5.0
_PATIENT_SECONDS = 300.0
_GRACE_SECONDS = 5.0
_ANSWER_SECONDS = 3.0


def _speak(error: WagontrainError) -> None:
    print(f"wagontrain: {error}", file=sys.stderr, flush=True)


@dataclass
class _Phase:
    """What this rank does, since when."""

    doing: str
    since: float
    patient: bool


class Watch:
    """Nobody to watch: the whole of it in a world of one rank."""

    stacks: Path | None = None
    interrupt: Callable[[], None] | None = None
    end: Callable[[int], object] = staticmethod(os._exit)
    """Ends the process, with a status, when training does not end by itself."""
    signs: Signs | None = None  # on rank 0: who is told what all ranks are doing

    def at(self, doing: str, patient: bool = False) -> None:
        """Note what this rank is doing now: a phrase such as "in validation"."""

    @contextlib.contextmanager
    def doing(self, doing: str, patient: bool = False) -> Iterator[None]:
        """Within, this rank does that; an error about a lost rank becomes one that names it."""
        self.at(doing, patient)
        yield

    def first_to(self, deed: str) -> bool:
        """Whether no rank has asked this for the same deed before. Waits for nobody long."""
        return True

    def close(self) -> None:
        """Stop watching, and tell the others: from here on it is all right to be gone."""


class RankWatch(Watch):
    """One rank's pulse, and its eye on the others.

    Args:
        rank: this rank.
        size: how many there are.
        host: name of this host.
        connect: makes a connection to the store that nothing else uses.
        patience: seconds of silence after which a rank is lost.
        holds: whether this process holds the store, so that it goes when this process ends.
        last_resort: what to do with the error when the training does not end by itself; the
            process ends after it.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        connect: Callable[[], Store],
        patience: float,
        holds: bool = False,
        last_resort: Callable[[WagontrainError], None] = _speak,
    ) -> None:
        self.rank, self.size, self.host = rank, size, host
        self.interval = min(1.0, patience / 10)
        self._connect = connect
        self._holds = holds
        self._last_resort = last_resort
        self._roll = Roll(Limits(patience, _HASTY_SECONDS, _PATIENT_SECONDS))
        self._phase = _Phase("meeting the other ranks", time.monotonic(), False)
        self._beats = 0
        self._alarmed = self._broken = self._left = False
        self._alarm_seen: float | None = None
        self._contact = time.monotonic()
        self._questions: queue.SimpleQueue[_Question] = queue.SimpleQueue()
        self._all_here = threading.Event()
        self._concluded = threading.Event()
        self._taken = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._verdict = ""
        self._ended_at = 0.0
        self._threads = [
            threading.Thread(target=loop, daemon=True, name=f"wagontrain-{name}")
            for name, loop in (("pulse", self._pulse_loop), ("guard", self._guard_loop))
        ]
        for thread in self._threads:
            thread.start()
        # A thread inside the store would crash the interpreter's end. Who ends without having
        # closed has not left in good order.
        atexit.register(self._stop_threads)

    # --- what the training calls ----------------------------------------------------------------

    def at(self, doing: str, patient: bool = False) -> None:
        self._phase = _Phase(doing, time.monotonic(), patient)

    @contextlib.contextmanager
    def doing(self, doing: str, patient: bool = False) -> Iterator[None]:
        self.at(doing, patient)
        try:
            yield
        except Exception as error:
            named = self._explain(error)
            if named is not None:
                raise named from error
            raise
        except BaseException as error:
            self._confess(f"was stopped ({type(error).__name__})")
            raise

    def wait_for_all(self, seconds: float) -> None:
        """Return when all ranks have come.

        Raises:
            WorkerError: some have not within so many seconds, or one that had come is lost.
        """
        limit = time.monotonic() + seconds
        self.at("meeting the other ranks")
        while not self._all_here.wait(0.05):
            if self._concluded.is_set():
                self._taken.set()
                self._linger()
                raise WorkerError(self._verdict)
            if time.monotonic() > limit:
                here = self._ask(self._who_is_here) or []
                missing = [str(rank) for rank in range(self.size) if rank not in here]
                raise WorkerError(
                    f"rank {', '.join(missing) or '?'} of {self.size} did not come within "
                    f"{seconds:.0f} s: start all of them, and check that they reach the master"
                )

    def first_to(self, deed: str) -> bool:
        answer = self._ask(lambda store: store.add(f"first-to/{deed}", 1) == 1)
        return answer is not False

    def close(self) -> None:
        if self._stop.is_set():
            return
        if not self._concluded.is_set():
            self._left = True
            self._ask(self._beat)
            limit = time.monotonic() + 3 * self.interval
            while self._holds and not self._roll.all_others_left and time.monotonic() < limit:
                time.sleep(0.02)  # the store goes with this process
                self._ask(self._beat)
        self._stop_threads()

    def _stop_threads(self) -> None:
        atexit.unregister(self._stop_threads)
        self._stop.set()
        self._questions.put(_Question(lambda store: None))  # wakes the thread
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_ANSWER_SECONDS)

    # --- errors ---------------------------------------------------------------------------------

    def _explain(self, error: Exception) -> WorkerError | None:
        """What a lost connection means; an error of this rank's own is told to the others."""
        if isinstance(error, WorkerError):
            return None
        if not lost_peer(error):
            said = str(error).strip() or repr(error)
            self._confess("failed: " + said.splitlines()[0])
            return None
        self._taken.set()
        self._alarmed = True
        self._ask(lambda store: store.set("alarm", str(self.rank)))
        if not self._concluded.wait(3 * _HASTY_SECONDS):
            return None
        self._linger()
        return WorkerError(self._verdict)

    def _confess(self, how: str) -> None:
        """Tell the others that it was this rank that failed."""
        text = f"rank {self.rank} on host {self.host} {how}"
        self._taken.set()
        self._ask(lambda store: store.compare_set("verdict", "", text))
        self._linger()

    def _linger(self) -> None:
        """Where the store goes with this process, leave the others time to read the verdict."""
        if self._holds:
            time.sleep(3 * self.interval)

    def _conclude(self, verdict: str) -> None:
        """End this rank's waiting: note where it stands, and shut what it waits on."""
        with self._lock:
            if self._concluded.is_set():
                return
            self._verdict, self._ended_at = verdict, time.monotonic()
            self._concluded.set()
        self._write_stacks()
        if not self._taken.is_set() and self.interrupt is not None:
            self.interrupt()

    def _write_stacks(self) -> None:
        if self.stacks is None:
            return
        with contextlib.suppress(OSError):  # the message matters more
            self.stacks.mkdir(parents=True, exist_ok=True)
            with (self.stacks / f"rank{self.rank}.txt").open("w") as file:
                file.write(f"{self._verdict}\n\nrank {self.rank} on host {self.host} was ")
                file.write(f"{self._phase.doing}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    # --- the pulse thread -----------------------------------------------------------------------

    def _pulse_loop(self) -> None:
        store: Store | None = None
        while not self._stop.is_set():
            try:
                store = store or self._connect()
                self._beat(store)
                self._contact, self._broken = time.monotonic(), False
            except (dist.DistError, RuntimeError, OSError):
                # The guard counts how long this goes on; a broken connection says more than
                # silence does.
                store, self._broken = None, True
            self._tell()
            self._answer(store)

    def _answer(self, store: Store | None) -> None:
        """Ask the store what the training wants to know, until the next pulse is due."""
        due = time.monotonic() + self.interval
        while (left := due - time.monotonic()) > 0 and not self._stop.is_set():
            try:
                question = self._questions.get(timeout=left)
            except queue.Empty:
                return
            if store is not None:
                with contextlib.suppress(dist.DistError, RuntimeError, OSError):
                    question.answer = question.ask(store)
            question.answered.set()

    def _beat(self, store: Store) -> None:
        now = time.monotonic()
        self._beats += 1
        phase = self._phase
        own = Pulse(
            self.rank,
            self.host,
            self._beats,
            phase.doing,
            now - phase.since,
            phase.patient,
            self._left,
        )
        store.set(f"pulse/{self.rank}", own.encode())
        for rank in range(self.size) if self.rank == 0 else (0,):
            if rank != self.rank and store.check([f"pulse/{rank}"]):
                self._roll.hear(Pulse.decode(store.get(f"pulse/{rank}")), now)
        if self.rank == 0:
            self._roll.hear(own, now)
            if not self._all_here.is_set() and len(self._roll.ranks) == self.size:
                store.set("all-here", "1")
        if not self._all_here.is_set() and store.check(["all-here"]):
            self._all_here.set()
        verdict = self._judge(store, now)
        if verdict is not None:
            store.compare_set("verdict", "", verdict)
        if store.check(["verdict"]):
            self._conclude(store.get("verdict").decode())

    def _tell(self) -> None:
        if self.signs is not None and self.signs.due():
            heard = self._roll.signs(time.monotonic())
            self.signs.send(
                {pulse.rank: pulse.doing for pulse, _ in heard},
                {pulse.rank: silent for pulse, silent in heard if not pulse.left},
            )

    def _judge(self, store: Store, now: float) -> str | None:
        """What this rank holds of the others."""
        if self._alarm_seen is None and (self._alarmed or store.check(["alarm"])):
            self._alarm_seen = now
        broken = None if self._alarm_seen is None else now - self._alarm_seen
        lost = self._roll.lost(now, broken)
        if lost is not None:
            return lost
        if self.rank == 0 and broken is not None and broken > 2 * _HASTY_SECONDS:
            return f"an exchange failed, though all ranks answer: {self._roll.phases()}"
        return None

    def _who_is_here(self, store: Store) -> list[int]:
        return [rank for rank in range(self.size) if store.check([f"pulse/{rank}"])]

    def _ask(self, ask: Callable[[Store], Any]) -> Any:
        """What the pulse thread's store says; None where it does not answer soon."""
        question = _Question(ask)
        self._questions.put(question)
        question.answered.wait(_ANSWER_SECONDS)
        return question.answer

    # --- the guard thread -----------------------------------------------------------------------

    def _guard_loop(self) -> None:
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if self._concluded.is_set():
                if not self._taken.is_set() and now - self._ended_at > _GRACE_SECONDS:
                    self._last_resort(WorkerError(self._verdict))
                    self.end(WorkerError.exit_status)
                    return
                continue
            silence = now - self._contact
            master = self._roll.pulse(0)
            if master is not None and master.left:
                return  # and the store with it
            broken = 0.0 if self._alarmed or self._broken else None
            if silence > self._roll.limits.of(None, broken):
                where = f"rank 0 on host {master.host}" if master else "the master"
                last = f" (last seen {master.doing})" if master else ""
                self._conclude(
                    f"{where}{last} cannot be reached from rank {self.rank} on host {self.host} "
                    f"for {silence:.0f} s: it has ended, or one of the two is cut off"
                )


class _Question:
    """Something to ask the store in the pulse thread."""

    def __init__(self, ask: Callable[[Store], Any]) -> None:
        self.ask = ask
        self.answer: Any = None
        self.answered = threading.Event()


def lost_peer(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another rank cannot be reached."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_PEER)


_LOST_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)
