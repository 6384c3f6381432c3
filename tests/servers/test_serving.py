"""What a shard says and does: pushes, pulls, snapshots, and what it refuses."""

from __future__ import annotations

import math
import socket
import time

import pytest
import torch

from tests.servers.shards import (
    LOCAL,
    MODEL,
    Coordinator,
    Make,
    Process,
    hear,
    random_rows,
)
from wagontrain.errors import WorkerError
from wagontrain.servers.contents import room
from wagontrain.servers.frames import FRAME
from wagontrain.servers.messages import (
    Beat,
    Hello,
    Pull,
    PullRows,
    Push,
    Refusal,
    Rows,
    Staged,
    encode,
)
from wagontrain.servers.orders import (
    Commit,
    Fill,
    Forget,
    Norm,
    PullState,
    Ready,
    Release,
    Setup,
    Snapshot,
    Squares,
)
from wagontrain.servers.parts import Buffer, Whole
from wagontrain.servers.tables import Table

TABLE = Table("users", 100, 3)


@pytest.fixture
def one(make: Make) -> Coordinator:
    """A coordinator of one shard that is ready."""
    coordinator = make(tables=(TABLE,))
    coordinator.start()
    coordinator.set_up()
    return coordinator


# What is said and done


def test_values_are_those_it_was_filled_with(one):
    worker = one.worker()
    worker.ask(whole=True, number=7)
    answer = worker.take(whole=True)
    assert (answer.shard, answer.version, answer.number) == (0, 0, 7)
    for name, view in one.first.views.items():
        assert torch.equal(worker.values.views[name], view)


def test_pushes_count_when_they_are_committed(one):
    workers = [one.worker(number) for number in (1, 2)]
    for worker in workers:
        worker.pushed(0, 3.0)
    assert workers[0].pull() == {"w": 10, "b": 11, "mean": 12}
    one.commit((1, 0), (2, 0), divide=2.0)
    assert workers[0].pull(1) == {"w": 7, "b": 8, "mean": 3}


def test_a_pull_waits_for_its_commit(one):
    waits, pushes = one.worker(1), one.worker(2)
    waits.ask(at_least=1, number=5)
    pushes.pushed(0)
    assert waits.silent()
    one.commit((2, 0))
    answer = waits.take()
    assert (answer.version, answer.number) == (1, 5)
    assert float(waits.values.views["w"][0, 0]) == 9


def test_a_pull_does_not_wait_for_ever(make):
    coordinator = make()
    coordinator.start(patience=0.2)
    coordinator.set_up()
    worker = coordinator.worker()
    worker.ask(at_least=3)
    assert worker.refused() == "commit 3 did not come within 0.2 s, there are 0: ask again"
    assert worker.pull()["w"] == 10


def test_a_worker_that_went_away_is_no_trouble(one):
    for number in range(3):
        gone = one.worker(number)
        gone.ask(at_least=1)
        gone.push(0)
        assert one.worker(9).pull()["w"] == 10  # so the others' questions have arrived
        gone.line.close()
    stays = one.worker(4)
    stays.pushed(0)
    one.commit((4, 0))
    assert stays.pull(1)["w"] == 9


def test_the_same_push_again_is_acknowledged_and_counts_once(one):
    worker = one.worker()
    for _ in range(2):
        worker.pushed(0)
    one.commit((1, 0))
    worker.pushed(0, 100.0)
    assert worker.pull(1)["w"] == 9
    assert not one.processes[0].server.shards[0].staging.held


def test_the_norm_is_told(one):
    worker = one.worker()
    worker.pushed(0, 2.0)
    one.say(0, Norm(5, ((1, 0),), 2.0))
    assert one.hear(Squares).message == Squares(0, 5, 30.0)


def test_what_is_forgotten_is_not_kept(one):
    worker = one.worker()
    worker.pushed(0)
    one.say(0, Forget(1, (0,)))
    one.say(0, Commit(1, ((1, 0),), 1.0))
    assert "commit 1 needs push 0 of worker 1" in one.hear(Refusal).message.reason
    one.say(0, Forget(1, None))
    one.commit()
    worker.push(1)
    assert worker.refused() == "worker 1 was given up: say hello again"


