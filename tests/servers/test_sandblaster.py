"""Whole minimisations on servers, in threads, against torch.optim.LBFGS on one process."""

from __future__ import annotations

import dataclasses
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.problems import PROBLEMS, SAMPLES, build, classes, numbers
from tests.servers.crews import Outcome, Threads
from wagontrain import checkpoint, crew, verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.servers.client import Client
from wagontrain.servers.portioned import PortionWorker, habits
from wagontrain.servers.wire import Network
from wagontrain.servers.work import fingerprint
from wagontrain.transport import Context

CPU = torch.device("cpu")
TAKEN = sorted(name for name in PROBLEMS if "batch-norm" not in name)
wolfe = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", history_size=4, max_iter=5)
fixed = partial(torch.optim.LBFGS, lr=0.3, history_size=4, max_iter=4)


def problem(name: str, optimizer: Any = wolfe, **fields: Any) -> wt.Task:
    """Whole batches: on small ones, each another function, L-BFGS runs wild and magnifies the
    last digit of anything."""
    fields = {"batch_size": SAMPLES, "epochs": 3, **fields}
    task = dataclasses.replace(build(name), optimizer=optimizer, **fields)
    return verify.prepared(task, "float64")[0]


def train(task: wt.Task, workers: int, folder: Path, **settings: Any) -> tuple[Outcome, Trace]:
    strategy = wt.make_strategy("sandblaster", {"portions": 3, **settings})
    outcome = Threads(task, strategy, workers, folder).run()
    return outcome, Trace.of(outcome.losses, task.build_model(), outcome.weights)


def agree(found: Trace, expected: Trace, workers: int) -> None:
    strategy = wt.make_strategy("sandblaster")
    verdict = verify.compare(found, expected, strategy, workers, "float64")
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", TAKEN)
def test_minimises_as_one_process(name: str, tmp_path: Path) -> None:
    with verify.computing_in("float64"):
        task = problem(name)
        _, found = train(task, 3, tmp_path / "run", servers=2)
        agree(found, train_plainly(task, CPU, 0, 3), 3)


