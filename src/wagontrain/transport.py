"""What ranks say to each other outside the strategies' own exchanges, and what that cost.

A `Context` is one rank's place in a running job: the world, the process group that a strategy
exchanges over, and a second small group for figures (losses, timings, batch statistics), so that
a few bytes do not queue behind a gradient bucket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wagontrain.mesh import World
from wagontrain.watch import Watch

_TEXT_BYTES = 1024
_TCP_INFO_BYTES_SENT = 200  # offset of tcpi_bytes_sent in struct tcp_info (Linux 4.19 and later)


@dataclass(frozen=True)
class Pending:
    """Figures on their way from all ranks; `result()` waits for them."""

    _finish: Callable[[], list[list[float]]]

    def result(self) -> list[list[float]]:
        """One list of figures per rank."""
        return self._finish()


@dataclass(frozen=True)
class Context:
    """One rank's place in a running job.

    Args:
        world: ranks and devices.
        group: the process group strategies exchange over; None in a world of one.
        side: the process group for figures; None in a world of one.
        sent: what this process has sent.
        watch: whether the other ranks are still there.
    """

    world: World = field(default_factory=World)
    group: dist.ProcessGroup | None = None
    side: dist.ProcessGroup | None = None
    sent: SentBytes = field(default_factory=lambda: SentBytes(talks=False))
    watch: Watch = field(default_factory=Watch)

    def gather_later(self, figures: Sequence[float] | Tensor) -> Pending:
        """Start collecting every rank's figures (as float64); all ranks give equally many.

        A tensor of shape [figures] on the world's device is taken without waiting for it.
        """
        local = torch.as_tensor(figures, dtype=torch.float64, device=self.world.device)
        if self.side is None:
            return Pending(lambda: [local.tolist()])
        return self._gather(local)

    def gather(self, figures: Sequence[float]) -> list[list[float]]:
        """Every rank's figures (as float64), one list per rank."""
        return self.gather_later(figures).result()

    def sum(self, figures: Sequence[float]) -> list[float]:
        """Element by element the sum over ranks, added in rank order on every rank."""
        return [sum(column) for column in zip(*self.gather(figures), strict=True)]

    def gather_integers(self, integers: Sequence[int]) -> list[list[int]]:
        """Every rank's 64-bit integers, exactly."""
        if self.side is None:
            return [list(integers)]
        local = torch.tensor(integers, dtype=torch.int64, device=self.world.device)
        return [list(map(int, row)) for row in self._gather(local).result()]

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, cut to 1023 bytes of UTF-8. No pickle, unlike all_gather_object."""
        raw = text.encode()[: _TEXT_BYTES - 1].ljust(_TEXT_BYTES, b"\0")
        return [
            bytes(row).rstrip(b"\0").decode(errors="ignore")
            for row in self.gather_integers(list(raw))
        ]

    def gather_bytes(self, own: bytes) -> list[bytes]:
        """Every rank's bytes, of any length."""
        lengths = [row[0] for row in self.gather_integers([len(own)])]
        if self.side is None:
            return [own]
        padded = torch.frombuffer(bytearray(own.ljust(max(*lengths, 1), b"\0")), dtype=torch.uint8)
        padded = padded.to(self.world.device)
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded, group=self.side)
        return [
            bytes(row[:length].cpu().numpy()) for row, length in zip(rows, lengths, strict=True)
        ]

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Make `tensor` that of `rank` on every rank."""
        if self.group is not None:
            dist.broadcast(tensor, rank, group=self.group)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Give `tensor` to `rank`, which has to receive it."""
        dist.send(tensor, rank, group=self.group)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill `tensor` with what `rank` sends."""
        dist.recv(tensor, rank, group=self.group)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.gather([0.0])

    def _gather(self, local: Tensor) -> Pending:
        rows = [torch.empty_like(local) for _ in range(self.world.size)]
        work: Any = dist.all_gather(rows, local, group=self.side, async_op=True)
        if local.device.type != "cuda":

            def finish() -> list[list[float]]:
                work.wait()
                return [row.tolist() for row in rows]

            return Pending(finish)
        # On a GPU the figures are copied out on a stream of their own: reading them then waits
        # for the forward that made them, and not for a backward that was queued after it.
        stream = torch.cuda.Stream(local.device)
        with torch.cuda.stream(stream):
            work.wait()
            host = torch.stack(rows).to("cpu", non_blocking=True)
            copied: Any = torch.cuda.Event()
            copied.record(stream)

        def finish_copy() -> list[list[float]]:
            copied.synchronize()
            result: list[list[float]] = host.tolist()
            return result

        return Pending(finish_copy)


def fingerprints(tensors: Iterable[Tensor]) -> list[int]:
    """One integer per tensor (CRC-32 of its bytes) that differs when any bit of it differs."""
    arrays = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for tensor in tensors
    )
    return [zlib.crc32(array.data) for array in arrays]


class SentBytes:
    """Bytes that this process has sent over TCP, as the kernel counted them.

    Gloo talks over TCP also within one machine, so this is what really travelled: payload,
    headers of Gloo's own and retransmissions. NCCL's shared memory and InfiniBand are not seen.

    The sockets found at `refresh` are counted; `total` is then a few system calls. None where
    the kernel does not say (other than Linux). A process that talks to nobody counts nothing.
    Sockets that are there when this object is made are others' and left alone.
    """

    def __init__(self, talks: bool = True) -> None:
        self._talks = talks
        self._sockets: dict[int, socket.socket] = {}
        self._others = {number for number, _ in self._open_sockets()}
        self._lap = 0
        self._forgotten = 0

    def refresh(self) -> None:
        """Find the TCP sockets that were opened since."""
        for number, descriptor in self._open_sockets():
            if number in self._others or number in self._sockets:
                continue
            with contextlib.suppress(OSError):  # closed meanwhile
                copy = socket.socket(fileno=os.dup(descriptor))
                if copy.type == socket.SOCK_STREAM and copy.family in _INTERNET:
                    self._sockets[number] = copy
                else:
                    copy.close()

    def _open_sockets(self) -> list[tuple[int, int]]:
        """Inode and descriptor of every socket of this process."""
        folder = "/proc/self/fd"
        if not self._talks or not os.path.isdir(folder):
            return []
        found = []
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.append((status.st_ino, int(name)))
        return found

    def shut(self) -> None:
        """Shut the connections, so that whoever waits on one gets an error instead."""
        self.refresh()
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):  # not connected: Gloo aborts if its listener goes
                sock.getpeername()
                sock.shutdown(socket.SHUT_RDWR)

    def total(self) -> int | None:
        """Bytes sent since this object was made, or since `forget`."""
        count = self._count()
        return None if count is None else count - self._forgotten

    def forget(self) -> None:
        """Count from here on: what was sent before was for something else."""
        self.refresh()
        self._forgotten = self._count() or 0
        self._lap = 0

    def lap(self) -> int | None:
        """Bytes sent since the last lap, or since this object was made."""
        now = self.total()
        if now is None:
            return None
        sent, self._lap = now - self._lap, now
        return sent

    def close(self) -> None:
        """Let go of the sockets."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def _count(self) -> int | None:
        if not hasattr(socket, "TCP_INFO"):
            return None
        total = 0
        for sock in self._sockets.values():
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_SENT + 8)
            if len(info) < _TCP_INFO_BYTES_SENT + 8:
                return None
            total += int.from_bytes(info[_TCP_INFO_BYTES_SENT:], sys.byteorder)
        return total


_INTERNET = (socket.AF_INET, socket.AF_INET6)


class Stopwatch:
    """Time marks on the device: CUDA events where there is a GPU, the clock elsewhere.

    Reading the marks of a step while the next one runs keeps the GPU from waiting for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now, on the device's own time line."""
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Seconds from one mark to another."""
        if not self._cuda:
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
