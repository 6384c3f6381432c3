"""A worker that keeps parameters of its own, tied to the servers' by a spring (EASGD).

Every `push_every` batches, with x the worker's parameters and x̃ the servers':

    d = α (x - x̃)        x ← x - d        x̃ ← x̃ + d

Between that the worker trains for itself, with the task's own optimizer.

Source: Zhang, Choromanska, LeCun 2015, "Deep learning with Elastic Averaging SGD", algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from wagontrain.servers.messages import Lease
from wagontrain.servers.work import Worker


class ElasticWorker(Worker):
    """One worker of EASGD at work; `habits.elastic` is α."""

    _stepped = 0.0
    """What the samples of the collected leases count for that a local step was made of."""

    def _refresh(self, lease: Lease) -> None:
        """The first parameters are the servers'; then the worker keeps its own."""
        if not self._fetched:
            super()._refresh(lease)

    def _trained(self) -> None:
        """One local step, on the mean over the lease's samples."""
        collected = self._collected
        weight = collected.weight - self._stepped
        self._stepped = collected.weight
        gradients = self._gradients[0]
        if weight:
            with torch.no_grad():
                for name, value in self.flat.updated.items():
                    value.grad = gradients.views[name].div_(weight)
                    if name not in self._touched:
                        value.grad = None
            self._clip_own()
            self.optimizer.step()
        self.flat.collect_in(gradients)

    def _clip_own(self) -> None:
        if self.habits.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.flat.updated.values(), self.habits.clip)

    def _fill(self) -> None:
        """Instead of a gradient, push how far the servers are to move."""
        assert self.habits.elastic is not None
        version = self.client.await_(self._begin(0))
        gradients, weight = self._gradients[0], max(self._collected.weight, 1.0)
        with torch.no_grad():
            for name in self.flat.updated:
                own, theirs = self.flat.values.views[name], self._spare.views[name]
                move = (own - theirs).mul_(self.habits.elastic)
                own.sub_(move)
                gradients.views[name].copy_(move.mul_(weight))  # servers divide by it
        self._touched.update(self.flat.updated)
        self._collected = replace(self._collected, fetched=version)
        self._stepped = 0.0
