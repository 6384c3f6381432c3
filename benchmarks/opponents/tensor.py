"""Split weights by DTensor: `parallelize_module`, columns and rows in turn as Megatron has it."""

from __future__ import annotations

import contextlib

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.measuring import arguments, measure
from benchmarks.models import PROBLEMS, exchanged_bytes


def plan(name: str, model: nn.Module) -> dict[str, ParallelStyle]:
    """How each layer of a model is split; with columns first, half of the exchanges fall away.

    Raises:
        SystemExit: nobody would split this model in such a way.
    """
    if name == "speech":  # the last layer's columns stay split: its loss is computed so
        layers = [key for key, module in model.named_children() if isinstance(module, nn.Linear)]
        last = layers.pop()
        styles = [ColwiseParallel(), RowwiseParallel()] * len(layers)
        whole = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        return dict(zip(layers, styles, strict=False)) | {last: whole}
    if name == "gpt":
        result: dict[str, ParallelStyle] = {}
        for number in range(len(model.blocks)):
            for part in ("query", "key", "value", "wide"):
                result[f"blocks.{number}.{part}"] = ColwiseParallel()
            for part in ("merge", "narrow"):
                result[f"blocks.{number}.{part}"] = RowwiseParallel()
        return result
    raise SystemExit(f"no plan to split {name!r}: only speech and gpt have one")


def main() -> None:
    asked = arguments(__doc__).parse_args()
    problem = PROBLEMS[asked.model]()
    model = problem.build()
    styles = plan(asked.model, model)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = exchanged_bytes(model)
    parallelize_module(model, mesh, styles)
    optimizer = problem.optimizer(model.parameters(), foreach=False)  # DTensors and others mix
    batches = problem.batches()  # every rank computes on all samples
    split_loss = loss_parallel if asked.model == "speech" else contextlib.nullcontext

    def step() -> float:
        inputs, target = next(batches)
        optimizer.zero_grad()
        with split_loss():
            loss = problem.loss(model(inputs), target)
            loss.backward()
        optimizer.step()
        return loss.item()

    measure(step, dist.barrier, asked, whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
