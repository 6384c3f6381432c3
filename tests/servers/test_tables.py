"""Embedding tables that live on the servers only, in whole trainings."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.servers.crews import Outcome, Threads
from wagontrain import checkpoint, verify
from wagontrain.layout import Layout
from wagontrain.reference import Trace, train_plainly
from wagontrain.servers import placing
from wagontrain.servers.contents import contents, take_up
from wagontrain.servers.image import Image
from wagontrain.servers.remote import RemoteEmbedding
from wagontrain.servers.shard import Shard
from wagontrain.servers.work import Worker
from wagontrain.state import WholeTensors
from wagontrain.transport import Context

SAMPLES, ROWS = 22, 60
STEPS = 6
sgd = partial(torch.optim.SGD, lr=0.3)
adagrad = partial(torch.optim.Adagrad, lr=0.2)


class Recommender(nn.Module):
    """Two ways to look at one table, a bag with padding, and layers that are no tables."""

    def __init__(self, rows: int = ROWS, dim: int = 8, sparse: bool = False) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, dim, sparse=sparse)
        self.words = nn.EmbeddingBag(rows, dim, padding_idx=3)
        self.small = nn.Embedding(4, dim)
        self.head = nn.Linear(4 * dim, 3)

    def forward(self, left: Tensor, right: Tensor, words: Tensor) -> Tensor:
        seen = [self.item(left), self.item(right), self.words(words), self.small(left % 4)]
        return self.head(torch.cat(seen, 1))


def ids(*shape: int, below: int = ROWS, seed: int = 0) -> Tensor:
    """Few different ones, so that every batch has duplicates."""
    few = torch.randint(0, below, (9,), generator=torch.Generator().manual_seed(seed))
    return few[torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed + 1))]


def data(below: int = ROWS) -> TensorDataset:
    inputs = ids(SAMPLES, below=below), ids(SAMPLES, below=below, seed=5)
    words = ids(SAMPLES, 4, below=below, seed=9)
    words[::2, 0] = 3
    target = torch.randint(0, 3, (SAMPLES,), generator=torch.Generator().manual_seed(2))
    return TensorDataset(torch.stack(inputs, 1), words, target)


class Samples(torch.utils.data.Dataset[Any]):
    """(left, right, words) and a class."""

    def __init__(self, below: int = ROWS) -> None:
        self.pairs, self.words, self.target = data(below).tensors

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, at: int) -> Any:
        return (self.pairs[at, 0], self.pairs[at, 1], self.words[at]), self.target[at]


def task(optimizer: Any = sgd, model: Any = Recommender, **fields: Any) -> wt.Task:
    """22 samples in batches of 8: 6 in the last one of an epoch."""
    usual = {"batch_size": 8, "epochs": 2, "train": Samples()} | fields
    return wt.Task(model=model, loss=F.cross_entropy, optimizer=optimizer, **usual)


def train(given: wt.Task, folder: Path, workers: int = 2, **settings: Any) -> Outcome:
    usual = {"servers": 2, "tables": "item,words", "consistency": "synchronous"}
    strategy = wt.make_strategy("parameter-server", usual | settings)
    return Threads(given, strategy, workers, folder).run()


def same_as_one_process(given: wt.Task, folder: Path, workers: int, **settings: Any) -> None:
    with verify.computing_in("float64"):
        prepared, _ = verify.prepared(given, "float64")
        outcome = train(prepared, folder, workers, **settings)
        found = Trace.of(outcome.losses, prepared.build_model(), outcome.weights)
        expected = train_plainly(prepared, torch.device("cpu"), 0, STEPS)
    strategy = wt.make_strategy("parameter-server", {"consistency": "synchronous"})
    verdict = verify.compare(found, expected, strategy, workers, "float64")
    assert verdict.passed, verdict
    assert set(found.parameters) >= {"item.weight", "words.weight"}


@pytest.mark.parametrize("optimizer", [sgd, adagrad], ids=["sgd", "adagrad"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_synchronous_steps_train_as_one_process(
    optimizer: Any, workers: int, tmp_path: Path
) -> None:
    same_as_one_process(task(optimizer), tmp_path / "run", workers)


@pytest.mark.parametrize(
    "fields",
    [
        {"clip_grad_norm": 0.05},
        {"accumulate": 3},
        {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)},
        {"model": partial(Recommender, sparse=True)},
    ],
    ids=["clip", "accumulate", "scheduler", "sparse"],
)
def test_every_way_of_stepping(fields: dict[str, Any], tmp_path: Path) -> None:
    tables = "auto" if "model" in fields else "item,words"
    same_as_one_process(task(**fields), tmp_path / "run", 3, tables=tables)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor with memory that is made within."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta:
            self.bytes = max(self.bytes, out.nbytes)
        return out


def test_a_model_is_built_without_its_tables() -> None:
    given = task(model=partial(Recommender, 100_000), batch_size=8)
    with Largest() as made:
        placed = placing.build(given, "auto", whole=False)
    assert set(placed.layers) == {"item", "words"}
    assert not placed.whole
    assert all(layer.weight.is_meta for layer in placed.layers.values())
    assert made.bytes < 100_000
    # Those that are left have numbers, and whatever only looks like a table has memory.
    model = nn.Sequential
    given = task(model=lambda: model(nn.Embedding(5000, 4), nn.Linear(4, 5000)))
    other = placing.build(given, "0", whole=False).model
    assert (other[0].weight.is_meta, other[1].weight.is_meta) == (True, False)


def test_a_table_larger_than_any_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables of 4 TB: workers, coordinator and checkpoints have the rows that were touched."""
    workers: list[Worker] = []
    monkeypatch.setattr(Worker, "run", _noting(Worker.run, workers))
    far = 10**9
    given = task(
        partial(torch.optim.Adagrad, lr=1e-4), partial(Recommender, far, 1024),
        train=Samples(far), validation=Samples(far),
    )  # fmt: skip
    outcome = train(given, tmp_path / "run", consistency="asynchronous")
    assert sum(outcome.losses[3:]) < sum(outcome.losses[:3])
    assert set(outcome.summary["validation"]) == {"loss"}
    for worker in workers:
        assert isinstance(worker.model.item, RemoteEmbedding)
        held = [*worker.model.parameters(), *worker.model.buffers()]
        assert max(value.nbytes for value in held if not value.is_meta) < 200_000
    assert not {"item.weight", "words.weight"} & set(outcome.weights)
    saved = checkpoint.latest(outcome.folder.path)
    kept = saved.reader().tensors
    touched = len(set(Samples(far).pairs.flatten().tolist()))
    assert kept["tables.item.weight.values"][0] == (touched, 1024)
    assert kept["tables.item.weight.sum"][0] == (touched, 1024)
    longer = dataclasses.replace(given, epochs=3)
    strategy = wt.make_strategy("parameter-server", {"tables": "auto", "servers": 3})
    source = checkpoint.Restored(Context(), saved)
    again = Threads(longer, strategy, 1, tmp_path / "again", source).run()
    assert len(again.losses) == 3
    # Adagrad's sums only grow: those of every row go on from where they were.
    before, after = (sums_of(saved), sums_of(checkpoint.latest(again.folder.path)))
    assert before.keys() == after.keys()
    assert all((after[row] >= before[row]).all() for row in before)
    assert any((after[row] > before[row]).any() for row in before)


