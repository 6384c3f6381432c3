"""Which samples a step sees, which of them a rank takes, and how they are loaded.

The global batch of a step depends on (seed, epoch, step) alone, never on the number of workers
or loaders. It is first cut into micro-batches and then each micro-batch into shares, so that
a layer that looks across samples (batch norm) meets the same groups on any number of workers.

    epoch's order      permutation of all samples, from (seed, epoch)
    global batch       a slice of it
    micro-batch        a chunk of the global batch (Task.accumulate of them)
    share              the part of a micro-batch that one rank takes
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from wagontrain.errors import ModelError, TaskError
from wagontrain.mesh import equal_shares, ranges, shares
from wagontrain.seeding import seeded_numbers
from wagontrain.streams import Stream
from wagontrain.task import Task, describe, origin, place


def mix(*parts: int | str) -> int:
    """A 63-bit seed from several numbers, so that (0, 1) and (1, 0) do not meet."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Order:
    """The order in which the samples of a dataset are visited, epoch by epoch."""

    samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    @property
    def steps(self) -> int:
        """Steps in one epoch."""
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int) -> Tensor:
        """All dataset indices in this epoch's order, int64 of shape [samples]."""
        if not self.shuffle:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)

    def positions(self, step: int) -> range:
        """Positions in the epoch's order that step `step` of the epoch takes."""
        start = step * self.batch_size
        return range(start, min(start + self.batch_size, self.samples))


@dataclass(frozen=True)
class SampledOrder(Order):
    """The order that a sampler gives, seeded for every epoch."""

    sampler: Any = None

    def epoch(self, epoch: int) -> Tensor:
        """All dataset indices in this epoch's order, int64 of shape [samples].

        Raises:
            TaskError: the sampler gives another order when asked again, or not as many.
        """
        first, again = self._asked(epoch), self._asked(epoch) if epoch == 0 else None
        if again is not None and not torch.equal(first, again):
            raise TaskError(
                f"Task.sampler ({type(self.sampler).__name__}) gives another order when it is "
                "asked again for the same epoch, so that no run could be resumed: have it draw by "
                "torch's random numbers, which are seeded for every epoch"
            )
        if len(first) != self.samples:
            raise TaskError(
                f"Task.sampler ({type(self.sampler).__name__}) gives {len(first)} samples in epoch "
                f"{epoch}, but its length is {self.samples}"
            )
        return first

    def _asked(self, epoch: int) -> Tensor:
        with seeded_numbers(mix(self.seed, "order", epoch)):
            if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
                set_epoch(epoch)
            return torch.tensor(list(self.sampler), dtype=torch.int64)


@dataclass(frozen=True)
class Cut:
    """How ranks divide what they are given: equal shares, or in proportion to `weights`."""

    rank: int = 0
    size: int = 1
    weights: tuple[float, ...] | None = None

    def micro_batches(self, positions: range, pieces: int) -> list[tuple[range, range]]:
        """(positions of the whole micro-batch, positions of this rank's share) for each piece."""
        result = []
        for piece in ranges(equal_shares(len(positions), pieces), positions.start):
            if len(piece):
                mine = ranges(shares(len(piece), self.size, self.weights), piece.start)[self.rank]
                result.append((piece, mine))
        return result


@dataclass(frozen=True)
class MicroBatch:
    """This rank's share of one micro-batch.

    A rank without samples (`count` 0) still holds one sample, a stand-in: it takes part in
    the exchange with weight zero.
    """

    inputs: Any
    target: Any
    count: int
    total: int

    @property
    def nbytes(self) -> int:
        """Of all tensors; what is input and target at once counts once."""
        leaves = pytree.tree_leaves((self.inputs, self.target))
        return sum({id(leaf): leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)}.values())


