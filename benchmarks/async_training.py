"""Asynchronous and seldom-talking training against plain data-parallel: does it learn, how fast?

    python benchmarks/async_training.py --tune            # learning rates, into async_rates.json
    python benchmarks/async_training.py --continue        # all cells; goes on where it was

Every contender trains the same model on the same 4 hosts of a test bed for the same time, 3 seeds
each, contenders in turns; what it knows is measured by validation after every 32 steps' samples.
Time begins when all hosts are at work: importing torch and finding each other takes 10 to 20 s
here, which no training of a useful length would notice. Server shards and the
coordinator are on the first host, beside its worker: nobody has more than the 4 hosts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness

from benchmarks import async_report
from benchmarks.async_cell import Cell, take
from benchmarks.async_tasks import CLUSTERS, CONTENDERS, GUESSES, MODELS, Contender, write_data
from wagontrain.testbed.bed import Bed, Shape

RATES = Path(__file__).with_name("async_rates.json")
TUNING_SEED = 100  # of no cell that is reported
FACTORS = (1 / 3, 1.0, 3.0)


def rates() -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> contender -> the rate that was found, and what was tried."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in MODELS}
    if RATES.exists():
        found |= json.loads(RATES.read_text())
    return found


def rate_of(model: str, contender: Contender) -> tuple[float, bool]:
    """A contender's learning rate, and whether it was searched for."""
    name = contender.tuned_as or contender.name
    found = rates()[model].get(name)
    return (found["rate"], True) if found else (GUESSES[model][name], False)


def cells(asked: argparse.Namespace) -> list[tuple[Contender, Cell]]:
    """What is asked for, contenders in turns."""
    return [
        (
            contender,
            Cell(
                model, cluster, contender.name, seed, rate_of(model, contender)[0],
                asked.seconds or MODELS[model].seconds[cluster],
            ),
        )
        for model in asked.models
        for seed in asked.seeds
        for cluster in asked.clusters
        for contender in CONTENDERS
        if cluster in contender.clusters and (not asked.only or contender.name in asked.only)
    ]  # fmt: skip


def measure(bed: Bed, contender: Contender, cell: Cell, work: Path) -> Cell:
    """One cell, from its file if it is there."""
    file = work / "cells" / f"{cell.name}.json"
    if file.exists():
        kept = Cell.read(file)
        if kept.good and kept.limit == cell.limit:
            return kept
    folder = work / "runs" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    take(bed, contender, cell, folder, work / "data")
    cell.write(file)
    if cell.good:
        shutil.rmtree(folder)  # checkpoints; what failed is left to look at
    return cell


def tell(number: int, of: int, cell: Cell) -> None:
    """A line on a cell."""
    final, reached = cell.final(), cell.seconds_to_target()
    metric = MODELS[cell.model].metric
    said = (
        f"{cell.samples_per_second:.0f} samples/s, {metric} "
        f"{'not seen' if final is None else f'{final:.3f}'}, target "
        f"{'not reached' if reached is None else f'after {reached:.1f} s'}, "
        f"{cell.starting:.0f} s to start"
    )
    print(f"{number} of {of}, {cell.name}: {said if cell.good else cell.ended}", flush=True)


def tune(bed: Bed, asked: argparse.Namespace, work: Path) -> None:
    """The best of three learning rates, a factor of 3 apart, for each contender of its own.

    On equal hosts, with a seed that is not reported; best is the lowest mean validation loss over
    the second half of the time. Where that is the first or the last of them, the search goes on
    in that direction, at most twice.
    """
    for model in asked.models:
        for contender in CONTENDERS:
            if contender.tuned_as or (asked.only and contender.name not in asked.only):
                continue
            limit = asked.seconds or MODELS[model].seconds["equal"] / 2
            losses: dict[float, float] = {}

            def loss(
                rate: float,
                model: str = model,
                contender: Contender = contender,
                limit: float = limit,
            ) -> float:
                cell = Cell(model, "equal", contender.name, TUNING_SEED, rate, limit)
                cell = measure(bed, contender, cell, work / "tuning")
                print(f"{cell.name}: {cell.late_loss():.4f}", flush=True)
                return cell.late_loss()

            for factor in FACTORS:
                rate = significant(GUESSES[model][contender.name] * factor)
                losses[rate] = loss(rate)
            for _ in range(2):
                best = min(losses, key=losses.__getitem__)
                if best not in (min(losses), max(losses)) or not math.isfinite(losses[best]):
                    break
                further = significant(best * 3 if best == max(losses) else best / 3)
                losses[further] = loss(further)
            best = min(losses, key=losses.__getitem__)
            if not math.isfinite(losses[best]):
                print(f"{model}, {contender.name}: none of {sorted(losses)} trains", flush=True)
                continue
            found = rates()
            tried = {f"{rate:g}": losses[rate] for rate in sorted(losses)}
            found[model][contender.name] = {"rate": best, "losses": tried, "seconds": limit}
            RATES.write_text(json.dumps(found, indent=1) + "\n")


def significant(rate: float) -> float:
    """Two digits, as a person would write it."""
    return float(f"{rate:.1e}")


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--only", nargs="+", choices=names, help="of the contenders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, help="of training in a cell")
    parser.add_argument("--cpus", type=float, default=0.45, help="cores of an equal host")
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc writes it")
    parser.add_argument("--work", type=Path, default=Path("runs/async"), help="for cells' files")
    parser.add_argument(
        "--continue", action="store_true", dest="go_on", help="keep the cells that are measured"
    )
    parser.add_argument("--tune", action="store_true", help="search for learning rates instead")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--name", default="async", help="of the files in benchmarks/results")
    return parser


def main() -> None:
    asked = options().parse_args()
    work = asked.work.absolute()
    os.environ["PYTHONPATH"] = f"{harness.ROOT / 'src'}:{harness.ROOT}"
    if not asked.go_on and not asked.report:
        shutil.rmtree(work / ("tuning" if asked.tune else "cells"), ignore_errors=True)
    for folder in (work / "data", work / "tuning" / "data"):
        if not folder.exists():
            write_data(folder)
    if asked.report:
        done = [Cell.read(work / "cells" / f"{cell.name}.json") for _, cell in cells(asked)
                if (work / "cells" / f"{cell.name}.json").exists()]  # fmt: skip
    else:
        with Bed.up(Shape(4, asked.rate, asked.cpus)) as bed:
            if asked.tune:
                tune(bed, asked, work)
                return
            done, planned = [], cells(asked)
            for number, (contender, cell) in enumerate(planned, 1):
                done.append(measure(bed, contender, cell, work))
                tell(number, len(planned), done[-1])
    origin = {**harness.origin(), "command": "python benchmarks/async_training.py "
              + " ".join(sys.argv[1:])}  # fmt: skip
    found = {model: {each.name: rate_of(model, each) for each in CONTENDERS}
             for model in asked.models}  # fmt: skip
    harness.RESULTS.mkdir(exist_ok=True)
    file = harness.RESULTS / f"{time.strftime('%Y-%m-%d')}-{asked.name}"
    record = {**origin, "hosts": 4, "cpus": asked.cpus, "rate": asked.rate,
              "cells": [asdict(cell) for cell in done]}  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(record) + "\n")
    pictures = async_report.draw(done, file)
    page = async_report.page(done, origin, found, pictures, asked.cpus, asked.rate)
    file.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
