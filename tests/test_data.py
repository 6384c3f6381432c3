"""Streams, and DataLoaders of one's own: what they give, and what is refused."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import wagontrain as wt
from tests.gang import Gang
from tests.problems import BATCH, SAMPLES, build
from wagontrain import verify
from wagontrain.batches import Batches
from wagontrain.mesh import World
from wagontrain.reference import Trace, train_plainly
from wagontrain.strategies.parameter_server import ParameterServer
from wagontrain.transport import Context

CPU = torch.device("cpu")


class Stream(IterableDataset[Any]):
    """A data set as a stream; `draws` shuffles a buffer of it with the global random numbers."""

    def __init__(self, draws: bool = False, begins: int = 0) -> None:
        self.data = build("padded-tokens").train
        self.draws, self.begins = draws, begins

    def __iter__(self) -> Iterator[Any]:
        order = list(range(self.begins, SAMPLES))
        if self.draws:
            random.shuffle(order)
        for index in order:
            codes, target = self.data[index]
            yield (torch.roll(codes, int(torch.randint(6, ()))) if self.draws else codes), target


class Sized(Stream):
    """One that says how long it is."""

    length = SAMPLES

    def __len__(self) -> int:
        return self.length


def streamed(draws: bool = False, **fields: Any) -> wt.Task:
    return dataclasses.replace(
        build("padded-tokens"),
        **({"train": Stream(draws), "shuffle": False, "epoch_samples": SAMPLES} | fields),
    )


def trained(context: Context, strategy: str, made: wt.Task, resume: Any = None) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(made, "float64")
        with wt.Run(task, wt.make_strategy(strategy), context, resume=resume) as run:
            losses = [run.step(batch).loss or 0.0 for batch in run.batches()]
            trace = Trace.of(losses, task.build_model(), run.runner.state_dict()["model"])
            run.close()
    return trace


def plainly(made: wt.Task, steps: int = 6) -> Trace:
    with verify.computing_in("float64"):
        return train_plainly(verify.prepared(made, "float64")[0], CPU, 0, steps)


def same(found: Trace, expected: Trace) -> bool:
    return verify.compare(found, expected, wt.make_strategy("data-parallel"), 2, "float64").passed


def test_a_stream_gives_what_the_same_data_set_gives_in_order() -> None:
    in_order = dataclasses.replace(build("padded-tokens"), shuffle=False)
    assert same(plainly(streamed()), plainly(in_order))


@pytest.mark.parametrize("strategy", ["data-parallel", "sharded", "split-weights", "hybrid"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_stream_trains_as_on_one_process(gang: Gang, strategy: str, accumulate: int) -> None:
    made = streamed(draws=True, accumulate=accumulate)
    expected = plainly(made)
    assert len(set(expected.losses)) == 6
    for found in gang.run(2, trained, strategy, made):
        assert same(found, expected)


def test_every_sample_of_a_stream_is_on_one_rank() -> None:
    for step, whole in enumerate(Batches.of_training(streamed(draws=True), CPU).epoch(1)):
        parts = [
            list(Batches.of_training(streamed(draws=True), CPU, wt.batches.Cut(r, 3)).epoch(1))[
                step
            ]
            for r in range(3)
        ]
        rows = [p.micro_batches[0].inputs[: p.micro_batches[0].count] for p in parts]
        assert torch.equal(torch.cat(rows), whole.micro_batches[0].inputs)


def test_epochs_of_a_stream_draw_otherwise_and_leave_the_models_numbers_alone() -> None:
    batches = Batches.of_training(streamed(draws=True), CPU)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        [batch.micro_batches[0].inputs for batch in batches.epoch(epoch)] for epoch in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_a_resumed_stream_goes_on_behind_what_was_seen(tmp_path: Path) -> None:
    made = streamed(draws=True)
    whole = wt.fit(made, "data-parallel", run_dir=tmp_path / "W", quiet=True)
    wt.fit(made, "data-parallel", run_dir=tmp_path / "R", steps=4, quiet=True)
    rest = wt.fit(made, "data-parallel", run_dir=tmp_path / "S", resume=tmp_path / "R", quiet=True)
    assert rest.summary["steps"] == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shuffle": True}, "say shuffle=False"),
        ({"epoch_samples": None}, "say in Task.epoch_samples"),
        ({"loader_workers": 2}, "each process would read all of it"),
        ({"train": iter([1, 2])}, "an iterator, which can be read once"),
        ({"epoch_samples": 0}, "whole number from 1 on"),
        ({"validation": Stream()}, "map-style"),
    ],
)
def test_streams_that_cannot_be_trained_on_are_refused(fields: Any, words: str) -> None:
    with pytest.raises(wt.TaskError, match=words):
        streamed(**fields)


def test_a_stream_has_to_be_as_long_as_it_says() -> None:
    class Longer(Sized):
        length = SAMPLES - 1

    short = streamed(epoch_samples=SAMPLES + 1)
    with pytest.raises(wt.ModelError, match=f"ended after {SAMPLES} samples of epoch 0"):
        list(Batches.of_training(short, CPU).epoch(0))
    longer = streamed(train=Longer(), epoch_samples=None)
    with pytest.raises(wt.ModelError, match=f"goes on after {SAMPLES - 1} samples"):
        list(Batches.of_training(longer, CPU).epoch(0))
    assert len(list(Batches.of_training(streamed(epoch_samples=9), CPU).epoch(0))) == 2
    exact = streamed(train=Sized(), epoch_samples=None)
    assert sum(batch.total for batch in Batches.of_training(exact, CPU).epoch(0)) == SAMPLES


def _other_stream_on_each_rank(context: Context) -> str:
    begins = context.world.rank  # as of a stream that takes its share by itself
    made = streamed(train=Stream(begins=begins), epoch_samples=SAMPLES - 1)
    try:
        wt.Run(made, wt.make_strategy("data-parallel"), context)
    except wt.TaskError as error:
        return str(error)
    return ""


def test_a_stream_that_differs_between_ranks_is_noticed(gang: Gang) -> None:
    for message in gang.run(2, _other_stream_on_each_rank):
        assert "the train data of rank 1 is not that of rank 0" in message


class Wandering(Stream):
    """Draws by a generator of its own, which nobody begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        order = list(range(SAMPLES))
        self.numbers.shuffle(order)
        return (self.data[index] for index in order)


