"""What shards do with whole vectors: small operations that the coordinator gives them as data.

A vector is named; each shard has its part of it, of the same shape as its parameters. What an
operation finds out is one number for each shard, of which the coordinator makes one for all: it
never sees a vector.

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 4.2: "a small set of
operations (e.g., dot product, scaling, coefficient-wise addition, multiplication) that can be
performed by each parameter server shard independently".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from wagontrain.servers.sums import sum_of

PARAMETERS = "x"
"""The vector that is the model's parameters, which workers fetch."""


@dataclass(frozen=True)
class Gradient:
    """The vector becomes the sum of the gradients that come with it, divided as they say."""

    target: str
    kind: Literal["gradient"] = "gradient"


@dataclass(frozen=True)
class Combine:
    """target = Σ factor · vector, added up in this order; the target is none of the vectors."""

    target: str
    terms: tuple[tuple[float, str], ...]
    kind: Literal["combine"] = "combine"


@dataclass(frozen=True)
class Products:
    """The scalar product of each vector on the left with each on the right, row by row."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    kind: Literal["products"] = "products"


@dataclass(frozen=True)
class Largest:
    """The largest absolute value of the vector's numbers."""

    of: str
    kind: Literal["largest"] = "largest"


@dataclass(frozen=True)
class Absolute:
    """The sum of the absolute values of the vector's numbers."""

    of: str
    kind: Literal["absolute"] = "absolute"


@dataclass(frozen=True)
class Rename:
    """The vector has another name from now on; what had that name before is gone."""

    old: str
    new: str
    kind: Literal["rename"] = "rename"


@dataclass(frozen=True)
class Discard:
    """These vectors are needed no longer."""

    vectors: tuple[str, ...]
    kind: Literal["discard"] = "discard"


Operation = Annotated[
    Gradient | Combine | Products | Largest | Absolute | Rename | Discard,
    Field(discriminator="kind"),
]

Reduction = Callable[[Iterable[float]], float]


def reductions(operations: Sequence[Operation]) -> list[Reduction]:
    """How the shards' numbers become one, for each number that the operations find out.

    Sums are rounded once, so that they do not depend on which shard was quicker.
    """
    found: list[Reduction] = []
    for operation in operations:
        if isinstance(operation, Products):
            found += [sum_of] * (len(operation.left) * len(operation.right))
        elif isinstance(operation, Absolute):
            found.append(sum_of)
        elif isinstance(operation, Largest):
            found.append(max)
    return found