@dataclass(frozen=True)
class Batch:
    """This rank's share of the global batch of one step.

    `step` counts from 0 over the whole training; `positions` are the places of the global
    batch in the epoch's order, `mine` those of this rank. `seconds` is how long this rank waited
    for its part.
    """

    epoch: int
    step: int
    positions: range
    mine: tuple[range, ...]
    micro_batches: tuple[MicroBatch, ...]
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Samples in the global batch."""
        return len(self.positions)


@dataclass
class Batches:
    """The batches of one rank, exactly resumable from any (epoch, step).

    Args:
        dataset: map-style dataset of `(input, target)`, or a stream.
        order: which samples each step takes.
        cut: how a batch is divided among ranks.
        pieces: micro-batches per batch.
        device: where tensors are put.
        collate: list of samples -> batch; None for torch's default.
        loader_workers: data-loading processes.
    """

    dataset: Dataset[Any] | Stream
    order: Order
    cut: Cut = Cut()
    pieces: int = 1
    device: torch.device = torch.device("cpu")
    collate: Callable[[list[Any]], Any] | None = None
    loader_workers: int = 0
    _ordered: tuple[int, Tensor] = field(default=(-1, torch.empty(0)), init=False, repr=False)

    @classmethod
    def of_training(cls, task: Task, device: torch.device, cut: Cut = Cut()) -> Batches:
        """The training batches of `task` for the rank that `cut` names."""
        order = Order(task.samples, task.batch_size, task.seed, task.shuffle)
        given: Any = task.train  # a DataLoader was taken apart
        data: Dataset[Any] | Stream
        if task.is_stream:
            data = Stream(given, exhaustive=task.epoch_samples is None)
        else:
            data = seeded(given, task.seed)
            if task.sampler is not None:
                order = SampledOrder(
                    order.samples, order.batch_size, order.seed, False, task.sampler
                )
        return cls(
            data,
            order,
            cut,
            task.accumulate,
            device,
            task.collate,
            task.loader_workers,
        )

    @classmethod
    def of_validation(cls, task: Task, device: torch.device, cut: Cut = Cut()) -> Batches | None:
        """The validation batches of `task` for the rank that `cut` names, if it has any."""
        if task.validation is None:
            return None
        samples = len(task.validation)  # type: ignore[arg-type]
        order = Order(samples, min(task.batch_size, samples), shuffle=False)
        data = seeded(task.validation, task.seed)
        return cls(data, order, cut, 1, device, task.collate, task.loader_workers)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from step `first_step` of the epoch on."""
        if not 0 <= first_step <= self.order.steps:
            raise ValueError(f"step {first_step} is not in an epoch of {self.order.steps} steps")
        if isinstance(self.dataset, Stream):
            return self._streamed(self.dataset, epoch, first_step)
        order = self.order.epoch(epoch)
        steps = [(step, self.order.positions(step)) for step in range(first_step, self.order.steps)]
        return self._batches(epoch, order, steps, self.cut)

    def _streamed(self, stream: Stream, epoch: int, first_step: int) -> Iterator[Batch]:
        """Batches of a stream: all of it is read, and this rank's share kept."""
        reading = stream.begin(epoch, mix(self.order.seed, "stream", epoch))
        reading.skip(min(first_step * self.order.batch_size, self.order.samples))
        for step in range(first_step, self.order.steps):
            began = time.perf_counter()
            positions = self.order.positions(step)
            samples = reading.take(len(positions))
            if stream.exhaustive and step == self.order.steps - 1:
                reading.require_end()
            pieces = self.cut.micro_batches(positions, self.pieces)
            micro_batches = tuple(
                self._micro_batch(
                    self._collated([samples[at - positions.start] for at in mine or piece[:1]]),
                    len(mine),
                    len(piece),
                )
                for piece, mine in pieces
            )
            yield Batch(
                epoch, epoch * self.order.steps + step, positions,
                tuple(mine for _, mine in pieces), micro_batches, time.perf_counter() - began,
            )  # fmt: skip

    def _collated(self, samples: list[Any]) -> Any:
        try:
            return (self.collate or default_collate)(samples)
        except Exception as error:  # whatever the user's collate raises is theirs to read
            raise ModelError(
                f"{len(samples)} samples of the stream cannot be put together: {origin(error)}"
            ) from error

    def part(self, epoch: int, step: int, positions: range, cut: Cut) -> Batch:
        """A share of some of an epoch's samples, whichever: for work that is handed out piece by
        piece.

        Args:
            epoch: whose order the positions are of.
            step: of the epoch; only a number.
            positions: of the samples that `cut` divides.
            cut: which share of them.
        """
        if epoch != self._ordered[0]:
            self._ordered = (epoch, self.order.epoch(epoch))
        return next(self._batches(epoch, self._ordered[1], [(step, positions)], cut))

    def _batches(
        self, epoch: int, order: Tensor, steps: Sequence[tuple[int, range]], cut: Cut
    ) -> Iterator[Batch]:
        pieces = [cut.micro_batches(positions, self.pieces) for _, positions in steps]
        taken = [mine or piece[:1] for each in pieces for piece, mine in each]
        parts = [order[part.start : part.stop] for part in taken]
        indices = iter(parts)
        loaded = self._load(epoch, parts)
        for (step, positions), each in zip(steps, pieces, strict=True):
            began = time.perf_counter()
            micro_batches = tuple(
                self._micro_batch(self._read(loaded, next(indices)), len(mine), len(piece))
                for piece, mine in each
            )
            yield Batch(
                epoch=epoch,
                step=epoch * self.order.steps + step,
                positions=positions,
                mine=tuple(mine for _, mine in each),
                micro_batches=micro_batches,
                seconds=time.perf_counter() - began,
            )

    def _read(self, loaded: Iterator[Any], indices: Tensor) -> Any:
        try:
            return next(loaded)
        except Exception as error:  # whatever the user's data set raises is theirs to read
            some = ", ".join(map(str, indices[:16].tolist())) + (
                " ..." if len(indices) > 16 else ""
            )
            raise ModelError(
                f"the data set failed on one of the samples {some}: {origin(error)}"
            ) from error

    def _micro_batch(self, collated: Any, count: int, total: int) -> MicroBatch:
        if isinstance(collated, Mapping):  # input and target at once, labels among them
            record = place(dict(collated), self.device)
            return MicroBatch(record, record, count, total)
        if not isinstance(collated, tuple | list) or len(collated) != 2:
            raise TaskError(
                f"the data set gives samples that collate to {describe(collated)}: "
                "each sample has to be a pair (input, target), or a dict that is both"
            )
        inputs, target = place(collated, self.device) if self.device.type != "cpu" else collated
        return MicroBatch(inputs, target, count, total)

    def _load(self, epoch: int, parts: Sequence[Tensor]) -> Iterator[Any]:
        """The collated samples of each part in turn, `parts` being dataset indices."""
        assert not isinstance(self.dataset, Stream)
        if isinstance(self.dataset, SeededDataset):
            self._sampler.epoch = epoch
        elif self.loader_workers == 0 and self.collate is None:
            tensors = _tensors(self.dataset)
            if tensors is not None:
                columns, at = tensors
                return ([column[at(part)] for column in columns] for part in parts)
        self._sampler.parts = parts
        return iter(self._loader)

    @cached_property
    def _sampler(self) -> _Parts:
        return _Parts(seeded=isinstance(self.dataset, SeededDataset))

    @cached_property
    def _loader(self) -> DataLoader[Any]:
        assert not isinstance(self.dataset, Stream)
        return DataLoader(
            self.dataset,
            batch_sampler=self._sampler,
            collate_fn=self.collate,
            num_workers=self.loader_workers,
            persistent_workers=self.loader_workers > 0,
            pin_memory=self.device.type == "cuda",
            # The loader seeds its processes from this; drawn from the global generator it
            # would shift the worker's own random numbers.
            generator=torch.Generator().manual_seed(self.order.seed),
        )


