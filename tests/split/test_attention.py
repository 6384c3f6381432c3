"""Attention divided by heads: the same results and gradients as whole, in any form of the call."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import SAMPLES, adam, classes, numbers
from wagontrain import building, verify
from wagontrain.axes import Axes, Axis, whole_world
from wagontrain.reference import Trace, train_plainly
from wagontrain.split.border import Replicated
from wagontrain.split.divide import divide
from wagontrain.split.observe import Observed
from wagontrain.transport import Context

COUNT, LENGTH, KEYS, HEADS, WIDTH = 3, 5, 7, 5, 20


def data(*shape: int, seed: int = 1) -> Tensor:
    return numbers(*shape, seed=seed).double()


def causal(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu(1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and a call of it."""

    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((COUNT, LENGTH, WIDTH),)
    same: tuple[int, int, int] = (0, 0, 0)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)


FIRST: dict[str, Any] = {"batch_first": True}
QUIET: dict[str, Any] = {"need_weights": False}
PADDING = torch.arange(LENGTH) >= torch.tensor([[5], [3], [1]])
CROSS = ((COUNT, LENGTH, WIDTH), (COUNT, KEYS, WIDTH), (COUNT, KEYS, WIDTH))
OTHER = ((COUNT, LENGTH, WIDTH), (COUNT, KEYS, 6), (COUNT, KEYS, 8))
CASES = {
    "itself": Case(FIRST, call=QUIET),
    "length first": Case(shapes=((LENGTH, COUNT, WIDTH),), call=QUIET),
    "one sample": Case(shapes=((LENGTH, WIDTH),)),
    "one sample, padded": Case(
        shapes=((LENGTH, WIDTH),), call=QUIET | {"key_padding_mask": PADDING[1]}
    ),
    "weights": Case(FIRST),
    "weights of every head": Case(FIRST, call={"average_attn_weights": False}),
    "no bias": Case(FIRST | {"bias": False}, call=QUIET),
    "fewer heads": Case(FIRST | {"num_heads": 2}, call=QUIET),
    "fewer heads, weights": Case(FIRST | {"num_heads": 2}, call={"average_attn_weights": False}),
    "across": Case(FIRST, CROSS[:2], (0, 1, 1), QUIET),
    "across, length first": Case(
        {}, ((LENGTH, COUNT, WIDTH), (KEYS, COUNT, WIDTH)), (0, 1, 1)
    ),
    "three": Case(FIRST, CROSS, (0, 1, 2), QUIET),
    "key is query": Case(FIRST, CROSS[:1] * 2, (0, 0, 1), QUIET),
    "value is query": Case(FIRST, CROSS[:1] * 2, (0, 1, 0), QUIET),
    "other widths": Case(FIRST | {"kdim": 6, "vdim": 8}, OTHER, (0, 1, 2), QUIET),
    "another width": Case(FIRST | {"kdim": 6, "vdim": 6}, OTHER[:2], (0, 1, 1)),
    "mask": Case(FIRST, call=QUIET | {"attn_mask": causal(LENGTH, LENGTH)}),
    "mask, weights": Case(FIRST, call={"attn_mask": causal(LENGTH, LENGTH)}),
    "causal": Case(FIRST, call=QUIET | {"attn_mask": causal(LENGTH, LENGTH), "is_causal": True}),
    "causal, weights": Case(FIRST, call={"attn_mask": causal(LENGTH, LENGTH), "is_causal": True}),
    "causal, padded": Case(
        FIRST,
        call=QUIET
        | {"attn_mask": causal(LENGTH, LENGTH), "key_padding_mask": PADDING, "is_causal": True},
    ),
    "padded": Case(FIRST, call=QUIET | {"key_padding_mask": PADDING}),
    "a learned bias": Case(FIRST, call=QUIET | {"attn_mask": data(LENGTH, LENGTH, seed=8)}),
    "a learned bias of each head": Case(
        FIRST, call=QUIET | {"attn_mask": data(COUNT * HEADS, LENGTH, LENGTH, seed=8)}
    ),
}  # fmt: skip


