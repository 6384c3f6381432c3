"""L-BFGS as its coordinator sees it: numbers in, operations on vectors out.

A step is a generator: it asks for the objective at the parameters as they are (`Evaluate`), or
for operations on the shards (`Order`), is given the numbers that came of it, and decides. The same
decisions as torch.optim.LBFGS, so that the parameters go the same way.

    d = -H g      H from the last m pairs s = t d, y = g - g_previous
    x = x + t d   t from the line search, or as it is

The product of H and g is a sum of the vectors g, s_i, y_i, and the two-loop recursion (Nocedal and
Wright, algorithm 7.4) on its factors needs only their scalar products: one exchange of numbers
instead of one for each of the 2m vectors (Chen, Wang and Zhou 2014, "Large-scale L-BFGS using
MapReduce"). Products of old pairs are kept, so that an iteration forms 4m new ones.

Vectors: x parameters, o where the line search began, d direction, g gradient, p that of the
iteration before, gN of a trial, sN and yN of a pair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wagontrain.errors import LossError, UsageError
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
)
from wagontrain.servers.sums import sum_of
from wagontrain.servers.wolfe import Point, strong_wolfe

ORIGIN, DIRECTION, GRADIENT, PREVIOUS = "o", "d", "g", "p"


@dataclass(frozen=True)
class Settings:
    """Those of torch.optim.LBFGS, by the same names."""

    lr: float
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """From a group of parameters of the optimizer.

        Raises:
            UsageError: a setting cannot be worked with.
        """
        made = cls(
            float(group["lr"]), group["max_iter"], group["max_eval"], group["tolerance_grad"],
            group["tolerance_change"], group["history_size"], group["line_search_fn"],
        )  # fmt: skip
        for name in ("max_iter", "max_eval", "history_size"):
            if getattr(made, name) < 1:
                raise UsageError(
                    f"LBFGS has {name}={getattr(made, name)}, with which it cannot make a step: "
                    "give 1 or more"
                )
        if made.line_search_fn not in (None, "strong_wolfe"):
            raise UsageError(
                f"LBFGS has line_search_fn={made.line_search_fn!r}: give 'strong_wolfe' or None"
            )
        return made


@dataclass
class Memory:
    """What is kept from one iteration and step to the next; vectors are on the shards.

    Args:
        n_iter, func_evals: so far, in all steps.
        t: the last step's length.
        scale: of the first guess of H: y·s / y·y of the last pair.
        pairs: numbers of those kept, the oldest first.
        rho: pair -> 1 / y·s.
        s_y: (i, j) -> s_i · y_j, for pairs j that are not older than i.
        y_y: (i, j) -> y_i · y_j, likewise.
    """

    n_iter: int = 0
    func_evals: int = 0
    t: float = 0.0
    scale: float = 1.0
    pairs: list[int] = field(default_factory=list)
    rho: dict[int, float] = field(default_factory=dict)
    s_y: dict[tuple[int, int], float] = field(default_factory=dict)
    y_y: dict[tuple[int, int], float] = field(default_factory=dict)

    def copy(self) -> Memory:
        """Another that does not change with this one."""
        return replace(
            self, pairs=list(self.pairs), rho=dict(self.rho), s_y=dict(self.s_y), y_y=dict(self.y_y)
        )

    def drop(self, pair: int) -> None:
        """Forget a pair."""
        self.pairs.remove(pair)
        del self.rho[pair]
        for table in (self.s_y, self.y_y):
            for key in [key for key in table if pair in key]:
                del table[key]

    @property
    def lacks_products(self) -> bool:
        """Whether products of pairs are to be formed first: it was read from a checkpoint."""
        return bool(self.pairs) and (self.pairs[-1], self.pairs[-1]) not in self.y_y


@dataclass(frozen=True)
class Order:
    """Operations for the shards; answered by the numbers they find out."""

    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Evaluate:
    """The objective and its gradient are wanted at the parameters.

    Args:
        before: operations that make the parameters what they have to be.
        after: operations once the gradient is there.
        trial: whether it may be too far along a line: an objective that is not finite is then
            answered as infinite, without numbers.
    """

    before: tuple[Operation, ...]
    after: tuple[Operation, ...]
    trial: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    numbers: tuple[float, ...] = ()
    loss: float = math.nan


@dataclass(frozen=True)
class Made:
    """A step: the objective before it, and what it took."""

    loss: float
    iterations: int
    evaluations: int


Step = Generator[Order | Evaluate, Answer, Made]
Terms = tuple[tuple[float, str], ...]


def step(settings: Settings, memory: Memory) -> Step:
    """One step: what `torch.optim.LBFGS.step` does with one batch.

    Raises:
        LossError: the numbers have become such that no direction follows from them.
    """
    first: tuple[Operation, ...] = (Absolute(GRADIENT),) if not memory.n_iter else ()
    found = yield Evaluate((), (Gradient(GRADIENT), Largest(GRADIENT), *first))
    loss, largest = found.loss, found.numbers[0]
    evaluations, iterations = 1, 0
    memory.func_evals += 1
    if largest <= settings.tolerance_grad:
        yield Order((Discard((GRADIENT,)),))
        return Made(found.loss, 0, 1)
    end: tuple[Operation, ...] = ()
    while True:
        iterations += 1
        memory.n_iter += 1
        previous = loss
        terms, unused = yield from _direction(settings, memory, end)
        memory.t = settings.lr
        if memory.n_iter == 1:
            memory.t *= min(1.0, 1.0 / found.numbers[1])
        # The first trial is made at once, though the direction may turn out to lead nowhere.
        begun = yield Order((
            *unused, Combine(ORIGIN, ((1.0, PARAMETERS),)), Combine(DIRECTION, terms),
            Combine(PREVIOUS, ((1.0, GRADIENT),)), _move(memory.t),
            Products((GRADIENT,), (DIRECTION,)), Largest(DIRECTION),
        ))  # fmt: skip
        slope, longest = begun.numbers
        if slope > -settings.tolerance_change:
            end = (Combine(PARAMETERS, ((1.0, ORIGIN),)),)
            break
        tried = 0
        if settings.line_search_fn is not None:
            start = Point(0.0, loss, slope, GRADIENT, largest)
            most = settings.max_eval - evaluations
            point, tried, end = yield from _search(settings, memory, start, longest, most)
            loss, largest, memory.t = point.f, point.largest, point.t
        else:
            end = ()
            if iterations < settings.max_iter:
                there = yield Evaluate((), (Gradient(GRADIENT), Largest(GRADIENT)))
                loss, largest, tried = there.loss, there.numbers[0], 1
        evaluations += tried
        memory.func_evals += tried
        if (
            iterations == settings.max_iter
            or evaluations >= settings.max_eval
            or largest <= settings.tolerance_grad
            or longest * abs(memory.t) <= settings.tolerance_change
            or abs(loss - previous) < settings.tolerance_change
        ):
            break
    yield Order((*end, Discard((ORIGIN, GRADIENT))))
    return Made(found.loss, iterations, evaluations)


def _move(t: float) -> Operation:
    return Combine(PARAMETERS, ((1.0, ORIGIN), (t, DIRECTION)))


def _search(
    settings: Settings, memory: Memory, start: Point, longest: float, most: int
) -> Generator[Order | Evaluate, Answer, tuple[Point, int, tuple[Operation, ...]]]:
    """The line search: where it led, trials, and what is still to be done to be there.

    The parameters are at the first trial already.
    """
    search = strong_wolfe(start, memory.t, longest, settings.tolerance_change, most)
    held = {GRADIENT}
    at = memory.t
    probe = next(search)
    for number in itertools.count():
        name = f"{GRADIENT}{number}"
        unused = sorted(held - {point.gradient for point in probe.keep} - {GRADIENT})
        held.difference_update(unused)
        moved = (_move(probe.t),) if probe.t != at else ()
        at = probe.t
        after = (Gradient(name), Products((name,), (DIRECTION,)), Largest(name))
        found = yield Evaluate((*_discard(unused), *moved), after, trial=True)
        point = Point(at, math.inf, math.nan)
        if math.isfinite(found.loss):
            point = Point(at, found.loss, found.numbers[0], name, found.numbers[1])
            held.add(name)
        try:
            probe = search.send(point)
        except StopIteration as ended:
            point, trials = ended.value
            break
    unused = sorted(held - {point.gradient, GRADIENT})
    end = [_move(point.t)] if point.t != at else []
    if point.gradient != GRADIENT:
        end.append(Rename(point.gradient, GRADIENT))
    return point, trials, (*end, *_discard(unused))


def _discard(names: list[str]) -> tuple[Operation, ...]:
    return (Discard(tuple(names)),) if names else ()


def _direction(
    settings: Settings, memory: Memory, end: tuple[Operation, ...]
) -> Generator[Order | Evaluate, Answer, tuple[Terms, tuple[Operation, ...]]]:
    """The direction as a sum of vectors, and what is needed no longer then.

    The last move becomes a pair, if there is curvature along it.
    """
    if memory.n_iter == 1:
        for pair in list(memory.pairs):
            memory.drop(pair)
        return ((-1.0, GRADIENT),), ()
    if memory.lacks_products:
        yield from _all_products(memory)
    new = memory.pairs[-1] + 1 if memory.pairs else 0
    numbers = [*memory.pairs, new]
    s, y = [f"s{pair}" for pair in numbers], [f"y{pair}" for pair in numbers]
    found = yield Order((
        *end, Combine(s[-1], ((memory.t, DIRECTION),)),
        Combine(y[-1], ((1.0, GRADIENT), (-1.0, PREVIOUS))),
        Products((*s, *y), (y[-1], GRADIENT)),
    ))  # fmt: skip
    rows = list(zip(found.numbers[::2], found.numbers[1::2], strict=True))
    with_s, with_y = rows[: len(s)], rows[len(s) :]
    curvature = with_s[-1][0]
    unused: list[int] = []
    if curvature > 1e-10:
        memory.rho[new] = 1.0 / curvature
        memory.scale = curvature / with_y[-1][0]
        memory.pairs.append(new)
        for pair, (s_y, _), (y_y, _) in zip(numbers, with_s, with_y, strict=True):
            memory.s_y[pair, new], memory.y_y[pair, new] = s_y, y_y
        if len(memory.pairs) > settings.history_size:
            unused.append(memory.pairs[0])
            memory.drop(memory.pairs[0])
    else:
        unused.append(new)
    s_g = {pair: row[1] for pair, row in zip(numbers, with_s, strict=True)}
    y_g = {pair: row[1] for pair, row in zip(numbers, with_y, strict=True)}
    terms = two_loops(memory, s_g, y_g)
    if not all(math.isfinite(factor) for factor, _ in terms):
        raise LossError(
            f"no direction of L-BFGS is finite after {memory.n_iter - 1} iterations: the objective "
            "is too steep or not smooth there; give a lower lr, or line_search_fn='strong_wolfe'"
        )
    return terms, _discard([f"{kind}{pair}" for kind in "sy" for pair in unused])


def two_loops(memory: Memory, s_g: Mapping[int, float], y_g: Mapping[int, float]) -> Terms:
    """-H g as a sum of vectors, from their scalar products alone.

    Args:
        memory: with the products of the pairs with each other.
        s_g, y_g: pair -> s · g, y · g.
    """
    pairs, rho, scale = memory.pairs, memory.rho, memory.scale
    alpha: dict[int, float] = {}
    for i in reversed(pairs):
        newer = [j for j in pairs if j > i]
        s_q = sum_of([-s_g[i], *(-alpha[j] * memory.s_y[i, j] for j in newer)])
        alpha[i] = rho[i] * s_q
    on_s: dict[int, float] = {}
    for i in pairs:
        y_q = sum_of([-y_g[i], *(-alpha[j] * memory.y_y[min(i, j), max(i, j)] for j in pairs)])
        older = [on_s[j] * memory.s_y[j, i] for j in pairs if j < i]
        on_s[i] = alpha[i] - rho[i] * sum_of([scale * y_q, *older])
    return (
        (-scale, GRADIENT),
        *((-scale * alpha[i], f"y{i}") for i in reversed(pairs)),
        *((on_s[i], f"s{i}") for i in pairs),
    )


def _all_products(memory: Memory) -> Generator[Order | Evaluate, Answer, None]:
    """Products of the pairs with each other."""
    pairs = memory.pairs
    s, y = tuple(f"s{pair}" for pair in pairs), tuple(f"y{pair}" for pair in pairs)
    found = yield Order((Products((*s, *y), y),))
    numbers: Iterator[float] = iter(found.numbers)
    for table in (memory.s_y, memory.y_y):
        for i, j in itertools.product(pairs, pairs):
            product = next(numbers)
            if i <= j:
                table[i, j] = product
