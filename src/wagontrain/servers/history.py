"""The state of L-BFGS on servers as an ordinary model and optimizer: see `image`.

torch.optim.LBFGS keeps all its state under its first parameter, as flat vectors over all
parameters: `d`, `prev_flat_grad`, and the lists `old_dirs` and `old_stps` of y and s. Here these
are matrices, a row for each pair, because a checkpoint holds tensors; all else is as torch has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wagontrain.errors import UsageError
from wagontrain.servers import lbfgs
from wagontrain.servers.contents import Contents
from wagontrain.servers.image import Image, updated
from wagontrain.servers.vectors import RULE
from wagontrain.state import Held, Source
from wagontrain.task import Task


class HistoryImage(Image):
    """A task's model and its L-BFGS, and how they are divided over shards.

    Args:
        task: what is trained.
        shards: over how many servers.

    Raises:
        UsageError: the optimizer is another.
    """

    def __init__(self, task: Task, shards: int) -> None:
        super().__init__(task, shards, RULE)
        if type(self.optimizer) is not torch.optim.LBFGS:
            raise UsageError(
                f"sandblaster minimises by L-BFGS, but the task's optimizer is "
                f"{type(self.optimizer).__name__}: give partial(torch.optim.LBFGS, "
                "line_search_fn='strong_wolfe'), or use another strategy"
            )
        (group,) = self.optimizer.param_groups
        lbfgs.Settings.of(group)
        names = {value: name for name, value in self.model.named_parameters()}
        sizes = [value.numel() for value in group["params"]]
        starts = itertools.accumulate(sizes, initial=0)
        self._starts = dict(zip((names[each] for each in group["params"]), starts, strict=False))
        self._length = sum(sizes)

    def restore(self, source: Source) -> None:
        """Take up a checkpoint's state, scheduler included.

        Raises:
            UsageError: it is of another model or optimizer.
        """
        super().restore(source)
        if "history_size" not in self.optimizer.param_groups[0]:
            raise UsageError(
                "the checkpoint is of another optimizer than LBFGS, which has other settings: "
                "resume with that, or take over the weights and begin anew"
            )

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]
        return state

    @property
    def memory(self) -> lbfgs.Memory:
        """What the coordinator keeps of it; products are formed anew."""
        state = self._state
        if not state.get("n_iter"):
            return lbfgs.Memory(func_evals=state.get("func_evals", 0))
        pairs = list(range(len(state.get("ro", ()))))
        return lbfgs.Memory(
            state["n_iter"], state["func_evals"], float(state["t"]), float(state["H_diag"]), pairs,
            {pair: float(rho) for pair, rho in zip(pairs, state["ro"], strict=True)},
        )  # fmt: skip

    def part(self, index: int) -> Contents:
        """The state that one shard begins with."""
        made = super().part(index)
        state = self._state
        if not state.get("n_iter"):
            return made
        vectors = {lbfgs.DIRECTION: state["d"], lbfgs.PREVIOUS: state["prev_flat_grad"]}
        for kind, key in (("s", "old_stps"), ("y", "old_dirs")):
            vectors |= {f"{kind}{pair}": row for pair, row in enumerate(state.get(key, ()))}
        for at, part in enumerate(updated(self.parts[index])):
            first = self._starts[part.name]
            for name, vector in vectors.items():
                own = vector[first + part.start : first + part.stop]
                made.tensors[f"state.{at}.{name}"] = own.clone()
        made.plain["groups"] = []
        return made

    def take(self, kept: Sequence[Contents], memory: Any = None) -> Held:
        """The state that the shards together have, as torch.optim.LBFGS has it."""
        super().take(kept)
        assert isinstance(memory, lbfgs.Memory)
        state = self._state
        state.clear()
        state |= {"func_evals": memory.func_evals, "n_iter": memory.n_iter}
        if memory.n_iter:
            state |= {
                "d": self._whole(kept, lbfgs.DIRECTION), "t": memory.t,
                "ro": [memory.rho[pair] for pair in memory.pairs], "H_diag": memory.scale,
                "prev_flat_grad": self._whole(kept, lbfgs.PREVIOUS),
            }  # fmt: skip
            for kind, key in (("s", "old_stps"), ("y", "old_dirs")):
                if memory.pairs:
                    rows = [self._whole(kept, f"{kind}{pair}") for pair in memory.pairs]
                    state[key] = torch.stack(rows)
        return self.training.held()

    def _whole(self, kept: Sequence[Contents], name: str) -> Tensor:
        vector: Tensor | None = None
        for parts, content in zip(self.parts, kept, strict=True):
            for at, part in enumerate(updated(parts)):
                own = content.tensors[f"state.{at}.{name}"]
                if vector is None:
                    vector = torch.zeros(self._length, dtype=own.dtype)
                first = self._starts[part.name]
                vector[first + part.start : first + part.stop] = own
        assert vector is not None
        return vector
