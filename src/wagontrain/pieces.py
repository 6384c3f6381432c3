"""Pieces of tensors in files: torch.distributed.checkpoint's safetensors form.

Each piece is stored under its tensor's name, and the file's header says where in the whole tensor
it begins. Nothing is a pickle. Loading torch.distributed.checkpoint takes a second, so that this
module is imported only where something is saved or restored.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from wagontrain.errors import TrainingError
from wagontrain.folder import checksum, flush_to_disk
from wagontrain.layout import Layout, Piece
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


def read(folder: Path, wanted: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The wanted parts of tensors, each read from where its pieces lie."""
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata()
    parts: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, layout in wanted.items():
            entry: Any = metadata.state_dict_metadata[name]
            part = parts[name] = torch.empty(layout.local_shape, dtype=entry.properties.dtype)
            pieces = Pieces(layout.shape, list(layout.pieces(part)))
            for item in create_read_items_for_chunk_list(name, entry, pieces.chunks()):
                stored: Any = metadata.storage_data[item.storage_index]
                file = str(stored.relative_path)
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, framework="pt"))
                content = files[file].get_slice(name)
                target = pieces.at(item.dest_index)
                target[_box(item.dest_offsets, item.lengths)] = (
                    content[_box(item.storage_offsets, item.lengths)]
                    if item.lengths
                    else files[file].get_tensor(name)
                )
    return parts


def _box(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(offsets, lengths, strict=True))


def described(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every whole tensor in the files of a folder."""
    metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
