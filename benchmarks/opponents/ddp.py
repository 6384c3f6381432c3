"""DistributedDataParallel, as PyTorch's tutorial has it."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measuring import arguments, measure
from benchmarks.models import PROBLEMS, exchanged_bytes


def main() -> None:
    asked = arguments(__doc__).parse_args()
    dist.init_process_group("gloo")
    problem = PROBLEMS[asked.model]()
    model = DistributedDataParallel(problem.build())
    optimizer = problem.optimizer(model.parameters())
    batches = problem.batches(dist.get_rank(), dist.get_world_size())

    def step() -> float:
        inputs, target = next(batches)
        optimizer.zero_grad()
        loss = problem.loss(model(inputs), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    measure(step, dist.barrier, asked, exchanged_bytes(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
