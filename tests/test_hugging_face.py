"""Hugging Face's models, unchanged, under every strategy: as one process trains them.

Samples are dicts, the loss is in the model's output, and sequences are of uneven lengths, so that
two ranks never have the same number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import wagontrain as wt
from tests.commands import ROOT, wagontrain
from tests.gang import Gang
from tests.hugging_face import LENGTH, MODELS, WORDS, gpt2, sentences
from wagontrain import verify
from wagontrain.objective import Objective
from wagontrain.reference import Trace, train_plainly
from wagontrain.transport import Context
from wagontrain.trial import unused_in_trial

STEPS = 6
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "data-parallel": ("data-parallel", {}),
    "stage 1": ("sharded", {"stage": 1}),
    "stage 2": ("sharded", {"stage": 2, "least": 100}),
    "stage 3": ("sharded", {"stage": 3, "least": 100}),
    "split-weights": ("split-weights", {}),
    "hybrid": ("hybrid", {"placement": "all"}),
    "pipeline": ("pipeline", {}),
    "pipeline of 4": ("pipeline", {"micro_batches": 4}),
}
QUICK = ("data-parallel", "stage 3", "split-weights", "pipeline of 4")
REFUSED = {"gpt2": "config.use_cache = False", "llama": "config.use_cache = False", "bert": "tied"}
"""Why a pipeline does not take a model."""


@functools.cache
def expected(model: str) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(MODELS[model](), "float64")
        return train_plainly(task, torch.device("cpu"), 0, STEPS)


def trained(context: Context, model: str, strategy: str, settings: dict[str, Any]) -> Any:
    """What happened, with the values of validation; or the message of a refusal."""
    chosen = wt.make_strategy(strategy, settings)
    with verify.computing_in("float64"):
        task, _ = verify.prepared(MODELS[model](), "float64")
        try:
            run = wt.Run(task, chosen, context)
        except wt.UsageError as error:
            return str(error)
        losses = [run.step(batch).loss or 0.0 for batch in run.batches()]
        values = run.validate()
        trace = Trace.of(losses, task.build_model(), run.runner.state_dict()["model"])
        run.close()
    return trace, values


def _cases() -> list[Any]:
    found = []
    for model in MODELS:
        alike = model in ("untied_gpt2", "llama_without_cache")  # only a pipeline sees them apart
        for way in WAYS:
            pipeline = way.startswith("pipeline")
            if (pipeline and model in REFUSED) or (alike and not pipeline):
                continue
            marks = () if way in QUICK else pytest.mark.whole
            found.append(pytest.param(model, way, marks=marks, id=f"{model}-{way}"))
    return found


@pytest.mark.parametrize(("model", "way"), _cases())
def test_trains_as_one_process(gang: Gang, model: str, way: str) -> None:
    name, settings = WAYS[way]
    values = []
    for trace, value in gang.run(2, trained, model, name, settings):
        verdict = verify.compare(trace, expected(model), wt.make_strategy(name), 2, "float64")
        assert verdict.passed, verdict
        values.append(value)
    assert values[0] == values[1]
    assert abs(values[0]["loss"] - _loss_of(model, trace)) < 1e-9


def _loss_of(model: str, trace: Trace) -> float:
    """The loss over all samples at once, with the weights that training ended with."""
    with verify.computing_in("float64"), torch.no_grad():
        task, _ = verify.prepared(MODELS[model](), "float64")
        built = task.build_model().eval()
        built.load_state_dict(trace.parameters, strict=False)
        batch = torch.utils.data.default_collate([task.train[at] for at in range(len(task.train))])
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        return float(built(**batch).loss)


@pytest.mark.parametrize("model", REFUSED)
def test_a_pipeline_says_what_hinders_it(gang: Gang, model: str) -> None:
    for message in gang.run(2, trained, model, "pipeline", {}):
        assert REFUSED[model] in message


def _tried(task: wt.Task) -> None:
    unused_in_trial(task, Objective(task, torch.device("cpu")), task.build_model())


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (None, "Task.weight=wt.count_labels"),
        (wt.count_labels, "not a mean over the samples"),
        (lambda target: len(target["labels"]), "not a mean over the samples"),
    ],
)
def test_a_mean_over_tokens_needs_their_true_number(weight: Any, words: str) -> None:
    """Each of these would give other results on two ranks than on one, and no error."""
    with pytest.raises(wt.TaskError, match=words):
        _tried(dataclasses.replace(gpt2(), weight=weight))
    _tried(gpt2())


def test_labels_are_counted() -> None:
    labels = torch.tensor([[-100, 4, 5], [7, -100, -100]])
    assert wt.count_labels({"labels": labels}) == wt.count_labels(labels) == 3
    assert wt.count_labels({"labels": labels}, shifted=True) == 2
    with pytest.raises(wt.ModelError, match="no 'labels'"):
        wt.count_labels({"input_ids": labels})


def test_a_model_that_was_given_no_labels_is_told_so() -> None:
    train = sentences()
    del train.columns["labels"]
    task = dataclasses.replace(gpt2(), train=train, validation=None, weight=None)
    with pytest.raises(wt.ModelError, match="has no loss: give it labels"):
        _tried(task)


def test_a_loss_of_ones_own_takes_the_output_object(gang: Gang) -> None:
    """The usual pair, with logits out of the output, is the same training."""
    losses = [gang.run(2, _logits, own)[0] for own in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class _Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.records = sentences(0.4)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        record = self.records[index]
        return record, record.pop("labels")


def _own_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def _logits(context: Context, own: bool) -> list[float]:
    task, _ = verify.prepared(MODELS["bert"](), "float32")
    if own:
        task = dataclasses.replace(
            task, train=_Pairs(), validation=None, loss=_own_loss, weight=wt.count_labels
        )
    run = wt.Run(task, wt.make_strategy("data-parallel"), context)
    losses = [run.step(batch).loss or 0.0 for batch in run.batches()]
    run.close()
    return losses


@pytest.mark.whole
@pytest.mark.parametrize("model", ["gpt2", "bert", "vit", "llama"])
def test_verify_holds_with_servers_too(model: str, tmp_path: Path) -> None:
    """In synchronous steps a parameter server is exact; and this is the command people type."""
    file = tmp_path / "job.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.hugging_face import {model}\n"
    )
    done = wagontrain(
        "verify", f"{file}:{model}", "--strategy",
        "parameter-server", "--set", "consistency=synchronous", "--workers", "2", "--steps", "4",
        "--json", folder=tmp_path, limit=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"passed": true' in done.stdout


# --- heads --------------------------------------------------------------------------------------


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SIZES, **changes))


def _qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, **changes))


_SIZES = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": LENGTH,
}  # fmt: skip
KINDS = {"mistral": _mistral, "qwen2": _qwen2}


def _divided(context: Context, kind: str, changes: dict[str, Any], settings: Any) -> Any:
    """How layers are divided, what training came to, and how many bytes went in a step."""
    model = partial(KINDS.get(kind, MODELS["llama"]().model), **changes)
    with verify.computing_in("float64"):
        made = dataclasses.replace(MODELS["llama"](), model=model)
        if settings.pop("dropout off", True):
            made, _ = verify.prepared(made, "float64")
        else:
            plain = made.model
            made = dataclasses.replace(made, model=lambda: plain().double())
        run = wt.Run(made, wt.make_strategy("split-weights", settings), context)
        reports = [run.step(batch) for batch in run.batches()]
        run.check_replicas()
        dims = {name: layout.dim for name, layout in run.runner.layouts.items()}
        state = run.runner.state_dict()["model"]
        trace = Trace.of([report.loss or 0.0 for report in reports], made.build_model(), state)
        run.close()
    return dims, trace, sum(report.sent or 0 for report in reports)


def _alone(kind: str) -> Trace:
    with verify.computing_in("float64"):
        made = dataclasses.replace(MODELS["llama"](), model=KINDS[kind])
        return train_plainly(verify.prepared(made, "float64")[0], torch.device("cpu"), 0, STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_gates_are_divided(gang: Gang, kind: str) -> None:
    for dims, trace, _ in gang.run(2, _divided, kind, {}, {}):
        layer = {name.split("layers.1.")[1]: d for name, d in dims.items() if "layers.1." in name}
        assert {layer[f"self_attn.{each}_proj.weight"] for each in "qkv"} == {0}
        assert layer["self_attn.o_proj.weight"] == layer["mlp.down_proj.weight"] == 1
        verdict = verify.compare(
            trace, _alone(kind), wt.make_strategy("split-weights"), 2, "float64"
        )
        assert verdict.passed, verdict


def test_divided_heads_send_less_than_columns(gang: Gang) -> None:
    """With weights of attention that somebody may look at, columns alone are gathered."""
    (_, _, together), _ = gang.run(2, _divided, "llama", {}, {})
    (dims, trace, apart), _ = gang.run(2, _divided, "llama", {"attn_implementation": "eager"}, {})
    assert dims["model.layers.0.self_attn.o_proj.weight"] == 0
    assert verify.compare(
        trace, expected("llama"), wt.make_strategy("split-weights"), 2, "float64"
    ).passed
    assert together < 0.9 * apart


def test_heads_that_do_not_divide_are_split_by_columns(gang: Gang) -> None:
    """Two heads for keys cannot be shared by three ranks."""
    for dims, trace, _ in gang.run(3, _divided, "llama", {}, {}):
        assert dims["model.layers.0.self_attn.o_proj.weight"] == 0
        assert verify.compare(
            trace, expected("llama"), wt.make_strategy("split-weights"), 3, "float64"
        ).passed


def test_dropout_of_attention_leaves_ranks_alike(gang: Gang) -> None:
    """Heads of other ranks are dropped by other numbers, and all go on with the same ones."""
    dropping = {"attention_dropout": 0.5}
    (_, first, _), (_, second, _) = gang.run(2, _divided, "llama", dropping, {"dropout off": False})
    assert first.losses == second.losses
    assert all(first.parameters[name].equal(second.parameters[name]) for name in first.parameters)
    assert first.losses != gang.run(2, _divided, "llama", {}, {})[0][1].losses


def test_sequences_are_of_uneven_lengths() -> None:
    """Were they all of one length, a wrong count would be matched as well."""
    lengths = sentences().columns["attention_mask"].sum(1)
    assert len(lengths.unique()) > 5
