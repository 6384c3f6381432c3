"""Pieces of tensors in files: torch.distributed.checkpoint's safetensors form.

Each piece is stored under its tensor's name, and the file's header says where in the whole tensor
it begins. Nothing is a pickle. Loading torch.distributed.checkpoint takes a second, so that this
module is imported only where something is saved or restored.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from wagontrain.errors import TrainingError, UsageError
from wagontrain.folder import checksum, flush_to_disk
from wagontrain.layout import SAFETENSORS, Layout, Piece
from wagontrain.task import origin

# Writing a file takes three times its size in memory.
_PART_BYTES = 32 * 2**20


class Pieces:
    """This rank's pieces of one tensor, as torch.distributed.checkpoint asks for them."""

    def __init__(self, shape: tuple[int, ...], pieces: list[tuple[tuple[int, ...], Tensor]]):
        self.shape = torch.Size(shape)
        self.pieces = pieces

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk, TensorProperties.create_from_tensor(tensor), self.shape
                ),
            )
            for chunk, (_, tensor) in zip(self.chunks(), self.pieces, strict=True)
        ]

    def at(self, index: MetadataIndex) -> Tensor:
        """The piece that torch.distributed.checkpoint means."""
        if index.index is not None:
            return self.pieces[index.index][1]
        return next(tensor for offset, tensor in self.pieces if torch.Size(offset) == index.offset)

    def chunks(self) -> list[ChunkStorageMetadata]:
        """Where each piece belongs."""
        return [
            ChunkStorageMetadata(torch.Size(offset), tensor.shape) for offset, tensor in self.pieces
        ]


class _OwnPart(DefaultSavePlanner):
    """Plans what one rank writes; whether all of it together is whole, `save` sees to."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        pieces: Pieces = self.state_dict[index.fqn]
        return pieces.at(index)


def write(pieces: Iterator[Piece], folder: Path, label: str) -> dict[str, str]:
    """Write pieces as they come, some of them to a file; returns each file's checksum."""
    files: dict[str, str] = {}
    # A file holds one piece under a name: the second ones of some tensors go to another file.
    waiting: list[dict[str, Pieces]] = []
    seen: set[int] = set()
    size = 0

    def flush() -> None:
        nonlocal size
        for content in waiting:
            file = folder / f"{label}-{len(files)}.safetensors"
            _write_file(content, file)
            files[file.name] = checksum(file)
        waiting.clear()
        seen.clear()
        size = 0

    for name, shape, offset, piece in pieces:
        if piece.numel() == 0:
            continue
        if size and size + piece.nbytes > _PART_BYTES:
            flush()
        if all(name in each for each in waiting):
            waiting.append({})
        content = piece.detach().cpu()
        memory = content.untyped_storage().data_ptr()
        # Tied weights share memory, which the format does not know: both are stored.
        stored = content.clone() if memory in seen else content
        next(each for each in waiting if name not in each)[name] = Pieces(shape, [(offset, stored)])
        seen.add(memory)
        size += piece.nbytes
    flush()
    return files


def _write_file(content: Mapping[str, Pieces], file: Path) -> None:
    scratch = file.with_suffix(".scratch")
    writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
    try:
        with warnings.catch_warnings():  # alone is meant: together they would talk by pickle
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(content), storage_writer=writer, planner=_OwnPart(), no_dist=True)
    except dcp.api.CheckpointException as error:  # is no Exception
        (cause, _), *_ = error.failures.values()
        what = f"the checkpoint could not be written into {str(file.parent.parent)!r}"
        raise TrainingError(f"{what}: {origin(cause)}") from cause
    (written,) = scratch.glob("*.safetensors")
    written.rename(file)
    shutil.rmtree(scratch)
    flush_to_disk(file)


