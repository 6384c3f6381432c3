"""Checkpoints: the state of a training in files that any strategy can take up again.

    step-120/state.json             what is not a tensor, and a checksum of every other file
    step-120/rank0-0.safetensors    pieces of tensors, with where they belong

The tensor files are those of torch.distributed.checkpoint in its safetensors form: each rank
writes the pieces that it answers for, and nobody gathers anything. Where ranks share no disk,
rank 0 writes for all, some pieces at a time. Everything is written into a folder with another
name, flushed to the disk and renamed, so that a crash at any moment leaves the checkpoint before
it whole. No file holds a pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wagontrain import plain
from wagontrain.errors import UsageError
from wagontrain.folder import checksum, flush_to_disk
from wagontrain.layout import SAFETENSORS, Layout, Piece, as_bytes
from wagontrain.state import Held, Source, announced, shared_plain
from wagontrain.transport import Context
from wagontrain.version import __version__

if TYPE_CHECKING:
    from wagontrain.pieces import Reader

_FORMAT = 1
_NAME = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there."""

    path: Path

    @property
    def description(self) -> dict[str, Any]:
        """What is not a tensor.

        Raises:
            UsageError: there is none, it is of a newer version, or it cannot be read.
        """
        file = self.path / _NAME
        try:
            if file.stat().st_size > _LARGEST:
                raise self._damaged(f"{_NAME} has {file.stat().st_size} bytes")
            result: dict[str, Any] = plain.decode(file.read_text())
        except OSError as error:
            raise UsageError(
                f"{str(self.path)!r} is no checkpoint ({error.strerror}: {_NAME}): give a run "
                "directory, or a folder such as RUN_DIR/checkpoints/step-120"
            ) from error
        except ValueError as error:
            raise self._damaged(f"{_NAME} is not what was written ({error})") from error
        if not isinstance(result, dict) or result.get("format") != _FORMAT:
            raise UsageError(
                f"checkpoint {str(self.path)!r} is of a form that this version "
                f"({__version__}) does not know: take the one that wrote it"
            )
        if misfit := _misfit(result):
            raise self._damaged(f"{_NAME} is not what was written ({misfit})")
        return result

    @property
    def steps(self) -> int:
        """Steps that had been taken."""
        return int(self.description["steps"])

    def check(self) -> None:
        """Compare every file with what was written.

        Raises:
            UsageError: one is missing, cut short, changed, or was put there by somebody else.
        """
        files = self.description["files"]
        for name, expected in files.items():
            file = self.path / name
            if not file.is_file() or checksum(file) != expected:
                what = "was changed or cut short" if file.is_file() else "is missing"
                raise self._damaged(f"{name} {what}")

    def reader(self) -> Reader:
        """What reads its tensors.

        Raises:
            UsageError: they are damaged.
        """
        from wagontrain import pieces

        description = self.description
        return pieces.Reader(self.path, description["files"], description["shapes"])

    def _damaged(self, why: str) -> UsageError:
        return UsageError(f"checkpoint {str(self.path)!r} is damaged: {why}; take an earlier one")


_LARGEST = 2**28
"""Bytes of state.json that are read at all: it holds a few numbers for each parameter."""


def _misfit(content: Mapping[str, Any]) -> str:
    """What of a description is not as it is written; empty where all is."""
    kinds = {"steps": int, "files": dict, "shapes": dict, "data": dict, "optimizer": dict}
    for name, kind in kinds.items():
        if type(content.get(name)) is not kind:
            return f"no {name!r}"
    for name in content["files"]:
        # Nothing but what ranks write, and nothing outside of the folder.
        if not re.fullmatch(r"rank\d+-\d+\.safetensors", str(name)):
            return f"no rank writes a file {name!r}"
    for name, shape in content["shapes"].items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            return f"{name!r} of shape {shape!r}"
    optimizer = content["optimizer"]
    groups, state = optimizer.get("groups"), optimizer.get("state")
    if not isinstance(groups, list) or not all(isinstance(each, dict) for each in groups):
        return "no groups of parameters"
    if not isinstance(state, dict) or not all(isinstance(each, dict) for each in state.values()):
        return "no state of the optimizer"
    if not isinstance(content.get("kinds", {}), dict):
        return "no kinds"
    if "scheduler" not in content or not isinstance(content["scheduler"], dict | None):
        return "no scheduler"
    return ""


