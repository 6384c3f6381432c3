"""Push and pull of a server shard, against a raw socket, torch RPC and a Ray actor.

    python benchmarks/server_throughput.py [--rounds 20] [--sizes 16 256]

All contenders of a size are up at the same time and take turns. A push ends when the server says
that it has the gradient; a pull when the values are in the worker's own memory, as they have to
be for a model to use them. wagontrain's server checks each gradient for numbers that are not
finite before it says so, the others only keep it. Two more parts: eight workers on one shard, and
a link of a test bed, where the shard is on another host. There iperf3, where it is installed, says
before and after the turns what one TCP stream that never stops reaches (what was received in 2 s,
both ways); the raw socket sends blocks as large as the gradient, each answered before the next.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contender_server import SHARD
from benchmarks.harness import RESULTS, origin, prepare
from benchmarks.serving import MIB
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.links import address, bits_per_second

MODULES = {
    "raw socket": "benchmarks.opponents.socket_server",
    "torch RPC": "benchmarks.opponents.rpc_server",
    "Ray actor": "benchmarks.opponents.ray_server",
    "wagontrain": "benchmarks.contender_server",
}
LIMIT = 150
"""Seconds for a contender to answer."""
OPPONENTS = ("torch RPC", "Ray actor")
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
Turns = dict[str, dict[str, list[dict[str, Any]]]]
"""Contender -> push or pull -> what each of its turns gave."""


def heard(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that a contender says; one that is silent for too long is ended."""
    assert process.stdout is not None
    watch = threading.Timer(LIMIT, process.kill)
    watch.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                return said
    finally:
        watch.cancel()
    raise SystemExit(f"{process.args} ended, or said nothing for {LIMIT} s")


