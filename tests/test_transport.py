from __future__ import annotations

import socket

import pytest
import torch

from tests.gang import Gang
from wagontrain.transport import Context, SentBytes, fingerprints


def exchanged(context: Context) -> dict[str, object]:
    rank = context.world.rank
    pending = context.gather_later(torch.tensor([rank, 0.5]))
    return {
        "later": pending.result(),
        "sum": context.sum([rank, 1.0]),
        "integers": context.gather_integers([2**60 + rank]),
        "text": context.gather_text(f"hôst-{rank}"),
        "long": len(context.gather_text("x" * 2000)[0]),
    }


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_hears_all_ranks(gang: Gang, size: int) -> None:
    results = gang.run(size, exchanged)
    for result in results:
        assert result["later"] == [[float(rank), 0.5] for rank in range(size)]
        assert result["sum"] == [sum(range(size)), size]
        assert result["integers"] == [[2**60 + rank] for rank in range(size)]
        assert result["text"] == [f"hôst-{rank}" for rank in range(size)]
        assert result["long"] == 1023


def test_fingerprints_tell_every_bit() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        one = torch.ones(5, 3).to(dtype)
        other = one.clone()
        assert fingerprints([one]) == fingerprints([other])
        other[2, 1] = 0
        assert fingerprints([one]) != fingerprints([other])
    near = torch.ones(4)
    next_up = near.clone()
    next_up[3] = torch.nextafter(near[3], torch.tensor(2.0))
    assert fingerprints([near]) != fingerprints([next_up])
    assert fingerprints([torch.zeros(3)]) != fingerprints([torch.zeros(4)])
    assert fingerprints([torch.arange(9)]) != fingerprints([torch.arange(9).flip(0)])
    assert fingerprints([torch.zeros(())]) != fingerprints([torch.ones(())])
    assert len(fingerprints([torch.zeros(2, dtype=torch.complex64), torch.zeros(0)])) == 2


def test_bytes_as_the_kernel_counts_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        earlier = socket.create_connection(server.getsockname())
        sent = SentBytes()
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        earlier.sendall(b"x" * 10)  # somebody else's
        sent.refresh()
        client.sendall(b"x" * 1000)
        assert sent.total() == 1000
        assert sent.lap() == 1000
        client.sendall(b"x" * 50)
        assert sent.lap() == 50
        later = socket.create_connection(server.getsockname())
        later.sendall(b"x" * 7)
        assert sent.lap() == 0  # not found yet
        sent.refresh()
        assert sent.lap() == 7
        assert sent.total() == 1057
        sent.close()
        for sock in (client, earlier, later, peer):
            sock.close()


def test_whoever_talks_to_nobody_counts_nothing() -> None:
    context = Context()
    assert context.sent.total() == 0
    assert context.gather([1.0, 2.0]) == [[1.0, 2.0]]
