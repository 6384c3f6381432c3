"""Two short trainings on real data, and who takes part in `async_training.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import wagontrain as wt
from examples import char_lm, mnist

CHARACTERS, HELD_OUT = 2048 * char_lm.CONTEXT + 1, 256 * char_lm.CONTEXT + 1
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}
EPOCHS = 1000
"""More than there is time for: a training ends with its time."""


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        usual: the optimizer of whoever trains with the task's own.
        metric: of validation, that is drawn.
        target: its value that is asked for.
        rising: whether more of it is better.
        seconds: of training, on equal hosts and with a slow one.
    """

    usual: str
    metric: str
    target: float
    rising: bool
    seconds: Mapping[str, float]


MODELS = {
    "mnist": Model("momentum", "accuracy", 0.95, True, {"equal": 20.0, "slow": 40.0}),
    "char_lm": Model("adamw", "loss", 2.3, False, {"equal": 40.0, "slow": 80.0}),
}
CLUSTERS = {"equal": {}, "slow": {3: 0.25}}
"""Hosts with less than the usual share of a core, and how much of it they have."""


@dataclass(frozen=True)
class Contender:
    """A strategy with settings.

    Args:
        name: in tables and pictures.
        strategy: name of the strategy.
        settings: what is set of it.
        optimizer: of the task; the model's usual one where not given.
        tuned_as: whose learning rate it takes; its own where not given.
        clusters: where it takes part.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str | None = None
    tuned_as: str | None = None
    clusters: tuple[str, ...] = tuple(CLUSTERS)


_SERVER = "parameter-server"
CONTENDERS = [
    Contender("data-parallel", "data-parallel"),
    Contender(
        "balanced", "data-parallel", {"balance": "true"}, None, "data-parallel", ("slow",)
    ),
    Contender("downpour", _SERVER),
    Contender("downpour-sgd", _SERVER, {"rule": "sgd"}, "sgd"),
    Contender("downpour-adagrad", _SERVER, {"rule": "adagrad"}, "sgd"),
    Contender("staleness-aware", _SERVER, {"rule": "staleness-aware"}, "sgd"),
    Contender("dc-asgd", _SERVER, {"rule": "dc-asgd"}, "sgd"),
    Contender("ssp-2", _SERVER, {"consistency": "ssp:2"}, None, "downpour"),
    Contender("backup-1", _SERVER, {"backup": 1}, None, "data-parallel"),
    Contender("easgd", _SERVER, {"rule": "easgd", "n_push": 4}),
    Contender("local-sgd", "local-sgd", {"steps_between": 16}),
    Contender("diloco", "local-sgd", {"steps_between": 32, "outer": "nesterov"}, "adamw"),
]  # fmt: skip

GUESSES = {
    "mnist": {
        "data-parallel": 0.05, "downpour": 0.05, "downpour-sgd": 0.1, "downpour-adagrad": 0.02,
        "staleness-aware": 0.3, "dc-asgd": 0.1, "easgd": 0.05, "local-sgd": 0.1, "diloco": 0.003,
    },
    "char_lm": {
        "data-parallel": 0.003, "downpour": 0.002, "downpour-sgd": 0.5, "downpour-adagrad": 0.03,
        "staleness-aware": 1.5, "dc-asgd": 0.5, "easgd": 0.003, "local-sgd": 0.003,
        "diloco": 0.003,
    },
}  # fmt: skip
"""Learning rates around which `--tune` searches; it writes what it finds to async_rates.json."""


def write_data(folder: Path) -> None:
    """Read the data once: each host would need seconds to unpack it with its part of a core."""
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = mnist.digits()
    tensors = {}
    for name, part in (("train", train), ("validation", validation)):
        images, labels = part.dataset.tensors
        tensors[f"{name}.images"] = images[part.indices].contiguous()
        tensors[f"{name}.labels"] = labels[part.indices].contiguous()
    safetensors.torch.save_file(tensors, folder / "mnist.safetensors")
    text = char_lm.bible()[: CHARACTERS + HELD_OUT]
    code = {character: index for index, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([code[character] for character in text])
    safetensors.torch.save_file({"codes": codes}, folder / "char_lm.safetensors")


def task(model: str, optimizer: str, rate: float, folder: str) -> wt.Task:
    """The task of a cell.

    Args:
        model: one of `MODELS`.
        optimizer: one of `OPTIMIZERS`.
        rate: its learning rate, the same in every step.
        folder: where `write_data` has written.
    """
    data = safetensors.torch.load_file(Path(folder) / f"{model}.safetensors")
    make = partial(OPTIMIZERS[optimizer], lr=rate)
    if model == "mnist":
        train, validation = (
            TensorDataset(data[f"{part}.images"], data[f"{part}.labels"])
            for part in ("train", "validation")
        )
        return wt.Task(
            model=mnist.LeNet, loss=F.cross_entropy, optimizer=make, train=train,
            validation=validation, metrics={"accuracy": mnist.accuracy}, batch_size=128,
            epochs=EPOCHS,
        )  # fmt: skip
    codes = data["codes"]
    characters = int(codes.max()) + 1
    return wt.Task(
        model=partial(char_lm.CharacterModel, characters, width=64, depth=2),
        loss=char_lm.next_character_loss, optimizer=make,
        train=char_lm.Windows(codes[:CHARACTERS]),
        validation=char_lm.Windows(codes[CHARACTERS:]), batch_size=64, epochs=EPOCHS,
    )  # fmt: skip
