"""Contenders side by side on one test bed: time, bytes and CPU of a training step.

    python benchmarks/harness.py --models speech alexnet --contenders ddp wagontrain:data-parallel

Contenders take turns (A B C A B C ...) on the same hosts, each turn in fresh processes, so that
a change of the machine's speed meets all of them. Bytes are those that the kernel counted on
each host during the timed steps, headers and acknowledgements included.

A contender is a script of benchmarks/opponents (ddp, fsdp2, tensor, alone), or wagontrain with
a strategy and its settings: wagontrain:data-parallel, wagontrain:data-parallel:bucket_mb=5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measuring import MARK
from benchmarks.models import PROBLEMS
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.links import bits_per_second
from wagontrain.testbed.run import run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPPONENTS = ("ddp", "fsdp2", "tensor", "alone")


@dataclass
class Outcome:
    """What the rounds of one contender on one model gave: one list of rows per good round."""

    model: str
    contender: str
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def median(self, name: str) -> float | None:
        """Median over rounds of the mean over ranks; None where no round ended well."""
        means = [statistics.mean(row[name] for row in rows) for rows in self.rounds]
        return statistics.median(means) if means else None

    @property
    def seconds(self) -> list[float]:
        """Seconds a step in each round, as rank 0 measured them between two barriers."""
        return [rows[0]["seconds"] for rows in self.rounds]


def command(contender: str, model: str, asked: argparse.Namespace) -> list[str]:
    """What runs on each host.

    Raises:
        SystemExit: there is no such contender.
    """
    name, _, rest = contender.partition(":")
    if name in OPPONENTS and not rest:
        module, options = f"benchmarks.opponents.{name}", []
    elif name == "wagontrain":
        strategy, _, settings = rest.partition(":")
        module = "benchmarks.contender"
        options = ["--strategy", strategy or "data-parallel"]
        for pair in filter(None, settings.split(",")):
            options += ["--set", pair]
    else:
        known = ", ".join(OPPONENTS)
        raise SystemExit(f"no contender {contender!r}: {known} or wagontrain:STRATEGY[:SETTINGS]")
    counts = ["--steps", str(asked.steps), "--warmup", str(asked.warmup)]
    return [sys.executable, "-m", module, "--model", model, *counts, *options]


def take_turn(bed: Bed, outcome: Outcome, asked: argparse.Namespace) -> None:
    """One round of one contender, added to its outcome; a failure is part of it."""
    lines: list[str] = []
    words = command(outcome.contender, outcome.model, asked)
    ended = run(bed, words, say=lines.append, timeout=asked.timeout)
    rows = [json.loads(line.partition(MARK)[2]) for line in lines if MARK in line]
    if ended.status == 0 and rows:
        outcome.rounds.append(sorted(rows, key=lambda row: row["rank"]))
        return
    why = f"no end within {asked.timeout:g} s" if ended.timed_out else f"status {ended.status}"
    last = next((line for line in reversed(lines) if line.partition("|")[2].strip()), "silent")
    outcome.failures.append(f"{why}; {last}")


def measure(asked: argparse.Namespace) -> list[Outcome]:
    """All rounds of all contenders on all models, on one test bed."""
    outcomes = [Outcome(model, each) for model in asked.models for each in asked.contenders]
    slow = {int(host): float(cpus) for host, cpus in (item.split("=") for item in asked.slow)}
    with Bed.up(Shape(asked.hosts, asked.rate, asked.cpus, slow=slow)) as bed:
        for model in asked.models:
            for number in range(asked.rounds):
                for outcome in outcomes:
                    if outcome.model != model or outcome.failures:
                        continue
                    take_turn(bed, outcome, asked)
                    said = outcome.failures or f"{outcome.seconds[-1] * 1e3:.0f} ms a step"
                    print(f"{model}, round {number + 1}, {outcome.contender}: {said}", flush=True)
    return outcomes


def floor_seconds(outcome: Outcome, asked: argparse.Namespace) -> float | None:
    """What an all-reduce of the gradients takes at least: 2 (N - 1) / N · P over the rate."""
    if not outcome.rounds or asked.rate is None:
        return None
    payload = 8 * outcome.rounds[0][0]["exchanged_bytes"]
    return 2 * (asked.hosts - 1) / asked.hosts * payload / bits_per_second(asked.rate)


def table(outcomes: list[Outcome], asked: argparse.Namespace) -> list[str]:
    """Markdown rows; failures have theirs."""
    lines = [
        f"| contender | ms a step | rounds | {asked.baseline} / this | of the wire's floor "
        "| MB sent a host | CPU s a host | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = next((each for each in outcomes if each.contender == asked.baseline), None)
    floor = next(filter(None, (floor_seconds(each, asked) for each in outcomes)), None)
    for outcome in outcomes:
        if not outcome.rounds:
            lines.append(f"| {outcome.contender} | failed: {outcome.failures[0]} | | | | | | |")
            continue
        seconds = statistics.median(outcome.seconds)
        ratio = f"{statistics.median(base.seconds) / seconds:.3f}" if base and base.rounds else ""
        spread = f"{min(outcome.seconds) * 1e3:.0f} to {max(outcome.seconds) * 1e3:.0f}"
        cells = [
            outcome.contender + (" (then failed)" if outcome.failures else ""),
            f"**{seconds * 1e3:.0f}**",
            spread,
            ratio,
            f"{seconds / floor:.2f}" if floor else "",
            f"{(outcome.median('sent') or 0) / 1e6:.1f}",
            f"{outcome.median('cpu_seconds'):.2f}",
            f"{(outcome.median('peak_memory') or 0) / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for outcome in outcomes:
        lines += ["", *(f"{outcome.contender} failed: {each}" for each in outcome.failures)]
    return [*lines, ""]


def report(outcomes: list[Outcome], asked: argparse.Namespace) -> str:
    """The whole Markdown page."""
    where = origin()
    link = asked.rate or "no limit"
    cores = "no limit" if asked.cpus is None else f"{asked.cpus:g} core each"
    text = [
        f"# {asked.name}, {time.strftime('%Y-%m-%d')}", "",
        f"{asked.hosts} hosts of a test bed on one machine, {cores}, links of {link} in each "
        f"direction. {where['machine']}; Python {where['python']}, torch {where['torch']}; "
        f"commit {where['commit']}.", "",
        f"    {where['command']}", "",
        f"Medians over {asked.rounds} rounds of {asked.steps} steps after {asked.warmup} to warm "
        "up, contenders in turns, fresh processes each time. The ratio is the baseline's median "
        "over the contender's: above 1 the contender is faster. Bytes, CPU time and memory are "
        "means over the hosts.", "",
    ]  # fmt: skip
    for model in asked.models:
        own = [outcome for outcome in outcomes if outcome.model == model]
        text += [f"## {model}, {PROBLEMS[model]().batch_size} samples a step", ""]
        floor = next(filter(None, (floor_seconds(each, asked) for each in own)), None)
        if floor is not None:
            count = asked.hosts
            text += [
                f"Floor of the wire, 2 · {count - 1} / {count} · P over the rate: "
                f"{floor * 1e3:.0f} ms.", "",
            ]  # fmt: skip
        text += table(own, asked)
    return "\n".join(text)


def origin() -> dict[str, str]:
    """Where and from what the figures come."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py") and " with changes"
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + changed,
        "command": "python benchmarks/harness.py " + shlex.join(sys.argv[1:]),
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=["speech"])
    parser.add_argument("--contenders", nargs="+", default=["ddp", "wagontrain:data-parallel"])
    parser.add_argument("--baseline", help="what ratios refer to; the first where not given")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc writes it")
    parser.add_argument("--cpus", type=float, default=0.45, help="cores of each host")
    parser.add_argument(
        "--slow", nargs="*", default=[], metavar="HOST=CPUS", help="hosts with other cores"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one turn")
    parser.add_argument("--name", default="harness", help="of the files in benchmarks/results")
    return parser


def prepare() -> None:
    """Let contenders find the sources, whatever folder this was started in."""
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT}"


def main() -> None:
    asked = options().parse_args()
    asked.baseline = asked.baseline or asked.contenders[0]
    for contender in asked.contenders:
        command(contender, asked.models[0], asked)  # a name that is wrong is refused here
    prepare()
    outcomes = measure(asked)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{time.strftime('%Y-%m-%d')}-{asked.name}"
    record = {
        **origin(),
        "options": vars(asked),
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(report(outcomes, asked))
    print(report(outcomes, asked))


if __name__ == "__main__":
    main()
