"""Which part of a tensor a rank holds: everything that saving, loading and comparing has to know.

A strategy divides tensors in its own way, but always along one dim, in ranges. Optimizer state
of the shape of its parameter is divided like it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The part of one tensor that a rank holds.

    Args:
        shape: of the whole tensor.
        dim: along which it is divided; None where this rank holds all of it.
        ranges: indices along `dim` that are held, one range behind the other in the local tensor.
        owner: whether it is this rank that speaks for its part, where several ranks hold it.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    ranges: tuple[range, ...] = ()
    owner: bool = True

    @classmethod
    def whole(cls, tensor: Tensor, owner: bool = True) -> Layout:
        """That of a tensor that is not divided."""
        return cls(tuple(tensor.shape), owner=owner)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.dim is None:
            return self.shape
        held = sum(map(len, self.ranges))
        return (*self.shape[: self.dim], held, *self.shape[self.dim + 1 :])

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of the part, out of the whole tensor."""
        if self.dim is None:
            return tensor.clone()
        parts = [tensor.narrow(self.dim, part.start, len(part)) for part in self.ranges]
        return torch.cat(parts, self.dim) if parts else tensor.narrow(self.dim, 0, 0).clone()

    def pieces(self, local: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each block of the part as (where it begins in the whole tensor, a view of it)."""
        zero = (0,) * len(self.shape)
        if self.dim is None:
            yield zero, local
            return
        start = 0
        for part in self.ranges:
            offset = (*zero[: self.dim], part.start, *zero[self.dim + 1 :])
            yield offset, local.narrow(self.dim, start, len(part))
            start += len(part)

    def of_state(self, state: Tensor) -> Layout:
        """The layout of optimizer state that belongs to a parameter of this layout.

        For what is no part of anything, such as a count of steps, the rank with the beginning of
        the parameter speaks.
        """
        if tuple(state.shape) == self.local_shape:
            return self
        first = self.dim is None or any(part and part.start == 0 for part in self.ranges)
        owner = self.owner and first
        return replace(self, shape=tuple(state.shape), dim=None, ranges=(), owner=owner)


Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]
"""Name, shape of the whole tensor, where the piece begins in it, and the piece."""


SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Types of tensors by the names that they have in a safetensors file."""


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the bytes that it is: not every engine knows every type."""
    return tensor.reshape(-1).view(torch.uint8)


def full_name(layer: str, key: str) -> str:
    """Name of a layer's tensor in the model's `state_dict`; a model that is one layer has none."""
    return f"{layer}.{key}" if layer else key


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one that shares its memory."""
    inside: Any = tensor
    if _is_dtensor(tensor):
        inner: Tensor = inside.to_local().detach()
        return inner
    return tensor.detach()


def as_part_of(parameter: Tensor, part: Tensor) -> Tensor:
    """A rank's part of optimizer state, as the kind of tensor that its parameter is."""
    spec: Any = parameter
    if not _is_dtensor(parameter) or part.shape != spec.to_local().shape:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, spec.device_mesh, spec.placements, shape=spec.shape, stride=spec.stride()
    )


def _is_dtensor(tensor: Tensor) -> bool:
    """By its method: importing the class takes half a second, and few strategies have any."""
    return hasattr(tensor, "to_local")
