"""Messages between two ends: what comes back as it was, and what is refused."""

from __future__ import annotations

import json
import math
import os
import socket
import time

import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.servers.shards import LOCAL, SECRET, WAIT
from tests.servers.talking import alike, heard, outer_address
from wagontrain.errors import UsageError, WorkerError
from wagontrain.servers.frames import FRAME
from wagontrain.servers.messages import (
    Ask,
    Beat,
    Done,
    Hello,
    Push,
    Refusal,
    Staged,
    Stop,
    Values,
    decode,
    encode,
)
from wagontrain.servers.orders import Commit
from wagontrain.servers.wire import BadMessage, Network, Secret

# Headers


@pytest.mark.parametrize(
    "message",
    [
        Hello("worker", "1", "here", 7, fingerprint="ab"),
        Done(1, 2, (3, 4), 5, 6.0, 7, 8.5),
        Push(0, 1, 2, ("a",), {"t": 3}),
        Commit(3, ((1, 0), (2, 5)), 2.0, 1, ({"lr": 0.1, "betas": [0.9, 0.99]}, {})),
        Beat("waiting"),
        Stop('"the loss is 1' + "0" * 30 + '\\", -' + "9" * 30),
    ],
)
def test_headers_come_back_as_they_were(message):
    assert decode(encode(message)) == message


GOOD = json.loads(encode(Push(0, 1, 2)))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\x00garbage",
        b"[]",
        b'{"kind": "no such"}',
        b'{"shard": 1}',
        json.dumps(GOOD | {"sequence": "later"}).encode(),
        json.dumps(GOOD | {"rows": [1]}).encode(),
        json.dumps({key: value for key, value in GOOD.items() if key != "worker"}).encode(),
        b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",  # a pickle
        b"[" * 100_000,
        b'{"kind": "look", "more": ' + b'{"a": ' * 5_000 + b"1" + b"}" * 5_001,
        json.dumps(GOOD | {"sequence": 10**400}).encode(),
        json.dumps(GOOD | {"rows": {"users": -(10**30)}}).encode(),
        json.dumps(GOOD | {"worker": math.nan}).encode(),
    ],
)
def test_what_is_no_header_is_refused(header):
    with pytest.raises(WorkerError, match="a message was refused: "):
        decode(header)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(header):
    with pytest.raises(WorkerError, match="a message was refused: "):
        decode(header)


# Frames


