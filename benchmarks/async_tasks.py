"""Two short trainings on real data, and who takes part in `async_training.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
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
    "mnist": Model("momentum", "accuracy", 0.95, True, {"equal": 20.0, "slow": 30.0}),
    "char_lm": Model("adamw", "loss", 2.3, False, {"equal": 30.0, "slow": 60.0}),
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


SERVER = "parameter-server"
CONTENDERS = [
    Contender("data-parallel", "data-parallel"),
    Contender(
        "balanced", "data-parallel", {"balance": "true"}, None, "data-parallel", ("slow",)
    ),
    Contender("downpour", SERVER),
    Contender("downpour-sgd", SERVER, {"rule": "sgd"}, "sgd"),
    Contender("downpour-adagrad", SERVER, {"rule": "adagrad"}, "sgd"),
    Contender("staleness-aware", SERVER, {"rule": "staleness-aware"}, "sgd"),
    Contender("dc-asgd", SERVER, {"rule": "dc-asgd"}, "sgd"),
    Contender("ssp-2", SERVER, {"consistency": "ssp:2"}, None, "downpour"),
    Contender("backup-1", SERVER, {"backup": 1}, None, "data-parallel"),
    Contender("easgd", SERVER, {"rule": "easgd", "n_push": 4}),
    Contender("local-sgd", "local-sgd", {"steps_between": 16}),
    Contender("diloco", "local-sgd", {"steps_between": 32, "outer": "nesterov"}, "adamw"),
]  # fmt: skip

GUESSES = {
    "mnist": {
        "data-parallel": 0.05, "downpour": 0.05, "downpour-sgd": 0.1, "downpour-adagrad": 0.0021,
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


class Gate:
    """Where workers that nobody waits for wait for each other once, before their first step.

    Or the first would have trained for seconds when the last has imported torch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ready(self) -> int:
        """How many hosts have come to it."""
        return len(list(self.folder.glob("ready-*")))

    def open(self) -> None:
        """Let them go on."""
        (self.folder / "go").touch()

    def keep(self, model: nn.Module) -> nn.Module:
        """Hold the model's first training step until the gate is open."""
        handle = model.register_forward_pre_hook(lambda *_: self._wait(model) and handle.remove())
        return model

    def _wait(self, model: nn.Module) -> bool:
        if not model.training:
            return False
        (self.folder / f"ready-{os.environ['TESTBED_HOST']}").touch()
        limit = time.monotonic() + 300
        while not (self.folder / "go").exists():
            if time.monotonic() > limit:
                raise TimeoutError("the other hosts did not come within 300 s")
            time.sleep(0.02)
        return True


def task(model: str, optimizer: str, rate: float, folder: str, gate: str | None) -> wt.Task:
    """The task of a cell.

    Args:
        model: one of `MODELS`.
        optimizer: one of `OPTIMIZERS`.
        rate: its learning rate, the same in every step.
        folder: where `write_data` has written.
        gate: folder of a `Gate`, where workers do not wait for each other anyway.
    """
    data = safetensors.torch.load_file(Path(folder) / f"{model}.safetensors")
    make = partial(OPTIMIZERS[optimizer], lr=rate)

    def held(build: Callable[[], nn.Module]) -> nn.Module:
        return build() if gate is None else Gate(Path(gate)).keep(build())

    if model == "mnist":
        train, validation = (
            TensorDataset(data[f"{part}.images"], data[f"{part}.labels"])
            for part in ("train", "validation")
        )
        return wt.Task(
            model=partial(held, mnist.LeNet), loss=F.cross_entropy, optimizer=make, train=train,
            validation=validation, metrics={"accuracy": mnist.accuracy}, batch_size=128,
            epochs=EPOCHS,
        )  # fmt: skip
    codes = data["codes"]
    characters = int(codes.max()) + 1
    return wt.Task(
        model=partial(held, partial(char_lm.CharacterModel, characters, width=64, depth=2)),
        loss=char_lm.next_character_loss, optimizer=make,
        train=char_lm.Windows(codes[:CHARACTERS]),
        validation=char_lm.Windows(codes[CHARACTERS:]), batch_size=64, epochs=EPOCHS,
    )  # fmt: skip
