"""Sandblaster with one slow host of four: small portions against equal ones.

    python benchmarks/sandblaster.py --name sandblaster

Full-batch L-BFGS of LeNet on a test bed, `wagontrain run` in each host under torchrun's variables.
One host has a quarter of the others' cores. Small portions (10 for each worker) and equal ones (1)
take turns, fresh processes each time; the same with four equal hosts says what the slow one costs.
Beds and ways may be measured one after the other (--beds, --ways): the page is made of all
that the day's JSON file has. What counts is the time of one evaluation of the whole batch with all
that belongs to it, over all steps but the first, in which processes start. Until all workers have
joined no host is held to its share of the cores: on a tenth of one, the four seconds that importing
torch takes are forty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wagontrain as wt
from benchmarks.harness import RESULTS, ROOT, origin, prepare
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.run import run


def task() -> wt.Task:
    """LeNet on all digits at once, in steps of a few iterations, with nothing to validate."""
    sys.path.insert(0, str(ROOT / "examples"))
    import mnist

    made = mnist.batch()
    minimise = partial(made.optimizer, max_iter=5)
    return replace(made, optimizer=minimise, validation=None, epochs=3)


BEDS = ("equal", "one slow")
WAYS = {
    "small": ["portions=10"],
    "equal": ["portions=1"],
    "equal, none given twice": ["portions=1", "duplicate=false"],
}


FULL = 2.0
"""Cores of each host while its processes start."""


class Caps:
    """Holds hosts to their share of the cores as soon as all workers have joined.

    Args:
        bed: the hosts.
        events: the run's file of events.
    """

    def __init__(self, bed: Bed, events: Path) -> None:
        self.bed = bed
        self.events = events
        self.since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="caps")

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            if not self.events.exists():
                continue
            if self.events.read_text().count('"kind": "joined"') >= self.bed.shape.hosts:
                for host in range(self.bed.shape.hosts):
                    self.bed.set_cpus(host, self.bed.shape.cpus_of(host) or FULL)
                self.since = time.time()
                return

    def __enter__(self) -> Caps:
        for host in range(self.bed.shape.hosts):
            self.bed.set_cpus(host, FULL)
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        self._thread.join()


@dataclass
class Turns:
    """What the rounds of one way on one bed gave."""

    hosts: str
    way: str
    commit: str
    seconds: list[float] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def take_turn(bed: Bed, turns: Turns, asked: argparse.Namespace) -> None:
    """One run, added to its turns."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "wagontrain", "run",
            f"{ROOT / 'benchmarks' / 'sandblaster.py'}", "--strategy", "sandblaster",
            "--run-dir", f"{folder}/R", *(f"--set={each}" for each in WAYS[turns.way]),
        ]  # fmt: skip
        events = Path(folder) / "R" / "events.jsonl"
        with Caps(bed, events) as caps:
            ended = run(bed, command, say=lines.append, timeout=asked.timeout)
        if ended.status or not events.exists():
            turns.failures.append(f"status {ended.status}; {lines[-1] if lines else 'silent'}")
            return
        told = [json.loads(line) for line in events.read_text().splitlines()]
        turns.summaries.append(json.loads((Path(folder) / "R" / "summary.json").read_text()))
    steps = [event for event in told if event["kind"] == "step"]
    if caps.since is None or caps.since > steps.pop(0)["time"]:
        turns.failures.append("the last worker joined when the first step was over")
        return
    evaluations = sum(event["evaluations"] for event in steps)
    turns.seconds.append(sum(event["seconds"] for event in steps) / evaluations)


def measure(asked: argparse.Namespace) -> list[Turns]:
    """All rounds on the beds asked for."""
    beds = {"equal": {}, "one slow": {asked.hosts - 1: asked.cpus / 4}}
    beds = {hosts: slow for hosts, slow in beds.items() if hosts in asked.beds}
    commit = origin()["commit"]
    every = [Turns(hosts, way, commit) for hosts in beds for way in asked.ways]
    for hosts, slow in beds.items():
        with Bed.up(Shape(asked.hosts, asked.rate, asked.cpus, slow=slow)) as bed:
            for number in range(asked.rounds):
                for turns in (each for each in every if each.hosts == hosts):
                    take_turn(bed, turns, asked)
                    said = turns.failures or f"{turns.seconds[-1] * 1e3:.0f} ms an evaluation"
                    print(f"{hosts}, {turns.way}, round {number + 1}: {said}", flush=True)
    return every


def report(every: list[Turns], asked: argparse.Namespace) -> str:
    """The whole Markdown page."""
    where = origin()
    command = where["command"].replace("harness.py", "sandblaster.py")
    equal = [each for each in every if (each.hosts, each.way) == ("equal", "small")]
    base = statistics.median(equal[0].seconds) if equal and equal[0].seconds else None
    lines = [
        f"# {asked.name}, {time.strftime('%Y-%m-%d')}", "",
        f"{asked.hosts} hosts of a test bed on one machine, {asked.cpus:g} core each, the slow one "
        f"a quarter of that, links of {asked.rate}. {where['machine']}; Python {where['python']}, "
        f"torch {where['torch']}.", "", f"    {command}", "",
        f"LeNet on 4,000 digits, L-BFGS on all of them at once. Medians over {asked.rounds} "
        "rounds; three steps of at most 5 iterations, the first not counted.", "",
        "| hosts | portions | ms an evaluation | rounds | against small on equal "
        "hosts | given twice, an evaluation | commit |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for turns in every:
        if not turns.seconds:
            lines.append(f"| {turns.hosts} | {turns.way} | failed: {turns.failures} | | | | |")
            continue
        seconds = statistics.median(turns.seconds)
        spread = f"{min(turns.seconds) * 1e3:.0f} to {max(turns.seconds) * 1e3:.0f}"
        ratio = f"{seconds / base:.2f}" if base else ""
        told = [each["minimised"] for each in turns.summaries]
        twice = sum(each["given_twice"] for each in told) / sum(
            each["evaluations"] for each in told
        )
        lines.append(
            f"| {turns.hosts} | {turns.way} | **{seconds * 1e3:.0f}** | {spread} | {ratio} "
            f"| {twice:.1f} | {turns.commit} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc writes it")
    parser.add_argument("--cpus", type=float, default=0.45, help="cores of each host")
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=BEDS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one turn")
    parser.add_argument("--name", default="sandblaster", help="of the file in benchmarks/results")
    asked = parser.parse_args()
    prepare()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{time.strftime('%Y-%m-%d')}-{asked.name}"
    record = file.with_suffix(".json")
    before = json.loads(record.read_text())["turns"] if record.exists() else []
    every = [
        Turns(**each)
        for each in before
        if each["hosts"] not in asked.beds or each["way"] not in asked.ways
    ] + measure(asked)
    kept = {**origin(), "options": vars(asked), "turns": [vars(each) for each in every]}
    record.write_text(json.dumps(kept, indent=1) + "\n")
    file.with_suffix(".md").write_text(report(every, asked))
    print(report(every, asked))


if __name__ == "__main__":
    main()
