"""Stages at work: micro-batches through a schedule of torch.distributed.pipelining.

All micro-batches of a schedule have to be of one shape. A batch that does not divide is filled up
with copies of its last sample, which the loss leaves out. Every rank of a pipeline has the whole
batch: inputs and targets do not travel, only activations and their gradients do.

torch finds out shapes by sending pickled objects from stage to stage; here every rank knows them
from its own recording, so that nothing but tensors is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS
from torch.utils import _pytree as pytree

from wagontrain.axes import Axis
from wagontrain.batches import MicroBatch
from wagontrain.errors import ModelError, WagontrainError
from wagontrain.stages.cutting import Stage

Kind = Literal["gpipe", "1f1b", "interleaved"]


def pieces(micro: MicroBatch, count: int, even: bool = False) -> list[MicroBatch]:
    """A micro-batch in `count` pieces of one size, or fewer where it has not enough samples.

    The last piece is filled up with copies of the last sample: `count` of a piece says how many
    are real, its inputs and target hold `total`.

    Args:
        micro: the micro-batch.
        count: of pieces.
        even: whether nothing may be filled up, because the model looks at all of it (computes its
            loss by itself): then there are fewer pieces, down to one.

    Raises:
        ModelError: something in it does not have one entry for each sample.
    """
    samples = max(micro.count, 1)
    if even:
        count = max(each for each in range(1, min(count, samples) + 1) if samples % each == 0)
    size = -(-samples // count)
    if size == samples:
        return [replace(micro, total=samples)]
    leaves = pytree.tree_leaves((micro.inputs, micro.target))
    if not all(
        isinstance(leaf, Tensor) and len(leaf) == samples for leaf in leaves if _sized(leaf)
    ):
        raise ModelError(
            f"a batch of {samples} samples cannot be cut into {count} micro-batches: not "
            "everything in it is a tensor with the samples first; collate it so, or give "
            "micro_batches=1"
        )
    result = []
    for start in range(0, samples, size):
        real = min(size, samples - start)
        index = torch.arange(start, start + size).clamp(max=samples - 1)

        def part(leaf: Any, start: int = start, real: int = real, index: Tensor = index) -> Any:
            if not _sized(leaf):
                return leaf
            return leaf[start : start + real] if real == size else leaf[index.to(leaf.device)]

        inputs = pytree.tree_map(part, micro.inputs)
        target = pytree.tree_map(lambda leaf, s=start, r=real: leaf[s : s + r], micro.target)
        result.append(MicroBatch(inputs, target, real if micro.count else 0, size))
    return result


def _sized(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or leaf.dim() > 0


def real_samples(output: Any, piece: MicroBatch) -> Any:
    """The part of a model's output that belongs to the real samples of a piece.

    Raises:
        ModelError: the output does not have one entry for each sample.
    """
    real = max(piece.count, 1)
    if real == piece.total:
        return output

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != piece.total:
            raise ModelError(
                f"a batch does not divide into micro-batches of {piece.total} samples, and the "
                "model's output does not have one entry for each sample, so that the rest cannot "
                "be left out: give micro_batches that divide, or 1"
            )
        return leaf[:real]

    return pytree.tree_map(part, output)


@dataclass
class Load:
    """What is on its way through the stages of this rank.

    Args:
        pieces: the micro-batches.
        compute: (stage, number of the micro-batch, tensors received) -> what the stage gives.
    """

    pieces: list[MicroBatch] = field(default_factory=list)
    compute: Callable[[Stage, int, Sequence[Tensor]], Any] | None = None


class _Module(nn.Module):
    """A stage as the engine wants it."""

    def __init__(self, stage: Stage, load: Load) -> None:
        super().__init__()
        self.stage, self.load = stage, load

    def forward(self, *received: Tensor, number: Tensor) -> Any:
        assert self.load.compute is not None
        return self.load.compute(self.stage, int(number), received)


class _Ready(PipelineStage):
    """A stage that is ready to receive everything from the start of a step.

    Gloo begins to transfer only when the receiver waits for it. Asked for when it is needed, an
    activation would travel while the receiver does nothing; so it is asked for before. One stage
    per rank receives from each neighbour in a fixed order.
    """

    _coming: dict[tuple[str, int], list[Any]] | None = None

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._coming = None

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self._coming is None:
            self._coming = {}
            for number in range(len(self.args_recv_info)):
                self._post("forward", number, super().get_fwd_recv_ops(number))
            for number in range(len(self.args_recv_info)):
                self._post("backward", number, super().get_bwd_recv_ops(number))
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return []

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._wait("forward", fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self._wait("backward", bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _post(self, way: str, number: int, operations: list[dist.P2POp]) -> None:
        assert self._coming is not None
        self._coming[way, number] = [
            dist.irecv(each.tensor, each.peer, self.group) for each in operations
        ]

    def _wait(self, way: str, number: int) -> None:
        assert self._coming is not None
        for work in self._coming.pop((way, number)):
            work.wait()


def schedule(
    kind: Kind,
    stages: Sequence[tuple[int, Stage]],
    total: int,
    micro_batches: int,
    axis: Axis,
    device: torch.device,
    load: Load,
    training: bool,
) -> Callable[[], None]:
    """What runs one load through the stages of this rank, forward and, in training, backward.

    Args:
        kind: the order of things.
        stages: number and content of this rank's stages.
        total: stages of the whole pipeline.
        micro_batches: pieces in a load.
        axis: the ranks of the pipeline.
        device: of this rank.
        load: filled before each run.
        training: whether to go backward.
    """
    alone = len(stages) == 1
    engine_of = _Ready if alone and device.type == "cpu" else PipelineStage
    made: list[Any] = [
        engine_of(
            _Module(stage, load), number, total, device,
            input_args=_examples(stage, stage.receives),
            # The last stage gives its part of the loss.
            output_args=_examples(stage, stage.sends) or torch.empty((), device="meta"),
            group=axis.group,
        )
        for number, stage in stages
    ]  # fmt: skip
    loss: Any = (lambda output, target: output) if training else None
    if alone:
        # With fewer micro-batches than stages, one-forward-one-backward is all forward first.
        enough = micro_batches >= total
        single = Schedule1F1B if kind == "1f1b" and training and enough else ScheduleGPipe
        engine: Any = single(made[0], micro_batches, loss, scale_grads=False)
    else:
        rounds = max(1, micro_batches // axis.size)
        several = ScheduleLoopedBFS if micro_batches % rounds else ScheduleInterleaved1F1B
        engine = several(made, micro_batches, loss, scale_grads=False)

    def run() -> None:
        numbers = torch.arange(micro_batches)
        with torch.set_grad_enabled(training):
            try:
                engine.step(
                    number=numbers, target=numbers if training else None, return_outputs=False
                )
            except RuntimeError as error:
                cause = error.__cause__
                if isinstance(cause, WagontrainError):  # the engine wraps what a stage raises
                    raise cause from cause.__cause__
                raise

    return run


def _examples(stage: Stage, numbers: Sequence[int]) -> tuple[Tensor, ...]:
    """Tensors like those of a recording, without memory, laid out without gaps."""
    values = stage.recording.values
    return tuple(
        torch.empty(values[number].shape, dtype=values[number].dtype, device="meta").requires_grad_(
            values[number].requires_grad
        )
        for number in numbers
    )