def tensors(seed=0):
    """Of several types; one is more than a frame, one has nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(FRAME // 4 + 3, generator=generator),
        torch.randint(0, 100, (5, 2), generator=generator),
        torch.zeros(0, 4),
        torch.randn(7, generator=generator).to(torch.bfloat16),
    ]


def test_tensors_arrive_in_place_both_ways(listener, line):
    sent, got = tensors(), alike(tensors())
    line.send(Push(0, 1, 2), sent)
    incoming = heard(listener)
    assert incoming.message == Push(0, 1, 2)
    incoming.into(got)
    incoming.end()
    assert all(map(torch.equal, sent, got))
    back = alike(sent)
    listener.send(incoming.peer, Values(0, 9), got)
    answer = heard(line)
    assert answer.message == Values(0, 9)
    answer.into(back)
    answer.end()
    assert all(map(torch.equal, sent, back))


def test_what_was_sent_says_when_its_memory_is_free(listener, line):
    sent = line.send(Push(0, 1, 2), tensors())
    incoming = heard(listener)
    incoming.into(alike(tensors()))
    limit = time.monotonic() + WAIT
    while not sent():
        assert time.monotonic() < limit
        assert line.receive(0.01) is None
    assert line.send(Ask(1))()  # nothing of it is needed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda own: own[:-1], "it ends too soon"),
        (lambda own: [own[0][:-1], *own[1:]], "a frame has 8 bytes, 12 were expected"),
        (lambda own: [torch.zeros(FRAME // 4 + 9), *own[1:]], "a frame has 36 bytes, 12 were"),
        (lambda own: [*own[:2], torch.zeros(3), own[3]], "a frame has 12 bytes, 0 were expected"),
        (lambda own: [*own, torch.zeros(1)], "more follows than was announced"),
    ],
)
def test_other_sizes_are_refused_and_the_next_message_is_whole(listener, line, change, why):
    own = tensors()
    line.send(Push(0, 1, 2), change(own))
    line.send(Push(0, 1, 3), own)
    incoming = heard(listener)
    with pytest.raises(WorkerError, match=f"a push message was refused: {why}"):
        incoming.into(alike(own))
        incoming.end()
    incoming = heard(listener)
    assert incoming.message == Push(0, 1, 3)
    got = alike(own)
    incoming.into(got)
    incoming.end()
    assert all(map(torch.equal, own, got))


def test_what_is_not_taken_can_be_dropped(listener, line):
    line.send(Push(0, 1, 2), tensors())
    line.send(Ask(7))
    heard(listener).drop()
    assert heard(listener).message == Ask(7)


def test_garbage_is_thrown_away_and_its_sender_known(listener, line):
    line.socket.send_multipart([b"\x00garbage", b"x" * 1000, b""])
    with pytest.raises(BadMessage, match="a message was refused: Invalid JSON") as caught:
        heard(listener)
    listener.send(caught.value.peer, Refusal("why"))
    assert heard(line).message == Refusal("why")
    line.socket.send(encode(Ask(1)))
    assert heard(listener).message == Ask(1)


def test_a_message_without_a_header_is_refused(network, listener):
    """A peer of another kind may leave it out; ours cannot."""
    peer = network.context.socket(zmq.ROUTER)
    peer.linger = 0
    peer.plain_username, peer.plain_password = b"wagontrain", SECRET.text.encode()
    peer.setsockopt(zmq.CONNECT_ROUTING_ID, b"listener")
    peer.connect(listener.endpoint)
    peer.setsockopt(zmq.ROUTER_MANDATORY, 1)
    limit = time.monotonic() + WAIT
    while True:
        try:
            peer.send_multipart([b"listener"])
            peer.send_multipart([b"listener", b""])
            break
        except zmq.ZMQError:  # not connected yet
            assert time.monotonic() < limit
            listener.socket.poll(20)
    with pytest.raises(BadMessage, match="refused"):
        heard(listener)
    peer.close()


def test_frames_larger_than_any_of_ours_end_the_connection(network, listener, line):
    line.send(Ask(1))
    heard(listener).drop()
    line.socket.send_multipart([encode(Ask(2)), b"x" * (2 * FRAME + 1)])
    limit = time.monotonic() + WAIT
    while not line.apart():
        assert time.monotonic() < limit
        assert line.receive(0.01) is None
    other = network.connect(listener.endpoint)
    other.send(Ask(3))
    assert heard(listener).message == Ask(3)


def test_bytes_that_are_not_of_this_protocol_harm_nobody(listener, line):
    port = int(listener.endpoint.rpartition(":")[2])
    with (
        socket.create_connection((LOCAL, port)) as silent,
        socket.create_connection((LOCAL, port)) as rude,
    ):
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(5000))
        line.send(Ask(1))
        assert heard(listener).message == Ask(1)
        rude.settimeout(WAIT)
        try:
            while rude.recv(1000):
                pass
        except ConnectionResetError:
            pass
        assert silent.fileno() >= 0
    line.send(Ask(2))
    assert heard(listener).message == Ask(2)


# Who may speak


def test_another_secret_is_refused_with_what_to_do(listener):
    with Network(Secret.new()) as stranger:
        line = stranger.connect(listener.endpoint)
        with pytest.raises(UsageError, match="refused the secret: it is that of another job"):
            line.send(Ask(1))
            line.receive(WAIT)
    assert listener.receive(0.1) is None


def test_a_refused_secret_is_told_to_one_that_sends_later(listener):
    """When the refusal has come there is nobody to send to, and zmq would wait for ever."""
    with Network(Secret.new()) as stranger:
        line = stranger.connect(listener.endpoint)
        assert line._monitor.poll(int(WAIT * 1000))
        while line.socket.poll(50, zmq.POLLOUT):
            pass
        with pytest.raises(UsageError, match="refused the secret: it is that of another job"):
            line.send(Ask(1))


def test_a_peer_without_any_secret_is_not_heard(listener):
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.connect(listener.endpoint)
    sock.send(encode(Ask(1)))
    assert listener.receive(0.3) is None
    context.destroy()


def test_beyond_loopback_everything_is_encrypted():
    address = outer_address()
    with Network(SECRET) as network, Network(SECRET) as other, Network(Secret.new()) as stranger:
        listener = network.listen(address)
        assert listener.socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
        line = other.connect(listener.endpoint)
        sent, got = tensors(), alike(tensors())
        line.send(Push(0, 1, 2), sent)
        incoming = heard(listener)
        incoming.into(got)
        incoming.end()
        assert all(map(torch.equal, sent, got))
        listener.send(incoming.peer, Staged(0, 1, 2))
        assert heard(line).message == Staged(0, 1, 2)
        knocking = stranger.connect(listener.endpoint)
        knocking.send(Ask(1))
        # It encrypts for another key than the listener's, who cannot tell it why.
        assert knocking.receive(0.5) is None
        assert knocking.connections() == 0
        assert listener.receive(0.1) is None


def test_somebody_with_the_listeners_key_only_is_not_heard():
    """The secret is behind both keys: the public one that answers a stranger opens nothing."""
    with Network(SECRET) as network:
        listener = network.listen(outer_address())
        sock = network.context.socket(zmq.DEALER)
        sock.linger = 0
        sock.curve_serverkey, _ = SECRET.keys("listen")
        sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
        sock.connect(listener.endpoint)
        sock.send(encode(Ask(1)))
        assert listener.receive(0.5) is None
        sock.close()


def test_secrets_are_checked_and_new():
    assert Secret.new() != Secret.new()
    for text in ("", "ab", "zz" * 32, "AB" * 32):
        with pytest.raises(UsageError, match="the job's secret is 64 hexadecimal digits"):
            Secret(text)
    assert SECRET.keys("listen") != SECRET.keys("connect")
    assert SECRET.keys("listen") == Secret(SECRET.text).keys("listen")


def test_an_address_that_is_not_here_or_taken_is_refused(network, listener):
    with pytest.raises(UsageError, match="cannot listen on 192.0.2.1:0"):
        network.listen("192.0.2.1")
    port = int(listener.endpoint.rpartition(":")[2])
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
        network.listen(LOCAL, port)


def test_lines_survive_that_a_listener_comes_back(network):
    first = network.listen(LOCAL)
    port = int(first.endpoint.rpartition(":")[2])
    line = network.connect(first.endpoint)
    line.send(Ask(1))
    heard(first).drop()
    assert (line.connections(), line.apart()) == (1, 0.0)
    first.close()
    limit = time.monotonic() + WAIT
    while not line.apart():
        assert time.monotonic() < limit
        assert line.receive(0.01) is None
    while True:
        try:
            second = network.listen(LOCAL, port)
            break
        except UsageError:  # not given back yet
            assert time.monotonic() < limit
    line.send(Ask(2))
    assert heard(second).message == Ask(2)
    assert line.connections() == 2
