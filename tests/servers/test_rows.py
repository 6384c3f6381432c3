"""Tables on a shard: rows that exist once they are updated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.servers.one_shard import TABLE, filled, job, push, value_of
from wagontrain.errors import UsageError, WorkerError
from wagontrain.servers.messages import Push
from wagontrain.servers.orders import Commit
from wagontrain.servers.shard import Shard
from wagontrain.servers.tables import Rows, Table


def test_rows_begin_as_drawn_and_exist_once_updated():
    shard = Shard(job())
    ids = {"users": torch.tensor([3, 700])}
    _, (drawn,) = shard.pull_rows(ids)
    assert shard.tables["users"].count == 0
    assert torch.equal(shard.pull_rows(ids)[1][0], drawn)
    push(shard, 1, 0, rows={"users": [700]})
    shard.commit(Commit(1, ((1, 0),), 2.0))
    assert shard.tables["users"].count == 1
    expected = torch.stack([drawn[0], drawn[1] - 0.5])
    assert torch.equal(shard.pull_rows(ids)[1][0], expected)


def test_new_rows_are_normal_and_do_not_repeat():
    rows = Rows(Table("t", 40_000, 4, std=0.1), filled().tables["users"].rule, 0, 2, seed=3)
    ids = torch.arange(0, 40_000, 2)
    drawn = rows.new(ids) / 0.1
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)
    assert float((drawn.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert abs(float((drawn[:, 0] * drawn[:, 1]).mean())) < 0.02
    assert abs(float((drawn[1:, 0] * drawn[:-1, 0]).mean())) < 0.02
    assert len(drawn.unique()) > 79_000
    assert torch.equal(rows.new(ids[5:7]) / 0.1, drawn[5:7])
    other = Rows(Table("u", 40_000, 4, std=0.1), rows.rule, 0, 2, seed=3)
    assert not torch.equal(other.new(ids), rows.new(ids))


def test_rows_are_divided_among_shards_and_others_refused():
    rows = Rows(TABLE, filled().tables["users"].rule, 1, 3, seed=0)
    rows.require(torch.tensor([1, 4, 997]))
    rows.require(torch.tensor([], dtype=torch.int64))
    with pytest.raises(WorkerError, match="row 5 of table 'users' is on shard 2, not here on"):
        rows.require(torch.tensor([1, 5]))
    for bad in (-2, 1000):
        with pytest.raises(WorkerError, match="table 'users' has rows 0 to 999"):
            rows.require(torch.tensor([1, bad]))
    with pytest.raises(WorkerError, match="there is no table 'items'"):
        filled().table("items")


def test_a_table_may_be_larger_than_memory():
    """A row of a table of 4 TB: there is only memory for what is touched."""
    table = Table("huge", 10**9, 1024)
    rows = Rows(table, filled().tables["users"].rule, 7, 64, seed=0)
    ids = torch.tensor([7, 64 * 10_000_000 + 7])
    before = rows.read(ids)
    rows.update(ids, torch.ones(2, 1024), {"lr": 1.0, "momentum": 0.0})
    assert torch.equal(rows.read(ids), before - 1)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(-4, 4)), max_size=5), max_size=6),
    st.integers(0, 5),
)
def test_tables_are_what_a_dense_tensor_would_be(pushes, snapshot):
    """Of SGD, which leaves rows without gradient alone. Each push may name a row several times."""
    shard = Shard(job(tables=(Table("t", 10, 2),)))
    every = {"t": torch.arange(10)}
    dense = shard.pull_rows(every)[1][0]
    kept = None
    for number, touched in enumerate(pushes):
        if number == snapshot:
            shard.keep(1)
            kept = dense.clone()
        ids = torch.tensor([row for row, _ in touched], dtype=torch.int32)
        rows = torch.tensor([[float(value)] * 2 for _, value in touched]).view(-1, 2)
        slot = shard.staging.slot()
        slot.memory.zero_()
        shard.stage(Push(0, 1, number), slot, {"t": (ids, rows)})
        shard.commit(Commit(number + 1, ((1, number),), 1.0))
        dense.index_add_(0, ids.long(), rows, alpha=-1)
    torch.testing.assert_close(shard.pull_rows(every)[1][0], dense)
    if kept is not None:
        torch.testing.assert_close(shard.pull_rows(every, 1)[1][0], kept)


# Rules that look at who pushed


def test_delay_compensation_uses_what_the_worker_had_fetched():
    shard = Shard(job("dc-asgd", settings={"strength": 0.5}, tables=()))
    shard.pull(worker=1)
    push(shard, 2, 0, -2.0)
    shard.commit(Commit(1, ((2, 0),), 1.0))  # worker 2 never fetched: no compensation
    assert value_of(shard, "a") == [2.0] * 4
    shard.pull(worker=1)  # fetched ahead: the gradient is of what was fetched before
    push(shard, 1, 0, 1.0)
    shard.commit(Commit(2, ((1, 0),), 1.0, staleness=1))
    # g + λ g² (w − w_bak) = 1 + 0.5 · (2 − 0) = 2
    assert value_of(shard, "a") == [0.0] * 4
    push(shard, 1, 1, 1.0)
    shard.commit(Commit(3, ((1, 1),), 1.0, staleness=1))
    # 1 + 0.5 · (0 − 2) = 0
    assert value_of(shard, "a") == [0.0] * 4


def test_delay_compensation_keeps_few_copies():
    shard = Shard(job("dc-asgd", tables=()))
    for worker in (1, 2, 1):
        shard.pull(worker=worker)
    fetched = shard._fetched
    assert fetched[1][0] is fetched[2][0]
    for number in range(9):
        push(shard, 3, number)
        shard.commit(Commit(number + 1, ((3, number),), 1.0))
        shard.pull(worker=1)
    assert len(fetched[1]) == 4
    shard.forget(1, None)
    assert list(fetched) == [2]
    with pytest.raises(UsageError, match="dc-asgd keeps what each worker fetched, but not of rows"):
        Shard(job("dc-asgd"))


def test_the_rate_of_rows_falls_with_staleness_too():
    shard = Shard(job("staleness-aware"))
    ids = {"users": torch.tensor([4])}
    before = shard.pull_rows(ids)[1][0]
    push(shard, 1, 0, rows={"users": [4]})
    shard.commit(Commit(1, ((1, 0),), 1.0, staleness=4))
    torch.testing.assert_close(shard.pull_rows(ids)[1][0], before - 0.25)
    assert value_of(shard, "a") == [-0.25] * 4
