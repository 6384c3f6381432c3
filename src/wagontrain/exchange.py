"""Sums of gradients that are used bucket by bucket, as they come in.

DistributedDataParallel returns from the backward pass when the last bucket has arrived; only then
can the update begin, and while it runs the network is idle. Here its hook starts the all-reduce
of each bucket and does not wait for it. Whoever updates takes the buckets in the order in which
they were sent: the update of what has arrived runs while the rest is on its way. What is started
may be something else than an all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# One large layer is a bucket of its own, whatever the bucket size. In one piece it would share
# the wire with the next bucket and both would come late; in small pieces Gloo takes more CPU.
_PIECE = 25 * 2**20


@dataclass
class _Sent:
    """A bucket on its way."""

    parameters: list[Tensor]
    works: list[Any]

    def has_come(self) -> bool:
        return all(work.is_completed() for work in self.works)


class Exchange:
    """The gradients of a DistributedDataParallel on the CPU, summed over a process group.

    Sums, not means: nothing is divided. `begin` before every backward pass that exchanges; after
    it, gradients are complete as `arrivals` gives out their parameters, and not before.

    Args:
        distributed: the model.
        group: the ranks.
        start: begins to sum a dense bucket, and returns what to wait for (`wait`, `is_completed`);
            where not given, an all-reduce.
    """

    def __init__(
        self,
        distributed: DistributedDataParallel,
        group: dist.ProcessGroup,
        start: Callable[[Any], Sequence[Any]] | None = None,
    ) -> None:
        self._group = group
        self._start = start or self._all_reduce
        self._sent: list[_Sent] = []
        self.waited = 0.0
        """Seconds spent waiting since `begin`."""
        distributed.register_comm_hook(None, self._send)

    def begin(self) -> None:
        """Forget the step before."""
        self._sent = []
        self.waited = 0.0

    def wait_for(self, parameter: Tensor) -> None:
        """Return when the gradient of this parameter is complete."""
        for sent in self._sent:
            if any(parameter is other for other in sent.parameters):
                self._wait(sent)

    def arrivals(self) -> Iterator[list[Tensor]]:
        """Parameters whose gradients are complete; waits where none are."""
        waiting = self._sent[::-1]
        while waiting:
            first = waiting.pop()
            self._wait(first)
            arrived = list(first.parameters)
            while waiting and waiting[-1].has_come():
                arrived += waiting.pop().parameters
            yield arrived

    def finish(self) -> None:
        """Wait for all that is on its way: a process that ends meanwhile fails in its own ways."""
        for sent in self._sent:
            self._wait(sent)

    def _wait(self, sent: _Sent) -> None:
        began = time.perf_counter()
        for work in sent.works:
            work.wait()
        sent.works = []
        self.waited += time.perf_counter() - began

    def _send(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as text
        gradients = bucket.buffer()
        if gradients.is_sparse:  # its sum is a new tensor, which DDP has to wait for
            work: Any = dist.all_reduce(gradients, group=self._group, async_op=True)
            self._sent.append(_Sent(bucket.parameters(), []))
            return work.get_future().then(lambda done: done.value()[0])
        self._sent.append(_Sent(bucket.parameters(), [*self._start(bucket)]))
        ready: torch.futures.Future[Tensor] = torch.futures.Future()
        ready.set_result(gradients)
        return ready

    def _all_reduce(self, bucket: Any) -> list[Any]:
        gradients = bucket.buffer()
        return [
            dist.all_reduce(piece, group=self._group, async_op=True)
            for piece in gradients.split(_PIECE // gradients.element_size())
        ]
