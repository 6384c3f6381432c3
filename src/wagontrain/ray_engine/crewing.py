"""The launching end of a crew on a Ray cluster: what its leader tells, and what it is told."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from wagontrain.errors import WorkerError
from wagontrain.folder import RunFolder
from wagontrain.hands import GRACE, Crew, Hand
from wagontrain.launch import Failure
from wagontrain.ray_engine.lead import END_SECONDS, Leader, Order
from wagontrain.ray_engine.notes import NOTES, Began, Begin, Ended, note_of
from wagontrain.servers.coordinator import Coordinator
from wagontrain.servers.wire import Secret


class RayCrew(Crew):
    """Actors, one for each process, which Ray restarts on another node when theirs is lost.

    Args:
        folder: of the job.
        run: the run's.
        secret: of the job; it goes to the nodes by Ray's own connections.
        workers: how many there will be.
        address: of the cluster; None for the one that Ray finds by itself.

    Raises:
        UsageError: no cluster answers, or it has not the CPUs or GPUs.
    """

    travels: ClassVar[bool] = True

    def __init__(
        self, folder: Path, run: RunFolder, secret: Secret, workers: int, address: str | None
    ) -> None:
        super().__init__(run.logs)
        self._secret = secret
        self._notes = folder / NOTES
        self._read = 0
        self._hands: dict[str, Hand] = {}
        order = Order(address, workers, str(run.path.absolute()), str(Path.cwd()))
        self._leader = Leader("crew_leader", folder, order, run.logs / "ray.log")
        try:
            self._address = self._leader.connect()
            if not self._address:
                self._leader.settle()
        except BaseException:
            self._leader.end()
            raise

    @property
    def address(self) -> str:
        """By which the cluster's other nodes reach this one."""
        return self._address

    def begin(self, job: Path, coordinator: str, shards: int, workers: int) -> None:
        """Have the leader place them: each worker with a CPU, and a GPU where there are any."""
        hands = [Hand(number, serves=True) for number in range(shards)]
        hands += [Hand(number, serves=False) for number in range(workers)]
        self._hands = {hand.name: hand for hand in hands}
        begin = Begin(coordinator, shards, self._secret.text)
        self._say(json.dumps(asdict(begin)))

    def _say(self, line: str) -> None:
        assert self._leader.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `look_after` finds out why
            self._leader.process.stdin.write(line.encode() + b"\n")
            self._leader.process.stdin.flush()

    def look_after(self, coordinator: Coordinator) -> None:
        """Have what has ended started again."""
        if self._leader.process.poll() is not None:
            self._leader.settle()
            raise WorkerError("the process that leads the Ray actors has ended before the run did")
        for note in self._news():
            hand = self._hands[note.name]
            if isinstance(note, Began):
                hand.host, hand.process, hand.began = note.host, note.process, time.monotonic()
            elif not (note.status == 0 and coordinator.finished):
                if note.failure is not None:
                    failure = Failure(**note.failure)
                    (self.logs / f"{note.name}.traceback").write_text(failure.traceback)
                    raise failure.error("")
                self.tell(coordinator, hand, note.how)
                self._say(note.name)

    def _news(self) -> list[Began | Ended]:
        if not self._notes.exists():
            return []
        with self._notes.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [note_of(line) for line in whole.splitlines()]

    def end(self, coordinator: Coordinator) -> None:
        """Let all end, which they were told to."""
        self._say("over")
        limit = time.monotonic() + GRACE + END_SECONDS
        while time.monotonic() < limit and self._leader.process.poll() is None:
            coordinator.say_over(0.1)

    def close(self) -> None:
        """End the leader, and so the actors."""
        self._leader.end()
        if not self._leader.log.stat().st_size:
            self._leader.log.unlink()
