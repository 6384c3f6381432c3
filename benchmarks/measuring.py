"""How a contender measures itself: seconds, bytes and CPU time of its timed steps."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

MARK = "benchmark: "


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every contender takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    return parser


def measure(
    step: Callable[[], object],
    barrier: Callable[[], object],
    asked: argparse.Namespace,
    exchanged_bytes: int,
) -> None:
    """Take the steps asked for and print what they cost, as one line of JSON.

    Args:
        step: one optimizer step.
        barrier: returns when every rank has come there.
        asked: steps, warm-up and model.
        exchanged_bytes: bytes of gradients, for the floor of the wire.
    """
    for _ in range(asked.warmup):
        step()
    barrier()
    before, cpu, began = traffic(), time.process_time(), time.perf_counter()
    for _ in range(asked.steps):
        step()
    barrier()
    seconds = time.perf_counter() - began
    cpu, after = time.process_time() - cpu, traffic()
    line = {
        "rank": int(os.environ.get("RANK", "0")),
        "model": asked.model,
        "steps": asked.steps,
        "seconds": seconds / asked.steps,
        "sent": (after[0] - before[0]) / asked.steps,
        "received": (after[1] - before[1]) / asked.steps,
        "cpu_seconds": cpu / asked.steps,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "exchanged_bytes": exchanged_bytes,
    }
    print(MARK + json.dumps(line), flush=True)
    barrier()


def traffic() -> tuple[int, int]:
    """Bytes that left and reached this host by eth0, headers included, as the kernel counts."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            columns = [int(word) for word in numbers.split()]
            return columns[8], columns[0]
    return 0, 0
