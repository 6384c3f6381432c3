"""Bytes that each strategy sends per step, as the kernel counts them, beside its formula's.

    python benchmarks/bytes.py [--steps 3] [--only pipeline hybrid]

Every strategy trains one of the benchmarks' models on 4 hosts of a test bed. Bytes are those that
leave a host by its network device, from one step to a later one, so that starting up does not
count; headers, acknowledgements and the ranks' signs of life do. Formulas count what has to
travel, and are those of the strategies' pages in docs/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks import harness
from benchmarks.models import PROBLEMS
from wagontrain.testbed.bed import Bed, Shape

HOSTS, S = 4, 4  # bytes of a float32
BOTH = 2 * (HOSTS - 1) / HOSTS
"""Of every byte that is summed over all hosts, or gathered and its gradient given back."""


@dataclass(frozen=True)
class Row:
    """One strategy on one model.

    Args:
        contender: as the harness names it.
        model: of benchmarks/models.py.
        formula: written out; N hosts, B samples of a step, P bytes of weights, s bytes a number.
        count: what it comes to: (the model without memory, B) -> bytes per host and step.
    """

    contender: str
    model: str
    formula: str
    count: Callable[[Any, int], float]


@dataclass(frozen=True)
class Counted:
    """What was found for a row: bytes per host and step, and bytes of a packet on average."""

    contender: str
    model: str
    formula: str
    formula_bytes: float
    kernel_bytes: float
    of_hosts: list[float]
    ratio: float
    packet: float


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the modules' parameters."""
    return sum(value.nbytes for module in modules for value in module.parameters())


def speech_sums(model: Any, batch: int) -> float:
    """Columns, rows, columns, rows, columns: a sum behind each rows, and one before each columns.

    Before the first there is none: the input needs no gradient. Last, three numbers a sample.
    """
    widths = [layer.in_features for layer in model if isinstance(layer, nn.Linear)]
    return BOTH * batch * (2 * widths[2] + 2 * widths[4] + 3) * S


def alexnet_mixed(model: Any, batch: int) -> float:
    """The fully connected layers: rows; columns and rows."""
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    first, second, third = (layer for layer in model if isinstance(layer, nn.Linear))
    by_rows = first.in_features / HOSTS + first.out_features
    pair = second.in_features + third.out_features
    return BOTH * (weight_bytes(*convolutions) + batch * (by_rows + pair) * S)


def table_rows(model: Any, batch: int) -> float:
    """Rows there and their gradients back, and which ones are meant, as int64."""
    rows, width = batch * len(model.tables) / HOSTS, model.tables[0].embedding_dim
    return BOTH * (rows * width * S + rows * 8 / 2 + weight_bytes(model.head))


def borders(model: Any, batch: int) -> float:
    """Three borders, each crossed by the residual stream and by its gradient, on four hosts."""
    length, width = model.places.weight.shape
    return (HOSTS - 1) / HOSTS * 2 * batch * length * width * S


OF_ALL = "2 (N-1)/N · P"
ROWS = [
    Row("wagontrain:data-parallel", "speech", OF_ALL, lambda model, _: BOTH * weight_bytes(model)),
    Row("wagontrain:sharded:stage=1", "speech", OF_ALL,
        lambda model, _: BOTH * weight_bytes(model)),
    Row("wagontrain:sharded:stage=2", "speech", OF_ALL,
        lambda model, _: BOTH * weight_bytes(model)),
    Row("wagontrain:sharded:stage=3", "speech", "(N-1)/N · (3 P - P of the last layer)",
        lambda model, _: BOTH / 2 * (3 * weight_bytes(model) - weight_bytes(model[-1]))),
    Row("wagontrain:split-weights", "speech", "2 (N-1)/N · B · (2 d + 2 d + 3) · s: two pairs of "
        "columns and rows, d = 2560; three numbers a sample for the split softmax", speech_sums),
    Row("wagontrain:hybrid", "alexnet", "2 (N-1)/N · (P of the convolutions + B · (d_in of fc6 / N "
        "+ d_out of fc6 + d_in of fc7 + d_out of fc8) · s): fc6 by rows, fc7 by columns, fc8 by "
        "rows", alexnet_mixed),
    Row("wagontrain:hybrid", "recommender", "2 (N-1)/N · (rows · width · s + rows · 8/2 + P of the "
        "network): tables by rows, of which a host needs B/N for each of 8", table_rows),
    Row("wagontrain:pipeline", "gpt", "(N-1)/N · 2 · B · length · width · s: three borders, "
        "forward and backward", borders),
]  # fmt: skip


