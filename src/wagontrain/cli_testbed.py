"""The command line of the test bed: `wagontrain testbed ...`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from wagontrain.errors import UsageError
from wagontrain.testbed import bed as beds
from wagontrain.testbed.bed import Bed, Shape, Usage
from wagontrain.testbed.run import run as run_everywhere
from wagontrain.testbed.run import variables

app = typer.Typer(
    help="Rehearse a cluster: hosts on this machine, joined by links as slow as you say. "
    "Needs Linux and root. Links have a rate, no added latency.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Hosts = Annotated[int, typer.Option(help="How many hosts.")]
Rate = Annotated[
    str | None, typer.Option(help="Rate of each link in each direction: 1gbit, 200mbit.")
]
Cpus = Annotated[float | None, typer.Option(help="Cores of each host: 0.45.")]
Memory = Annotated[str | None, typer.Option(help="Memory of each host: 2G.")]
Slow = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST=CPUS", help="A host with other cores: 3=0.1; repeatable."),
]
BedName = Annotated[str | None, typer.Option("--bed", help="Which bed, where several are up.")]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="A host: 2 or tb2.")]
Command = Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Write -- before it.")]
_LEAVE_OPTIONS = {"allow_interspersed_args": False}


def _shape(
    hosts: int, rate: str | None, cpus: float | None, memory: str | None, slow: list[str] | None
) -> Shape:
    others = {}
    for item in slow or []:
        host, _, share = item.partition("=")
        try:
            others[int(host.removeprefix("tb"))] = float(share)
        except ValueError:
            raise UsageError(f"--slow {item!r}: give HOST=CPUS, such as 3=0.1") from None
    return Shape(hosts, rate, cpus, memory, others)


@app.command(
    context_settings=_LEAVE_OPTIONS,
    epilog="Example: wagontrain testbed run --hosts 4 --rate 1gbit --cpus 0.45 -- "
    "wagontrain run examples/mnist.py",
)
def run(
    command: Command,
    hosts: Hosts = 4,
    rate: Rate = None,
    cpus: Cpus = None,
    memory: Memory = None,
    slow: Slow = None,
    per_host: Annotated[int, typer.Option(help="Processes in each host.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="End it after so many seconds.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what hosts used here.")
    ] = None,
) -> None:
    """Bring up hosts, run COMMAND once in each, show what they used, take all down.

    COMMAND finds torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) in its environment.
    """
    if per_host < 1:
        raise UsageError(f"{per_host} processes in each host: give at least 1")
    shape = _shape(hosts, rate, cpus, memory, slow)
    if shutil.which(command[0]) is None:
        raise UsageError(f"there is no program {command[0]!r}")
    signal.signal(signal.SIGTERM, _stop)
    with Bed.up(shape) as bed:
        ended = run_everywhere(bed, command, per_host, _say, timeout)
        used = bed.usage()
    if json_file is not None:
        record = {
            "shape": dataclasses.asdict(shape),
            "command": command,
            "statuses": ended.statuses,
            "seconds": ended.seconds,
            "hosts": [dataclasses.asdict(usage) for usage in used],
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")
    _show(used)
    if ended.timed_out:
        print(f"ended after {timeout:g} s, as --timeout said", file=sys.stderr)
    raise typer.Exit(ended.status)


@app.command(epilog="Example: wagontrain testbed up --hosts 3 --rate 200mbit --name lab")
def up(
    hosts: Hosts = 4,
    rate: Rate = None,
    cpus: Cpus = None,
    memory: Memory = None,
    slow: Slow = None,
    name: Annotated[str | None, typer.Option(help="Name of the bed.")] = None,
) -> None:
    """Bring up hosts that stay until `down`."""
    bed = Bed.up(_shape(hosts, rate, cpus, memory, slow), name, owned=False)
    print(bed.name)


@app.command(
    name="exec",
    context_settings=_LEAVE_OPTIONS,
    epilog="Example: wagontrain testbed exec 0 -- ping -c 1 tb1",
)
def execute(host: HostName, command: Command, bed: BedName = None) -> None:
    """Run COMMAND in one host that is up."""
    found = Bed.find(bed)
    number = found.host(host)
    command = command[1:] if command[0] == "--" else command
    if not command or command[0].startswith("-"):
        raise UsageError("give the options first, then the host, then the command")
    process = found.start(number, command, variables(found, number, 0, 1))
    try:
        status = process.wait()
    except KeyboardInterrupt:
        try:
            status = process.wait(10)  # Ctrl-C went to it as well
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    raise typer.Exit(status if status >= 0 else 128 - status)


@app.command(epilog="Example: wagontrain testbed status")
def status(bed: BedName = None) -> None:
    """Show the beds that are up, and what their hosts have used."""
    beds.require()
    for name in beds.sweep():
        print(f"{name}: its owner was gone; taken down")
    found = [Bed.find(bed)] if bed else list(beds.everything())
    if not found:
        print("no test bed is up")
    for each in found:
        shape = each.shape
        rate = shape.rate or "unlimited"
        print(f"{each.name}: {shape.hosts} hosts, links of {rate}")
        cut = [f"tb{host}" for host in range(shape.hosts) if each.is_cut(host)]
        if cut:
            print(f"cut off: {', '.join(cut)}")
        _show(each.usage())


@app.command(epilog="Example: wagontrain testbed down lab")
def down(
    name: Annotated[str | None, typer.Argument(metavar="[BED]", help="Which bed.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All beds.")] = False,
) -> None:
    """End everything in the hosts of a bed and remove them."""
    beds.require()
    for bed in list(beds.everything()) if every else [Bed.find(name)]:
        bed.down()
        print(f"{bed.name}: down")


@app.command(epilog="Example: wagontrain testbed set-rate tb1 100mbit")
def set_rate(
    host: HostName,
    rate: Annotated[str, typer.Argument(help="1gbit, 200mbit ...; or none.")],
    bed: BedName = None,
) -> None:
    """Change the rate of a host's link, in both directions."""
    found = Bed.find(bed)
    found.set_rate(found.host(host), None if rate == "none" else rate)


