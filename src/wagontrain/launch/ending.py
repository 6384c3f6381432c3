"""The end of a process in which Gloo was at work."""

from __future__ import annotations

import time
from pathlib import Path

_THREAD = "pt_gloo_runloop"  # as torch names the threads of ProcessGroupGloo
_SECONDS = 2.0


def await_gloo(tasks: Path = Path("/proc/self/task"), seconds: float = _SECONDS) -> bool:
    """Wait until Gloo's threads rest, and say whether they do.

    Such a thread may hold the last reference to a tensor for a moment after whoever waited for the
    exchange has gone on. Letting go of it takes Python's lock, and where the interpreter is at its
    end by then, the process aborts: after everything was done (pytorch/pytorch pull request 179291
    tells of it). A thread that its control group does not let run counts as busy.

    Args:
        tasks: folder of this process's threads. Other systems than Linux have none.
        seconds: at most.
    """
    limit = time.monotonic() + seconds
    rested = 0
    while rested < 2:  # one that waited for Python's lock seems to rest, too
        time.sleep(0.005)
        rested = 0 if any(map(_busy, tasks.glob("*"))) else rested + 1
        if time.monotonic() > limit:
            return False
    return True


def _busy(task: Path) -> bool:
    try:
        name, state = (task / "comm").read_text().strip(), (task / "stat").read_text()
    except OSError:  # it has ended
        return False
    return name == _THREAD and state.rpartition(")")[2].split()[0] == "R"
