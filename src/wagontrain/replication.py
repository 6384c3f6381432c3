"""Parameters that several ranks hold alike: their gradients are summed by DistributedDataParallel.

Each bucket of gradients is all-reduced as soon as it is full, while the backward pass of earlier
layers goes on; on the CPU, what has arrived is updated while the rest is on its way.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training"
(VLDB), section 3.2 (buckets, overlap).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wagontrain.axes import Axis, start_exchange
from wagontrain.errors import ModelError
from wagontrain.exchange import Exchange
from wagontrain.figures import CarriedFigures, WithSlots
from wagontrain.task import trainable

_BUCKET_MB = {"cuda": 25.0, "cpu": 5.0}

# torch 2.13 renamed the argument and warns about the old name.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


@dataclass(frozen=True)
class Buckets:
    """How gradients travel.

    Args:
        megabytes: MiB of gradients that travel together; where not given 25 over NCCL, as torch
            has it, and 5 over Gloo, which sends several buckets at a time.
        unused: whether some step may leave a parameter without gradient.
        apart: names of parameters that are left out: no other rank holds them.
        hook: (state, hook) of DistributedDataParallel that compresses; None sends all digits.
        figures: how many figures each rank sends along; 0 for none.
        owners: which rank of the axis alone needs the sum for a parameter. Over Gloo the others do
            not get it, and half of the bytes travel.
    """

    megabytes: float | None = None
    unused: bool = False
    apart: Collection[str] = ()
    hook: tuple[Any, Callable[..., Any]] | None = None
    figures: int = 0
    owners: Mapping[Tensor, int] | None = None


class Replication:
    """A model whose parameters, but for those left out, are the same on all ranks of an axis.

    Args:
        model: the module.
        axis: the ranks.
        device: where it is.
        buckets: how gradients travel.
    """

    def __init__(self, model: nn.Module, axis: Axis, device: torch.device, buckets: Buckets):
        assert axis.group is not None
        exact = buckets.hook is None
        carry = device.type == "cpu" and exact and buckets.figures > 0
        megabytes = buckets.megabytes or _BUCKET_MB[device.type]
        inner = WithSlots(model, buckets.figures * axis.size) if carry else model
        apart = [f"model.{name}" if carry else name for name in buckets.apart]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, apart)
        self.distributed = distributed = DistributedDataParallel(
            inner,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=axis.group,
            bucket_cap_mb=megabytes,
            find_unused_parameters=buckets.unused,
            # Gradients live in the buckets: one copy less per step, and one less in memory.
            gradient_as_bucket_view=True,
            # Batch norm keeps equal running statistics by itself; other buffers are compared
            # (check_replicas) rather than overwritten with those of rank 0.
            **_NO_BUFFER_SYNC,
        )
        size = sum(
            value.nbytes for name, value in trainable(model) if name not in set(buckets.apart)
        )
        self.sums: Exchange | None = None
        self.divided_by = axis.size
        if not exact:
            assert buckets.hook is not None
            distributed.register_comm_hook(*buckets.hook)
        elif device.type == "cpu" and buckets.owners is not None:
            sums = ToOwners(axis, buckets.owners)
            self.sums, self.divided_by = Exchange(distributed, axis.group, sums), 1
        # With one bucket there is nothing to do meanwhile.
        elif device.type == "cpu" and (size > megabytes * 2**20 or buckets.apart):
            self.sums, self.divided_by = Exchange(distributed, axis.group), 1
        elif buckets.apart:  # their gradients are sums, so that the others' have to be, too
            distributed.register_comm_hook(axis.group, _sum_hook)
            self.divided_by = 1
        self.figures = (
            CarriedFigures(distributed, self.sums, axis.index, axis.size) if carry else None
        )
        self.forward: Callable[..., Any] = self.figures or distributed

    def begin(self) -> None:
        """Forget the exchange of the step before."""
        if self.sums is not None:
            self.sums.begin()

    @contextlib.contextmanager
    def holding(self, last: bool) -> Iterator[None]:
        """Within, backward passes add gradients up; the last one of a step exchanges them."""
        try:
            with contextlib.nullcontext() if last else self.distributed.no_sync():
                yield
        except ModelError as error:
            if "finished reduction" not in str(error):
                raise
            raise ModelError(
                "a parameter got no gradient in the step before, on this or another worker, "
                "though the trial step used it: if that is meant, --set "
                "find_unused_parameters=true"
            ) from error

    def arrivals(self) -> Iterable[Sequence[Tensor]]:
        """Parameters whose gradients are still on their way, as they arrive."""
        return () if self.sums is None else self.sums.arrivals()

    @property
    def waited(self) -> float:
        """Seconds that `arrivals` waited."""
        return 0.0 if self.sums is None else self.sums.waited

    def finish(self) -> None:
        """Wait for what is on its way."""
        if self.sums is not None:
            self.sums.finish()


class ToOwners:
    """Sums of gradients that go to the owner of each parameter alone, straight from every rank.

    Args:
        axis: the ranks.
        owners: the rank of each parameter; what has none is summed on all.
    """

    def __init__(self, axis: Axis, owners: Mapping[Tensor, int]) -> None:
        self.axis, self.owners = axis, owners
        self._waiting: list[_Sum] = []

    def __call__(self, bucket: Any) -> list[_Sum]:
        """Begin with a bucket of DistributedDataParallel, in pieces: each is held several times."""
        result = []
        piece: list[tuple[int | None, Tensor]] = []
        size = 0
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            most = _PIECE // gradient.element_size()
            for part in gradient.view(-1).split(most):
                if size and size + part.nbytes > _PIECE:
                    result.append(self._begin(piece))
                    piece, size = [], 0
                piece.append((self.owners.get(parameter), part))
                size += part.nbytes
        return [*result, self._begin(piece)]

    def _begin(self, piece: list[tuple[int | None, Tensor]]) -> _Sum:
        while len(self._waiting) >= _IN_FLIGHT:
            self._waiting.pop(0).wait()
        of_ranks = [
            [part for owner, part in piece if owner in (rank, None)]
            for rank in range(self.axis.size)
        ]
        example = piece[0][1]
        outgoing = [torch.cat(parts) if parts else example[:0] for parts in of_ranks]
        own = of_ranks[self.axis.index]
        shape = (sum(part.numel() for part in own),)
        self._waiting.append(
            _Sum(own, start_exchange(self.axis, outgoing, [shape] * len(outgoing)))
        )
        return self._waiting[-1]


_PIECE = 8 * 2**20
_IN_FLIGHT = 4


class _Sum:
    """The gradients of a rank's own parameters, complete after `wait`."""

    def __init__(self, own: list[Tensor], coming: Callable[[], list[Tensor]]) -> None:
        self._own = own
        self._coming: Callable[[], list[Tensor]] | None = coming

    def is_completed(self) -> bool:
        """Whether it has been waited for."""
        return self._coming is None

    def wait(self) -> None:
        """Add up what comes, in the order of ranks: the same sum wherever it is taken."""
        if self._coming is None:
            return
        first, *others = self._coming()
        self._coming = None
        total = first.clone()
        for part in others:
            total += part
        for gradient, part in zip(self._own, total.split([len(g) for g in self._own]), strict=True):
            gradient.copy_(part)


def _sum_hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as text
    """The sum over ranks, where DistributedDataParallel would take the mean."""
    work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
