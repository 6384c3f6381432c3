from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import ROOT, python, wagontrain
from wagontrain.events import read

EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.whole
def test_mnist_reads_at_least_96_percent_of_the_digits(tmp_path: Path) -> None:
    done = wagontrain(
        "run", str(EXAMPLES / "mnist.py"), "--workers", "2", "--strategy", "data-parallel",
        "--run-dir", "R", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "R" / "summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.96
    assert summary["world_size"] == 2


@pytest.mark.whole
@pytest.mark.parametrize("settings", [[], ["--set", "outer=nesterov", "--set", "steps_between=32"]])
def test_mnist_reads_at_least_95_percent_with_local_sgd(
    tmp_path: Path, settings: list[str]
) -> None:
    done = wagontrain(
        "run", str(EXAMPLES / "mnist.py"), "--strategy", "local-sgd", "--workers", "4",
        "--run-dir", "R", *settings, folder=tmp_path, limit=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "R" / "summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.95
    assert (summary["world_size"], summary["exact"]) == (4, False)


@pytest.mark.whole
def test_mnist_reads_at_least_93_percent_by_whole_batches(tmp_path: Path) -> None:
    done = wagontrain(
        "run", f"{EXAMPLES / 'mnist.py'}:batch", "--strategy", "sandblaster", "--workers", "2",
        "--run-dir", "R", folder=tmp_path, limit=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "R" / "summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.93
    assert summary["exact"] is True


def test_mnist_splits_its_digits_once(examples: Any) -> None:
    train, validation = examples("mnist").digits()
    assert (len(train), len(validation)) == (4000, 1000)
    assert not set(train.indices) & set(validation.indices)
    image, digit = train[0]
    assert image.shape == (1, 28, 28)
    assert 0 <= int(digit) <= 9
    assert train.indices == examples("mnist").digits()[0].indices


@pytest.mark.whole
def test_linear_regression_shows_what_the_textbook_says(tmp_path: Path) -> None:
    done = python(EXAMPLES / "linear_regression.py", folder=tmp_path, starts=9)
    assert done.returncode == 0, done.stderr
    by_hand, one_step, converged = (
        float(number) for number in re.findall(r"largest difference.*: (\S+)", done.stdout)
    )
    assert by_hand < 1e-12
    assert one_step < 1e-12
    assert converged < 1e-4


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "strategy", "steps", "first", "last"),
    [("char_lm", "auto", "30", 4, 3), ("hf_gpt2", "data-parallel", "20", 5, 3.8)],
)
def test_language_models_learn(
    tmp_path: Path, name: str, strategy: str, steps: str, first: float, last: float
) -> None:
    done = wagontrain(
        "run", str(EXAMPLES / f"{name}.py"), "--workers", "2", "--strategy", strategy,
        "--steps", steps, "--run-dir", "R", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = (event for event, _ in read(tmp_path / "R" / "events.jsonl"))
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert losses[0] > first
    assert losses[-1] < last


def test_char_lm_reads_the_bible_and_cannot_see_ahead(examples: Any) -> None:
    module = examples("char_lm")
    text = module.bible()
    assert "In the beginning God created the heaven and the earth." in text[:200]
    assert len(text) > 4_000_000
    model = module.CharacterModel(30)
    codes = torch.randint(0, 30, (2, module.CONTEXT))
    changed = codes.clone()
    changed[:, 40:] = 0
    before, after = model(codes), model(changed)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-5)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-5)


def test_hf_gpt2_guesses_every_byte_of_a_sentence_and_no_filling(examples: Any) -> None:
    module = examples("hf_gpt2")
    data = module.Sentences(["Jesus wept."])
    record = data[0]
    real = record["labels"] != -100
    assert bytes(record["input_ids"][real].tolist()) == b"Jesus wept.\0"
    assert record["attention_mask"].sum() == real.sum() == 12
    groups = module.without_decay(module.model()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(value.ndim > 1 for value in groups[0]["params"])


@pytest.mark.whole
def test_flights_keeps_its_large_tables_on_the_servers(tmp_path: Path) -> None:
    done = wagontrain(
        "run", str(EXAMPLES / "flights.py"), "--strategy", "parameter-server", "--workers", "2",
        "--set", "tables=auto", "--steps", "60", "--run-dir", "R", folder=tmp_path, limit=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "R" / "summary.json").read_text())
    assert summary["validation"]["loss"] < 0.98 * summary["validation"]["loss_of_shares"]
    moved = summary["row_bytes"]
    assert 0 < moved["touched"] < moved["received"] <= 1.2 * moved["touched"]
    assert moved["sent"] <= 1.2 * moved["touched"]


def test_flights_are_told_apart_by_what_is_known_beforehand(examples: Any) -> None:
    module = examples("flights")
    codes, classes, counts = module.flights()
    assert codes.shape == (327_346, len(module.KINDS))
    assert classes.bincount().tolist() == [249_716, 49_841, 27_789]
    assert (codes.max(0).values + 1).tolist() == counts
    score, late = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert module.area_under_curve(score, late) == 0.75


@pytest.mark.whole
# mnist on 3 workers is the README's own command: test_docs.
@pytest.mark.parametrize(("name", "workers"), [("linear_regression", "4"), ("char_lm", "2")])
def test_examples_train_as_one_process_does(name: str, workers: str, tmp_path: Path) -> None:
    done = wagontrain(
        "verify", str(EXAMPLES / f"{name}.py"), "--strategy", "data-parallel", "--workers",
        workers, "--steps", "6", "--json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