@pytest.mark.parametrize(
    ("optimizer", "fields"),
    [
        (fixed, {}),
        (partial(wolfe, lr=0.5, history_size=1), {}),
        (partial(wolfe, max_eval=3), {"accumulate": 3}),
        (partial(wolfe, tolerance_grad=0.05), {}),
        (
            wolfe,
            {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)},
        ),
        (partial(fixed, max_iter=2, lr=0.1), {"batch_size": 8, "epochs": 2}),
    ],
    ids=["fixed", "short", "few", "tolerant", "scheduler", "small batches"],
)
def test_every_way_of_stepping(optimizer: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    with verify.computing_in("float64"):
        task = problem("padded-tokens", optimizer, **fields)
        steps = task.epochs * task.steps_per_epoch
        _, found = train(task, 2, tmp_path / "run", servers=1, n_push=2)
        agree(found, train_plainly(task, CPU, 0, steps), 2)


class SmallLeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(3 * 9, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def images() -> wt.Task:
    data = TensorDataset(numbers(60, 1, 8, 8), classes(60, 4))
    return wt.Task(
        SmallLeNet, F.cross_entropy, partial(wolfe, max_iter=10), data, 60, 2, validation=data
    )


def test_a_convolutional_network_and_its_report(tmp_path: Path) -> None:
    with verify.computing_in("float64"):
        task = verify.prepared(images(), "float64")[0]
        outcome, found = train(task, 3, tmp_path / "run", servers=3, portions=5)
        expected = train_plainly(task, CPU, 0, 2)
        agree(found, expected, 3)
        told = outcome.summary["minimised"]
        assert told["iterations"] == sum(event["iterations"] for event in outcome.of("step"))
        assert told["evaluations"] == sum(event["evaluations"] for event in outcome.of("step"))
        assert told["evaluations"] > told["iterations"] > 10
        # Every evaluation was of every sample, once.
        counted = sum(each["samples"] for each in outcome.summary["workers"].values())
        assert counted == 60 * told["evaluations"]
        assert outcome.summary["samples"] == 120
        assert outcome.summary["exact"] is True
        measured = outcome.of("validation")
        assert [event["step"] for event in measured] == [1, 2]
        model = task.build_model()
        model.load_state_dict(expected.parameters)
        (inputs, target) = torch.utils.data.default_collate(list(task.train))
        loss = F.cross_entropy(model(inputs.double()), target)
        assert measured[-1]["values"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-8)


class Held(PortionWorker):
    """Stops within a portion of an evaluation until it is let go; remembers what it computed."""

    def __init__(self, go: threading.Event, stopped: threading.Event, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go, self.stopped = go, stopped

    def _backward(self, *arguments: Any) -> Any:
        found = super()._backward(*arguments)
        self.stopped.set()
        assert self.go.wait(30)
        return found


class Beside(Threads):
    """A job whose first worker is the test's; the others come when it says so."""

    waiting = True

    def work(self) -> None:
        if not self.waiting:
            super().work()

    def others(self) -> None:
        """Start the others, once."""
        if self.waiting:
            self.waiting = False
            for _ in range(self.workers):
                self.work()

    def first(self, kind: Any) -> None:
        def work() -> None:
            with Network(self.secret) as network:
                client = Client(network, self.listener.endpoint, fingerprint(self.task, CPU))
                try:
                    kind(self.task, client, habits(5), CPU).run()
                except crew.OverError:
                    pass
                finally:
                    client.close()

        self.start(work)


def test_a_slow_workers_portions_are_done_by_others(tmp_path: Path) -> None:
    """One worker is stuck in its first portion for a whole step."""
    go, stopped = threading.Event(), threading.Event()
    with verify.computing_in("float64"):
        task = problem("linear-regression", epochs=6)
        strategy = wt.make_strategy("sandblaster", {"portions": 3})
        job = Beside(task, strategy, 2, tmp_path / "run")
        job.first(partial(Held, go, stopped))
        committed = job.record.committed

        def commit(apply: Any) -> None:
            assert stopped.is_set()
            go.set()
            committed(apply)

        job.record.committed = commit  # type: ignore[method-assign]
        outcome = job.run(lambda: job.others() if stopped.is_set() else None)
        found = Trace.of(outcome.losses, task.build_model(), outcome.weights)
        agree(found, train_plainly(task, CPU, 0, 6), 3)
    told = outcome.summary["minimised"]
    counted = sum(each["samples"] for each in outcome.summary["workers"].values())
    assert counted == SAMPLES * told["evaluations"]
    assert told["given_twice"] >= 1
    assert told["not_counted"] >= 1
    assert any("too late" in event["reason"] for event in outcome.of("dropped"))


class Dying(PortionWorker):
    """Goes within its second portion, without a word."""

    def __init__(self, gone: threading.Event, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gone, self.portions = gone, 0

    def _backward(self, *arguments: Any) -> Any:
        self.portions += 1
        if self.portions == 2:
            self.gone.set()
            raise crew.OverError
        return super()._backward(*arguments)


def test_a_lost_workers_portions_are_given_to_others(tmp_path: Path) -> None:
    with verify.computing_in("float64"):
        task = problem("dropout-off")
        strategy = wt.make_strategy("sandblaster", {"portions": 4, "servers": 2})
        job = Beside(task, strategy, 2, tmp_path / "run", patience=1.5)
        gone = threading.Event()
        job.first(partial(Dying, gone))

        def when_it_is_missed() -> None:
            if gone.is_set() and not job.coordinator.members:
                job.others()

        outcome = job.run(when_it_is_missed)
        found = Trace.of(outcome.losses, task.build_model(), outcome.weights)
        agree(found, train_plainly(task, CPU, 0, 3), 3)
    assert [event["leases"] for event in outcome.of("lost")] == [[0, 1]]
    told = outcome.summary["minimised"]
    counted = sum(each["samples"] for each in outcome.summary["workers"].values())
    assert counted == SAMPLES * told["evaluations"]


def test_goes_on_from_a_checkpoint_with_its_history(tmp_path: Path) -> None:
    with verify.computing_in("float64"):
        task = problem("padded-tokens", epochs=4)
        whole = train_plainly(task, CPU, 0, 4)
        first, _ = train(dataclasses.replace(task, epochs=2), 2, tmp_path / "one", servers=2)
        saved = checkpoint.latest(first.folder.path)
        source = checkpoint.Restored(Context(), saved)
        strategy = wt.make_strategy("sandblaster", {"servers": 3})
        outcome = Threads(task, strategy, 2, tmp_path / "two", source).run()
        found = Trace.of(outcome.losses, task.build_model(), outcome.weights)
        agree(found, dataclasses.replace(whole, losses=whole.losses[2:]), 2)
        # As torch.optim.LBFGS has it, but for matrices in the place of lists.
        model = task.build_model()
        optimizer = task.build_optimizer(model, closures=True)
        names = [name for name, _ in model.named_parameters()]
        kept = checkpoint.Restored(Context(), checkpoint.latest(outcome.folder.path))
        assert kept.plain["optimizer"]["groups"][0]["history_size"] == 4
        size = sum(value.numel() for value in optimizer.param_groups[0]["params"])
        assert kept.shapes()[f"optimizer.{names[0]}.d"] == (size,)
        assert kept.shapes()[f"optimizer.{names[0]}.old_dirs"] == (4, size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, r"optimizer is SGD: give .*LBFGS"),
        ({"clip_grad_norm": 1.0}, "cannot clip gradients"),
        ({"optimizer": partial(wolfe, line_search_fn="weak")}, "give 'strong_wolfe' or None"),
        ({"optimizer": partial(wolfe, history_size=0)}, "history_size=0.*give 1 or more"),
    ],
)
def test_what_it_does_not_take(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = dataclasses.replace(problem("linear-regression"), **fields)
    strategy = wt.make_strategy("sandblaster")
    with pytest.raises(wt.UsageError, match=message) as told:
        strategy.check(task, wt.World(size=2))
        Threads(task, strategy, 2, tmp_path / "run")
    assert "\n" not in str(told.value)


def test_batch_norm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(wt.UsageError, match="is batch norm, which looks at the whole batch"):
        train(problem("conv-batch-norm"), 2, tmp_path / "run")


def test_others_refuse_its_optimizer_and_name_it(tmp_path: Path) -> None:
    task = problem("linear-regression")
    with pytest.raises(wt.UsageError, match="which only the strategy sandblaster does"):
        wt.Run(task, wt.make_strategy("data-parallel"), Context())
    with pytest.raises(wt.UsageError, match="which only the strategy sandblaster does"):
        Threads(task, wt.make_strategy("parameter-server"), 2, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"portions": 0}, "portions is 0"), ({"replicas": 1}, "at least 2 servers")],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(wt.UsageError, match=re.escape(message)):
        wt.make_strategy("sandblaster", settings)


class Steep(nn.Module):
    """Its objective has no value from a certain step on, as logarithms have it."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.9, 0.2]))

    def forward(self, at: Tensor) -> Tensor:
        return (at * self.x).sum(1)


def barrier(output: Tensor, target: Tensor) -> Tensor:
    return (-3 * torch.log(1 - output) - target * output).mean()


def test_a_trial_that_goes_too_far_is_shortened(tmp_path: Path) -> None:
    with verify.computing_in("float64"):
        data = TensorDataset(torch.ones(8, 2) * 0.5, torch.linspace(3.0, 40.0, 8))
        task = wt.Task(Steep, barrier, partial(wolfe, lr=8.0), data, 8, 2)
        task, _ = verify.prepared(task, "float64")
        outcome, found = train(task, 2, tmp_path / "run", portions=2)
    assert outcome.of("too_far")
    assert all(map(torch.isfinite, map(torch.tensor, found.losses)))
    assert found.losses[1] < found.losses[0]
