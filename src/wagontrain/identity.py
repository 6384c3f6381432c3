"""Whether data are the same: on all ranks, and in a run that is resumed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from wagontrain.batches import Batches, few_samples
from wagontrain.errors import TaskError, UsageError
from wagontrain.task import Task
from wagontrain.transport import Context


def require_same_data(context: Context, sets: Mapping[str, Batches | None]) -> None:
    """Compare a few samples between ranks. Every rank has to call this.

    Raises:
        TaskError: some rank has other data than rank 0.
    """
    for name, batches in sets.items():
        if batches is None:
            continue
        prints = few_samples(batches)
        rows = context.gather_integers([zlib.crc32(repr(prints).encode())])
        for rank, row in enumerate(rows):
            if row != rows[0]:
                raise TaskError(
                    f"the {name} data of rank {rank} is not that of rank 0: it was made or "
                    "split at random; build it inside the task function, or give "
                    "random_split a generator with a fixed seed"
                )


def order_of(task: Task) -> dict[str, Any]:
    """What the order of samples follows from."""
    return {
        "samples": task.samples, "batch_size": task.batch_size, "seed": task.seed,
        "shuffle": task.shuffle, "sampler": type(task.sampler).__name__ if task.sampler else "",
    }  # fmt: skip


def require_same_order(saved: Mapping[str, Any], task: Task) -> None:
    """Refuse to resume with samples in another order.

    Args:
        saved: what `order_of` gave when the checkpoint was written.
        task: to be trained on.

    Raises:
        UsageError: says what differs.
    """
    for name, value in order_of(task).items():
        if name == "sampler" and name not in saved and not value:
            continue  # from before there were any
        if saved.get(name) != value:
            there = f"{name} {saved[name]}" if name in saved else f"no {name!r}"
            raise UsageError(
                f"the checkpoint was written with {there}, here it is {value}: samples "
                "would be seen twice or never; resume with the same"
            )
