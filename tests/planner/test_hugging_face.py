"""Hugging Face's models: what their layers send is foretold as they are divided."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import wagontrain as wt
from tests.gang import Gang
from tests.hugging_face import WIDE
from tests.planner import made
from wagontrain.batches import Batches
from wagontrain.costs import Costs
from wagontrain.planner import profiling, search
from wagontrain.profile import Profile
from wagontrain.split.placing import cheapest, problem
from wagontrain.split.predict import Border
from wagontrain.transport import Context

SIZE = 2
OVERHEAD = 6_000  # bytes of a step for figures, and headers of some sixty messages


def profiled(task: wt.Task) -> Profile:
    return profiling.measure(task, torch.device("cpu"), [2])


def sent(context: Context, model: str, strategy: str, settings: dict[str, Any]) -> Any:
    """Bytes foretold and sent in a step on a whole batch, of the rank that sends most."""
    profiling._SECONDS = 0.02  # of this process of the gang; bytes do not hang on times
    given, chosen = WIDE[model](), wt.make_strategy(strategy, settings)
    own = profiled(given).to_json().encode()
    profile = Profile.from_json(context.gather_bytes(own)[0].decode())
    foretold = search.estimate(chosen, Costs(profile, made.cluster(SIZE))).sent
    runner = chosen.setup(given, context)
    batches = Batches.of_training(given, context.world.device, runner.cut)
    own: list[float] = []
    for batch in itertools.chain.from_iterable(map(batches.epoch, range(3))):
        context.barrier()
        context.sent.refresh()
        context.sent.lap()
        travelled = runner.step(batch).sent
        if batch.total == given.batch_size:
            own.append(float(travelled or 0))
    runner.close()
    # The least: sometimes something is sent again.
    return foretold, min(max(step) for step in zip(*context.gather(own), strict=True))


@pytest.mark.parametrize(
    ("model", "strategy", "settings"),
    [
        ("vit", "split-weights", {}),
        ("llama", "split-weights", {}),
        ("llama", "hybrid", {"placement": "all"}),
        ("gpt2", "split-weights", {}),
        ("bert", "split-weights", {}),
    ],
)
def test_what_travels_is_what_was_foretold(
    gang: Gang, model: str, strategy: str, settings: dict[str, Any]
) -> None:
    foretold, travelled = gang.run(SIZE, sent, model, strategy, settings)[0]
    assert abs(travelled - foretold) <= 0.02 * travelled + OVERHEAD


def test_placements_know_families_and_leave_tied_layers_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiling, "_SECONDS", 0.02)
    profile = profiled(WIDE["llama"]())
    costs = Costs(profile, made.cluster(4, rate=1e12, latency=1e-9))
    for ranks, families in ((2, 4), (4, 2)):  # two heads of keys
        given = problem(costs, Border(ranks, 8.0, shards=False), 8.0, 0.0)
        assert sum(len(names) > 2 for names in given.saved) == families
        found = cheapest(given)
        assert found["model.layers.0.mlp.gate_proj"] == "column"
        assert found["model.layers.0.mlp.down_proj"] == "row"
    tied = profiled(WIDE["gpt2"]())
    given = problem(Costs(tied, made.cluster(2)), Border(2, 8.0, shards=True), 4.0, 1.0)
    assert not given.options.keys() & {"transformer.wte", "lm_head"}


def test_what_is_input_and_target_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_SECONDS", 0.02)
    task = WIDE["gpt2"]()
    sample = task.train[0]
    assert profiled(task).sample == sum(column.nbytes for column in sample.values())