def test_a_stream_that_cannot_be_repeated_is_refused() -> None:
    """Alike on all ranks, so that only a resumed run would see some samples twice."""
    with pytest.raises(wt.TaskError, match="begins otherwise when it is read again"):
        wt.Run(streamed(train=Wandering()), wt.make_strategy("data-parallel"), Context())


def test_samples_of_a_stream_that_cannot_be_put_together_are_told() -> None:
    def failing(samples: list[Any]) -> Any:
        raise KeyError("no such column")

    batches = Batches.of_training(streamed(collate=failing), CPU)
    with pytest.raises(wt.ModelError, match="8 samples of the stream .*KeyError: 'no such column'"):
        next(batches.epoch(0))


def test_servers_refuse_a_stream(tmp_path: Path) -> None:
    with pytest.raises(wt.UsageError, match="a stream has none"):
        wt.fit(streamed(), ParameterServer(), run_dir=tmp_path / "R", quiet=True)


# --- a DataLoader of one's own ------------------------------------------------------------------


def loading(**options: Any) -> wt.Task:
    task = build("padded-tokens")
    loader = DataLoader(task.train, **({"batch_size": BATCH} | options))
    return dataclasses.replace(task, train=loader, batch_size=0, shuffle=True)


def test_a_loader_is_its_data_set_batch_size_and_order() -> None:
    plain = build("padded-tokens")
    assert same(plainly(loading(shuffle=True)), plainly(plain))
    in_order = dataclasses.replace(plain, shuffle=False)
    assert same(plainly(loading()), plainly(in_order))
    other = loading(batch_size=5, num_workers=2, collate_fn=list)
    assert (other.batch_size, other.loader_workers, other.collate) == (5, 2, list)
    assert other.steps_per_epoch == 4


def _other_sampler_on_each_rank(context: Context) -> str:
    weights = torch.arange(SAMPLES) % (2 + context.world.rank) + 0.1
    made = dataclasses.replace(
        build("padded-tokens"), sampler=WeightedRandomSampler(weights, SAMPLES)
    )
    try:
        wt.Run(made, wt.make_strategy("data-parallel"), context)
    except wt.TaskError as error:
        return str(error)
    return ""


def test_an_order_that_differs_between_ranks_is_noticed(gang: Gang) -> None:
    for message in gang.run(2, _other_sampler_on_each_rank):
        assert "is not that of rank 0, or in another order" in message


def test_a_loader_is_shared_out_over_ranks(gang: Gang) -> None:
    made = loading(sampler=WeightedRandomSampler(torch.rand(SAMPLES) + 0.1, 23))
    assert (made.samples, made.steps_per_epoch) == (23, 3)
    expected = plainly(made)
    for found in gang.run(2, trained, "data-parallel", made):
        assert same(found, expected)


DATA = TensorDataset(torch.zeros(SAMPLES, 2))


class Backwards(Sampler[int]):
    """Another place to begin at in every epoch."""

    def __init__(self) -> None:
        self.at = 0

    def set_epoch(self, epoch: int) -> None:
        self.at = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(self.at - index) % SAMPLES for index in range(SAMPLES)])

    def __len__(self) -> int:
        return SAMPLES