def sums_of(saved: checkpoint.Checkpoint) -> dict[int, Tensor]:
    """What Adagrad keeps of the rows of one table."""
    names = [f"tables.item.weight.{key}" for key in ("ids", "sum")]
    shapes = saved.reader().tensors
    kept = saved.reader().read({name: Layout(shapes[name][0]) for name in names})
    return dict(zip(kept[names[0]].tolist(), kept[names[1]], strict=True))


def _noting(run: Any, workers: list[Worker]) -> Any:
    def noted(worker: Worker) -> None:
        workers.append(worker)
        run(worker)

    return noted


def test_bytes_of_rows_are_few_beside_the_rows_touched(tmp_path: Path) -> None:
    given = task(
        adagrad, partial(Recommender, 5000, 64), train=Samples(5000), validation=Samples(5000),
        batch_size=22, epochs=4,
    )  # fmt: skip
    outcome = train(given, tmp_path / "run", 2, servers=1, consistency="asynchronous")
    moved = outcome.summary["row_bytes"]
    batch = Samples(5000)
    distinct = len(batch.pairs.unique()) + len(batch.words.unique())
    assert moved["touched"] == 4 * distinct * 64 * 4
    assert moved["touched"] < moved["received"] <= 1.2 * moved["touched"]
    # The padding row is looked up, and has no gradient.
    assert moved["touched"] * (distinct - 1) / distinct < moved["sent"] <= 1.2 * moved["touched"]