def test_rows_of_tables_travel_by_id(one):
    worker = one.worker()
    ids, gradient = random_rows(TABLE, [5, 99, 7])
    asked = PullRows(0, {"users": 3}, number=3)
    worker.line.send(asked, [ids])
    before, after = torch.zeros(3, 3), torch.zeros(3, 3)
    answer = worker.hear(Rows)
    assert answer.message == Rows(0, 0, 3)
    answer.into([before])
    answer.end()
    slices = worker.gradients.slices(0)
    worker.line.send(Push(0, 1, 0, rows={"users": 3}), [*slices, ids, gradient])
    worker.hear(Staged)
    worker.line.send(PullRows(0, {"users": 3}, at_least=1), [ids])
    assert worker.silent(0.1)
    one.commit((1, 0))
    answer = worker.hear(Rows)
    answer.into([after])
    torch.testing.assert_close(after, before - gradient)


def test_a_snapshot_is_pulled_while_others_go_on(one):
    worker = one.worker()
    worker.pushed(0)
    one.commit((1, 0))
    one.say(0, Snapshot(4))
    worker.pushed(1)
    one.commit((1, 1))
    assert worker.pull(2)["w"] == pytest.approx(9 - 0.9 - 1)
    assert worker.pull(snapshot=4)["w"] == 9
    one.say(0, PullState(4))
    incoming = one.hear(Fill)
    fill = incoming.message
    assert (fill.version, fill.shard) == (1, 0)
    values, tensors = Buffer(one.jobs[0].parts).regions, room(fill.state)
    incoming.into([*values, *tensors.values()])
    incoming.end()
    assert tensors["state.0.momentum_buffer"].tolist() == [1.0] * 24
    one.say(0, Release(4))
    one.commit()
    worker.ask(snapshot=4)
    assert worker.refused() == "shard 0 has no snapshot 4"


# What cannot be


