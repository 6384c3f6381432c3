"""The textbook case of map-reduce: linear regression by batch gradient descent on 4 machines.

Each of 4 workers holds 100 of 400 rows (of scikit-learn's diabetes data) and sums its part of
the gradient; the sums are added and divided once by 400:

    temp_j^(k) = Σ_{i in machine k} (h_θ(x_i) - y_i) x_ij        k = 1..4
    θ_j := θ_j - α / 400 · (temp_j^(1) + temp_j^(2) + temp_j^(3) + temp_j^(4))

Run it to see that the combined step is the single machine's step, and where it converges:

    python examples/linear_regression.py

L-BFGS on parameter servers needs a tenth of the passes over all rows:

    wagontrain run examples/linear_regression.py:lbfgs --strategy sandblaster --workers 4
"""

from dataclasses import replace
from functools import partial

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt

MACHINES = 4
ROWS = 400
# Age, sex, body mass, blood pressure and two blood values. The other four blood values are nearly
# combinations of these: with them, gradient descent takes thousands of steps.
FEATURES = [0, 1, 2, 3, 8, 9]


def rows() -> tuple[Tensor, Tensor]:
    """Features with mean 0 and variance 1, [400, 6], and the target likewise, [400]."""
    features, target = load_diabetes(return_X_y=True)
    x = torch.tensor(features[:ROWS, FEATURES], dtype=torch.float32)
    y = torch.tensor(target[:ROWS], dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


class Linear(nn.Module):
    """h_θ(x) = θ_0 + Σ_j θ_j x_j, beginning with θ = 0: [n, 6] -> [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Linear(6, 1)
        nn.init.zeros_(self.theta.weight)
        nn.init.zeros_(self.theta.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta(x).squeeze(1)


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean of (h_θ(x) - y)² / 2, whose gradient is the sum above divided by the rows."""
    return 0.5 * (output - target).square().mean()


def task() -> wt.Task:
    x, y = rows()
    return wt.Task(
        model=Linear,
        loss=half_squared_error,
        optimizer=partial(torch.optim.SGD, lr=0.6),
        train=TensorDataset(x, y),
        batch_size=ROWS,  # batch gradient descent: every step sees all rows
        epochs=100,
        shuffle=False,
    )


def lbfgs() -> wt.Task:
    """The same rows and model, minimised by L-BFGS."""
    minimise = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")
    return replace(task(), optimizer=minimise, epochs=1)


def one_step_by_hand() -> tuple[Tensor, Tensor]:
    """The first step's gradient on one machine, and as the sum of 4 machines' sums / 400."""
    x, y = (value.double() for value in rows())
    x = torch.cat([torch.ones(ROWS, 1, dtype=torch.float64), x], dim=1)
    theta = torch.zeros(7, dtype=torch.float64)
    single = x.T @ (x @ theta - y) / ROWS
    machines = zip(x.chunk(MACHINES), y.chunk(MACHINES), strict=True)
    parts = [x_k.T @ (x_k @ theta - y_k) for x_k, y_k in machines]
    return single, sum(parts) / ROWS


def closed_form() -> Tensor:
    """θ that solves the normal equations, [7], intercept first."""
    x, y = (value.double() for value in rows())
    x = torch.cat([torch.ones(ROWS, 1, dtype=torch.float64), x], dim=1)
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]


if __name__ == "__main__":
    from wagontrain.verify import verify

    single, combined = one_step_by_hand()
    print(f"gradient of the first step, one machine:   {single[:4].numpy().round(6)} ...")
    each = f"{MACHINES} machines of {ROWS // MACHINES} rows"
    print(f"  combined from {each}: {combined[:4].numpy().round(6)} ...")
    print(f"  largest difference: {(single - combined).abs().max():.1e}")

    verdict = verify(task, wt.make_strategy("data-parallel"), workers=MACHINES, steps=1)
    print(f"one step of wagontrain on {MACHINES} workers against one process:")
    print(f"  largest difference of a parameter: {verdict.max_parameter_deviation:.1e}")

    state = wt.fit(task, "data-parallel", workers=MACHINES).state_dict()
    theta = torch.cat([state["theta.bias"], state["theta.weight"][0]]).double()
    exact = closed_form()
    print(f"after {task().epochs} steps, against the closed form:")
    print(f"  θ             {theta[1:6].numpy().round(4)} ...")
    print(f"  closed form   {exact[1:6].numpy().round(4)} ...")
    print(f"  largest difference: {(theta - exact).abs().max():.1e}")
