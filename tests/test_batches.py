from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from wagontrain.batches import Batch, Batches, Cut, Order, SeededDataset, draws_at_random, mix
from wagontrain.errors import TaskError


class Indices(Dataset[Any]):
    """Each sample is its own index."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index), torch.tensor(-index)


def taken(batch: Batch) -> list[int]:
    """Samples this rank takes, stand-ins left out."""
    return [int(index) for micro in batch.micro_batches for index in micro.inputs[: micro.count]]


orders = st.builds(
    Order,
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    order=orders,
    epoch=st.integers(0, 3),
    size=st.integers(1, 5),
    pieces=st.integers(1, 4),
    weights=st.booleans(),
)
def test_the_ranks_together_take_the_global_batch_in_order_and_nothing_twice(
    order: Order, epoch: int, size: int, pieces: int, weights: bool
) -> None:
    chosen = tuple(range(1, size + 1)) if weights else None
    everyone = [
        list(Batches(Indices(order.samples), order, Cut(rank, size, chosen), pieces).epoch(epoch))
        for rank in range(size)
    ]
    alone = list(Batches(Indices(order.samples), order).epoch(epoch))
    assert len(alone) == order.steps
    for step, batches in enumerate(zip(*everyone, strict=True)):
        counts = {len(batch.micro_batches) for batch in batches}
        assert len(counts) == 1  # all ranks take part in every micro-batch
        together = [
            int(index)
            for number in range(counts.pop())
            for batch in batches
            for index in batch.micro_batches[number].inputs[: batch.micro_batches[number].count]
        ]
        assert together == taken(alone[step])
        assert all(len(micro.inputs) for batch in batches for micro in batch.micro_batches)
    assert sorted(index for batch in alone for index in taken(batch)) == list(range(order.samples))


@settings(max_examples=40, deadline=None)
@given(order=orders, epoch=st.integers(0, 3), data=st.data())
def test_an_epoch_resumes_at_any_step(order: Order, epoch: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, order.steps))
    batches = Batches(Indices(order.samples), order)
    whole = [taken(batch) for batch in batches.epoch(epoch)]
    rest = list(batches.epoch(epoch, first))
    assert [taken(batch) for batch in rest] == whole[first:]
    assert [batch.step for batch in rest] == [
        epoch * order.steps + step for step in range(first, order.steps)
    ]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = Order(100, 10, seed=3)
    assert torch.equal(order.epoch(1), Order(100, 32, seed=3).epoch(1))
    assert not torch.equal(order.epoch(1), order.epoch(2))
    assert not torch.equal(order.epoch(1), Order(100, 10, seed=4).epoch(1))
    assert not torch.equal(Order(100, 10, 0).epoch(1), Order(100, 10, 1).epoch(0))
    assert torch.equal(Order(100, 10, 3, shuffle=False).epoch(7), torch.arange(100))


def test_order_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    list(Batches(Indices(9), Order(9, 2)).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), unique=True, min_size=2))
def test_mixed_seeds_do_not_meet(pairs: list[tuple[int, int]]) -> None:
    assert len({mix(*pair) for pair in pairs}) == len(pairs)


def test_indexing_tensors_at_once_is_fetching_and_stacking() -> None:
    data = TensorDataset(torch.randn(20, 3), torch.arange(20))
    for dataset in (data, Subset(data, [5, 3, 9, 1, 12, 7, 4])):
        order = Order(len(dataset), 3)
        at_once = Batches(dataset, order)
        stacked = Batches(dataset, order, collate=torch.utils.data.default_collate)
        for one, other in zip(at_once.epoch(0), stacked.epoch(0), strict=True):
            assert torch.equal(one.micro_batches[0].inputs, other.micro_batches[0].inputs)
            assert torch.equal(one.micro_batches[0].target, other.micro_batches[0].target)


def test_loader_processes_change_nothing() -> None:
    order = Order(20, 6, seed=1)
    with_processes = Batches(Indices(20), order, loader_workers=2)
    alone = Batches(Indices(20), order)
    for epoch in (0, 1):  # the processes are kept from one epoch to the next
        assert [taken(b) for b in with_processes.epoch(epoch)] == [
            taken(b) for b in alone.epoch(epoch)
        ]
    assert [taken(b) for b in with_processes.epoch(1, 2)] == [taken(b) for b in alone.epoch(1, 2)]


class Noisy(Dataset[Any]):
    """Random augmentation from all three usual sources."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        noise = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
        return noise + index, torch.tensor(index)


def test_random_augmentation_is_the_same_on_any_number_of_workers() -> None:
    assert draws_at_random(Noisy())
    assert not draws_at_random(Indices(3))

    def samples(cut: Cut, loader_workers: int = 0) -> dict[int, Tensor]:
        batches = Batches(
            SeededDataset(Noisy(), 0), Order(12, 5), cut, loader_workers=loader_workers
        )
        return {
            int(index): noise
            for batch in batches.epoch(1)
            for micro in batch.micro_batches
            for noise, index in zip(micro.inputs, micro.target[: micro.count], strict=False)
        }

    alone = samples(Cut())
    assert len(alone) == 12
    for other in (samples(Cut(), 2), samples(Cut(0, 2)) | samples(Cut(1, 2))):
        assert all(torch.equal(alone[index], other[index]) for index in alone)


def test_augmentation_draws_afresh_every_epoch_and_leaves_the_global_numbers_alone() -> None:
    dataset = SeededDataset(Noisy(), 0)
    before = torch.get_rng_state()
    first, second = dataset[(0, 4)][0], dataset[(1, 4)][0]
    assert not torch.equal(first, second)
    assert torch.equal(first, dataset[(0, 4)][0])
    assert torch.equal(before, torch.get_rng_state())


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise OSError("disk on fire")


class Single(Broken):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2)


def test_bad_samples_are_named() -> None:
    with pytest.raises(
        TaskError, match="a sample of the data set cannot be read: OSError: disk on fire"
    ):
        draws_at_random(Broken())
    with pytest.raises(TaskError, match=r"collate to \[2, 2\]: each sample has to be a pair"):
        next(Batches(Single(), Order(3, 2)).epoch(0))
    with pytest.raises(ValueError, match="step 3 is not in an epoch of 2 steps"):
        next(Batches(Indices(3), Order(3, 2)).epoch(0, 3))
