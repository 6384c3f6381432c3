"""A shard's parameters under an update rule: its values, their state, the groups' settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wagontrain.errors import UsageError
from wagontrain.optimizers import ELEMENTWISE
from wagontrain.servers import rules
from wagontrain.servers.rules import RULES, State


class Updater:
    """Updates flat parts of parameters by one rule, in place.

    Args:
        rule: its name.
        optimizer: class of the task's own optimizer, in torch.optim.
        groups: settings of each group of parameters.
        values: the parts.
        members: which group each part belongs to.

    Raises:
        UsageError: there is no such rule, or the optimizer looks at whole tensors.
    """

    def __init__(
        self,
        rule: str,
        optimizer: str,
        groups: Sequence[Mapping[str, Any]],
        values: Sequence[Tensor],
        members: Sequence[int],
    ) -> None:
        rules.require_rule(rule)
        self.rule = rule
        self.groups = [readable(group) for group in groups]
        self.values = list(values)
        self.members = list(members)
        self._optimizer: Optimizer | None = None
        self._parameters: list[nn.Parameter] = []
        if rule in RULES:
            self._states = [_nothing(RULES[rule], value) for value in values]
        else:
            self._build(optimizer)

    def _build(self, name: str) -> None:
        if name not in ELEMENTWISE:
            raise UsageError(
                f"optimizer {name} is not known to treat every number of a tensor by itself, and "
                f"no shard holds whole tensors: use one of {', '.join(ELEMENTWISE)}"
            )
        kind = getattr(torch.optim, name)
        self._parameters = [nn.Parameter(value) for value in self.values]
        if not self._parameters:
            return
        filled: list[dict[str, Any]] = [{**group, "params": []} for group in self.groups]
        for parameter, member in zip(self._parameters, self.members, strict=True):
            filled[member]["params"].append(parameter)
        # Some settings only count when an optimizer is made.
        known = inspect.signature(kind).parameters
        usual = {key: value for key, value in self.groups[0].items() if key in known}
        self._optimizer = kind(filled, **usual)

    def apply(self, gradients: Sequence[Tensor | None], staleness: int = 0) -> None:
        """One update; parts without gradient stay as they are. Gradients may be overwritten."""
        groups = self.groups
        if self.rule == "staleness-aware":
            groups = [rules.delayed(group, staleness) for group in groups]
        with torch.no_grad():
            if self.rule in RULES:
                self._apply_rule(gradients, groups)
            elif self._optimizer is not None:
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = gradient
                for own, group in zip(self._optimizer.param_groups, groups, strict=True):
                    own.update(group)
                self._optimizer.step()
                for parameter in self._parameters:
                    parameter.grad = None

    def _apply_rule(
        self, gradients: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        update = RULES[self.rule].update
        for value, gradient, state, member in zip(
            self.values, gradients, self._states, self.members, strict=True
        ):
            if gradient is not None:
                update(value, gradient, state, groups[member])

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over settings of groups that changed.

        Raises:
            UsageError: there are more of them than groups.
        """
        if len(groups) > len(self.groups):
            raise UsageError(
                f"settings came for {len(groups)} groups of parameters, of which there are "
                f"{len(self.groups)}"
            )
        for own, changed in zip(self.groups, groups, strict=False):
            own.update(readable(changed))

    def move(self, values: Sequence[Tensor]) -> None:
        """Go on with the same values at another place."""
        self.values = list(values)
        if self._optimizer is not None:
            for parameter, value in zip(self._parameters, self.values, strict=True):
                parameter.data = value

    def states(self) -> list[State]:
        """What is kept for each part, sharing memory; empty before its first update."""
        if self.rule in RULES:
            return self._states
        if self._optimizer is None:
            return []
        return [
            {
                key: value if isinstance(value, Tensor) else torch.tensor(value)
                for key, value in self._optimizer.state.get(parameter, {}).items()
                if value is not None
            }
            for parameter in self._parameters
        ]

    def restore(self, states: Sequence[State]) -> None:
        """Take up what another of the same parts and rule kept."""
        if self.rule in RULES:
            for own, other in zip(self._states, states, strict=True):
                for key, value in own.items():
                    value.copy_(other[key])
        elif self._optimizer is not None:
            for parameter, other in zip(self._parameters, states, strict=True):
                self._optimizer.state[parameter] = {
                    key: value.clone() for key, value in other.items()
                }


def readable(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as optimizers want them: what came as a list of numbers is a pair."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in group.items()
        if key != "params"
    }


def _nothing(rule: rules.Rule, value: Tensor) -> State:
    state = {key: torch.zeros_like(value) for key in rule.like}
    return state | {key: torch.zeros((), dtype=torch.float32) for key in rule.single}
