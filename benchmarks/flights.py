"""A recommender on real data: tables that live on the servers, against tables on every host.

    python benchmarks/flights.py

examples/flights.py on 4 hosts of a test bed, one epoch, each way with each seed, in turns. Rows are
those of the tables of flight numbers and aeroplanes that a batch has; `sent` and `received` are all
bytes of the messages that carry them, headers and ids included. A host's bytes are the kernel's
count, over the whole run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness

BED = ("--hosts", "4", "--rate", "1gbit", "--cpus", "0.45")
WAYS = {
    "data-parallel": ("--strategy", "data-parallel"),
    "parameter-server": ("--strategy", "parameter-server", "--set", "tables=auto"),
}
LONGEST = 600.0


@dataclass(frozen=True)
class Run:
    """What came of one.

    Args:
        way: one of `WAYS`.
        seed: of the run.
        loss, known: of validation, and of who knows only the classes' shares.
        speed: samples per second.
        sent: bytes that the busiest host sent, by the kernel's count.
        rows: bytes of rows touched, sent and received; none where no table is on servers.
    """

    way: str
    seed: int
    loss: float
    known: float
    accuracy: float
    speed: float
    sent: int
    rows: dict[str, int]


def run(way: str, seed: int, epochs: int, folder: Path) -> Run:
    """Train once, on a bed of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    program = [sys.executable, "-m", "wagontrain"]
    command = [
        *program, "testbed", "run", *BED, "--json", "used.json", "--",
        *program, "run", str(harness.ROOT / "examples" / "flights.py"), *WAYS[way],
        "--seed", str(seed), "--epochs", str(epochs), "--run-dir", "R",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=folder, check=True, timeout=LONGEST, stdout=log, stderr=log)
    summary = json.loads((folder / "R" / "summary.json").read_text())
    hosts = json.loads((folder / "used.json").read_text())["hosts"]
    values = summary["validation"]
    return Run(
        way, seed, values["loss"], values["loss_of_shares"], values["accuracy"],
        summary["samples_per_second"], max(host["bytes_sent"] for host in hosts),
        summary.get("row_bytes") or {},
    )  # fmt: skip


def spread(values: list[float], form: str) -> str:
    """Median (least to most)."""
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def page(runs: list[Run], origin: dict[str, Any]) -> str:
    """The result, as Markdown."""
    lines = [
        f"# Flights on 4 hosts, {time.strftime('%Y-%m-%d')}", "",
        f"{origin['machine']}; Python {origin['python']}, torch {origin['torch']}; commit "
        f"{origin['commit']}. `{' '.join(BED)}`", "", f"    {origin['command']}", "",
        "Median (least to most) over seeds. Who knows only how many flights are late has a loss "
        f"of {runs[0].known:.3f}.", "",
        "| | validation loss | accuracy | samples/s | MB sent by the busiest host |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for way in WAYS:
        mine = [each for each in runs if each.way == way]
        lines.append(
            f"| {way} | {spread([each.loss for each in mine], '.4f')} "
            f"| {spread([each.accuracy for each in mine], '.4f')} "
            f"| {spread([each.speed for each in mine], ',.0f')} "
            f"| {spread([each.sent / 1e6 for each in mine], '.1f')} |"
        )
    moved = [each.rows for each in runs if each.rows]
    touched = spread([each["touched"] / 1e6 for each in moved], ".1f")
    lines += ["", "Bytes of rows, against those of the numbers in the rows that batches touched in "
              f"a run, {touched} MB:", ""]  # fmt: skip
    for name in ("received", "sent"):
        times = statistics.median(each[name] / each["touched"] for each in moved)
        lines.append(f"- {name}: **{times:.3f}** times (asked: at most 1.2)")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/flights"))
    asked = parser.parse_args()
    runs = []
    for seed in asked.seeds:
        for way in WAYS:
            runs.append(run(way, seed, asked.epochs, asked.work.absolute() / f"{way}-{seed}"))
            print(runs[-1], flush=True)
    command = ["python", "benchmarks/flights.py", *sys.argv[1:]]
    origin = {**harness.origin(), "command": " ".join(command)}
    file = harness.RESULTS / f"{time.strftime('%Y-%m-%d')}-flights"
    record = {**origin, "runs": [asdict(each) for each in runs]}
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(runs, origin))
    print(page(runs, origin))


if __name__ == "__main__":
    main()
