"""What was lost in the middle of a run is done again, or given up where nobody needs it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wagontrain as wt
from tests.servers import counting
from tests.servers.crews import Outcome, Threads
from tests.servers.test_tables import Samples
from tests.servers.test_tables import task as of_tables
from wagontrain.servers.commands import Keep
from wagontrain.servers.messages import Done, Refusal
from wagontrain.servers.orders import Release
from wagontrain.servers.serving import Server
from wagontrain.servers.shard import Shard
from wagontrain.servers.wire import Network

EPOCHS = 3


def lbfgs(epochs: int) -> wt.Task:
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 3, generator=torch.Generator().manual_seed(3)), torch.ones(32, 1)
    )
    return wt.Task(
        model=partial(nn.Linear, 3, 1), loss=F.mse_loss,
        optimizer=partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=3),
        train=data, validation=data, batch_size=32, epochs=epochs,
    )  # fmt: skip


def job(name: str, folder: Path, workers: int = 2) -> Threads:
    """A run of two epochs and more, with a state saved after each."""
    settings = {"servers": 2, "replicas": 1}
    task = counting.task(EPOCHS) if name == "parameter-server" else lbfgs(30)
    return Threads(task, wt.make_strategy(name, settings), workers, folder)


def known(run: Threads) -> dict[int, Server]:
    """The shards' processes that the run will have."""
    servers: dict[int, Server] = {}

    def serve(number: int) -> None:
        with Network(run.secret) as network:
            line, listener = network.connect(run.endpoint), network.listen("127.0.0.1")
            servers[number] = Server(network, line, listener, number)
            servers[number].run()

    run.serve = lambda number: run.start(serve, number)  # type: ignore[method-assign]
    return servers


def epochs_validated(outcome: Outcome) -> list[int]:
    return sorted(event["epoch"] for event in outcome.of("validation"))


@pytest.mark.parametrize("shards", [(1,), (0, 1)], ids=["one has not", "none has"])
@pytest.mark.parametrize("name", ["parameter-server", "sandblaster"])
def test_a_state_that_is_to_be_saved_and_not_there_is_taken_again(
    name: str, shards: tuple[int, ...], tmp_path: Path
) -> None:
    """A shard says that it has no such snapshot, as one does that lost the order to keep it."""
    run = job(name, tmp_path / "run")
    fleet, asked = run.coordinator.fleet, []
    pull = fleet.pull_state

    def lose_and_pull(number: int) -> None:
        asked.append(number)
        if len(asked) == 1:
            for index in shards:
                fleet._send(fleet.shards[index].peer, Release(number), ())
        pull(number)

    fleet.pull_state = lose_and_pull  # type: ignore[method-assign]
    outcome = run.run()
    assert len(asked) > 1
    assert epochs_validated(outcome) == list(range(run.task.epochs))
    if name == "parameter-server":
        counting.check(outcome.weights, outcome.summary, outcome.events, EPOCHS)


def test_a_shard_that_never_has_it_ends_the_run(tmp_path: Path) -> None:
    run = job("parameter-server", tmp_path / "run")
    fleet, pull = run.coordinator.fleet, run.coordinator.fleet.pull_state

    def lose_and_pull(number: int) -> None:
        fleet._send(fleet.shards[1].peer, Release(number), ())
        pull(number)

    fleet.pull_state = lose_and_pull  # type: ignore[method-assign]
    with pytest.raises(wt.TrainingError, match="server shard 1: shard 1 has no snapshot"):
        run.run()


@pytest.mark.parametrize(
    ("noticed", "why"), [(False, "did not give its state"), (True, "did not come")]
)
def test_a_last_state_that_does_not_come_is_not_waited_for_for_ever(
    noticed: bool, why: str, tmp_path: Path
) -> None:
    run = job("parameter-server", tmp_path / "run")
    object.__setattr__(run.coordinator.terms, "start", 2.0)
    servers, fleet = known(run), run.coordinator.fleet
    ask = run.coordinator.states.ask

    def end_and_ask(keep: Keep) -> None:
        if keep.final:
            servers[1]._over = True
            fleet.shards[1].ready = not noticed
            limit = time.monotonic() + 20
            while not servers[1].line.socket.closed:  # until nobody is there to be asked
                assert time.monotonic() < limit
                time.sleep(0.01)
        ask(keep)

    run.coordinator.states.ask = end_and_ask  # type: ignore[method-assign]
    with pytest.raises(wt.TrainingError, match=f"server shard 1 {why}"):
        run.run()