BAD = {
    "another shard": (Push(3, 1, 0), "shard 3 is not here, but shard 0"),
    "an unknown table": (Push(0, 1, 0, rows={"items": 1}), "there is no table 'items'"),
    "no frames": (Push(0, 1, 0), "it ends too soon"),
    "less than no rows": (Push(0, 1, 0, rows={"users": -1}), "-1 rows of table 'users'"),
    "endless rows": (PullRows(0, {"users": 10**15}), "rows of table 'users' cannot be moved"),
    "rows without ids": (PullRows(0, {"users": 3}), "it ends too soon"),
    "an unknown snapshot": (Pull(0, 1, snapshot=-1), "shard 0 has no snapshot -1"),
    "a hello": (Hello("worker", "1", "here", 2), "a shard has no use for a hello message"),
    "a commit": (Commit(1, (), 1.0), "a shard has no use for a commit message"),
    "no proper name": (Push(0, -1, 0), "push 0 of worker -1 has no proper name"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused_and_the_shard_goes_on(one, what):
    message, why = BAD[what]
    worker = one.worker()
    worker.line.send(message)
    assert why in worker.refused()
    worker.pushed(0)
    one.commit((1, 0))
    assert worker.pull(1)["w"] == 9


def test_frames_of_other_sizes_are_refused(one):
    worker = one.worker()
    slices = worker.gradients.slices(0)
    other = Whole([*MODEL, MODEL[0]], 1).slices(0)
    for sent, why in [
        (slices[:1], "it ends too soon"),
        (other, "bytes, 120 were expected"),
        ([*slices, slices[0]], "more follows than was announced"),
    ]:
        worker.line.socket.send_multipart(
            [encode(Push(0, 1, 0)), *(memoryview(each.numpy()) for each in sent)]
        )
        assert why in worker.refused()
    worker.pushed(0)
    held = one.processes[0].server.shards[0].staging.held
    assert list(held) == [(1, 0)]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name(one, bad):
    worker = one.worker()
    worker.push(3, b=bad)
    refusal = worker.hear(Refusal).message
    assert refusal == Refusal("the gradient of 'b' is not finite", 0, 1, 3)
    worker.pushed(3)


def test_garbage_is_refused_and_silence_costs_nothing(one):
    port = int(one.endpoints[0].rpartition(":")[2])
    worker, rude = one.worker(1), one.worker(2)
    with socket.create_connection((LOCAL, port)):
        rude.line.socket.send_multipart([b"garbage", b"x" * 1000])
        assert "a message was refused: Invalid JSON" in rude.refused()
        rude.line.socket.send(encode(Refusal("a refusal is not answered")))
        rude.line.socket.send_multipart([encode(Push(0, 2, 0)), b"x" * (2 * FRAME)])
        worker.pushed(0)
        one.commit((1, 0))
        assert worker.pull(1)["w"] == 9
    before = time.process_time()
    assert worker.silent(1.0)
    assert time.process_time() - before < 0.5  # of two sides, one of which polls


def test_the_coordinator_is_told_what_cannot_be(one):
    one.say(0, Commit(5, (), 1.0))
    told = one.hear(Refusal).message
    assert told.reason == (
        "shard 0: shard 0 has 0 commits and was given number 5: those between are missing"
    )
    one.say(0, Refusal("it is not answered"))
    one.say(0, Beat())
    one.say(0, Hello("worker", "1", "here", 2))
    assert "no use for a hello message" in one.hear(Refusal).message.reason
    one.listener.socket.send_multipart([one.peers[0], b"garbage"])
    assert "a message was refused" in one.hear(Refusal).message.reason
    one.say(0, Fill(0), one.first.slices(0))
    assert "a state came for shard 0, which was not set up" in one.hear(Refusal).message.reason
    one.commit()


def test_a_snapshot_that_was_passed_over_is_refused_at_once(one):
    """The order to keep it was lost with a connection, and a worker waits for it."""
    worker = one.worker()
    worker.ask(snapshot=3)
    assert worker.silent()
    one.say(0, Release(3))
    assert worker.refused() == "shard 0 has no snapshot 3"
    one.say(0, PullState(3))
    refusal = one.hear(Refusal).message
    assert (refusal.reason, refusal.snapshot) == ("shard 0: shard 0 has no snapshot 3", 3)


def test_one_that_is_told_anew_what_to_hold_forgets_what_it_had(make):
    """It answers what it was asked before, once it has that."""
    one = make()
    one.start(patience=1.0)
    one.set_up()
    early, late = one.worker(1), one.worker(2)
    early.ask(1)
    assert early.silent(0.1)
    one.say(0, Setup(one.jobs[0].plain(), attempt=2))
    late.ask(1)
    assert early.refused() == "commit 1 did not come within 1 s, it is being filled: ask again"
    one.fill(0, 0)
    assert one.hear(Ready).message == Ready(0, 0, attempt=2)
    assert late.silent(0.1)
    one.commit()
    late.take()


def test_jobs_that_cannot_be_are_refused(make):
    coordinator = make(rule="dc-asgd")
    coordinator.start()
    for setup, why in [
        (Setup({}), "a shard's job was refused: Field required at index"),
        (Setup(coordinator.jobs[0].plain(), mirror="tcp://127.0.0.1:1"), "dc-asgd keeps what"),
        (Setup(coordinator.jobs[0].plain(), mirror=coordinator.endpoints[0]), "its own mirror"),
        (Setup(coordinator.jobs[0].plain() | {"rule": "sdg"}), "no update rule 'sdg'"),
        (Setup(coordinator.jobs[0].plain() | {"file": "none"}, source="file"), "cannot be read"),
        (Norm(1, (), 1.0), "it holds nothing yet"),
    ]:
        coordinator.say(0, setup)
        assert why in coordinator.hear(Refusal).message.reason
    coordinator.set_up()


# Memory of one machine


def test_a_worker_beside_the_shard_shows_its_memory(one):
    worker = one.worker()
    assert worker.pull() == {"w": 10, "b": 11, "mean": 12}
    worker.pushed(0)  # finds out on the way
    placed = False
    for number in range(1, 4):
        worker.ask()
        placed = worker.take().placed
        worker.pushed(number)
    assert placed
    one.commit((1, 0), (1, 1), (1, 2), (1, 3))
    worker.values.views["b"].fill_(0)
    assert worker.pull(1) == {"w": 6, "b": 7, "mean": 1}
    assert worker.values.views["w"].tolist() == [[6.0] * 4] * 6
    worker.line.send(Pull(0, 1), worker.values.slices(0)[1:])
    assert worker.refused() == "room for [16] bytes was given, the values have [120, 16]"
    assert one.worker(2).pull()["w"] == 6


# Processes that end


def test_it_ends_with_the_coordinators_word_or_silence(make, network):
    coordinator = make()
    coordinator.start()
    coordinator.kill(0)
    listener = network.listen(LOCAL)
    process = Process(listener.endpoint, 0, patience=0.5)
    hear(listener, Hello)
    listener.close()
    process.ended()
    assert isinstance(process.error, WorkerError)
    assert "it has not reached the coordinator" in str(process.error)