class _Parts:
    """A batch sampler that gives out what it was last told to."""

    def __init__(self, seeded: bool) -> None:
        self.seeded = seeded
        self.epoch = 0
        self.parts: Sequence[Tensor] = []

    def __iter__(self) -> Iterator[list[Any]]:
        for part in self.parts:
            indices = part.tolist()
            yield [(self.epoch, index) for index in indices] if self.seeded else indices

    def __len__(self) -> int:
        return len(self.parts)


def _tensors(dataset: Dataset[Any]) -> tuple[tuple[Tensor, ...], Callable[[Tensor], Tensor]] | None:
    """Tensors to index at once where that gives exactly what fetching and stacking would."""
    if type(dataset) is TensorDataset:
        return dataset.tensors, lambda part: part
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        chosen = torch.as_tensor(dataset.indices)
        return dataset.dataset.tensors, lambda part: chosen[part]
    return None


class SeededDataset(Dataset[Any]):
    """A dataset with random augmentation, its draws fixed by (seed, epoch, sample).

    Without this, what an augmented sample looks like would depend on which rank and which
    loader process happened to fetch it, and no two worker counts would train alike.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with seeded_numbers(mix(self.seed, "sample", epoch, index)):
            return self.dataset[index]


_PROBES = 9


def seeded(dataset: Dataset[Any], seed: int) -> Dataset[Any]:
    """The dataset, with its random draws fixed if it makes any."""
    return SeededDataset(dataset, seed) if draws_at_random(dataset) else dataset


def draws_at_random(dataset: Dataset[Any]) -> bool:
    """Whether fetching a few samples moves torch's, Python's or NumPy's random numbers."""
    samples = len(dataset)  # type: ignore[arg-type]
    with seeded_numbers(0):
        before = _random_state()
        try:
            for index in range(0, samples, max(1, samples // _PROBES)):
                dataset[index]
        except Exception as error:  # whatever the user's data set raises is theirs to read
            raise TaskError(f"a sample of the data set cannot be read: {origin(error)}") from error
        return _random_state() != before


def _random_state() -> tuple[bytes, Any, tuple[Any, ...]]:
    """The state of torch's, Python's and NumPy's random numbers, to compare."""
    kind, keys, *rest = np.random.get_state()
    torchs = torch.default_generator.get_state().numpy().tobytes()
    return torchs, random.getstate(), (kind, np.asarray(keys).tobytes(), *rest)
