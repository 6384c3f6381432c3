"""A shard without a process: pushes, commits, snapshots, and its state."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.servers.one_shard import MODEL, filled, job, push, value_of, views
from wagontrain.errors import UsageError, WorkerError
from wagontrain.servers.contents import contents, read, room, take_up, write
from wagontrain.servers.job import Job
from wagontrain.servers.messages import Push
from wagontrain.servers.orders import Commit
from wagontrain.servers.parts import PARAMETERS, divide
from wagontrain.servers.shard import Shard
from wagontrain.servers.staging import Settled


def test_a_commit_divides_the_sum_and_takes_each_groups_rate():
    shard = Shard(job())
    push(shard, 1, 0, 3.0)
    push(shard, 2, 0, 5.0)
    assert shard.commit(Commit(1, ((1, 0), (2, 0)), 4.0, factor=0.5))
    assert value_of(shard, "a") == [-1.0] * 4
    assert value_of(shard, "b") == [-2.0] * 4
    assert shard.version == 1
    assert not shard.staging.held


def test_pushes_are_added_in_the_order_given():
    """Floats: 1 + 1e8 − 1e8 is 0, and − 1e8 + 1e8 + 1 is 1."""
    numbers = {1: 1.0, 2: 1e8, 3: -1e8}
    for order in itertools.permutations(numbers):
        shard = Shard(job())
        for worker in (1, 2, 3):
            push(shard, worker, 0, numbers[worker])
        shard.commit(Commit(1, tuple((worker, 0) for worker in order), 1.0))
        total = torch.tensor(0.0)
        for worker in order:
            total = total + numbers[worker]
        assert value_of(shard, "a") == [-float(total)] * 4


def test_new_settings_come_with_a_commit():
    shard = Shard(job())
    push(shard, 1, 0)
    shard.commit(Commit(1, ((1, 0),), 1.0, groups=({"lr": 0.25}, {})))
    assert value_of(shard, "a") == [-0.25] * 4
    assert value_of(shard, "b") == [-2.0] * 4


def test_buffers_take_the_value_pushed():
    shard = Shard(job())
    push(shard, 1, 0, mean=7.0, count=3)
    shard.commit(Commit(1, ((1, 0),), 8.0))
    assert value_of(shard, "mean") == [7.0, 7.0]  # not divided: it is no gradient
    push(shard, 1, 1, mean=2.0, count=4)
    push(shard, 2, 0, mean=4.0, count=9)
    shard.commit(Commit(2, ((1, 1), (2, 0)), 1.0))
    assert value_of(shard, "mean") == [3.0, 3.0]
    assert value_of(shard, "count") == [9]


def test_parameters_without_gradient_in_all_pushes_stay():
    shard = Shard(job(groups=({"lr": 1.0, "weight_decay": 0.5}, {"lr": 1.0})))
    views(shard.values.now)["a"].fill_(1.0)
    push(shard, 1, 0, without=("a",), a=0.0)
    push(shard, 2, 0, without=("a", "b"), a=0.0, b=0.0)
    shard.commit(Commit(1, ((1, 0), (2, 0)), 1.0))
    assert value_of(shard, "a") == [1.0] * 4
    assert value_of(shard, "b") == [-1.0] * 4


def test_the_same_push_again_is_not_kept_twice():
    shard = Shard(job())
    message = Push(0, 1, 0)
    assert not shard.staging.knows(message)
    push(shard, 1, 0)
    assert shard.staging.knows(message)
    shard.commit(Commit(1, ((1, 0),), 1.0))
    assert shard.staging.knows(message)
    assert not shard.staging.knows(Push(0, 1, 1))
    assert not shard.staging.knows(Push(0, 2, 0))


def test_the_same_commit_again_is_ignored_and_a_gap_is_an_error():
    shard = Shard(job())
    push(shard, 1, 0)
    assert shard.commit(Commit(1, ((1, 0),), 1.0))
    assert not shard.commit(Commit(1, ((1, 0),), 1.0))
    assert value_of(shard, "a") == [-1.0] * 4
    with pytest.raises(WorkerError, match="has 1 commits and was given number 3"):
        shard.commit(Commit(3, (), 1.0))


def test_a_commit_that_cannot_be_changes_nothing():
    shard = Shard(job())
    push(shard, 1, 0)
    with pytest.raises(WorkerError, match="commit 1 needs push 5 of worker 2"):
        shard.commit(Commit(1, ((1, 0), (2, 5)), 1.0))
    for divide_by in (0.0, math.nan, math.inf):
        with pytest.raises(WorkerError, match="commit 1 divides by"):
            shard.commit(Commit(1, ((1, 0),), divide_by))
    assert shard.version == 0
    assert value_of(shard, "a") == [0.0] * 4
    assert shard.commit(Commit(1, ((1, 0),), 1.0))


def test_an_empty_commit_counts():
    shard = Shard(job())
    assert shard.commit(Commit(1, (), 1.0))
    assert shard.version == 1


def test_what_was_lost_is_counted_after_a_start_from_a_file():
    shard = Shard(job())
    shard.forgiving = True
    push(shard, 1, 0)
    assert shard.norm(((1, 0), (2, 5)), 1.0) == 0
    assert shard.commit(Commit(1, ((1, 0), (2, 5)), 1.0))
    assert (shard.version, shard.lost) == (1, 1)
    assert value_of(shard, "a") == [0.0] * 4
    assert not shard.staging.held
    push(shard, 1, 1)
    assert shard.commit(Commit(2, ((1, 1),), 1.0))
    assert shard.lost == 1
    assert value_of(shard, "a") == [-1.0] * 4


def test_forgotten_pushes_do_not_come_back():
    shard = Shard(job())
    push(shard, 1, 0)
    push(shard, 1, 1)
    shard.forget(1, (0, 2))
    assert list(shard.staging.held) == [(1, 1)]
    assert shard.staging.knows(Push(0, 1, 2))  # comes too late: acknowledged, and left at that
    shard.forget(1, None)
    assert not shard.staging.held
    with pytest.raises(WorkerError, match="worker 1 was given up: say hello again"):
        shard.staging.knows(Push(0, 1, 3))
    assert not shard.staging.knows(Push(0, 2, 0))


@given(st.lists(st.integers(0, 12)))
def test_settled_sequences_are_remembered_in_little_room(sequences):
    settled = Settled()
    for sequence in sequences:
        settled.add(sequence)
    assert all((number in settled) == (number in sequences) for number in range(14))
    assert settled.below not in settled
    assert all(number > settled.below for number in settled.more)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named(bad):
    shard = Shard(job())
    with pytest.raises(WorkerError, match="the gradient of 'b' is not finite"):
        push(shard, 1, 0, b=bad)
    with pytest.raises(WorkerError, match="the value of 'mean' is not finite"):
        push(shard, 1, 0, mean=bad)
    with pytest.raises(WorkerError, match="the gradient of table 'users' is not finite"):
        push(shard, 1, 0, bad, a=0.0, b=0.0, mean=0.0, count=0, rows={"users": [1]})
    assert not shard.staging.held
    push(shard, 1, 0, 3e38, count=0)  # whose sum is infinite, but none of the numbers
    assert list(shard.staging.held) == [(1, 0)]


def test_memory_of_pushes_is_used_again():
    shard = Shard(job())
    for number in range(5):
        slot = shard.staging.slot()
        shard.staging.back(slot)
        push(shard, 1, number)
        assert shard.staging.held[1, number].buffer is slot
        shard.commit(Commit(number + 1, ((1, number),), 1.0))


def test_one_worker_cannot_fill_the_memory():
    shard = Shard(job(most=2))
    push(shard, 1, 0)
    push(shard, 1, 1)
    with pytest.raises(WorkerError, match="2 pushes of worker 1 wait to be applied"):
        shard.staging.knows(Push(0, 1, 2))
    assert shard.staging.knows(Push(0, 1, 1))
    with pytest.raises(WorkerError, match="no proper name"):
        shard.staging.knows(Push(0, 1, -1))


def test_the_norm_is_that_of_the_sum():
    shard = Shard(job())
    push(shard, 1, 0, 3.0, rows={"users": [5, 6]})
    push(shard, 2, 0, 1.0, rows={"users": [6]})
    pushes = ((1, 0), (2, 0))
    # 8 numbers of 4, row 5 of 3 and row 6 of 4, two numbers each, all halved
    assert shard.norm(pushes, 2.0) == pytest.approx((8 * 16 + 2 * 9 + 2 * 16) / 4)
    assert shard.norm(pushes, 2.0) == pytest.approx(44.5)  # asking changes nothing
    shard.commit(Commit(1, pushes, 2.0))
    assert value_of(shard, "a") == [-2.0] * 4
    assert shard.norm((), 1.0) == 0


# Values and snapshots


def test_what_is_lent_does_not_change():
    shard = Shard(job())
    returned = []
    _, lent = shard.pull()
    shard.values.lend(lambda: bool(returned))
    for number in range(3):
        push(shard, 1, number)
        shard.commit(Commit(number + 1, ((1, number),), 1.0))
        assert not lent[PARAMETERS].any()
    assert value_of(shard, "a") == [-3.0] * 4
    moved = shard.values.now
    push(shard, 1, 3)
    shard.commit(Commit(4, ((1, 3),), 1.0))
    assert shard.values.now is moved  # nothing lent, nothing moved
    returned.append(True)
    shard.values.lend(lambda: False)
    push(shard, 1, 4)
    shard.commit(Commit(5, ((1, 4),), 1.0))
    assert shard.values.now.regions[PARAMETERS].data_ptr() == lent[PARAMETERS].data_ptr()
    assert value_of(shard, "a") == [-5.0] * 4


def test_a_snapshot_stays_as_it_was():
    shard = Shard(job("momentum"))
    push(shard, 1, 0, rows={"users": [1, 2]})
    shard.commit(Commit(1, ((1, 0),), 1.0))
    before = [each.clone() for each in shard.pull(whole=True)[1]]
    ids = {"users": torch.tensor([1, 2, 3, 4], dtype=torch.int32)}
    rows = shard.pull_rows(ids)[1][0]
    shard.keep(7)
    held = contents(shard, 7)
    state = {name: value.clone() for name, value in held.tensors.items()}
    for number, touched in enumerate(([2, 3], [2, 4], [9, 1])):
        push(shard, 1, number + 1, rows={"users": touched})
        shard.commit(Commit(number + 2, ((1, number + 1),), 1.0))
    version, values = shard.pull(whole=True, snapshot=7)
    assert version == 1
    assert all(map(torch.equal, values, before))
    version, kept = shard.pull_rows(ids, 7)
    assert version == 1
    assert torch.equal(kept[0], rows)
    assert not torch.equal(shard.pull_rows(ids)[1][0], rows)
    later = contents(shard, 7).tensors
    assert later.keys() == state.keys()
    assert all(torch.equal(later[name], state[name]) for name in state)
    shard.release(7)
    with pytest.raises(WorkerError, match="shard 0 has no snapshot 7"):
        shard.pull(snapshot=7)


def same_afterwards(one, other):
    """Both go on in the same way."""
    for shard in (one, other):
        assert shard.staging.knows(Push(0, 1, 2))
        assert shard.staging.knows(Push(0, 2, 5))
        with pytest.raises(WorkerError, match="given up"):
            shard.staging.knows(Push(0, 3, 1))
        push(shard, 1, 3, rows={"users": [10, 77]})
        assert shard.commit(Commit(4, ((2, 5), (1, 3)), 3.0))
    assert all(map(torch.equal, one.pull(whole=True)[1], other.pull(whole=True)[1]))
    ids = {"users": torch.tensor([0, 3, 10, 77, 99])}
    assert torch.equal(one.pull_rows(ids)[1][0], other.pull_rows(ids)[1][0])
    assert one.updater.groups == other.updater.groups


@pytest.mark.parametrize("rule", ["momentum", "optimizer"])
def test_another_process_goes_on_from_what_was_sent(rule):
    one, other = filled(rule), Shard(job(rule, optimizer="Adam"))
    content = contents(one)
    announced = content.announced()
    tensors = room(announced)
    for name, value in content.tensors.items():
        tensors[name].copy_(value)
    take_up(other, replace(content, tensors=tensors, plain=announced["plain"]))
    same_afterwards(one, other)


def test_another_process_goes_on_from_a_file(tmp_path):
    one, other = filled(), Shard(job("momentum"))
    file = tmp_path / "shard-0.safetensors"
    write(contents(one), file)
    take_up(other, read(file, other.values.now.regions))
    same_afterwards(one, other)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_files_that_are_none_are_refused(tmp_path):
    shard, file = Shard(job()), tmp_path / "state"
    with pytest.raises(WorkerError, match="cannot be read"):
        read(file, shard.values.now.regions)
    write(contents(filled()), file)
    whole = file.read_bytes()
    for broken in (b"", whole[:100], whole[: len(whole) // 2], b"x" * 1000):
        file.write_bytes(broken)
        with pytest.raises(WorkerError, match="cannot be read"):
            read(file, shard.values.now.regions)
    file.write_bytes(whole)
    smaller = Shard(job(parts=divide(MODEL, 2)[0]))
    with pytest.raises(WorkerError, match="is of another job"):
        read(file, smaller.values.now.regions)


def test_a_state_of_another_rule_is_refused():
    with pytest.raises(WorkerError, match="a state is none of shard 0"):
        take_up(Shard(job("adam")), contents(filled()))


def test_jobs_travel_as_plain_data():
    assert Job.of(job().plain()) == job()
    with pytest.raises(WorkerError, match="job was refused: Field required at shards"):
        Job.of({"index": 0, "parts": []})
    with pytest.raises(UsageError, match="no group 1 of parameters, of 1"):
        Shard(job(groups=({"lr": 1.0},)))
