"""How many steps a relaxed strategy needs, for each that exact training needs to the same loss.

Nobody can know that beforehand for a model at hand. What theory knows is a range, and that is what
is said here: where it begins and ends, not where in it a training will lie. Three results:

Steps against batch size (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training",
section 2.3), with a noise scale B_noise that differs by model and grows while it trains:

    S(B) = S_min (1 + B_noise / B)

The first term is what training needs without noise; the second is what noise costs. Write
v = B_noise / B for a batch B.

**Late gradients.** A delay acts on the first term alone: without noise, gradients that are t
updates late do as little as one in t of them (Arjevani, Shamir, Srebro 2020, "A Tight Convergence
Analysis for Stochastic Gradient Descent with Delayed Updates"); where noise prevails, they cost
nothing. With delays of t on average and T at most, t becomes sqrt(t T) (Koloskova, Stich, Jaggi
2022, "Sharper Convergence Guarantees for Asynchronous SGD", for constant rates). So in all

    (1 + sqrt(t T) + v) / (1 + v)     from 1, for large v, to 1 + sqrt(t T), for v = 0

**Rare averages.** A round of H steps of N workers, each on its own share B / N, does at best what H
steps of the whole batch do: so it is for quadratic losses, and so published trainings come out
(Lin et al. 2018; DiLoCo, Douillard et al. 2023: 500 steps apart, no worse). At worst, what
one of these does:

    H steps of one worker by itself           (1 + N v) / (1 + v)
    one step on all samples of the round      (H + v) / (1 + v)

The first, for the mean of weights is no worse than the mean of the workers' losses (Jensen, for
convex losses); the second, for local SGD is no worse than it (Woodworth et al. 2020, "Is Local SGD
Better than Minibatch SGD?", proven for quadratic losses, and wrong for some others). The better of
the two is the least good at v = (H - 1) / (N - 1), which gives the end of the range:

    (N H - 1) / (N + H - 2)           from 1, for H = 1, to N, for large H

The noise scale is not measured: a profile sees the first steps only, where it is smallest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Steps for each of exact training, to the same loss.

    Args:
        least: as good as it gets.
        most: as bad as it gets.
        why: what makes them more.
    """

    least: float = 1.0
    most: float = 1.0
    why: str = ""


EXACT = Steps()


def late(mean: float, most: float) -> Steps:
    """Of gradients that are applied to newer weights than they were computed from.

    Args:
        mean: updates that they are late, on average.
        most: the latest of them.
    """
    if mean <= 0:
        return EXACT
    times = 1 + math.sqrt(mean * most)
    return Steps(1.0, times, f"gradients are {mean:.3g} updates late, {most:.3g} at most")


def apart(workers: int, period: int) -> Steps:
    """Of workers that train by themselves between averages.

    Args:
        workers: N.
        period: H, steps from one average to the next.
    """
    if workers == 1 or period == 1:
        return EXACT
    times = (workers * period - 1) / (workers + period - 2)
    return Steps(1.0, times, f"{workers} workers are {period} steps apart")
