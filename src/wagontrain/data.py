"""Data as people have it: what of a DataLoader of one's own can be honoured, and streams.

Which samples a step sees has to follow from the seed and the step alone, for any number of
workers. So a DataLoader is taken apart: its data set, batch size, order and collation are the
task's, and what would make the order hang on anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from wagontrain.errors import TaskError


def is_stream(dataset: object) -> bool:
    """Whether a data set is read from its beginning on, and cannot be indexed."""
    if isinstance(dataset, IterableDataset):
        return True
    return isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__")


def length(dataset: object, name: str) -> int:
    """Samples in a data set that can be indexed.

    Raises:
        TaskError: it has no length, cannot be indexed, or is empty.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"Task.{name} ({type(dataset).__name__}) has no length or cannot be indexed: which "
            "samples a step sees has to be known beforehand; give a map-style dataset with "
            "__len__ and __getitem__"
        )
    return _counted(dataset, name)


def _counted(dataset: Sized, name: str) -> int:
    try:
        found = len(dataset)
    except (TypeError, ValueError) as error:
        raise TaskError(f"Task.{name} ({type(dataset).__name__}) has no length: {error}") from error
    if found == 0:
        raise TaskError(f"Task.{name} is empty: give at least one sample")
    return found


def stream_length(dataset: object, told: int | None) -> int:
    """Samples in an epoch of a stream.

    Args:
        dataset: the stream.
        told: how many there are, where the task says it.

    Raises:
        TaskError: nobody knows, or it can be read only once.
    """
    if isinstance(dataset, Iterator):
        raise TaskError(
            f"Task.train ({type(dataset).__name__}) is an iterator, which can be read once: give "
            "an IterableDataset, whose __iter__ begins anew for every epoch, rank and trial"
        )
    if told is not None:
        return told
    if not isinstance(dataset, Sized):
        raise TaskError(
            f"Task.train ({type(dataset).__name__}) is a stream without __len__: say in "
            "Task.epoch_samples how many samples of it make an epoch"
        )
    return _counted(dataset, "train")


def require_streamable(shuffle: bool, sampler: Any, loader_workers: int) -> None:
    """Refuse what cannot be had with a stream.

    Raises:
        TaskError: says what, and why.
    """
    if shuffle or sampler is not None:
        raise TaskError(
            "Task.train is a stream, whose samples come in its own order: say shuffle=False, and "
            "shuffle within the stream (random numbers are seeded there by seed and epoch)"
        )
    if loader_workers:
        raise TaskError(
            f"Task.loader_workers is {loader_workers}, but Task.train is a stream: each process "
            "would read all of it; leave loader_workers at 0"
        )


def require_sampler(sampler: Any) -> None:
    """Refuse what is no order of single samples of the whole data set.

    Raises:
        TaskError: says what it is instead.
    """
    kind = type(sampler).__name__
    if not isinstance(sampler, Sized):
        raise TaskError(
            f"the sampler ({kind}) has no length: give a sampler of torch.utils.data, or one "
            "with __len__"
        )
    if isinstance(sampler, DistributedSampler):
        raise TaskError(
            f"the sampler is a {kind}: every worker takes its share of each batch by itself here; "
            "give shuffle=True or another sampler instead"
        )
    if isinstance(sampler, BatchSampler):
        raise TaskError(
            f"the sampler is a {kind}, which gives batches: which samples make a global batch "
            "follows from Task.batch_size; give a sampler of single samples"
        )


def taken_apart(train: Any, validation: Any, batch_size: int, collate: Any) -> dict[str, Any]:
    """The fields of a task that DataLoaders given as its data stand for.

    Args:
        train: the task's; anything.
        validation: the task's; anything.
        batch_size: the task's; 0 where the loader's is meant.
        collate: the task's.

    Raises:
        TaskError: something of a loader cannot be honoured; says what and why.
    """
    fields = of_loader(train, batch_size, collate) if isinstance(train, DataLoader) else {}
    if isinstance(validation, DataLoader):
        fields["validation"] = of_validation_loader(validation, fields.get("collate", collate))
    return fields


def of_loader(loader: DataLoader[Any], batch_size: int, collate: Any) -> dict[str, Any]:
    """The fields of a task that a DataLoader for training stands for.

    Args:
        loader: given as `train`.
        batch_size: the task's; 0 where the loader's is meant.
        collate: the task's.

    Raises:
        TaskError: something of the loader cannot be honoured; says what and why.
    """
    _require_plain(loader, "train")
    if batch_size not in (0, loader.batch_size):
        raise TaskError(
            f"Task.batch_size is {batch_size}, but the DataLoader's is {loader.batch_size}: leave "
            "one out; it is the global batch, over all workers"
        )
    if collate is not None:
        raise TaskError("Task.collate and the DataLoader's collate_fn were both given: leave one")
    fields = {
        "train": loader.dataset,
        "batch_size": loader.batch_size,
        "collate": collation(loader),
        "loader_workers": loader.num_workers,
        "shuffle": False,
    }
    if is_stream(loader.dataset):
        return fields
    require_sampler(loader.sampler)
    if getattr(loader.sampler, "generator", None) is not None:
        raise TaskError(
            "Task.train is a DataLoader with a generator of its own: the order of samples follows "
            "from Task.seed, so that a run can be resumed anywhere; leave the generator out"
        )
    fields["shuffle"] = _shuffles(loader, "train")
    if not fields["shuffle"] and type(loader.sampler) is not SequentialSampler:
        fields["sampler"] = loader.sampler
    return fields


def of_validation_loader(loader: DataLoader[Any], collate: Any) -> Any:
    """The data set of a DataLoader for validation, all of which is measured, in whatever order.

    Raises:
        TaskError: something of the loader cannot be honoured.
    """
    _require_plain(loader, "validation")
    if type(loader.sampler) is not SequentialSampler and not _shuffles(loader, "validation"):
        raise TaskError(
            f"Task.validation is a DataLoader with a {type(loader.sampler).__name__}: every sample "
            "is measured once, on some worker; give the samples that are meant as a Subset"
        )
    if collation(loader) is not collate:
        raise TaskError(
            "Task.validation is a DataLoader with another collate_fn than training has: a task "
            "has one for both; give both loaders the same"
        )
    return loader.dataset


def collation(loader: DataLoader[Any]) -> Any:
    """What a loader makes batches by; None for torch's default."""
    return None if loader.collate_fn is default_collate else loader.collate_fn


def _shuffles(loader: DataLoader[Any], name: str) -> bool:
    """Whether a loader takes every sample once, in any order."""
    sampler: Any = loader.sampler
    once = type(sampler) is RandomSampler and not sampler.replacement
    return once and sampler.num_samples == length(loader.dataset, name)


def _require_plain(loader: DataLoader[Any], name: str) -> None:
    if loader.batch_size is None or loader.collate_fn is default_convert:
        raise TaskError(
            f"Task.{name} is a DataLoader "
            + (
                "with a batch_sampler of its own"
                if loader.batch_sampler is not None
                else "without batch_size"
            )
            + ": which samples make a global batch follows from Task.batch_size; give batch_size, "
            "and a sampler where the order is special"
        )
    if loader.drop_last:
        raise TaskError(
            f"Task.{name} is a DataLoader with drop_last=True: here the last, smaller batch counts "
            "as what it is, and no sample is left out; leave drop_last off"
        )
    if loader.worker_init_fn is not None:
        raise TaskError(
            f"Task.{name} is a DataLoader with a worker_init_fn: random numbers are seeded by "
            "(seed, epoch, sample) here, and do not hang on loading processes; leave it out"
        )