def latest(folder: Path) -> Checkpoint:
    """The newest checkpoint of a run directory, or the one that `folder` itself is.

    Raises:
        UsageError: there is none.
    """
    if (folder / _NAME).exists():
        return Checkpoint(folder)
    found = sorted(_all_in(folder / "checkpoints"), key=lambda path: int(path.name[5:]))
    if not found:
        raise UsageError(
            f"{str(folder)!r} holds no checkpoint: give the directory of a run that has saved one"
        )
    return Checkpoint(found[-1])


def _all_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.name[5:].isdigit()]


def save(
    context: Context, held: Held, folder: Path, steps: int, notes: Mapping[str, Any], keep: int = 2
) -> Checkpoint:
    """Write `folder/step-STEPS`; every rank has to call this.

    Args:
        context: this rank's place in the job.
        held: what this rank holds of the state.
        folder: of checkpoints; where other ranks do not see rank 0's, rank 0 writes for them.
        steps: steps taken so far.
        notes: what else to keep: plain data.
        keep: how many checkpoints to leave in the folder.
    """
    first = context.world.rank == 0
    target = folder / f"step-{steps}"
    part = folder / f".step-{steps}.part"
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    shared = _is_shared(context, part)
    described = shared_plain(context, held)
    files = _write_own(held, part, context.world.rank) if shared or first else {}
    if not shared:
        files |= _write_for_others(context, held, part)
    shapes = {name: layout.shape for name, layout in held.layouts.items()}
    for text in context.gather_bytes(json.dumps([files, shapes]).encode()):
        others, theirs = json.loads(text)
        files |= others
        shapes |= theirs
    if first:
        content = {
            "format": _FORMAT, "steps": steps, "files": files, "shapes": shapes,
            **notes, **described, "wagontrain": __version__, "torch": torch.__version__,
        }  # fmt: skip
        with (part / _NAME).open("w") as file:
            file.write(plain.encode(content))
            file.flush()
            os.fsync(file.fileno())
        flush_to_disk(part)
        if target.exists():  # resumed from the one before, and come here again
            shutil.rmtree(target)
        part.rename(target)
        flush_to_disk(folder)
        for old in sorted(_all_in(folder), key=lambda path: int(path.name[5:]))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    context.barrier()
    return Checkpoint(target)


def _is_shared(context: Context, folder: Path) -> bool:
    """Whether all ranks see rank 0's folder, and not another one of that name."""
    token = folder / "token"
    if context.world.rank == 0:
        token.write_text(secrets.token_hex(16))
    expected = context.gather_text(token.read_text() if context.world.rank == 0 else "")[0]
    seen = _is_here(token) and token.read_text() == expected
    result = all(row[0] for row in context.gather([float(seen)]))
    if context.world.rank == 0:
        token.unlink()
    return result


def _is_here(file: Path) -> bool:
    return file.is_file()


def _write_own(held: Held, folder: Path, rank: int) -> dict[str, str]:
    """Write the pieces that this rank answers for; returns the checksum of every file."""
    own = (
        (name, layout.shape, offset, piece)
        for name, layout in held.layouts.items()
        if layout.owner
        for offset, piece in layout.pieces(held.tensors[name])
    )
    from wagontrain import pieces

    return pieces.write(own, folder, f"rank{rank}")


def _write_for_others(context: Context, held: Held, folder: Path) -> dict[str, str]:
    """Rank 0 receives the other ranks' pieces and writes them; returns checksums there."""
    from wagontrain import pieces

    everyones = announced(context, held)

    def arriving(rank: int) -> Iterator[Piece]:
        for name, entry in everyones[rank].items():
            for offset, size in entry["pieces"] if entry["owner"] else ():
                dtype = getattr(torch, entry["dtype"])
                piece = torch.empty(size, dtype=dtype, device=context.world.device)
                if piece.numel():
                    context.receive(as_bytes(piece), rank)
                yield name, tuple(entry["shape"]), tuple(offset), piece

    files: dict[str, str] = {}
    for rank in range(1, context.world.size):
        if context.world.rank == 0:
            files |= pieces.write(arriving(rank), folder, f"rank{rank}")
        elif context.world.rank == rank:
            for name, layout in held.layouts.items():
                for _, piece in layout.pieces(held.tensors[name]) if layout.owner else ():
                    if piece.numel():
                        context.send(as_bytes(piece.contiguous()), 0)
    return files


