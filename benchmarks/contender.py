"""wagontrain beside the opponents: any strategy, through `wt.connect`."""

from __future__ import annotations

import wagontrain as wt
from benchmarks.measuring import arguments, measure
from benchmarks.models import exchanged_bytes, task
from wagontrain import launch
from wagontrain.registry import make_strategy


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--strategy", default="data-parallel")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    asked = parser.parse_args()
    launch.ask_for_large_pages()  # as the command line does; before there is any tensor
    settings = dict(pair.split("=", 1) for pair in asked.set)
    strategy = make_strategy(asked.strategy, settings)
    run = wt.connect(task(asked.model), strategy)
    batches = run.batches()
    measure(
        lambda: run.step(next(batches)),
        run.context.barrier,
        asked,
        exchanged_bytes(run.model),
    )
    run.close()
    launch.leave(run.context)


if __name__ == "__main__":
    main()
