"""Who takes part, and how a count of samples is divided among them. Plain data and arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from wagontrain.errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes of one job, as one of them sees it.

    `rank`, `size`, `local_rank` and `local_size` mean what they mean in torch.distributed;
    `device` is where this rank computes and `threads` how many CPU threads it uses.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    threads: int = 1


def equal_shares(count: int, parts: int) -> list[int]:
    """Sizes of `parts` equal shares of `count` items, as `torch.chunk` cuts them.

    torch.chunk leaves out empty pieces at the end; here they are kept as zeros, so the list
    always has `parts` entries and sums to `count`.
    """
    size = -(-count // parts)
    return [max(0, min(size, count - part * size)) for part in range(parts)]


def proportional_shares(count: int, weights: Sequence[float]) -> list[int]:
    """Sizes of shares of `count` items in proportion to `weights`; they sum to `count`.

    Each border lies at the rounded running sum, in exact arithmetic, so that no share is more
    than one item away from its due and every rank computes the same borders.
    """
    if not weights or any(not 0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UsageError(
            f"shares in proportion to {list(weights)} cannot be formed: give one number per "
            "worker, none negative and at least one above zero"
        )
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    borders = [round(count * running / total) for running in itertools.accumulate(exact)]
    return [stop - start for start, stop in itertools.pairwise([0, *borders])]


def shares(count: int, parts: int, weights: Sequence[float] | None = None) -> list[int]:
    """Sizes of the shares of `count` items for `parts` ranks: equal, or in proportion."""
    if weights is None:
        return equal_shares(count, parts)
    if len(weights) != parts:
        raise UsageError(f"{len(weights)} weights were given for {parts} workers: give one each")
    return proportional_shares(count, weights)


def even_shares(count: int, parts: int) -> list[int]:
    """Sizes of `parts` shares of `count` items that differ by at most one, the larger first."""
    least, more = divmod(count, parts)
    return [least + (part < more) for part in range(parts)]


def balanced_shares(count: int, costs: Sequence[tuple[float, float]]) -> list[float]:
    """Shares of `count` items with which all ranks end at the same time.

    A rank with n items takes fixed + n · each seconds; all take T where the shares add up:
    n_k = (T - fixed_k) / each_k. Ranks whose fixed time alone is beyond T get nothing.

    Args:
        count: items to share.
        costs: (fixed, each) of every rank in seconds, `each` above zero.
    """
    taking = set(range(len(costs)))
    while True:
        rate = sum(1 / costs[rank][1] for rank in taking)
        spent = sum(costs[rank][0] / costs[rank][1] for rank in taking)
        together = (count + spent) / rate
        idle = {rank for rank in taking if costs[rank][0] >= together}
        if not idle:
            return [
                (together - fixed) / each if rank in taking else 0.0
                for rank, (fixed, each) in enumerate(costs)
            ]
        taking -= idle


def ranges(sizes: Sequence[int], start: int = 0) -> list[range]:
    """Consecutive index ranges of the given sizes, the first beginning at `start`."""
    borders = itertools.accumulate(sizes, initial=start)
    return [range(first, stop) for first, stop in itertools.pairwise(borders)]
