"""The coordinator's side of L-BFGS, numbers only, against torch.optim.LBFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wagontrain.errors import LossError, UsageError, WorkerError
from wagontrain.servers import lbfgs
from wagontrain.servers.operations import (
    PARAMETERS,
    Absolute,
    Combine,
    Discard,
    Gradient,
    Largest,
    Operation,
    Products,
    Rename,
    reductions,
)
from wagontrain.servers.parts import Buffer, Part
from wagontrain.servers.vectors import Vectors
from wagontrain.servers.wolfe import Point, minimum_of_cubic

Function = Callable[[Tensor], Tensor]


class Shards:
    """Vectors that are divided in three, the last shard with nothing of them."""

    def __init__(self, x: Tensor) -> None:
        cut = len(x) // 2
        self.ranges = [(0, cut), (cut, len(x)), (len(x), len(x))]
        self.parts = [[Part("x", *each, "float64", 0)] if each[0] < each[1] else []
                      for each in self.ranges]  # fmt: skip
        self.vectors = [Vectors(parts) for parts in self.parts]
        self.values = [Buffer(parts) for parts in self.parts]
        self.fill(self.values, x)

    def fill(self, buffers: list[Buffer], x: Tensor) -> None:
        for (start, stop), buffer in zip(self.ranges, buffers, strict=True):
            for view in buffer.views:
                view.copy_(x[start:stop])

    @property
    def x(self) -> Tensor:
        return torch.cat([view for buffer in self.values for view in buffer.views])

    def run(self, commands: tuple[Operation, ...], gradient: Tensor | None) -> tuple[float, ...]:
        gradients: list[Any] = [None] * 3
        if gradient is not None:
            gradients = [Buffer(parts, 2) for parts in self.parts]
            self.fill(gradients, gradient)
        found = [
            own.run(commands, values, each)
            for own, values, each in zip(self.vectors, self.values, gradients, strict=True)
        ]
        parts = zip(*found, strict=True)
        return tuple(one(each) for one, each in zip(reductions(commands), parts, strict=True))


def by_us(f: Function, x: Tensor, steps: int, **given: Any) -> tuple[Tensor, list[float], Any]:
    """Where our steps lead, the objective before each, and what is remembered."""
    chosen = lbfgs.Settings.of(torch.optim.LBFGS([torch.zeros(1)], **given).param_groups[0])
    shards, memory, losses = Shards(x), lbfgs.Memory(), []
    for _ in range(steps):
        step = lbfgs.step(chosen, memory)
        request = next(step)
        while True:
            if isinstance(request, lbfgs.Order):
                answer = lbfgs.Answer(shards.run(request.operations, None))
            else:
                shards.run(request.before, None)
                at = shards.x.requires_grad_()
                loss = f(at)
                (gradient,) = torch.autograd.grad(loss, at)
                value = float(loss.detach())
                if request.trial and not math.isfinite(value):
                    answer = lbfgs.Answer((), math.inf)
                else:
                    answer = lbfgs.Answer(shards.run(request.after, gradient), value)
            try:
                request = step.send(answer)
            except StopIteration as ended:
                losses.append(ended.value.loss)
                break
        # Between steps nothing is kept but what the next one needs.
        kept = {f"{kind}{pair}" for pair in memory.pairs for kind in "sy"}
        more = {lbfgs.DIRECTION, lbfgs.PREVIOUS} if memory.n_iter else set()
        assert set(shards.vectors[1]._held) == kept | more
    return shards.x, losses, memory


def by_torch(f: Function, x: Tensor, steps: int, **given: Any) -> tuple[Tensor, list[float], Any]:
    parameter = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.LBFGS([parameter], **given)

    def closure() -> float:
        optimizer.zero_grad()
        loss = f(parameter)
        loss.backward()
        return float(loss.detach())

    losses = [float(optimizer.step(closure)) for _ in range(steps)]
    return parameter.detach(), losses, optimizer.state[parameter]


def strayed(f: Function, x: Tensor, steps: int, **given: Any) -> float:
    """How far torch itself strays if the last digits of where it begins are others."""
    there, _, _ = by_torch(f, x, steps, **given)
    others = [by_torch(f, x * (1 + by), steps, **given)[0] for by in (4e-16, -4e-16)]
    return max(float((other - there).abs().max()) for other in others)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(size: int, seed: int) -> Function:
    root, shift = random(size, size, seed=seed), random(size, seed=seed + 1)
    matrix = root @ root.T + 0.01 * torch.eye(size, dtype=torch.float64)
    return lambda x: 0.5 * x @ matrix @ x - shift @ x


WAYS = [
    {"line_search_fn": line, "history_size": history, "max_iter": iterations}
    for line in ("strong_wolfe", None)
    for history in (1, 3, 10)
    for iterations in (1, 5, 20)
]


def compare(f: Function, x: Tensor, steps: int, wild: bool = False, **given: Any) -> None:
    """Compare; with `wild`, leave out what magnifies a last digit so that nothing is to be seen."""
    ours, losses, memory = by_us(f, x, steps, **given)
    theirs, expected, state = by_torch(f, x, steps, **given)
    rounding = strayed(f, x, steps, **given)
    size = max(1.0, float(theirs.abs().max()))
    if wild:
        assume(rounding < 1e-7 * size)
    assert float((ours - theirs).abs().max()) <= 1e-11 * size + 100 * rounding
    assert losses[0] == expected[0]
    if rounding < 1e-9:
        assert losses == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert memory.n_iter == state["n_iter"]
        assert memory.func_evals == state["func_evals"]
        if memory.n_iter:
            assert len(memory.pairs) == len(state["old_dirs"] or ())


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("size", [2, 6])
def test_rosenbrock(how: dict[str, Any], size: int) -> None:
    lr = 1.0 if how["line_search_fn"] else 1e-3
    compare(rosenbrock, -1.2 + 0.1 * random(size, seed=3), 4, lr=lr, **how)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_quadratics(how: dict[str, Any]) -> None:
    lr = 1.0 if how["line_search_fn"] else 0.5
    for seed in (1, 5):
        compare(quadratic(8, seed), random(8, seed=9), 3, lr=lr, **how)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 7),
    lr=st.floats(0.01, 4.0),
    history=st.integers(1, 6),
    iterations=st.integers(1, 12),
    most=st.none() | st.integers(1, 15),
    line=st.sampled_from(["strong_wolfe", None]),
    tolerance=st.sampled_from([1e-7, 0.5]),
)
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
def test_random_functions_and_settings(
    seed: int, size: int, lr: float, history: int, iterations: int, most: int | None,
    line: str | None, tolerance: float,
) -> None:  # fmt: skip
    bowl = quadratic(size, seed)
    compare(
        lambda x: torch.log1p(x.square().sum() + bowl(x).square()) + torch.cos(x).sum(),
        random(size, seed=seed + 2), 3, wild=True, lr=lr, history_size=history, max_iter=iterations,
        max_eval=most, line_search_fn=line, tolerance_grad=tolerance,
    )  # fmt: skip


def test_two_loops_are_the_inverse_of_the_updated_matrix() -> None:
    """Against the formula of BFGS, matrices written out: Nocedal and Wright, 7.16."""
    s, y, g = random(3, 5, seed=1), random(3, 5, seed=2), random(5, seed=3)
    y = s @ (random(5, 5, seed=4) @ random(5, 5, seed=4).T + torch.eye(5)) + 0 * y
    matrix = torch.eye(5, dtype=torch.float64) * float(s[2] @ y[2] / (y[2] @ y[2]))
    for one, other in zip(s, y, strict=True):
        rho = 1 / (one @ other)
        turn = torch.eye(5, dtype=torch.float64) - rho * torch.outer(other, one)
        matrix = turn.T @ matrix @ turn + rho * torch.outer(one, one)
    memory = lbfgs.Memory(3, 3, 1.0, float(s[2] @ y[2] / (y[2] @ y[2])), [0, 1, 2])
    for i in range(3):
        memory.rho[i] = float(1 / (s[i] @ y[i]))
        for j in range(i, 3):
            memory.s_y[i, j], memory.y_y[i, j] = float(s[i] @ y[j]), float(y[i] @ y[j])
    products = [{i: float(each[i] @ g) for i in range(3)} for each in (s, y)]
    vectors = {"g": g} | {f"s{i}": s[i] for i in range(3)} | {f"y{i}": y[i] for i in range(3)}
    direction = sum(factor * vectors[name] for factor, name in lbfgs.two_loops(memory, *products))
    torch.testing.assert_close(direction, -matrix @ g)


def test_a_direction_that_is_not_finite_is_told() -> None:
    memory = lbfgs.Memory(1, 1, 1.0, math.inf, [0], {0: 1.0}, {(0, 0): 1.0}, {(0, 0): 1.0})
    chosen = lbfgs.Settings(1.0, 5, 5, 0.0, 0.0, 3, None)
    step = lbfgs.step(chosen, memory)
    next(step)
    order = step.send(lbfgs.Answer((1.0,), 3.0))
    assert isinstance(order, lbfgs.Order)
    with pytest.raises(LossError, match="no direction of L-BFGS is finite after 1 iterations"):
        step.send(lbfgs.Answer((0.0, 1.0) * 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_eval": 0}, "max_eval=0, with which it cannot make a step"),
        ({"line_search_fn": "armijo"}, "give 'strong_wolfe' or None"),
    ],
)
def test_settings_that_cannot_be_worked_with(changed: dict[str, Any], message: str) -> None:
    group = torch.optim.LBFGS([torch.zeros(1)]).param_groups[0]
    with pytest.raises(UsageError, match=message):
        lbfgs.Settings.of({**group, **changed})


def test_cubics() -> None:
    one, other = Point(0.0, 0.0, -1.0), Point(2.0, 0.0, 1.0)
    assert minimum_of_cubic(one, other) == pytest.approx(1.0)
    assert minimum_of_cubic(other, one) == pytest.approx(1.0)
    assert minimum_of_cubic(one, Point(2.0, math.inf, math.nan)) == 1.0
    straight = Point(1.0, -1.0, -1.0)
    assert minimum_of_cubic(one, straight, (1.01, 10.0)) == 10.0


# --- vectors ------------------------------------------------------------------------------------


def test_operations_on_parts_are_those_on_the_whole() -> None:
    x, g = random(7, seed=1), random(7, seed=2)
    shards = Shards(x)
    found = shards.run(
        (
            Gradient("g"), Combine("d", ((-2.0, "g"), (0.5, PARAMETERS))),
            Products(("g", "d"), ("d", PARAMETERS)), Largest("d"), Absolute("g"),
            Combine("e", ((1.0, "d"),)), Rename("e", "d"), Discard(("g",)),
        ),
        g,
    )  # fmt: skip
    d = -2 * g + 0.5 * x
    expected = [g @ d, g @ x, d @ d, d @ x, d.abs().max(), g.abs().sum()]
    assert found == pytest.approx([float(each) for each in expected], rel=1e-14)
    assert set(shards.vectors[0]._held) == {"d"}
    torch.testing.assert_close(shards.x, x, rtol=0, atol=0)
    assert [len(buffer.views) for buffer in shards.values] == [1, 1, 0]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (Products(("q",), ("q",)), "no vector 'q'"),
        (Rename("q", "r"), "no vector 'q'"),
        (Gradient("g"), "none came with it"),
        (Combine("d", ((1.0, "d"),)), "cannot be made of itself"),
    ],
)
def test_operations_that_cannot_be(command: Operation, message: str) -> None:
    shards = Shards(torch.ones(4, dtype=torch.float64))
    shards.run((Combine("d", ((1.0, PARAMETERS),)),), None)
    with pytest.raises(WorkerError, match=message):
        shards.run((command,), None)


def test_a_product_that_is_not_finite_is_told() -> None:
    shards = Shards(torch.full((4,), 1e300, dtype=torch.float64))
    with pytest.raises(WorkerError, match="not finite"):
        shards.run((Products((PARAMETERS,), (PARAMETERS,)),), None)


def test_a_state_is_taken_up_whole() -> None:
    shards = Shards(random(6, seed=1))
    shards.run((Combine("s0", ((3.0, PARAMETERS),)),), None)
    other = Vectors(shards.parts[0])
    other.restore(shards.vectors[0].states())
    (view,) = other._held["s0"].views
    torch.testing.assert_close(view, 3 * shards.x[:3])