@pytest.mark.parametrize("bad", [ROWS, -1])
def test_an_id_that_there_is_not(bad: int, tmp_path: Path) -> None:
    spoiled = Samples()
    spoiled.pairs[13, 1] = bad
    message = f"^id {bad} is none of table 'item.weight', which has rows 0 to {ROWS - 1}: "
    with pytest.raises(wt.ModelError, match=message):
        train(task(train=spoiled), tmp_path / "run", 1)


@pytest.mark.parametrize("optimizer", [sgd, adagrad], ids=["sgd", "adagrad"])
@pytest.mark.parametrize("servers", [1, 3])
def test_goes_on_from_a_checkpoint(optimizer: Any, servers: int, tmp_path: Path) -> None:
    """Of tables, into tables on another number of servers."""
    longer = task(optimizer, epochs=3)
    whole = train(longer, tmp_path / "whole", 1)
    half = train(dataclasses.replace(longer, epochs=1), tmp_path / "half", 1)
    source = checkpoint.Restored(Context(), checkpoint.latest(half.folder.path))
    strategy = wt.make_strategy(
        "parameter-server",
        {"tables": "item,words", "servers": servers, "consistency": "synchronous"},
    )
    rest = Threads(longer, strategy, 1, tmp_path / "rest", source).run()
    assert half.losses + rest.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, value in rest.weights.items():
        torch.testing.assert_close(value, whole.weights[name], rtol=1e-4, atol=1e-5)


def test_tables_are_taken_up_from_other_strategies_and_by_them(tmp_path: Path) -> None:
    given = task(adagrad, epochs=3)
    plainly = train_plainly(given, torch.device("cpu"), 0, 9)
    with wt.Run(
        dataclasses.replace(given, epochs=1), wt.make_strategy("data-parallel"), Context()
    ) as run:
        for batch in run.batches():
            run.step(batch)
        saved = run.save(tmp_path / "first")
        run.close()
    assert saved is not None
    settings = {"consistency": "synchronous", "servers": 2, "tables": "item"}
    strategy = wt.make_strategy("parameter-server", settings)
    source = checkpoint.Restored(Context(), checkpoint.Checkpoint(saved))
    two = dataclasses.replace(given, epochs=2)
    outcome = Threads(two, strategy, 2, tmp_path / "run", source).run()
    assert outcome.losses == pytest.approx(plainly.losses[3:6], rel=1e-4)
    place = outcome.folder.path
    with wt.Run(given, wt.make_strategy("data-parallel"), Context(), resume=place) as run:
        losses = [run.step(batch).loss for batch in run.batches()]
        run.close()
    assert losses == pytest.approx(plainly.losses[6:], rel=1e-4)


def test_every_sample_counts_once_whatever_the_settings(tmp_path: Path) -> None:
    for at, settings in enumerate(
        [
            {"consistency": "ssp:1", "n_push": 2, "n_fetch": 2},
            {"consistency": "asynchronous", "overlap": True, "replicas": 1},
            {"backup": 1, "rule": "staleness-aware"},
            {"consistency": "asynchronous", "rule": "adagrad", "rate": 0.1},
        ]
    ):
        adam = partial(torch.optim.Adam, lr=0.01, weight_decay=0.1)
        given = task(adam, validation=Samples(), clip_grad_norm=1.0)
        outcome = train(given, tmp_path / f"run{at}", 3, **settings)
        assert outcome.summary["samples"] == 2 * SAMPLES
        assert outcome.summary["row_bytes"]["touched"] > 0
        assert all(value.isfinite().all() for value in outcome.weights.values())


def test_rows_that_nobody_asks_for_keep_their_first_numbers_and_have_no_state(
    tmp_path: Path,
) -> None:
    given = task(partial(torch.optim.Adam, lr=0.05), train=Samples(), epochs=1)
    outcome = train(given, tmp_path / "run", consistency="asynchronous")
    first, touched = given.build_model().state_dict(), Samples().pairs.flatten().unique()
    rest = torch.tensor([row for row in range(ROWS) if row not in touched])
    after = outcome.weights["item.weight"]
    assert torch.equal(after[rest], first["item.weight"][rest])
    assert (after[touched] != first["item.weight"][touched]).any(1).all()
    assert torch.equal(outcome.weights["words.weight"][3], torch.zeros(8))
    saved = checkpoint.latest(outcome.folder.path)
    names = ["optimizer.item.weight.exp_avg_sq", "tables.item.weight.step"]
    described = saved.reader().tensors
    kept = saved.reader().read({name: Layout(described[name][0]) for name in names})
    for value in kept.values():
        assert (value[touched] > 0).any(1).all()
        assert not value[rest].any()