class Forgetful(Backwards):
    """Goes on from where it was, and not from the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.at += 1


class Short(Backwards):
    def __iter__(self) -> Iterator[int]:
        return iter([0, 1, 2])


def test_a_sampler_gives_the_order_of_every_epoch() -> None:
    made = loading(sampler=Backwards())
    order = Batches.of_training(made, CPU).order
    assert [order.epoch(epoch)[0] for epoch in (0, 1, 2, 1)] == [0, 1, 2, 1]
    given = dataclasses.replace(build("padded-tokens"), sampler=Backwards())
    assert torch.equal(Batches.of_training(given, CPU).order.epoch(2), order.epoch(2))
    shuffled = Batches.of_training(loading(sampler=SubsetRandomSampler(range(12))), CPU).order
    assert sorted(shuffled.epoch(0).tolist()) == list(range(12))
    assert not torch.equal(shuffled.epoch(0), shuffled.epoch(1))


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (Forgetful(), "another order when it is asked again"),
        (RandomSampler(DATA, generator=torch.Generator()), "another order when it is asked again"),
        (Short(), "3"),
    ],
)
def test_a_sampler_that_cannot_be_repeated_is_refused(sampler: Any, words: str) -> None:
    with pytest.raises(wt.TaskError, match=words):
        made = dataclasses.replace(build("padded-tokens"), sampler=sampler)
        Batches.of_training(made, CPU).order.epoch(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop_last": True}, "leave drop_last off"),
        ({"shuffle": True, "generator": torch.Generator()}, "leave the generator out"),
        ({"sampler": RandomSampler(DATA, generator=torch.Generator())}, "leave the generator out"),
        ({"sampler": DistributedSampler(DATA, 2, 0)}, "takes its share of each batch by itself"),
        ({"batch_size": None}, "without batch_size"),
        ({"worker_init_fn": print}, "leave it out"),
        (
            {"batch_size": 1, "batch_sampler": BatchSampler(SequentialSampler(DATA), 3, False)},
            "batch_sampler of its own",
        ),
    ],
)
def test_what_of_a_loader_cannot_be_honoured_is_refused(options: Any, words: str) -> None:
    with pytest.raises(wt.TaskError, match=words):
        loading(**options)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (DistributedSampler(DATA, 2, 0), "takes its share of each batch by itself"),
        (BatchSampler(SequentialSampler(DATA), 4, False), "give a sampler of single samples"),
        (iter([1]), "has no length"),
    ],
)
def test_a_sampler_is_an_order_of_single_samples(sampler: Any, words: str) -> None:
    with pytest.raises(wt.TaskError, match=words):
        dataclasses.replace(build("padded-tokens"), sampler=sampler)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop_last": True}, "leave drop_last off"),
        ({"sampler": RandomSampler(DATA, num_samples=3)}, "meant as a Subset"),
        ({"sampler": RandomSampler(DATA, replacement=True)}, "meant as a Subset"),
        ({"sampler": SubsetRandomSampler(range(3))}, "meant as a Subset"),
    ],
)
def test_validation_measures_every_sample_or_refuses(options: Any, words: str) -> None:
    task = build("padded-tokens")
    with pytest.raises(wt.TaskError, match=words):
        dataclasses.replace(task, validation=DataLoader(task.train, 4, **options))
    shuffled = DataLoader(task.train, 4, shuffle=True)
    assert dataclasses.replace(task, validation=shuffled).validation is task.train


def test_a_loader_and_a_task_must_not_say_different_things() -> None:
    task = build("padded-tokens")
    with pytest.raises(wt.TaskError, match="Task.batch_size is 4, but the DataLoader's is 8"):
        dataclasses.replace(task, train=DataLoader(task.train, BATCH), batch_size=4)
    with pytest.raises(wt.TaskError, match="leave one"):
        dataclasses.replace(task, train=DataLoader(task.train, BATCH), collate=list)
    with pytest.raises(wt.TaskError, match="another collate_fn"):
        loaders = [DataLoader(task.train, BATCH, collate_fn=each) for each in (None, list)]
        dataclasses.replace(task, train=loaders[0], validation=loaders[1])
    both = dataclasses.replace(
        task, train=DataLoader(task.train, BATCH), validation=DataLoader(task.train, 3)
    )
    assert both.validation is task.train
    with pytest.raises(wt.TaskError, match="the DataLoader has one, too"):
        loader = DataLoader(task.train, BATCH)
        dataclasses.replace(task, train=loader, sampler=SequentialSampler(DATA))
    with pytest.raises(wt.TaskError, match="Task.batch_size is 0"):
        dataclasses.replace(task, batch_size=0)


def test_a_loader_of_a_stream_is_one(gang: Gang) -> None:
    made = dataclasses.replace(
        build("padded-tokens"),
        train=DataLoader(Stream(), BATCH, collate_fn=default_collate), epoch_samples=SAMPLES,
    )  # fmt: skip
    assert made.is_stream
    wt.make_strategy("data-parallel").check(made, World(size=2))
    for found in gang.run(2, trained, "data-parallel", made):
        assert same(found, plainly(streamed()))
