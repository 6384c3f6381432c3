"""A raw socket: what the machine itself can do, with nothing that a server needs."""

from __future__ import annotations

import os
import socket
import sys

import torch

from benchmarks.serving import MIB, Sides, follow


def receive(sock: socket.socket, memory: memoryview) -> bool:
    """Fill memory; False at the connection's end."""
    while len(memory):
        got = sock.recv_into(memory)
        if not got:
            return False
        memory = memory[got:]
    return True


def serve(sock: socket.socket, size: int) -> None:
    """Answer `p` and a gradient by `.`, and anything else by values."""
    memory = memoryview(torch.zeros(size * MIB, dtype=torch.uint8).numpy())
    asked = bytearray(1)
    while receive(sock, memoryview(asked)):
        if asked == b"p":
            receive(sock, memory)
            sock.sendall(b".")
        else:
            sock.sendall(memory)


def main() -> None:
    size, address = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    listener = socket.create_server((address, 0))
    server = os.fork()
    if server == 0:
        sock, _ = listener.accept()
        serve(sock, size)
        os._exit(0)
    sock = socket.create_connection(listener.getsockname())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(torch.ones(size * MIB, dtype=torch.uint8).numpy())
    answer = memoryview(bytearray(1))

    def push() -> None:
        sock.sendall(b"p")
        sock.sendall(memory)
        receive(sock, answer)

    def pull() -> None:
        sock.sendall(b"g")
        receive(sock, memory)

    follow(Sides(push, pull, server))
    sock.close()
    os.waitpid(server, 0)


if __name__ == "__main__":
    main()
