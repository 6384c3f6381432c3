"""A raw socket: what the machine itself can do, with nothing that a server needs.

python -m benchmarks.opponents.socket_server MIB
python -m benchmarks.opponents.socket_server MIB serve|connect ADDRESS PORT
"""

from __future__ import annotations

import os
import socket
import sys
import time

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


def serve(listener: socket.socket, size: int) -> None:
    """Answer `p` and a gradient by `.`, and anything else by values."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(os.getpid().to_bytes(8, "little"))
    memory = memoryview(torch.zeros(size * MIB, dtype=torch.uint8).numpy())
    asked = bytearray(1)
    while receive(sock, memoryview(asked)):
        if asked == b"p":
            receive(sock, memory)
            sock.sendall(b".")
        else:
            sock.sendall(memory)


def connected(address: str, port: int) -> socket.socket:
    """A connection, as soon as somebody listens there."""
    limit = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((address, port), timeout=60)
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)


def ask(sock: socket.socket, size: int) -> None:
    """Be the worker."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    said = bytearray(8)
    receive(sock, memoryview(said))
    server = int.from_bytes(said, "little")
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


def main() -> None:
    size = int(sys.argv[1])
    if len(sys.argv) > 2:
        address, port = sys.argv[3], int(sys.argv[4])
        if sys.argv[2] == "serve":
            serve(socket.create_server((address, port)), size)
        else:
            ask(connected(address, port), size)
        return
    listener = socket.create_server(("127.0.0.1", 0))
    server = os.fork()
    if server == 0:
        serve(listener, size)
        os._exit(0)
    ask(connected(*listener.getsockname()), size)
    os.waitpid(server, 0)


if __name__ == "__main__":
    main()
