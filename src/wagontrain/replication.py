"""Parameters that several ranks hold alike: their gradients are summed by DistributedDataParallel.

Each bucket of gradients is all-reduced as soon as it is full, while the backward pass of earlier
layers goes on; on the CPU, what has arrived is updated while the rest is on its way.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training"
(VLDB), section 3.2 (buckets, overlap).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wagontrain.axes import Axis
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
    """

    megabytes: float | None = None
    unused: bool = False
    apart: Collection[str] = ()
    hook: tuple[Any, Callable[..., Any]] | None = None
    figures: int = 0


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


def _sum_hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as text
    """The sum over ranks, where DistributedDataParallel would take the mean."""
    work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
