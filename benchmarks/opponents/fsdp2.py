"""FSDP2: `fully_shard` on every layer that holds much, then on the whole."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.measuring import arguments, measure
from benchmarks.models import PROBLEMS, Block, exchanged_bytes

_MUCH = 1_000_000


def main() -> None:
    asked = arguments(__doc__).parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    problem = PROBLEMS[asked.model]()
    model = problem.build()
    whole = exchanged_bytes(model)
    for module in units(model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = problem.optimizer(model.parameters())
    batches = problem.batches(dist.get_rank(), dist.get_world_size())

    def step() -> float:
        inputs, target = next(batches)
        optimizer.zero_grad()
        loss = problem.loss(model(inputs), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    measure(step, dist.barrier, asked, whole)
    dist.destroy_process_group()


def units(model: nn.Module) -> list[nn.Module]:
    """What is gathered and let go together: blocks of a transformer, else single layers."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return blocks or [
        module
        for module in model.modules()
        if not list(module.children())
        and sum(value.numel() for value in module.parameters()) >= _MUCH
    ]


if __name__ == "__main__":
    main()
