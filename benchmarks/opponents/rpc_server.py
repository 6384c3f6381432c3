"""A parameter server of torch.distributed.rpc, as PyTorch's tutorials have it: one RRef."""

from __future__ import annotations

import os
import socket
import sys
import threading

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp

from benchmarks.serving import MIB, Sides, follow


class Server:
    """Holds the values and the last gradient."""

    def __init__(self, size: int) -> None:
        self.values = torch.zeros(size * MIB // 4)
        self.gradient = torch.zeros(0)
        self.lock = threading.Lock()

    def push(self, gradient: torch.Tensor) -> None:
        with self.lock:
            self.gradient = gradient

    def pull(self) -> torch.Tensor:
        return self.values

    def process(self) -> int:
        return os.getpid()


def run(rank: int, port: int, size: int) -> None:
    if rank == 0:
        torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}")
    rpc.init_rpc(f"node{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 1:
        sys.stdin = os.fdopen(0)
        server = rpc.remote("node0", Server, (size,))
        own, gradient = torch.zeros(size * MIB // 4), torch.ones(size * MIB // 4)
        follow(
            Sides(
                lambda: server.rpc_sync().push(gradient),
                lambda: own.copy_(server.rpc_sync().pull()),
                server.rpc_sync().process(),
            )
        )
    rpc.shutdown()


def main() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    size = int(sys.argv[1])
    server = mp.get_context("spawn").Process(target=run, args=(0, port, size))
    server.start()
    run(1, port, size)
    server.join()


if __name__ == "__main__":
    main()