def test_a_disk_that_is_full_is_told_and_ends_nothing(tmp_path: Path) -> None:
    run = job("parameter-server", tmp_path / "run")
    hear, said = run.coordinator.decisions.done, []

    def done(message: Done) -> Any:
        if not said:
            peer = run.coordinator.fleet.shards[0].peer
            said.append(Refusal("shard 0: the state could not be written", 0, then="go on"))
            run.coordinator._HANDLERS[Refusal](run.coordinator, peer, said[0], None)  # type: ignore[arg-type]
        return hear(message)

    run.coordinator.decisions.done = done  # type: ignore[method-assign]
    outcome = run.run()
    (event,) = outcome.of("shard_trouble")
    assert event["why"] == "shard 0: the state could not be written"


def lost_once(method: Callable[..., Any], shards: tuple[int, ...]) -> Callable[..., Any]:
    """Of a shard: the first snapshot that is asked for is lost on these just before."""
    lost: dict[int, int] = {}

    def replaced(self: Shard, *given: Any, **named: Any) -> Any:
        snapshot = named.get("snapshot", given[-1] if given else None)
        index = self.job.index
        asked = isinstance(snapshot, int) and index in shards
        if asked and lost.setdefault(index, snapshot) == snapshot:
            self.kept.pop(snapshot, None)
        return method(self, *given, **named)

    return replaced


@pytest.mark.parametrize("shards", [(1,), (0, 1)], ids=["one has not", "none has"])
def test_parameters_of_a_lost_snapshot_are_validated_anew(
    shards: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shard, "pull", lost_once(Shard.pull, shards))
    outcome = job("parameter-server", tmp_path / "run", workers=1).run()
    counting.check(outcome.weights, outcome.summary, outcome.events, EPOCHS)


@pytest.mark.parametrize("shards", [(1,), (0, 1)], ids=["one has not", "none has"])
def test_rows_of_a_lost_snapshot_are_validated_anew(
    shards: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters of it were there, and then it is gone."""
    monkeypatch.setattr(Shard, "pull_rows", lost_once(Shard.pull_rows, shards))
    strategy = wt.make_strategy("parameter-server", {"servers": 2, "tables": "item,words"})
    given = of_tables(validation=Samples())
    outcome = Threads(given, strategy, 2, tmp_path / "run").run()
    assert epochs_validated(outcome) == list(range(given.epochs))


class Spoiling(counting.Counting):
    """Now and then the line has no finite gradient, and the counts have one.

    Args:
        pace: as in `counting.Counting`.
        bad: which training steps.
        number: of the next step, counted over all workers.
    """

    def __init__(self, pace: Callable[[], None], bad: set[int], number: Any) -> None:
        super().__init__(pace)
        self.bad = bad
        self.number = number

    def forward(self, numbers: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts, line, total = super().forward(numbers, points)
        if self.training and next(self.number) in self.bad:
            line.register_hook(lambda gradient: gradient * math.nan)
        return counts, line, total


@pytest.mark.parametrize("consistency", ["asynchronous", "synchronous"])
def test_a_gradient_that_one_shard_refuses_is_in_no_update(
    consistency: str, tmp_path: Path
) -> None:
    """The other shard has put its part aside, and must not keep it."""
    task = counting.task(EPOCHS)
    bad = {5, 20, 40}
    object.__setattr__(task, "model", partial(Spoiling, lambda: None, bad, itertools.count()))
    strategy = wt.make_strategy("parameter-server", {"servers": 2, "consistency": consistency})
    run = Threads(task, strategy, 3, tmp_path / "run")
    servers = known(run)
    outcome = run.run()
    counting.check(outcome.weights, outcome.summary, outcome.events, EPOCHS)
    reasons = [event["reason"] for event in outcome.of("spoiled")]
    assert len(reasons) == len(bad)
    assert any("'line." in reason and "is not finite" in reason for reason in reasons), reasons
    for number, server in servers.items():
        assert not server.shards[number].staging.held
