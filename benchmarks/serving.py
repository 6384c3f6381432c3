"""What contenders of `server_throughput.py` have in common: they push and pull when told to.

A contender says in a line of JSON that it is ready, and then answers a line such as `push 3` by
the seconds of each and the CPU time that its server took for all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass
class Sides:
    """How to push and pull, and the process that serves.

    Args:
        push: returns when the server has the gradient.
        pull: returns when the server's values are in the worker's own memory.
        server: number of its process.
        after: what is done after each push, and not timed.
    """

    push: Callable[[], object]
    pull: Callable[[], object]
    server: int
    after: Callable[[], object] = lambda: None


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far, all of its threads."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def follow(sides: Sides) -> None:
    """Do what is asked for on standard input, until it ends."""
    say(ready=True)
    for line in sys.stdin:
        what, count = line.split()
        before, seconds = cpu_seconds(sides.server), []
        for _ in range(int(count)):
            began = time.perf_counter()
            sides.push() if what == "push" else sides.pull()
            seconds.append(time.perf_counter() - began)
            if what == "push":
                sides.after()
        say(seconds=seconds, server_cpu=cpu_seconds(sides.server) - before)


def say(**fields: object) -> None:
    """One line of JSON."""
    print(json.dumps(fields), flush=True)
