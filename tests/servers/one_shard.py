"""A small shard, and pushes for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from wagontrain.servers.job import Job
from wagontrain.servers.messages import Push
from wagontrain.servers.orders import Commit
from wagontrain.servers.parts import Entry, divide
from wagontrain.servers.shard import Shard
from wagontrain.servers.tables import Table

MODEL = [
    Entry("a", (4,), "float32", 0),
    Entry("b", (2, 2), "float32", 1),
    Entry("mean", (2,), "float32", "assigned"),
    Entry("count", (), "int64", "assigned"),
    Entry("frozen", (3,), "float32", "constant"),
]
TABLE = Table("users", 1000, 2, std=0.5)


def job(rule="sgd", **changes):
    usual = Job(
        0, 1, tuple(divide(MODEL, 1)[0]), rule, groups=({"lr": 1.0}, {"lr": 2.0}), tables=(TABLE,)
    )
    return replace(usual, **changes)


def views(buffer):
    return {part.name: view for part, view in zip(buffer.parts, buffer.views, strict=True)}


def push(shard, worker, sequence, value=1.0, without=(), rows=None, **special):
    """Put a gradient aside that has one value everywhere, or the one given for a tensor."""
    counts = {name: len(ids) for name, ids in (rows or {}).items()}
    message = Push(0, worker, sequence, without, counts)
    slot = shard.staging.slot()
    for name, view in views(slot).items():
        view.fill_(special.get(name, value))
    made = {
        name: (torch.tensor(ids, dtype=torch.int32), torch.full((len(ids), 2), value))
        for name, ids in (rows or {}).items()
    }
    shard.stage(message, slot, made)


def value_of(shard, name):
    return views(shard.values.now)[name].tolist()


def filled(rule="momentum"):
    """A shard with something of everything."""
    shard = Shard(job(rule, optimizer="Adam"))
    for number in range(3):
        push(shard, 1, number, number + 1.0, rows={"users": [number, 10]})
        shard.commit(Commit(number + 1, ((1, number),), 2.0, groups=({"lr": 0.5 / (number + 1)},)))
    push(shard, 2, 5, 4.0, without=("a",), rows={"users": [3]})
    push(shard, 3, 0)
    shard.forget(3, None)
    return shard