def results(
    layer: nn.MultiheadAttention, case: Case
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """What a call returns; the gradients of what it was given, and of the parameters."""
    inputs = [data(*shape, seed=5 + at).requires_grad_() for at, shape in enumerate(case.shapes)]
    call = dict(case.call)
    if isinstance(mask := call.get("attn_mask"), Tensor) and mask.is_floating_point():
        call["attn_mask"] = mask.clone().requires_grad_()
        inputs.append(call["attn_mask"])
    given = [inputs[number] for number in case.same]
    returned = [each for each in layer(*given, **call) if each is not None]
    loss = sum((each * data(*each.shape, seed=9)).sum() for each in returned)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = [x.grad for x in inputs if x.grad is not None]
    assert len(gradients) == len(inputs)
    return (
        [each.detach() for each in returned],
        gradients,
        {name: value.grad for name, value in layer.named_parameters() if value.grad is not None},
    )


def compared(context: Context, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    options = {"embed_dim": WIDTH, "num_heads": HEADS} | case.layer
    layer = nn.MultiheadAttention(**options).double()
    with torch.no_grad():
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:
                bias.copy_(data(*bias.shape, seed=4))  # torch begins with zeros
    plain = results(copy.deepcopy(layer), case)
    axis = whole_world(context)
    divided = divide(
        layer, {"": "heads"}, Observed([""]), Replicated(axis), Axes(Axis(), axis),
        torch.device("cpu"),
    )  # fmt: skip
    split = results(layer, case)
    torch.testing.assert_close(split[:2], plain[:2], rtol=1e-11, atol=1e-12)
    assert split[2].keys() == plain[2].keys()
    for key, gradient in split[2].items():
        expected = divided.layouts[key].take(plain[2][key])
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
    held = divided.layouts["out_proj.weight"].local_shape[1] // layer.head_dim
    assert held in (layer.num_heads // axis.size, -(-layer.num_heads // axis.size))
    divided.undo.close()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_heads_divided_give_what_whole_attention_gives(gang: Gang, size: int, name: str) -> None:
    gang.run(size, compared, name)


def dropped(context: Context) -> tuple[Tensor, float]:
    layer = nn.MultiheadAttention(8, 4, dropout=0.5, batch_first=True)
    axis = whole_world(context)
    divide(
        layer, {"": "heads"}, Observed([""]), Replicated(axis), Axes(Axis(), axis),
        torch.device("cpu"),
    )  # fmt: skip
    torch.manual_seed(1)
    x = numbers(2, 30, 8)
    _, weights = layer(x, x, x, average_attn_weights=False)
    return weights.detach() == 0, float(torch.rand(()))


def test_dropout_differs_from_head_to_head(gang: Gang) -> None:
    (shown, after), (other, also) = gang.run(2, dropped)
    assert torch.equal(shown, other)
    assert after == also  # outside all ranks draw alike
    assert 0.45 < shown.float().mean() < 0.55
    for head in (1, 2, 3):
        assert 0.4 < (shown[:, 0] == shown[:, head]).float().mean() < 0.6


TOKENS, STEPS = 11, 6

# Torch says so in the validation of one process.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Translator(nn.Module):
    """Torch's own layers: an encoder that pads, a decoder that cannot look ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 16)
        layer = partial(nn.TransformerEncoderLayer, 16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer(), 2)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, TOKENS)

    def forward(self, codes: Tensor) -> Tensor:
        padding = codes == 0
        ahead = causal(codes.shape[1], codes.shape[1]).to(codes.device)
        x = self.table(codes)
        seen = self.encoder(x, src_key_padding_mask=padding)
        y = self.decoder(x, seen, tgt_mask=ahead, memory_key_padding_mask=padding)
        return self.head(y).transpose(1, 2)


def token_loss(scores: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(scores, codes, ignore_index=0)


def count_tokens(codes: Tensor) -> int:
    return int((codes != 0).sum())


def translation() -> wt.Task:
    codes = classes(SAMPLES * 6, TOKENS - 1).view(SAMPLES, 6) + 1
    codes[torch.arange(6) >= 2 + torch.arange(SAMPLES)[:, None] % 5] = 0  # left-aligned padding
    both = TensorDataset(codes, torch.where(codes == 0, 0, codes % (TOKENS - 1) + 1))
    return wt.Task(model=Translator, loss=token_loss, weight=count_tokens, optimizer=adam,
                   train=both, validation=both, batch_size=8, epochs=2)  # fmt: skip


def trained(context: Context, strategy: str, settings: dict[str, Any]) -> tuple[Trace, Any]:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(translation(), "float64")
        with wt.Run(task, wt.make_strategy(strategy, settings), context) as run:
            losses = [run.step(batch).loss or 0.0 for batch in run.batches()]
            values = run.validate()
            run.check_replicas()
            trace = Trace.of(losses, task.build_model(), run.runner.state_dict()["model"])
            shapes = {name: tuple(value.shape) for name, value in run.model.named_parameters()}
            run.close()
    return trace, (values, shapes)


@pytest.mark.parametrize(
    ("strategy", "settings", "size"),
    [
        ("split-weights", {}, 2), ("split-weights", {}, 3), ("split-weights", {"degree": 2}, 4),
        ("hybrid", {"placement": "all"}, 3),
    ],
)  # fmt: skip
def test_torchs_transformer_trains_and_validates_as_on_one_process(
    gang: Gang, strategy: str, settings: dict[str, Any], size: int
) -> None:
    """Validation too, where torch's encoder goes another way, past the layers inside."""
    with verify.computing_in("float64"):
        task, _ = verify.prepared(translation(), "float64")
        reference = train_plainly(task, torch.device("cpu"), 0, STEPS)
        model = task.build_model()
        model.load_state_dict({**reference.parameters, **reference.buffers})
        codes, target = translation().train.tensors  # type: ignore[attr-defined]
        with torch.no_grad():
            expected = float(token_loss(model.eval()(codes), target))
    for trace, (values, shapes) in gang.run(size, trained, strategy, settings):
        verdict = verify.compare(trace, reference, wt.make_strategy(strategy), size, "float64")
        assert verdict.passed, verdict
        assert values["loss"] == pytest.approx(expected, rel=1e-9)
        whole = shapes["encoder.layers.0.self_attn.in_proj_weight"] == (48, 16)
        assert whole == (strategy == "hybrid")


def went_on(context: Context, strategy: str, folder: Path, upto: int) -> list[float | None]:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(translation(), "float64")
        ahead = folder if (folder / "checkpoints").exists() else None
        with wt.Run(task, wt.make_strategy(strategy), context, max_steps=6, resume=ahead) as run:
            losses = []
            for batch in run.batches():
                losses.append(run.step(batch).loss)
                if run.step_count == upto:
                    break
            run.save(folder / "checkpoints")
            run.close()
    return losses


def test_checkpoints_are_those_of_the_whole_layer(gang: Gang, tmp_path: Path) -> None:
    straight = gang.run(1, went_on, "data-parallel", tmp_path / "straight", 6)[0]
    ways = [("split-weights", 3, 2), ("data-parallel", 2, 4), ("split-weights", 2, 6)]
    together: list[float | None] = []
    for strategy, size, upto in ways:
        together += gang.run(size, went_on, strategy, tmp_path / "mixed", upto)[0]
    assert together == pytest.approx(straight, rel=1e-9)
    # Queries', keys' and values' rows lie apart in the whole tensor: three pieces, three files.
    saved = tmp_path / "mixed" / "checkpoints" / "step-6"
    assert len(list(saved.glob("*.safetensors"))) == 2 * 3


def without_memory(context: Context, strategy: str) -> tuple[list[float | None], list[Tensor]]:
    """Trained by ranks none of which could hold the whole."""
    with mock.patch.object(building, "usable_bytes", return_value=1):
        task, _ = verify.prepared(translation(), "float32")
        run = wt.Run(task, wt.make_strategy(strategy), context)
    first = run.runner.state_dict()["model"]
    names = [f"decoder.self_attn.{key}" for key in ("in_proj_weight", "out_proj.bias")]
    weights = [first[name].clone() for name in names]
    losses = [run.step(batch).loss for batch in run.batches()]
    run.close()
    return losses, weights


def test_attention_larger_than_a_host_begins_alike_everywhere(gang: Gang) -> None:
    losses, (weight, bias) = gang.run(2, without_memory, "split-weights")[0]
    others, (same, _) = gang.run(3, without_memory, "sharded")[0]
    assert torch.equal(weight, same)
    bound = (6 / (4 * 16)) ** 0.5  # as torch's own _reset_parameters has it: xavier, and zeros
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert not bias.any()
    assert losses[0] == pytest.approx(others[0], rel=1e-5)
