"""A parameter server as a Ray actor, as Ray's documentation has it: NumPy arrays by its store."""

from __future__ import annotations

import os
import sys

import numpy as np
import ray
import torch

from benchmarks.serving import MIB, Sides, follow


@ray.remote(num_cpus=0)
class Server:
    """Holds the values and the last gradient."""

    def __init__(self, size: int) -> None:
        self.values = np.zeros(size * MIB // 4, dtype=np.float32)
        self.gradient = np.zeros(0)

    def push(self, gradient: np.ndarray) -> None:
        self.gradient = gradient

    def pull(self) -> np.ndarray:
        return self.values

    def process(self) -> int:
        return os.getpid()


def main() -> None:
    size = int(sys.argv[1])
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, **quiet)  # not a cluster that happens to be there
    server = Server.remote(size)
    own, gradient = torch.zeros(size * MIB // 4), torch.ones(size * MIB // 4)

    def pull() -> None:
        values = ray.get(server.pull.remote())
        with np.errstate(all="ignore"):
            np.copyto(own.numpy(), values)

    follow(
        Sides(
            lambda: ray.get(server.push.remote(gradient.numpy())),
            pull,
            ray.get(server.process.remote()),
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