def filled(image: Image) -> list[Shard]:
    """An image's shards as they begin."""
    shards = []
    for job in image.jobs(image.optimizer.state_dict()["param_groups"], {}):
        shards.append(Shard(job))
        take_up(shards[-1], image.part(job.index))
    return shards


def update(shards: list[Shard], name: str, rows: Tensor) -> None:
    """Adam on some rows, with gradients that follow from their ids."""
    for shard in shards:
        mine = rows[rows % len(shards) == shard.job.index]
        gradient = torch.outer(mine + 1.0, torch.ones(8))
        shard.tables[name].update(mine, gradient, shard.updater.groups[0])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "touched rows"])
def test_state_of_rows_moves_to_another_number_of_servers(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "fit_here", lambda task: whole)
    given, name = task(partial(torch.optim.Adam, lr=0.1)), "item.weight"

    def image(servers: int) -> Image:
        return Image(given, servers, "optimizer", "item,words")

    first, often, once = image(2), torch.tensor([4, 17, 50]), torch.tensor([5, 17])
    before = filled(first)
    for rows in (often, once, often):
        update(before, name, rows)
    for shard in before:
        shard.keep(0)
    held = first.take([contents(shard, 0) for shard in before])
    second = image(3)
    second.restore(WholeTensors(held.tensors, held.plain))
    after = filled(second)
    assert sum(shard.tables[name].count for shard in after) == 4
    assert sum(shard.tables["words.weight"].count for shard in after) == 0
    for shards in (before, after):  # so that all that is kept is looked at
        update(shards, name, torch.arange(ROWS))
    for row in range(ROWS):
        ids = torch.tensor([row])
        found = [shards[row % len(shards)].tables[name].read(ids) for shards in (before, after)]
        torch.testing.assert_close(found[0], found[1])


class OwnForward(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.table.weight


def only(layer: Any) -> Any:
    return lambda: nn.ModuleDict({"table": layer(), "rest": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("model", "tables", "message"),
    [
        (only(partial(nn.Embedding, 9, 4)), "tabel", "'tabel' is no nn.Embedding.*'table'"),
        (only(partial(nn.Embedding, 9, 4)), "rest", "'rest' is no nn.Embedding"),
        (partial(nn.Linear, 2, 2), "table", "it has none"),
        (only(partial(nn.Embedding, 9, 4)), "auto", "tables=auto: no embedding with sparse=True"),
        (only(partial(nn.Embedding, 9, 4, max_norm=1.0)), "table", "max_norm changes rows"),
        (
            only(partial(nn.Embedding, 9, 4, scale_grad_by_freq=True)),
            "table",
            "scale_grad_by_freq counts ids",
        ),
        (only(partial(nn.EmbeddingBag, 9, 4, mode="max")), "table", "the maximum over a bag"),
        (only(partial(OwnForward, 9, 4)), "table", "OwnForward has a forward of its own"),
        (Tied, "table", "tied, as 'table.weight' and 'out.weight'"),
        (
            only(lambda: nn.Embedding(9, 4).requires_grad_(False)),
            "table",
            "frozen, and so never changes",
        ),
    ],
)
def test_tables_that_cannot_be_on_the_servers(
    model: Any, tables: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(wt.UsageError, match=message):
        train(task(model=model), tmp_path / "run", tables=tables)


def test_what_is_not_the_same_for_single_rows_is_refused(tmp_path: Path) -> None:
    adam, heavy = partial(torch.optim.Adam, lr=0.1), partial(sgd, weight_decay=0.1)
    for optimizer, what in ((adam, "Adam"), (heavy, "SGD with weight_decay=0.1")):
        with pytest.raises(wt.UsageError, match=rf"^{what} changes rows of 'item.weight' that"):
            train(task(optimizer), tmp_path / what)
    with pytest.raises(wt.UsageError, match="RMSprop cannot update single rows of a table"):
        train(task(torch.optim.RMSprop), tmp_path / "rms", consistency="asynchronous")
    with pytest.raises(wt.UsageError, match="rule easgd needs all parameters at the workers"):
        train(task(), tmp_path / "run", consistency="asynchronous", rule="easgd")


def test_a_short_run_tells_its_settings_and_bytes(tmp_path: Path) -> None:
    outcome = train(task(epochs=1), tmp_path / "run", 1)
    assert outcome.summary["bytes_sent_per_rank"][0] > 0  # also of a run that is over at once
    plan = json.loads((outcome.folder.path / "plan.json").read_text())
    assert plan["settings"]["tables"] == "item,words"
    assert plan["exact"] is True
