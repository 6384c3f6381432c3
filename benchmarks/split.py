"""Split weights, hybrid, sharded and pipeline against plain scripts, and the ratios asked of them.

    python benchmarks/split.py [--rounds 3] [--only speech gpt]

Each row is a run of the harness: contenders in turns on 4 hosts of 0.45 core. Its part of the page
is written when it is over.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import harness


@dataclass(frozen=True)
class Row:
    """One model on one kind of link, and how much faster who has to be than whom."""

    model: str
    rate: str
    contenders: tuple[str, ...]
    asked: tuple[tuple[str, str, float], ...]
    timeout: float = 200.0

    @property
    def title(self) -> str:
        """Of its part of the page."""
        return f"{self.model}, links of {self.rate}: {', '.join(self.contenders)}"


SPLIT, HYBRID = "wagontrain:split-weights", "wagontrain:hybrid"
SHARDED, PIPELINE = "wagontrain:sharded", "wagontrain:pipeline"
ROWS = [
    Row(
        "speech", "1gbit", ("alone", "ddp", "tensor", SPLIT),
        ((SPLIT, "alone", 3.3), (SPLIT, "ddp", 4.5), (SPLIT, "tensor", 1.0)),
    ),
    Row("speech", "1gbit", ("fsdp2", SHARDED), ((SHARDED, "floor", 1 / 1.5),)),
    Row(
        "alexnet", "1gbit", ("alone", "ddp", HYBRID),
        ((HYBRID, "alone", 3.5), (HYBRID, "ddp", 1.8)),
    ),
    Row(
        "alexnet", "200mbit", ("alone", "ddp", HYBRID),
        ((HYBRID, "alone", 2.6), (HYBRID, "ddp", 5.0)), 300.0,
    ),
    Row("dense_recommender", "1gbit", ("ddp", HYBRID), ((HYBRID, "ddp", 10.0),)),
    Row("recommender", "1gbit", ("ddp", HYBRID), ()),
    Row("gpt", "200mbit", ("ddp", PIPELINE), ((PIPELINE, "ddp", 2.0),), 300.0),
]  # fmt: skip


def seconds(outcomes: list[harness.Outcome], name: str, asked: argparse.Namespace) -> float | None:
    """Median seconds of a contender; of "floor", what sharding sends over the rate."""
    if name == "floor":  # three times the weights rather than the all-reduce's two
        floors = [harness.floor_seconds(outcome, asked) for outcome in outcomes]
        floor = next(filter(None, floors), None)
        return None if floor is None else 1.5 * floor
    outcome = next(each for each in outcomes if each.contender == name)
    return statistics.median(outcome.seconds) if outcome.rounds else None


def measure(row: Row, rounds: int) -> list[str]:
    """Run one row; returns its part of the page."""
    asked = harness.options().parse_args(
        ["--models", row.model, "--contenders", *row.contenders, "--rate", row.rate,
         "--rounds", str(rounds), "--steps", "3", "--warmup", "1",
         "--timeout", str(row.timeout), "--name", "split"]
    )  # fmt: skip
    asked.baseline = row.contenders[0]
    harness.prepare()
    outcomes = harness.measure(asked)
    page = harness.report(outcomes, asked).splitlines()
    first = next(number for number, line in enumerate(page) if line.startswith("## "))
    where = harness.origin()
    text = [
        f"## {row.title}", "",
        f"{rounds} rounds; {where['machine']}; Python {where['python']}, torch {where['torch']}; "
        f"commit {where['commit']}.",
        *page[first + 1 :],
    ]  # fmt: skip
    for name, other, least in row.asked:
        mine, theirs = seconds(outcomes, name, asked), seconds(outcomes, other, asked)
        reached = "not measured" if not mine or not theirs else f"{theirs / mine:.2f}"
        text.append(f"- {other} / {name}: **{reached}** (asked: {least:.2f})")
    return [*text, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="models; other rows stay as they were today")
    given = parser.parse_args()
    file = Path(harness.RESULTS) / f"{time.strftime('%Y-%m-%d')}-split.md"
    sections = file.read_text().split("\n## ")[1:] if file.exists() else []
    pages = {text.partition("\n")[0]: ["## " + text] for text in sections}
    head = [
        f"# Split weights, hybrid, sharded, pipeline, {time.strftime('%Y-%m-%d')}", "",
        "4 hosts of a test bed on one machine, 0.45 core each. Medians over rounds, contenders in "
        "turns; ratios of medians, above 1 is faster.", "",
    ]  # fmt: skip
    for row in ROWS:
        if not given.only or row.model in given.only:
            pages[row.title] = measure(row, given.rounds)
            rows = [pages[each.title] for each in ROWS if each.title in pages]
            text = "\n".join([*head, *itertools.chain.from_iterable(rows)])
            file.write_text(re.sub("\n{3,}", "\n\n", text).rstrip() + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