def count(bed: Bed, row: Row, asked: argparse.Namespace) -> Counted:
    """Train with a strategy on the hosts and hold its bytes against its formula.

    Raises:
        SystemExit: the training failed.
    """
    outcome = harness.Outcome(row.model, row.contender)
    before = bed.usage()
    harness.take_turn(bed, outcome, asked)
    after = bed.usage()
    if outcome.failures:
        raise SystemExit(f"{row.contender} on {row.model}: {outcome.failures[0]}")
    problem = PROBLEMS[row.model]()
    with torch.device("meta"):
        formula = row.count(problem.model(), problem.batch_size)
    sent = [each["sent"] for each in outcome.rounds[0]]
    mean = statistics.mean(sent)
    packets = sum(host.packets_sent for host in after) - sum(host.packets_sent for host in before)
    every = sum(host.bytes_sent for host in after) - sum(host.bytes_sent for host in before)
    return Counted(
        row.contender, row.model, row.formula, formula, mean, sent, mean / formula, every / packets
    )


def page(found: list[Counted], asked: argparse.Namespace) -> str:
    """The results as Markdown."""
    where = harness.origin()
    lines = [
        f"# Bytes per host and step, {time.strftime('%Y-%m-%d')}", "",
        f"{HOSTS} hosts of a test bed on one machine, links of {asked.rate}. {where['machine']}; "
        f"Python {where['python']}, torch {where['torch']}; commit {where['commit']}.", "",
        "    python benchmarks/bytes.py " + " ".join(sys.argv[1:]), "",
        f"Means over the hosts and over {asked.steps} steps, after {asked.warmup}. The kernel "
        "counts what leaves a host's network device, with headers of 66 bytes a packet, with the "
        "acknowledgements of what came in, the figures of each step and the signs of life. It "
        "hands over up to 64 KiB as one packet (segmentation offload; the column has the "
        "average, acknowledgements included), so that headers are next to nothing here: on a "
        "wire that cuts them to 1448 bytes they are 4.6 %.", "",
        "| strategy | model | formula, N hosts | formula, MB | kernel, MB | ratio | hosts, MB "
        "| packet, kB |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in found:
        spread = f"{min(each.of_hosts) / 1e6:.2f} to {max(each.of_hosts) / 1e6:.2f}"
        lines.append(
            f"| {each.contender.removeprefix('wagontrain:')} | {each.model} | {each.formula} | "
            f"{each.formula_bytes / 1e6:.2f} | {each.kernel_bytes / 1e6:.2f} | "
            f"**{each.ratio:.3f}** | {spread} | {each.packet / 1e3:.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="strategies, by a part of the name")
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc writes it")
    parser.add_argument("--steps", type=int, default=3, help="counted steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for each strategy")
    asked = parser.parse_args()
    rows = [row for row in ROWS if not asked.only or any(n in row.contender for n in asked.only)]
    harness.prepare()
    found = []
    with Bed.up(Shape(HOSTS, asked.rate)) as bed:
        for row in rows:
            found.append(count(bed, row, asked))
            print(f"{row.contender} on {row.model}: {found[-1].ratio:.3f}", flush=True)
    file = harness.RESULTS / f"{time.strftime('%Y-%m-%d')}-bytes"
    record = {**harness.origin(), "found": [asdict(each) for each in found]}
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(found, asked))
    print(page(found, asked))


if __name__ == "__main__":
    main()