def asked(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """Have a contender do something."""
    assert process.stdin is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    return heard(process)


def take_turns(processes: dict[str, subprocess.Popen[str]], rounds: int, repeats: int) -> Turns:
    """All rounds; the first warms up and is left out."""
    turns: Turns = {name: {"push": [], "pull": []} for name in processes}
    for number in range(rounds + 1):
        for what in ("push", "pull"):
            for name, process in processes.items():
                said = asked(process, f"{what} {repeats}")
                if number:
                    turns[name][what].append(said)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
    for process in processes.values():
        process.wait(60)
    return turns


def on_loopback(size: int, rounds: int) -> Turns:
    """All contenders on one machine."""
    processes = {}
    for name, module in MODULES.items():
        processes[name] = subprocess.Popen([sys.executable, "-m", module, str(size)], **PIPES)
        heard(processes[name])
    return take_turns(processes, rounds, max(1, 64 // size))


def iperf3(bed: Bed, times: int) -> dict[str, list[float]]:
    """GB/s from the second host to the first, as a push goes, and back; nothing without iperf3."""
    found: dict[str, list[float]] = {"push": [], "pull": []}
    if shutil.which("iperf3") is None:
        return found
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = bed.start(0, ["iperf3", "--server"], **quiet)
    limit = time.monotonic() + LIMIT
    try:
        while min(map(len, found.values())) < times:
            for what, rates in found.items():
                words = ["iperf3", "--client", address(0), "--time", "2", "--json"]
                words += ["--reverse"] if what == "pull" else []
                done = bed.start(1, words, **PIPES)
                out, _ = done.communicate(timeout=60)
                ended = json.loads(out)["end"]
                if "sum_received" in ended:  # else the server does not listen yet
                    rates.append(ended["sum_received"]["bits_per_second"] / 8e9)
            if time.monotonic() > limit:
                raise SystemExit(f"iperf3 gave no figures within {LIMIT} s: {out}")
    finally:
        server.terminate()
        server.wait(10)
    return found


def on_link(size: int, rounds: int, rate: str) -> tuple[Turns, dict[str, list[float]]]:
    """A raw socket and wagontrain, between two hosts of a test bed; and what iperf3 says."""
    here, there = address(0), address(1)
    with Bed.up(Shape(2, rate)) as bed:
        before = iperf3(bed, 2)
        raw = [sys.executable, "-m", MODULES["raw socket"], str(size)]
        servers = [bed.start(0, [*raw, "serve", here, "5000"])]
        processes = {"raw socket": bed.start(1, [*raw, "connect", here, "5000"], **PIPES)}
        own = [sys.executable, "-m", MODULES["wagontrain"], str(size), there]
        processes["wagontrain"] = bed.start(1, own, **PIPES)
        told = heard(processes["wagontrain"])
        shard = bed.start(0, [*SHARD, told["coordinator"], "0", here, "0", "."], **PIPES)
        assert shard.stdin is not None
        shard.stdin.write(told["secret"] + "\n")
        shard.stdin.flush()
        for process in processes.values():
            heard(process)
        turns = take_turns(processes, rounds, 1)
        for server in [*servers, shard]:
            server.wait(60)
        after = iperf3(bed, 2)
    return turns, {what: before[what] + after[what] for what in before}


def crowd(workers: int, size: int, seconds: float) -> list[int]:
    """Rounds that each of many workers on one shard had."""
    words = [str(workers), str(size), str(seconds)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.crowd", *words], **PIPES)
    counts: list[int] = heard(process)["counts"]
    process.wait(60)
    return counts


def rates(said: list[dict[str, Any]], size: int) -> list[float]:
    """GB/s of each turn, by its median."""
    return [size * MIB / 1e9 / statistics.median(each["seconds"]) for each in said]


def table(
    turns: Turns, size: int, against: tuple[str, ...], stream: dict[str, list[float]] | None = None
) -> list[str]:
    """Markdown rows: GB/s, the ratio to the better of some others, CPU time of the server.

    `stream` is what iperf3 says, where it is there: what is compared with then.
    """
    lines = [
        "| contender | push, GB/s | quartiles | pull, GB/s | quartiles "
        "| server's CPU s a pushed GB | ... a pulled GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sides in turns.items():
        cells = [name]
        for what in ("push", "pull"):
            low, middle, high = statistics.quantiles(rates(sides[what], size), n=4)
            cells += [f"**{middle:.3g}**", f"{low:.3g} to {high:.3g}"]
        for what in ("push", "pull"):
            moved = sum(len(each["seconds"]) for each in sides[what]) * size * MIB / 1e9
            cells.append(f"{sum(each['server_cpu'] for each in sides[what]) / moved:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    if stream:
        cells = ["iperf3"]
        for what in ("push", "pull"):
            low, middle, high = statistics.quantiles(stream[what], n=4)
            cells += [f"**{middle:.3g}**", f"{low:.3g} to {high:.3g}"]
        lines.append("| " + " | ".join([*cells, "", ""]) + " |")
    lines.append("")
    for what in ("push", "pull"):
        own = statistics.median(rates(turns["wagontrain"][what], size))
        other = {name: statistics.median(rates(turns[name][what], size)) for name in against}
        if stream:
            other = {"iperf3": statistics.median(stream[what])}
        best = max(other, key=lambda name: other[name])
        lines.append(f"- {what}: {own / other[best]:.2f} times {best}.")
    return [*lines, ""]


def report(record: dict[str, Any]) -> str:
    """The whole Markdown page."""
    text = [
        f"# Throughput of a server shard, {time.strftime('%Y-%m-%d')}", "",
        f"{record['machine']}; Python {record['python']}, torch {record['torch']}; commit "
        f"{record['commit']}.", "",
        f"    {record['command']}", "",
        *(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip().splitlines(), "",
    ]  # fmt: skip
    for size, turns in record["loopback"].items():
        text += [f"## {size} MiB on one machine, {record['rounds']} rounds", ""]
        text += table(turns, int(size), OPPONENTS)
    if record["crowd"]:
        counts, size = record["crowd"], record["crowd_size"]
        text += [
            f"## {len(counts)} workers on one shard, {size} MiB each", "",
            f"Rounds of push, commit and pull in {record['crowd_seconds']:g} s: "
            f"{', '.join(map(str, counts))}. Slowest to fastest: "
            f"**{min(counts) / max(counts):.2f}**; together "
            f"{sum(counts) * size * MIB / 1e9 / record['crowd_seconds']:.2f} GB/s each way.", "",
        ]  # fmt: skip
    if record["link"]:
        size, line = record["link_size"], bits_per_second(record["rate"]) / 8e9
        text += [f"## {size} MiB over a link of {record['rate']}, encrypted", ""]
        stream = record["iperf3"] if any(record["iperf3"].values()) else None
        text += table(record["link"], size, ("raw socket",), stream)
        text += [f"The link's rate is {line:.3g} GB/s, headers included.", ""]
        if stream is None:
            text += ["iperf3 is not installed: the raw socket stands in for it.", ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 256], help="MiB")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rate", default="1gbit", help="of the link; none leaves it out")
    parser.add_argument("--link-size", type=int, default=16, help="MiB over the link")
    parser.add_argument("--workers", type=int, default=8, help="on one shard; 0 leaves them out")
    parser.add_argument("--seconds", type=float, default=20.0, help="that they work")
    parser.add_argument("--name", default="server-throughput", help="of the files")
    options = parser.parse_args()
    prepare()
    none: tuple[Turns, dict[str, list[float]]] = ({}, {})
    link, stream = (
        none if options.rate == "none" else on_link(options.link_size, options.rounds, options.rate)
    )
    record: dict[str, Any] = {
        **origin(),
        "command": "python benchmarks/server_throughput.py " + " ".join(sys.argv[1:]),
        "rounds": options.rounds,
        "loopback": {str(size): on_loopback(size, options.rounds) for size in options.sizes},
        "crowd_size": 4,
        "crowd_seconds": options.seconds,
        "crowd": crowd(options.workers, 4, options.seconds) if options.workers else [],
        "link_size": options.link_size,
        "rate": options.rate,
        "link": link,
        "iperf3": stream,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{time.strftime('%Y-%m-%d')}-{options.name}"
    file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(report(record))
    print(report(record))


if __name__ == "__main__":
    main()
