"""What a task's optimizer may be: one, or several over different parameters, which are one here."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wagontrain.errors import TaskError

ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD",
    "Rprop",
)  # fmt: skip
"""Optimizers of torch that treat every number of a tensor by itself."""


class Several(Optimizer):
    """Several optimizers as one: each updates its own parameters, one after the other.

    The groups of parameters are theirs, the same dicts, and so are the entries of the state.

    Args:
        parts: optimizers that have no parameter in common.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([{"params": []}], {})
        self.parts = tuple(parts)
        states: Any = _States(self.parts)
        self.state = states
        self._gather()

    def _gather(self) -> None:
        """Have the groups that the parts have now."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        """One step of each.

        Args:
            closure: None; those that evaluate the model by themselves are refused.
        """
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give each part what is its own, by the number of its groups.

        Args:
            state_dict: as `state_dict` gives it.

        Raises:
            ValueError: the groups are not as many, or have other numbers of parameters.
        """
        groups, state = iter(state_dict["param_groups"]), state_dict["state"]
        for part in self.parts:
            own = list(itertools.islice(groups, len(part.param_groups)))
            members = {number for group in own for number in group["params"]}
            entries = {number: state[number] for number in members & state.keys()}
            part.load_state_dict({"param_groups": own, "state": entries})
        if list(groups):
            raise ValueError("loaded state dict has more parameter groups")
        self._gather()


class _States(MutableMapping[Tensor, dict[str, Any]]):
    """The states of several optimizers: of each parameter that of its own one."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self._parts = parts
        self._owner = {
            value: part
            for part in parts
            for group in part.param_groups
            for value in group["params"]
        }

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        entries: dict[str, Any] = self._owner[parameter].state[parameter]
        return entries

    def __setitem__(self, parameter: Tensor, entries: dict[str, Any]) -> None:
        self._owner[parameter].state[parameter] = entries

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner[parameter].state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in part.state for part in self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(part.state for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


class Schedules(LRScheduler):
    """The schedules of several optimizers as one.

    Args:
        parts: one for each of the optimizers, in their order.
    """

    def __init__(self, parts: Sequence[LRScheduler]) -> None:
        self.parts = tuple(parts)

    def step(self, epoch: int | None = None) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Those of all."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give each its own.

        Args:
            state_dict: as `state_dict` gives it.

        Raises:
            KeyError: it is of one schedule.
            ValueError: it is of another number of schedules.
        """
        for part, own in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(own)


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers that one consists of: itself, or several."""
    return optimizer.parts if isinstance(optimizer, Several) else (optimizer,)


def kind_of(made: Optimizer | LRScheduler) -> str:
    """The name of its class: `AdamW`; of several `SGD + AdamW`."""
    parts = made.parts if isinstance(made, Several | Schedules) else (made,)
    return " + ".join(type(part).__name__ for part in parts)


def argument(make: Callable[..., Any], model: nn.Module) -> Any:
    """What a function that makes an optimizer is to be given, by the name of its argument."""
    try:
        names = [
            name
            for name, each in inspect.signature(make).parameters.items()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):  # something built in, which does not say
        names = []
    first = names[0] if names else ""
    if first == "model":
        return model
    return model.named_parameters() if first == "named_parameters" else model.parameters()


def as_one(made: Any, model: nn.Module, closures: bool) -> Optimizer:
    """What a function that makes an optimizer returned, if it can be trained with.

    Args:
        made: an optimizer, or a list of several.
        model: whose parameters they may have.
        closures: whether it may be one that evaluates the model by itself: LBFGS.

    Raises:
        TaskError: it cannot be; says why.
    """
    parts = list(made) if isinstance(made, list | tuple) else [made]
    for part in parts:
        if not isinstance(part, Optimizer):
            what = type(part).__name__ if part is made else f"a list with a {type(part).__name__}"
            raise TaskError(
                f"Task.optimizer returned {what}: return a torch.optim optimizer, "
                "for instance partial(torch.optim.SGD, lr=0.1), or a list of optimizers"
            )
    if not parts:
        raise TaskError("Task.optimizer returned an empty list: return an optimizer, or several")
    minimising = any(isinstance(part, torch.optim.LBFGS) for part in parts)
    if minimising and len(parts) > 1:
        raise TaskError(
            "torch.optim.LBFGS is one of several optimizers, but it evaluates the model several "
            "times per step, and the others would change it meanwhile: let it be the only one"
        )
    if minimising and not closures:
        raise TaskError(
            "torch.optim.LBFGS evaluates the model several times per step, which only the "
            "strategy sandblaster does: use that, or a first-order optimizer such as SGD or "
            "Adam"
        )
    names: dict[Tensor, str] = {value: name for name, value in model.named_parameters()}
    taken: set[Tensor] = set()
    for part in parts:
        held = {value for group in part.param_groups for value in group["params"]}
        if held - names.keys():
            raise TaskError(
                "Task.optimizer holds parameters that are not the model's, which would be "
                "trained on each worker by itself: make them part of the model"
            )
        if twice := held & taken:
            raise TaskError(
                f"two of the optimizers that Task.optimizer returned have the parameter "
                f"{min(names[value] for value in twice)!r}: give it to one of them"
            )
        taken |= held
    return parts[0] if len(parts) == 1 else Several(parts)


def treats_parameters_by_themselves(optimizer: Optimizer) -> bool:
    """Whether it is torch's own, all of which do; others may look at several at once."""
    modules = [type(part).__module__ for part in parts_of(optimizer)]
    return all(f"{module}.".startswith("torch.optim.") for module in modules)


def require_elementwise(optimizer: Optimizer) -> None:
    """Refuse an optimizer that looks at a tensor as a whole, of which a rank has only a part.

    Raises:
        TaskError: it is not known to treat every number by itself.
    """
    for part in parts_of(optimizer):
        if not treats_parameters_by_themselves(part) or type(part).__name__ not in ELEMENTWISE:
            raise TaskError(
                f"optimizer {type(part).__name__} is not known to treat every number of a tensor "
                f"by itself, and here no rank holds whole tensors: use one of "
                f"{', '.join(ELEMENTWISE)}, or the strategy data-parallel, or sharded with stage=1"
            )


def is_hooked(optimizer: Optimizer) -> bool:
    """Whether somebody asked to be called at every step of it."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(getattr(part, name, None) for part in parts_of(optimizer) for name in names)


def values_per_weight(optimizer: Optimizer) -> float:
    """Values that it keeps for each weight that it updates, by what it is; a mean over several."""
    kept = {part: _values_of(part) for part in parts_of(optimizer)}
    weights: dict[Optimizer, int] = {
        part: sum(value.numel() for group in part.param_groups for value in group["params"])
        for part in kept
    }
    return sum(kept[part] * weights[part] for part in kept) / max(1, sum(weights.values()))


def _values_of(optimizer: Optimizer) -> int:
    if type(optimizer) is torch.optim.SGD and not optimizer.defaults.get("momentum"):
        return 0
    return _KEPT.get(type(optimizer).__name__, _KEPT_BY_OTHERS)


# Adam keeps two.
_KEPT = {"SGD": 1, "Adagrad": 1, "RMSprop": 1, "Muon": 1}
_KEPT_BY_OTHERS = 2
