"""How a shard updates its values from a gradient: one small function for each rule.

A rule works in place on a flat part of a tensor, or on some rows of a table, [rows, dim]; what it
keeps between updates (its state) begins as zeros of the same shape, or one number for each row.
Symbols: w value, g gradient, η learning rate `lr`, λ weight decay.

A rule's settings are those of the optimizer's group of parameters: the same names as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wagontrain.errors import UsageError, nearest

Settings = Mapping[str, Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Args:
        update: `(value, gradient, state, settings)`, in place; the gradient may be overwritten.
        like: names of state that is of the value's shape.
        single: names of state that is one number for a part, or for each row.
    """

    update: Callable[[Tensor, Tensor, State, Settings], None]
    like: tuple[str, ...] = ()
    single: tuple[str, ...] = ()


def sgd(value: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """w ← w − η (g + λ w)."""
    _decay(value, gradient, settings)
    value.add_(gradient, alpha=-settings["lr"])


def momentum(value: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """v ← μ v + g + λ w, then w ← w − η v; with `nesterov` w ← w − η (g + λ w + μ v).

    As torch.optim.SGD has it: the rate is not inside the velocity.
    """
    _decay(value, gradient, settings)
    mu = settings.get("momentum", 0.9)
    velocity = state["momentum_buffer"].mul_(mu).add_(gradient)
    if settings.get("nesterov"):
        velocity = gradient.add_(velocity, alpha=mu)
    value.add_(velocity, alpha=-settings["lr"])


def adam(value: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """m ← β₁ m + (1 − β₁) g, s ← β₂ s + (1 − β₂) g², w ← w − η m̂ / (√ŝ + ε).

    m̂ = m / (1 − β₁ᵗ) and ŝ = s / (1 − β₂ᵗ), t the number of updates: for each row of a table its
    own. With `decoupled_weight_decay` w ← w (1 − η λ) beforehand (AdamW), else λ w is part of g.

    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019.
    """
    lr = settings["lr"]
    first, second = settings.get("betas", (0.9, 0.999))
    if settings.get("decoupled_weight_decay"):
        value.mul_(1 - lr * settings.get("weight_decay", 0))
    else:
        _decay(value, gradient, settings)
    step = state["step"].add_(1)
    mean = state["exp_avg"].lerp_(gradient, 1 - first)
    square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = square.sqrt().div_((1 - second**step).sqrt_()).add_(settings.get("eps", 1e-8))
    value.sub_(root.reciprocal_().mul_(mean).mul_(lr / (1 - first**step)))


def adagrad(value: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """s ← s + g², then w ← w − γ g / √s, γ = `lr`; where s is 0 nothing changes.

    No ε, and this gradient is in s already: the first update of every number is γ long.

    Source: Dean et al. 2012, section 4.1.
    """
    _decay(value, gradient, settings)
    root = state["sum"].addcmul_(gradient, gradient).sqrt()
    change = gradient.div_(root).masked_fill_(root == 0, 0)
    value.add_(change, alpha=-settings["lr"])


def adagrad_with_epsilon(value: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """s ← s + g², then w ← w − η / (1 + (t − 1) δ) · g / (√s + ε): torch.optim.Adagrad."""
    _decay(value, gradient, settings)
    step = state["step"].add_(1)
    rate = settings["lr"] / (1 + (step - 1) * settings.get("lr_decay", 0))
    root = state["sum"].addcmul_(gradient, gradient).sqrt().add_(settings.get("eps", 1e-10))
    value.sub_(gradient.div_(root).mul_(rate))


def easgd(value: Tensor, gradient: Tensor, state: State, settings: Settings) -> None:
    """w̃ ← w̃ + d: what is pushed is no gradient but d = α (w − w̃) of one worker.

    Source: Zhang, Choromanska and LeCun 2015.
    """
    value.add_(gradient)


def compensate(gradient: Tensor, value: Tensor, fetched: Tensor, strength: float) -> None:
    """g ← g + λ g ⊙ g ⊙ (w − w_bak): what g would be at w, to first order.

    w_bak is what the worker had fetched when it computed g, `strength` is λ.

    Source: Zheng et al. 2017, "Asynchronous Stochastic Gradient Descent with Delay Compensation".
    """
    gradient.addcmul_(gradient.square(), value - fetched, value=strength)


def delayed(settings: Settings, staleness: int) -> dict[str, Any]:
    """η / max(τ, 1), τ the staleness of the gradient.

    Source: Zhang et al. 2016, "Staleness-aware Async-SGD for Distributed Deep Learning".
    """
    return {**settings, "lr": settings["lr"] / max(staleness, 1)}


def _decay(value: Tensor, gradient: Tensor, settings: Settings) -> None:
    if settings.get("weight_decay"):
        gradient.add_(value, alpha=settings["weight_decay"])


RULES = {
    "sgd": Rule(sgd),
    "momentum": Rule(momentum, ("momentum_buffer",)),
    "adam": Rule(adam, ("exp_avg", "exp_avg_sq"), ("step",)),
    "adagrad": Rule(adagrad, ("sum",)),
    "easgd": Rule(easgd),
}
"""Rules that are functions of their own."""

AROUND = ("optimizer", "staleness-aware", "dc-asgd")
"""Rules that hand a gradient or a rate to the task's own optimizer."""

_OF_TABLES = {
    "SGD": RULES["momentum"],
    "Adam": RULES["adam"],
    "AdamW": RULES["adam"],
    "Adagrad": Rule(adagrad_with_epsilon, ("sum",), ("step",)),
}
_NOT_OF_TABLES = ("dampening", "amsgrad", "maximize", "initial_accumulator_value")


def require_rule(name: str) -> None:
    """Check that there is such a rule.

    Raises:
        UsageError: there is none.
    """
    if name not in RULES and name not in AROUND:
        raise UsageError(f"there is no update rule {name!r}: {nearest(name, [*RULES, *AROUND])}")


def rule_of_tables(name: str, optimizer: str, settings: Settings) -> Rule:
    """The rule for rows of a table, each of which counts its own updates.

    Args:
        name: of the rule asked for.
        optimizer: class of the task's own.
        settings: of the table's group of parameters.

    Raises:
        UsageError: rows cannot be updated so.
    """
    require_rule(name)
    if name in RULES:
        return RULES[name]
    if optimizer not in _OF_TABLES:
        raise UsageError(
            f"optimizer {optimizer} cannot update single rows of a table: use one of "
            f"{', '.join(_OF_TABLES)}, or keep the table in the model"
        )
    for key in _NOT_OF_TABLES:
        if settings.get(key):
            raise UsageError(
                f"optimizer {optimizer} with {key}={settings[key]!r} cannot update single rows of "
                f"a table: leave {key} out, or keep the table in the model"
            )
    if optimizer == "SGD" and not settings.get("momentum"):
        return RULES["sgd"]
    return _OF_TABLES[optimizer]
