"""Processes that begin where torch is imported already: forks of one that waits.

Importing torch and what it imports at the first step takes some five seconds of CPU time, and a
run on two workers does it three times. So multiprocessing's fork server imports everything once
(`forked`), and what tests start is a fork of it.

That the interpreter finds and imports all of it, and how it ends, is shown by the tests that start
real processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory


def context() -> ForkServerContext:
    """What starts processes as forks of one that has imported torch and all of wagontrain."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.forked", "tests.problems"])
    return made


class Fork:
    """A Python script with arguments under way in a fork; what torch's agent starts is one, too.

    Args:
        words: the script and its arguments; "-" for a script that is read from standard input.
        folder: to run it in.
        environment: all its variables.
        text: its standard input.
        before: what the fork does first; it has to be picklable.
        starts: how many processes it starts at most, one after another or at once.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        folder: Path,
        environment: Mapping[str, str],
        text: str = "",
        before: Callable[[], None] | None = None,
        starts: int = 5,
    ) -> None:
        self.words = [str(word) for word in words]
        self._streams = TemporaryDirectory(prefix="forked-")
        streams = Path(self._streams.name)
        (streams / "stdin").write_text(text)
        given = (self.words, folder, dict(environment), streams, before, starts)
        self._process = context().Process(target=_command, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed by its end, which has to come in time; to be called once.

        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        self._process.join(timeout)
        in_time = self.poll() is not None
        self._kill()
        files = (Path(self._streams.name) / name for name in ("stdout", "stderr"))
        out, err = (file.read_text() if file.exists() else "" for file in files)
        self.close()
        if not in_time:
            raise subprocess.TimeoutExpired(self.words, timeout, out.encode(), err.encode())
        return out, err

    def close(self) -> None:
        """End it, if it has not ended, and let go of what it printed."""
        self._kill()
        self._process.close()
        self._streams.cleanup()

    def _kill(self) -> None:
        if self.poll() is None:
            self._process.kill()
            self._process.join(10)
            self.poll()


def _command(
    words: list[str],
    folder: Path,
    environment: Mapping[str, str],
    streams: Path,
    before: Callable[[], None] | None,
    starts: int,
) -> None:
    from tests import forked  # here: only forks import all that it does

    for number, name in enumerate(("stdin", "stdout", "stderr")):
        forked.redirect(number, streams / name)
    if before is not None:
        before()
    os.chdir(folder)
    forked.Spare.prepare(starts)
    forked.become(words, environment)