@app.command(epilog="Example: wagontrain testbed set-cpus tb1 0.2")
def set_cpus(
    host: HostName,
    share: Annotated[float, typer.Argument(help="Cores: 0.2.")],
    bed: BedName = None,
) -> None:
    """Change how many cores a host has."""
    found = Bed.find(bed)
    found.set_cpus(found.host(host), share)


@app.command(epilog="Example: wagontrain testbed cut tb1")
def cut(host: HostName, bed: BedName = None) -> None:
    """Drop all of a host's traffic, silently."""
    found = Bed.find(bed)
    found.cut(found.host(host))


@app.command(epilog="Example: wagontrain testbed heal tb1")
def heal(host: HostName, bed: BedName = None) -> None:
    """Let a host's traffic pass again."""
    found = Bed.find(bed)
    found.heal(found.host(host))


@app.command(epilog="Example: wagontrain testbed kill tb1")
def kill(host: HostName, bed: BedName = None) -> None:
    """End every process in a host at once (SIGKILL)."""
    found = Bed.find(bed)
    count = found.kill(found.host(host))
    print(f"{count} processes killed")


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that the bed is taken down


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # in one piece: several threads speak
    sys.stdout.flush()


def _show(used: list[Usage]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("host")
    for title in ("sent MB", "packets", "received MB", "packets", "CPU s", "peak MB"):
        table.add_column(title, justify="right")
    for host in used:
        peak = "?" if host.peak_memory is None else f"{host.peak_memory / 1e6:.0f}"
        table.add_row(
            host.host,
            f"{host.bytes_sent / 1e6:.2f}",
            str(host.packets_sent),
            f"{host.bytes_received / 1e6:.2f}",
            str(host.packets_received),
            f"{host.cpu_seconds:.2f}",
            peak,
        )
    Console().print(table)
