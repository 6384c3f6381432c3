"""wagontrain against plain PyTorch: one process against a bare loop, two against a DDP script.

    python benchmarks/foundation.py [--rounds 60]

Both sides run in the same processes, in turns of a few steps each, so that a change of the
machine's speed meets both. A ratio is plain time / wagontrain time of one round: above 1,
wagontrain is faster. A second copy of the plain loop, held against the first in the same way,
shows what the machine's noise makes of two equal things. Half of the rounds are in processes
where wagontrain is built first, half where the plain loop is, so that where memory lies favours
neither. wagontrain keeps its run's files
(events, TensorBoard) as `fit` does; the plain loops keep nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import plain

import wagontrain as wt
from wagontrain import launch
from wagontrain.folder import RunFolder
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.task import load_task, make_task
from wagontrain.transport import Context

ROOT = Path(__file__).parents[1]
STEPS = {"LeNet": 12, "char LM": 2, "MLP 10 M": 4}


def lenet() -> wt.Task:
    return make_task(load_task(str(ROOT / "examples" / "mnist.py")))


def char_lm() -> wt.Task:
    """Without its schedule, which ends after one epoch."""
    task = make_task(load_task(str(ROOT / "examples" / "char_lm.py")))
    return dataclasses.replace(task, scheduler=None)


def mlp() -> wt.Task:
    """10.0 M parameters: the exchange weighs more than the computing."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(4096, 784, generator=generator),
        torch.randint(0, 10, (4096,), generator=generator),
    )
    return wt.Task(
        model=lambda: nn.Sequential(
            nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
            nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10),
        ),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        train=data,
        batch_size=128,
    )  # fmt: skip


TASKS: dict[str, Callable[[], wt.Task]] = {"LeNet": lenet, "char LM": char_lm, "MLP 10 M": mlp}


def ours(task: wt.Task, context: Context, folder: Path) -> Iterator[float | None]:
    """The same training by wagontrain: yields the loss after every step, for ever."""
    endless = dataclasses.replace(task, epochs=10**6, validation=None, metrics={})
    keep = RunFolder.create(folder, "bench") if context.world.rank == 0 else None
    run = wt.Run(endless, DataParallel(), context, keep)
    for batch in run.batches():
        yield run.step(batch).loss


def rounds(name: str, context: Context, count: int, folder: Path, first: int) -> list[list[float]]:
    """Seconds a step of [plain, wagontrain, plain again], round by round."""
    task = TASKS[name]()
    loop = plain.bare_loop if context.world.size == 1 else plain.ddp_script
    sides: list[Iterator[object]] = [loop(task), ours(task, context, folder), loop(task)]
    steps = STEPS[name]
    result = []
    for number in range(count + 1):
        seconds = [0.0] * len(sides)
        for turn in range(len(sides)):
            side = (turn + number + first) % len(sides)
            context.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                next(sides[side])
            seconds[side] = (time.perf_counter() - began) / steps
        if number:  # the first round warms up
            result.append(seconds)
    return result


def work(out: Path, names: list[str], count: int, first: int) -> None:
    """What each process does; rank 0 leaves the figures."""
    context = launch.join(launch.place_from_environment())
    figures = {name: rounds(name, context, count, out / f"run-{name}", first) for name in names}
    if context.world.rank == 0:
        (out / "figures.json").write_text(json.dumps(figures))
    launch.leave(context)


def measure(workers: int, names: list[str], count: int) -> dict[str, list[list[float]]]:
    """Figures of so many processes, from two starts of them: each side is built first in one."""
    result: dict[str, list[list[float]]] = {name: [] for name in names}
    for first in (0, 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options = ["--work", name, "--rounds", str(count // 2), "--first", str(first)]
            command = [sys.executable, __file__, *options, *names]
            launch.start_workers(command, workers, folder, folder)
            for model, rows in json.loads((folder / "figures.json").read_text()).items():
                result[model] += rows
    return result


def table(figures: dict[str, list[list[float]]], against: str) -> list[str]:
    """Markdown rows: medians and the ratios' quartiles."""
    lines = [
        f"| model | {against}, ms | wagontrain, ms | ratio, median | quartiles | "
        f"{against} against itself |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in figures.items():
        other, own, _ = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
        low, middle, high = statistics.quantiles([row[0] / row[1] for row in rows], n=4)
        control = statistics.quantiles([row[0] / row[2] for row in rows], n=4)
        lines.append(
            f"| {name} | {other:.2f} | {own:.2f} | **{middle:.3f}** | {low:.3f} to {high:.3f} | "
            f"{control[1]:.3f} ({control[0]:.3f} to {control[2]:.3f}) |"
        )
    return lines


def machine() -> str:
    """Processor and cores."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {launch.cores()} cores; Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--first", type=int)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.names, arguments.rounds, arguments.first)
        # The plain loops are never closed; DistributedDataParallel aborts when torn down so.
        os._exit(0)
    alone = measure(1, ["LeNet", "char LM"], arguments.rounds)
    pair = measure(2, ["LeNet", "MLP 10 M", "char LM"], arguments.rounds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    date = time.strftime("%Y-%m-%d")
    text = [
        f"# Foundation: wagontrain against plain PyTorch, {date}", "",
        f"Commit {commit}; {machine()}; torch {torch.__version__}. "
        f"`python benchmarks/foundation.py --rounds {arguments.rounds}`: both sides in the same "
        "processes in turns; ratio = plain time / wagontrain time per round, above 1 wagontrain "
        "is faster. Times are medians a step.", "",
        "## One process against a bare PyTorch loop", "",
        *table(alone, "bare loop"), "",
        "## Two processes against a hand-written DDP script", "",
        *table(pair, "DDP script"), "",
    ]  # fmt: skip
    file = ROOT / "benchmarks" / "results" / f"{date}-foundation.md"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