@dataclass(frozen=True)
class _Stored:
    """A piece in a file: where it begins in the whole tensor, and its shape."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class _Whole:
    """A tensor that is stored in pieces."""

    dtype: torch.dtype
    pieces: list[_Stored] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """As far as the pieces reach."""
        ends = [
            [at + n for at, n in zip(piece.offset, piece.shape, strict=True)]
            for piece in self.pieces
        ]
        return tuple(map(max, zip(*ends, strict=True)))

    def is_covered(self) -> bool:
        """Whether the pieces lie side by side along one dim, without gap, and make up the whole.

        Whoever asks for the memory of the whole can then rely on its being no more than is stored.
        """
        shape = self.shape
        dims = {
            dim
            for piece in self.pieces
            for dim in range(len(shape))
            if piece.shape[dim] != shape[dim]
        }
        if not dims:
            return len(self.pieces) == 1
        (dim, *others) = dims
        at = 0
        for piece in sorted(self.pieces, key=lambda piece: piece.offset[dim]):
            if piece.offset[dim] != at or any(piece.offset[:dim] + piece.offset[dim + 1 :]):
                return False
            at += piece.shape[dim]
        return not others


class Reader:
    """Reads parts of tensors from the files of a checkpoint, each from where its pieces lie.

    Files are not believed: what their headers say is checked before memory is asked for.

    Args:
        folder: the checkpoint's.
        files: names of its files.
        shapes: of the whole tensors that are to be in them.

    Raises:
        UsageError: one is no file of tensors, or a tensor has not all its pieces.
    """

    def __init__(
        self, folder: Path, files: Collection[str], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        self._folder = folder
        self._tensors: dict[str, _Whole] = {}
        for file in files:
            try:
                self._look_into(file)
            # What safetensors and the metadata's JSON raise for bytes that are no such file.
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise self._damaged(f"{file} is no file of tensors ({error})") from error
        for name in self._tensors.keys() | {name for name in shapes if 0 not in shapes[name]}:
            tensor = self._tensors.get(name)
            told = shapes.get(name)
            if tensor is None or list(tensor.shape) != told or not tensor.is_covered():
                raise self._damaged(f"of tensor {name!r} not every piece is there, or twice")

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every whole tensor."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, wanted: Mapping[str, Layout]) -> dict[str, Tensor]:
        """The wanted parts of tensors.

        Raises:
            UsageError: one of them is not of that shape.
        """
        parts: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for name, layout in wanted.items():
                tensor = self._tensors[name]
                if tensor.shape != layout.shape:
                    raise self._damaged(f"tensor {name!r} is of shape {list(tensor.shape)}")
                part = parts[name] = torch.empty(layout.local_shape, dtype=tensor.dtype)
                for offset, block in layout.pieces(part):
                    for piece in tensor.pieces:
                        there, here = _common(piece, offset, tuple(block.shape))
                        if not all(part.stop > part.start for part in there):
                            continue
                        if piece.file not in files:
                            opened = safe_open(self._folder / piece.file, framework="pt")
                            files[piece.file] = stack.enter_context(opened)
                        if there:
                            block[here] = files[piece.file].get_slice(name)[there]
                        else:  # a single number, which cannot be cut
                            block.copy_(files[piece.file].get_tensor(name))
        return parts

    def _look_into(self, file: str) -> None:
        with safe_open(self._folder / file, framework="pt") as content:
            places = json.loads((content.metadata() or {})[_PLACES])
            for name in content.keys():  # noqa: SIM118  not a dict
                piece = content.get_slice(name)
                shape = tuple(piece.get_shape())
                offset = tuple(places[name]["saved_offsets"])
                if len(offset) != len(shape) or not all(type(n) is int and n >= 0 for n in offset):
                    raise ValueError(f"{name!r} begins at {offset}")
                dtype = SAFETENSORS[piece.get_dtype()]
                tensor = self._tensors.setdefault(name, _Whole(dtype))
                first = tensor.pieces[0].shape if tensor.pieces else shape
                if tensor.dtype is not dtype or len(first) != len(shape):
                    raise ValueError(f"{name!r} is of another type, or of other dims, elsewhere")
                tensor.pieces.append(_Stored(file, offset, shape))

    def _damaged(self, why: str) -> UsageError:
        return UsageError(
            f"checkpoint {str(self._folder)!r} is damaged: {why}; take an earlier one"
        )


def _common(
    piece: _Stored, offset: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a stored piece and a block of the whole have in common, as slices of either."""
    there, here = [], []
    for begins, length, at, n in zip(piece.offset, piece.shape, offset, size, strict=True):
        start, stop = max(begins, at), min(begins + length, at + n)
        there.append(slice(start - begins, stop - begins))
        here.append(slice(start - at, stop - at))
    return tuple(there), tuple(here)


_PLACES = "DCP_SHARDING_INFO"
