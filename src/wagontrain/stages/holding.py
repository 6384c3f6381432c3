"""What a rank keeps of a model: its stages' parameters and buffers, under their plain names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wagontrain.errors import TaskError
from wagontrain.optimizers import kind_of, treats_parameters_by_themselves


def give_memory(model: nn.Module, names: set[str], device: torch.device) -> None:
    """Give memory to the named parameters and buffers of a model on the meta device."""
    given: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for entries in (module._parameters, module._buffers):
            for key, value in entries.items():
                if value is None or f"{path}.{key}".lstrip(".") not in names:
                    continue
                if id(value) not in given:
                    empty = torch.empty_like(value, device=device)
                    parameter = isinstance(value, nn.Parameter)
                    given[id(value)] = (
                        nn.Parameter(empty, value.requires_grad) if parameter else empty
                    )
                entries[key] = given[id(value)]


def let_go(model: nn.Module, optimizer: Optimizer, names: set[str]) -> None:
    """Let go of all parameters and buffers but the named ones, in the optimizer, too.

    The optimizer was built over all parameters, so that its groups are those that the task means,
    whichever of their parameters are here.

    Raises:
        TaskError: it is not known to treat every parameter by itself.
    """
    if not treats_parameters_by_themselves(optimizer):
        raise TaskError(
            f"optimizer {kind_of(optimizer)} is not known to treat every parameter by "
            "itself, and here no rank has all of them: use one of torch.optim, or the strategy "
            "data-parallel"
        )
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    kept = {id(value) for name, value in state.items() if name in names}
    for module in model.modules():
        for entries in (module._parameters, module._buffers):
            for key, value in entries.items():
                if value is not None and id(value) not in kept:
                    entries[key] = None
    for group in optimizer.param_groups:
        group["params"] = [value for value in group["params"] if id(value) in kept]
    for value in list(optimizer.state):
        if id(value) not in kept:
            del optimizer.state[value]
