"""What a task costs, layer by layer: plain data, measured by `profiling`.

Times are those of one machine. What a stretch of the step costs for n samples is a line,
fixed + n · each: calling an operation costs something whatever it works on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from wagontrain.errors import UsageError

FORMAT = 1

Cut = Literal["column", "row", "heads", "whole"]
"""How a layer is held: divided by its outputs, its inputs, its heads, or not at all."""


@dataclass(frozen=True)
class Line:
    """Seconds for n samples: fixed + n · each."""

    fixed: float
    each: float

    def __call__(self, samples: float) -> float:
        """Seconds for so many samples."""
        return self.fixed + self.each * samples

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        """The line that fits (samples, seconds) best, by the squares of relative errors.

        Neither part is below zero, nor does a sample cost nothing: noise must not make work
        free.
        """
        high, last = max(points)
        if len({size for size, _ in points}) == 1 or last <= 0:
            return cls(0.0, max(0.0, last) / high)
        weights = [1 / max(seconds, 1e-9) ** 2 for _, seconds in points]
        total = sum(weights)
        size = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
        mean = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
        slope = sum(
            w * (n - size) * (t - mean) for w, (n, t) in zip(weights, points, strict=True)
        ) / sum(w * (n - size) ** 2 for w, (n, _) in zip(weights, points, strict=True))
        each = min(max(slope, 0.1 * mean / size), mean / size)
        return cls(max(0.0, mean - each * size), each)


@dataclass(frozen=True)
class Part:
    """A tensor of trainable weights in a layer.

    Args:
        name: of the parameter.
        shape: of it.
        nbytes: of it.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Layer:
    """One module without others in it (or with weights of its own), in the order of first calls.

    Args:
        name: of the module.
        kind: of it: "Linear", ...
        parts: its trainable weights.
        forward: seconds, with whatever runs before the next layer.
        backward: seconds.
        rows: vectors that it works on, for each sample: tokens of a text, 1 in a classifier.
        given: bytes of what it is called with, for each sample.
        output: bytes of its result, for each sample.
        kept: bytes that it keeps for the backward pass, for each sample.
        flops: of its forward, for each sample.
        cuts: how its weights can be split, in a border of shards, or of replicas.
        after: the layer that follows with nothing but elementwise functions in between.
        sparse: whether its gradient has only the rows that were looked up.
        scores: whether its result are scores whose softmax the loss takes: they may stay divided.
        family: the layer by rows that ends what this one by columns begins, with others beside it:
            nothing travels within where all ranks have all samples. See `split.families`.
        heads: ranks have to get as many of them each, for that; 0 where there are none.
        tied: whether another layer has some of its weights, too: both are divided alike, or none.
            They are `parts` of the one that comes first.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    forward: Line
    backward: Line
    rows: float
    given: float
    output: float
    kept: float
    flops: float
    cuts: tuple[Cut, ...] = ()
    after: str = ""
    scores: bool = False
    sparse: bool = False
    family: str = ""
    heads: int = 0
    tied: bool = False

    def touched(self, samples: float) -> float:
        """Bytes of a sparse gradient: rows, and the number of each."""
        return samples * (self.output + 8 * self.rows)

    @property
    def nbytes(self) -> int:
        """Of its weights."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Profile:
    """What a task costs on the machine it was measured on.

    Args:
        model: fingerprint of the model and task: names, shapes, types, batch size.
        batch_size: of the global batch.
        accumulate: micro-batches that a batch is cut into anyway.
        layers: in the order of the forward pass.
        update: seconds of the optimizer for a byte of weights, and once for each step.
        optimizer: bytes of its state for a byte of weights.
        buffers: bytes of what the model has besides weights.
        sample: bytes of a sample, input and target.
        base: bytes of memory that the process had taken before there was a model.
        speed: arithmetic of this worker while measuring, in 10⁹ operations a second.
        device: it was measured on.
    """

    model: str
    batch_size: int
    accumulate: int
    layers: tuple[Layer, ...]
    update: Line
    optimizer: float
    buffers: int
    sample: float
    base: int
    speed: float
    device: str

    @property
    def nbytes(self) -> int:
        """Of all trainable weights."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def piece(self) -> int:
        """Samples of a micro-batch, over all workers."""
        return -(-self.batch_size // self.accumulate)

    @property
    def across_samples(self) -> bool:
        """Whether a layer looks across samples: who has some of them does not compute the same."""
        return any("BatchNorm" in layer.kind for layer in self.layers)

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """What `to_json` gave.

        Raises:
            UsageError: it is not that.
        """
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT:
                raise KeyError("format")
            layers = tuple(_layer(each) for each in content.pop("layers"))
            return cls(layers=layers, update=Line(**content.pop("update")), **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this is no profile of this version: {error!r}") from error


def _layer(content: Mapping[str, Any]) -> Layer:
    parts = tuple(
        Part(part["name"], tuple(part["shape"]), part["nbytes"]) for part in content["parts"]
    )
    made = {name: Line(**content[name]) for name in ("forward", "backward")}
    return Layer(**{**content, **made, "parts": parts, "cuts": tuple(content["cuts"])})
