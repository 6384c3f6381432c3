"""Memory of one machine: shown instead of sent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.servers.shards import SECRET, WAIT
from tests.servers.talking import alike, heard, outer_address
from wagontrain.errors import WorkerError
from wagontrain.servers.frames import FRAME
from wagontrain.servers.messages import Ask, Pull, Push, Staged, Values, encode
from wagontrain.servers.shared import NOTHING, Arena, Atlas
from wagontrain.servers.wire import Line, Listener, Network


def accept(listener: Listener, line: Line, arena: Arena) -> None:
    """Let a line find out that its memory can be seen."""
    line.send(Ask(0))
    heard(listener).drop()
    line.send(Push(0, 0, 0), [arena.memory(8)])  # offers on the way, and is still sent as it was
    incoming = heard(listener)
    assert incoming.message == Push(0, 0, 0)
    incoming.drop()
    listener.send(incoming.peer, Staged(0, 0, 0))
    assert heard(line).message == Staged(0, 0, 0)


def test_memory_is_shown_instead_of_sent(network, listener, line):
    arena = network.arena
    accept(listener, line, arena)
    shown = [arena.memory(3 * FRAME), torch.zeros(0, dtype=torch.uint8)]
    shown[0].fill_(5)
    rows = torch.ones(4)
    line.send(Push(0, 1, 2, rows={"t": 4}), [*shown, rows])
    incoming = heard(listener)
    assert incoming.message == Push(0, 1, 2, rows={"t": 4}, shared=2)
    got = alike([*shown, rows])
    incoming.into(got)
    incoming.end()
    assert all(map(torch.equal, got, [*shown, rows]))


def test_answers_are_written_where_they_are_wanted(network, listener, line):
    accept(listener, line, network.arena)
    wanted = network.arena.memory(100)
    line.send(Pull(0, 1), [wanted[10:20]])
    incoming = heard(listener)
    assert incoming.message == Pull(0, 1, shared=1)
    (place,) = incoming.places()
    incoming.end()
    place.fill_(3)
    listener.send(incoming.peer, Values(0, 4, placed=True))
    answer = heard(line)
    answer.into([wanted[10:20]])
    answer.end()
    assert wanted.sum() == 30
    assert wanted[10:20].tolist() == [3] * 10


def test_shown_memory_of_another_size_is_refused(network, listener, line):
    accept(listener, line, network.arena)
    line.send(Push(0, 1, 2), [network.arena.memory(100)])
    with pytest.raises(WorkerError, match="it refers to 100 bytes, 99 were expected"):
        heard(listener).into([torch.zeros(99, dtype=torch.uint8)])
    line.socket.send_multipart([encode(Push(0, 1, 3, shared=2)), NOTHING])
    with pytest.raises(WorkerError, match="it ends too soon"):
        heard(listener).into([])


def test_between_machines_memory_is_sent():
    with Network(SECRET) as network:
        listener = network.listen(outer_address())
        line = network.connect(listener.endpoint)
        for number in range(3):
            line.send(Push(0, 1, number), [network.arena.memory(10)])
            incoming = heard(listener)
            assert incoming.message == Push(0, 1, number)
            incoming.into([torch.zeros(10, dtype=torch.uint8)])
            listener.send(incoming.peer, Staged(0, 1, number))
            assert heard(line).message == Staged(0, 1, number)


# Without torch, which takes seconds to import.
SHOWS = """
import fcntl, mmap, os, struct, sys
descriptor = os.memfd_create("here", os.MFD_ALLOW_SEALING)
os.ftruncate(descriptor, 4096 + 1000)
if sys.argv[1] == "sealed":
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
memory = mmap.mmap(descriptor, 4096 + 1000)
memory[:32] = b"t" * 32
memory[4096:] = bytes([7]) * 1000
print(struct.pack("<QQ32sQQ", os.getpid(), descriptor, b"t" * 32, 100, 200).hex(), flush=True)
sys.stdin.readline()
print(sum(memory[4096:]), flush=True)
"""


@pytest.fixture(params=["sealed"])
def other(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """Another process that shows its memory, and a reference to it."""
    command = [sys.executable, "-c", SHOWS, request.param]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, bytes.fromhex(process.stdout.readline())
        process.communicate(timeout=WAIT)


def test_memory_of_another_process_is_seen_while_it_lives(other):
    atlas = Atlas()
    process, reference = other
    seen = atlas.find(reference)
    assert seen.tolist() == [7] * 200
    seen.fill_(0)
    said, _ = process.communicate("\n", timeout=WAIT)
    assert int(said) == 7 * 800
    assert len(atlas) == 1
    atlas.prune()
    assert len(atlas) == 0
    assert seen.tolist() == [0] * 200  # what is in use stays
    with pytest.raises(WorkerError, match=f"memory of process {process.pid} cannot be reached"):
        atlas.find(reference)


@pytest.mark.parametrize("other", ["open"], indirect=True)
def test_memory_that_may_become_shorter_is_refused(other):
    """Touching what was cut off would kill this process."""
    with pytest.raises(WorkerError, match="cannot be reached from here: it is not sealed"):
        Atlas().find(other[1])


def test_references_that_are_none_are_refused():
    arena, atlas = Arena(), Atlas()
    memory = arena.memory(100)
    reference = arena.reference(memory)
    assert reference is not None
    assert arena.reference(torch.zeros(100)) is None
    assert arena.reference(torch.zeros(0)) == NOTHING
    assert len(atlas.find(NOTHING)) == 0
    for bad in (b"", reference[:-1], reference + b"x"):
        with pytest.raises(WorkerError, match="this is no reference to memory"):
            atlas.find(bad)
    stranger = reference[:16] + bytes(32) + reference[48:]
    with pytest.raises(WorkerError, match="cannot be reached from here: it is another's"):
        atlas.find(stranger)
    beyond = reference[:-8] + (101).to_bytes(8, "little")
    with pytest.raises(WorkerError, match="shares 100 bytes, not 101"):
        atlas.find(beyond)
    with open(__file__, "rb") as file:  # noqa: PTH123  a descriptor that is no such memory
        other = reference[:8] + file.fileno().to_bytes(8, "little") + reference[16:]
        with pytest.raises(WorkerError, match="cannot be reached from here"):
            atlas.find(other)
    arena.close()
    assert arena.reference(memory) is None