class Restored(Source):
    """A checkpoint as a source of parts; where only rank 0 sees it, rank 0 reads for all.

    Every rank has to make one at the same time.

    Raises:
        UsageError: the checkpoint is damaged.
    """

    def __init__(self, context: Context, checkpoint: Checkpoint) -> None:
        self._context = context
        self._checkpoint = checkpoint
        first = context.world.rank == 0
        here = _is_here(checkpoint.path / _NAME)
        self._shared = all(row[0] for row in context.gather([float(here)]))
        complaint = ""
        content: dict[str, Any] = {}
        tensors: Mapping[str, Any] = {}
        if first:
            try:
                checkpoint.check()
                content, tensors = checkpoint.description, checkpoint.reader().tensors
            except UsageError as error:
                complaint = str(error)
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        told = json.dumps([complaint, plain.encode(content), shapes]).encode()
        complaint, text, found = json.loads(context.gather_bytes(told if first else b"")[0])
        if complaint:
            raise UsageError(complaint)
        self.plain = plain.decode(text)
        self._shapes = {name: tuple(shape) for name, shape in found.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, wanted: Mapping[str, Layout]) -> dict[str, Tensor]:
        if self._shared:
            return self._checkpoint.reader().read(wanted)
        parts: dict[str, Tensor] = {}
        reader = self._checkpoint.reader() if self._context.world.rank == 0 else None
        device = self._context.world.device
        for name, shape in self._shapes.items():
            whole = None
            if reader is not None:
                whole = reader.read({name: Layout(shape)})[name].to(device)
            kind = str(whole.dtype).removeprefix("torch.") if whole is not None else ""
            kind = self._context.gather_text(kind)[0]
            if whole is None:
                whole = torch.empty(shape, dtype=getattr(torch, kind), device=device)
            if whole.numel():
                self._context.broadcast(as_bytes(whole), 0)
            if name in wanted:
                parts[name] = wanted[name].take(whole).cpu()
        return parts


def restored(context: Context, place: Path) -> Restored:
    """The latest checkpoint in a place that rank 0 sees; every rank has to call this.

    Raises:
        UsageError: there is none, or it is damaged; on all ranks.
    """
    found, complaint = "", ""
    if context.world.rank == 0:
        try:
            found = str(latest(place).path.resolve())
        except UsageError as error:
            complaint = str(error)
    complaint = context.gather_text(complaint)[0]
    if complaint:
        raise UsageError(complaint)
    return Restored(context, Checkpoint(Path(context.gather_text(found)[0])))


def export(checkpoint: Checkpoint, file: Path) -> None:
    """Write the model's weights as one safetensors file, under the plain model's names.

    Where a moving average of them was kept (Task.ema), it is that.

    One tensor is in memory at a time. The format: eight bytes with the length of a JSON header,
    the header (type, shape, begin and end of each tensor), the tensors.

    Raises:
        UsageError: the checkpoint is damaged, or the file cannot be written.
    """
    checkpoint.check()
    header: dict[str, Any] = {}
    end = 0
    reader, names = checkpoint.reader(), {kind: name for name, kind in SAFETENSORS.items()}
    tensors = {name: each for name, each in reader.tensors.items() if _is_model(name)}
    for name, (shape, kind) in tensors.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name.removeprefix(_MODEL)] = {
            "dtype": names[kind], "shape": shape, "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, (shape, _) in tensors.items():
                average = name.replace(_MODEL, _AVERAGE, 1)
                source = average if average in reader.tensors else name
                tensor = reader.read({source: Layout(shape)})[source]
                out.write(as_bytes(tensor).numpy().data)
        flush_to_disk(part)
        part.replace(file)
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error


_MODEL = "model."
_AVERAGE = "ema."


def _is_model(name: str) -> bool:
    return name.startswith(_MODEL)
