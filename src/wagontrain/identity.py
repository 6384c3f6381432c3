"""Whether data are the same: on all ranks, and in a run that is resumed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from wagontrain.batches import Batches, Order, SampledOrder, SeededDataset, mix
from wagontrain.errors import TaskError, UsageError
from wagontrain.streams import Stream
from wagontrain.task import Task
from wagontrain.transport import Context, fingerprints


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
                    f"the {name} data of rank {rank} is not that of rank 0, or in another order: "
                    "it was made, split or sampled at random; build it inside the task function, "
                    "or give random_split a generator with a fixed seed"
                )


def few_samples(batches: Batches) -> list[int]:
    """The number of samples, and fingerprints of the first (twice), the middle and the last.

    Of a stream its beginning, of a sampler's order all. Ranks compare them: a data set that each
    has built or split at random by itself would train on some samples twice and validate on others
    that were trained on, and nobody would notice.

    Raises:
        TaskError: a stream begins otherwise when it is read again.
    """
    data, order = batches.dataset, batches.order
    if isinstance(data, Stream):
        first, again = (_prints(_beginning(data, order)) for _ in range(2))
        if first != again:
            raise TaskError(
                f"Task.train ({type(data.dataset).__name__}) is a stream that begins otherwise "
                "when it is read again, so that no run could be resumed: have __iter__ begin anew, "
                "and draw by the random numbers of torch, Python or NumPy themselves, which are "
                "seeded for every epoch"
            )
        return [order.samples, *first]
    last = len(data) - 1  # type: ignore[arg-type]
    some = [
        data[(0, index)] if isinstance(data, SeededDataset) else data[index]
        for index in (0, 0, last // 2, last)
    ]
    visited = fingerprints([order.epoch(0)]) if isinstance(order, SampledOrder) else []
    return [order.samples, *_prints(some), *visited]


def _beginning(data: Stream, order: Order) -> list[Any]:
    return data.begin(0, mix(order.seed, "stream", 0)).take(min(_FIRST, order.samples))


_FIRST = 3


def _prints(samples: list[Any]) -> list[int]:
    found = []
    for leaf in pytree.tree_leaves(samples):
        tensor = leaf if isinstance(leaf, Tensor) else None
        text = str(leaf).encode() if isinstance(leaf, int | float | str | np.ndarray) else b""
        found.append(fingerprints([tensor])[0] if tensor is not None else zlib.crc32(text))
    return found


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
