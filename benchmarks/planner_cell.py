"""One cell of the planner's grid, on each host: predict every strategy, then run every one.

Nothing that is measured here flows back into the predictions: those come from the probe and the
profile, which are taken first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

import wagontrain as wt
from benchmarks.measuring import MARK
from benchmarks.models import PROBLEMS, task
from wagontrain import launch
from wagontrain.batches import Batches
from wagontrain.building import forget_peak, peak_memory
from wagontrain.cluster import dump
from wagontrain.costs import Costs
from wagontrain.errors import TaskError, UsageError
from wagontrain.planner import choosing, search
from wagontrain.planner.probing import probe
from wagontrain.planner.search import Weighed
from wagontrain.strategy import Strategy
from wagontrain.task import Task, load_task, make_task
from wagontrain.transport import Context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="of models.py, or a task file")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--slowest", type=float, default=5.0, help="times the best predicted")
    parser.add_argument("--most", type=int, default=2, help="settings of each strategy")
    parser.add_argument("--layers", action="store_true", help="keep the profile, too")
    asked = parser.parse_args()
    launch.ask_for_large_pages()  # as the command line does; before there is any tensor
    known = asked.model in PROBLEMS
    made = task(asked.model) if known else make_task(load_task(asked.model))
    context = launch.join(launch.place_from_environment(), launch.Terms(patience=120.0))
    began = time.perf_counter()
    profile, speeds = choosing.profiled(made, context)
    profiling = time.perf_counter() - began
    cluster = probe(context, "bed", speeds)
    profile = choosing.at_rest(profile, context)
    probing = time.perf_counter() - began - profiling
    costs = Costs(profile, cluster)
    weighed = search.weigh(wt.discover().values(), costs, made)
    say(context, {"planning": {"profile": profiling, "probe": probing}, "cluster": dump(cluster)})
    if asked.layers:
        say(context, {"profile": profile.to_json()})
    for place in to_run(weighed, asked):
        each = weighed[place]
        row: dict[str, Any] = {"place": place, "title": search.told(each.strategy)}
        row["strategy"], row["settings"] = each.strategy.name, each.strategy.settings
        row["fits"] = each.fits
        row["predicted"] = dataclasses.asdict(each.estimate) if each.estimate else None
        row["memory"] = {}
        row |= measured(made, context, each.strategy, asked.steps)
        say(context, row)
    for each in weighed:
        if not each.fits:
            row = {"title": search.told(each.strategy), "fits": False, "why": each.refused}
            row["predicted"] = dataclasses.asdict(each.estimate) if each.estimate else None
            say(context, row)
    launch.leave(context)


def to_run(weighed: list[Weighed], asked: argparse.Namespace) -> list[int]:
    """Places of what is run: of each strategy the best settings, unless it is hopeless."""
    found: list[int] = []
    for place, each in enumerate(weighed):
        names = [weighed[other].strategy.name for other in found]
        far = 4 * asked.slowest if each.strategy.name not in names else asked.slowest
        hopeless = each.seconds > far * weighed[0].seconds or each.strategy.crewed
        if each.fits and not hopeless and names.count(each.strategy.name) < asked.most:
            found.append(place)
    return found


def measured(made: Task, context: Context, strategy: Strategy, steps: int) -> dict[str, Any]:
    """Seconds, bytes and memory of a few steps."""
    device = context.world.device
    forget_peak(device)
    refused, runner = "", None
    try:
        runner = strategy.setup(made, context)
    except (UsageError, TaskError) as error:
        refused = str(error)
    told = [text for text in context.gather_text(refused) if text]
    if told or runner is None:
        if runner is not None:
            runner.close()
        return {"refused": told[0] if told else ""}
    batches = Batches.of_training(made, device, runner.cut)
    loaded = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    taken: list[float] = []
    sent: list[int] = []
    for number in range(2 + steps):
        batch = next(loaded)
        context.barrier()
        context.sent.refresh()
        context.sent.lap()
        start = time.perf_counter()
        report = runner.step(batch)
        own = time.perf_counter() - start
        mine = report.sent or 0
        rows = context.gather([own, float(mine)])
        if number >= 2:
            taken.append(max(row[0] for row in rows))
            sent.append(int(max(row[1] for row in rows)))
    peaks = [row[0] for row in context.gather_integers([peak_memory(device)])]
    runner.close()
    return {"seconds": taken, "sent": sent, "peaks": peaks}


def say(context: Context, row: dict[str, Any]) -> None:
    if context.world.rank == 0:
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
