"""One process on one host, nothing distributed; the other hosts stay idle."""

from __future__ import annotations

import os

from benchmarks.measuring import arguments, measure
from benchmarks.models import PROBLEMS


def main() -> None:
    asked = arguments(__doc__).parse_args()
    if os.environ.get("RANK", "0") != "0":
        return
    problem = PROBLEMS[asked.model]()
    model = problem.build()
    optimizer = problem.optimizer(model.parameters())
    batches = problem.batches()

    def step() -> float:
        inputs, target = next(batches)
        optimizer.zero_grad()
        loss = problem.loss(model(inputs), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    measure(step, lambda: None, asked, 0)


if __name__ == "__main__":
    main()
