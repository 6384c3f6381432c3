"""A shard whose process was lost goes on: from its mirror, or from its file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.servers.shards import LOCAL, SECRET, WAIT, Coordinator, hear
from wagontrain.servers.contents import contents, read
from wagontrain.servers.messages import Hello, Push, Refusal, Staged, Stop
from wagontrain.servers.orders import Ready, Setup
from wagontrain.servers.parts import Buffer


def staged(coordinator: Coordinator, process: int, index: int) -> list[tuple[int, int]]:
    """Pushes that a process has put aside of a shard."""
    server = coordinator.processes[process].server
    assert server is not None
    return sorted(server.shards[index].staging.held)


def test_what_is_acknowledged_is_on_the_mirror(make):
    two = make(2)
    two.mirrored()
    worker = two.worker(1, 0)
    worker.pushed(0)
    assert staged(two, 0, 0) == staged(two, 1, 0) == [(1, 0)]
    two.worker(1, 1).pushed(0)
    two.commit((1, 0))
    servers = [two.processes[index].server for index in range(2)]
    for index in range(2):
        own, mirror = servers[index].shards[index], servers[1 - index].shards[index]
        assert all(map(torch.equal, own.pull(whole=True)[1], mirror.pull(whole=True)[1]))
        assert own.version == mirror.version == 1


def test_nothing_is_acknowledged_before_the_mirror_has_it(make, network):
    one = make()
    one.start()
    mirror = network.listen(LOCAL)
    one.set_up(mirror=mirror.endpoint)
    worker, again = one.worker(), one.worker()
    worker.push(0)
    forwarded = hear(mirror, Push)
    assert forwarded.message == Push(0, 1, 0)
    forwarded.drop()
    again.push(0)  # the same, after a new connection, say
    assert worker.silent(0.1)
    assert again.silent(0.1)
    mirror.send(forwarded.peer, Staged(0, 1, 0))
    worker.hear(Staged)
    again.hear(Staged)
    again.pushed(0)
    worker.push(1)
    forwarded = hear(mirror, Push)
    forwarded.drop()
    mirror.send(forwarded.peer, Refusal("it was given up", 0, 1, 1))
    assert worker.refused() == "it was given up"


def test_a_killed_shard_goes_on_from_its_mirror(make):
    two = make(2)
    two.mirrored()
    for index in range(2):
        worker = two.worker(1, index)
        worker.pushed(0)
        worker.pushed(1, 2.0)
    two.commit((1, 0))
    port = two.kill(0)
    two.start(0, port)
    jobs, ends = two.jobs, two.endpoints
    two.say(0, Setup(jobs[0].plain(), mirror=ends[1], source=ends[1], version=two.version))
    two.say(0, Setup(jobs[1].plain(), source=ends[1], version=two.version))
    ready = {two.hear(Ready).message for _ in range(2)}
    assert ready == {Ready(0, 1), Ready(1, 1, mirror=True)}
    two.commit((1, 1))  # was put aside before
    worker = two.worker(1, 0)
    worker.pushed(1)  # is known
    worker.pushed(2)  # reaches the mirror
    assert staged(two, 0, 0) == staged(two, 1, 0) == [(1, 2)]
    # momentum 0.9: 10 - 1 - (0.9 + 2)
    assert worker.pull(2)["w"] == pytest.approx(6.1)


def test_what_the_mirror_did_not_acknowledge_is_sent_again(make):
    two = make(2)
    two.mirrored()
    port = two.kill(1)
    worker = two.worker(1, 0)
    worker.push(0)
    assert worker.silent()
    two.start(1, port)
    jobs, ends = two.jobs, two.endpoints
    two.say(1, Setup(jobs[1].plain(), mirror=ends[0], source=ends[0]))
    two.say(1, Setup(jobs[0].plain(), source=ends[0]))
    for _ in range(2):
        two.hear(Ready)
    worker.hear(Staged)
    assert staged(two, 1, 0) == [(1, 0)]
    two.worker(1, 1).pushed(0)
    two.commit((1, 0))


def test_a_mirror_that_is_not_there_is_told(make):
    one = make()
    one.start(patience=0.5)
    one.say(0, Setup(one.jobs[0].plain(), source="tcp://127.0.0.1:1"))
    assert "gave no state of 0: nothing" in one.hear(Refusal).message.reason
    one.fill(0, 0)
    one.hear(Ready)


def written(file: Path, one: Coordinator) -> None:
    """Return when a file has the state after the last commit."""
    limit = time.monotonic() + WAIT
    regions = Buffer(one.jobs[0].parts).regions
    while not file.exists() or read(file, regions).version < one.version:
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_killed_shard_goes_on_from_its_file(make, tmp_path):
    file = tmp_path / "shard-0"
    one = make(file=str(file), every=0.01)
    one.start()
    one.set_up()
    worker = one.worker()
    worker.pushed(0)
    one.commit((1, 0))
    written(file, one)
    port = one.kill(0)
    one.start(0, port)
    one.set_up(0, source="file")
    assert worker.pull(1)["w"] == 9
    one.commit((1, 1), lost=1)  # was put aside when it was killed
    worker.pushed(2)
    one.commit((1, 2))
    assert worker.pull(3)["w"] == pytest.approx(9 - 0.9 - 1)


def test_a_disk_that_is_full_ends_nothing(make, tmp_path):
    (tmp_path / "file").touch()
    one = make(file=str(tmp_path / "file" / "shard-0"), every=0.01)
    one.start()
    one.set_up()
    worker = one.worker()
    worker.pushed(0)
    one.commit((1, 0))
    refusal = one.hear(Refusal).message
    assert "the state could not be written to" in refusal.reason
    assert refusal.then == "go on"
    assert worker.pull(1)["w"] == 9


def test_a_process_of_its_own_is_told_the_secret_in_private(make):
    one = make()
    program = [sys.executable, "-m", "wagontrain.servers.serving"]
    command = [*program, one.listener.endpoint, "0", LOCAL, "0", "."]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdin is not None
        process.stdin.write(SECRET.text + "\n")
        process.stdin.flush()
        limit = time.monotonic() + 3 * WAIT
        while (incoming := one.listener.receive(1.0)) is None:  # it imports torch
            assert time.monotonic() < limit
        assert isinstance(incoming.message, Hello)
        assert incoming.message.process == process.pid
        assert SECRET.text not in Path(f"/proc/{process.pid}/cmdline").read_text()
        one.listener.send(incoming.peer, Stop())
        _, said = process.communicate(timeout=WAIT)
    assert (process.returncode, said) == (0, "")


def test_contents_are_those_of_the_mirror(make):
    """To the bit, whatever came between."""
    two = make(2, rule="adam")
    two.mirrored()
    workers = [two.worker(1, index) for index in range(2)]
    for number in range(5):
        for worker in workers:
            worker.pushed(number, 0.3 * number - 1)
        two.commit((1, number), divide=3.0)
    own = contents(two.processes[0].server.shards[0])
    mirror = contents(two.processes[1].server.shards[0])
    assert own.tensors.keys() == mirror.tensors.keys()
    assert all(torch.equal(own.tensors[name], mirror.tensors[name]) for name in own.tensors)
    assert all(map(torch.equal, own.values, mirror.values))
