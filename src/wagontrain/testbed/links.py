"""Network of a test bed: namespaces joined by a bridge, links shaped in both directions.

The bridge has a namespace of its own, so that nothing of a test bed shows in the machine's own
network: no name and no address of it can collide with one that is there, and several test beds
can use the same addresses side by side.

      namespace of host i                    namespace of the switch
    ┌──────────────────────┐          ┌───────────────────────────────┐
    │ eth0 10.77.0.(i+1)   │ tbf →    │ port i                        │
    │                      ├──────────┤           bridge              │
    │                      │    ← tbf │ port j                        │
    └──────────────────────┘          └───────────────────────────────┘

Rates are held by tc's token bucket filter. There is no added latency: the kernel module for it
(netem) is missing from many kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from wagontrain.errors import TestBedError, UsageError

NAMESPACES = Path("/run/netns")
MAX_HOSTS = 200
_SECONDS = 30
_QUEUE_SECONDS = 0.05
_PACKET = 1600


def address(index: int) -> str:
    """Address of host `index`; the same in every test bed, which cannot see each other."""
    return f"10.77.0.{index + 1}"


def bits_per_second(rate: str) -> float:
    """A rate as tc writes it: 1gbit, 200mbit, 64kbit.

    Raises:
        UsageError: it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate.strip().lower())
    if match is None or not float(match[1]) > 0:
        raise UsageError(f"rate {rate!r}: give one such as 1gbit, 200mbit or 64kbit")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def connect(switch: str, hosts: Iterable[str]) -> None:
    """Make the namespaces and join them: host i by its eth0 with port i of the switch."""
    call("ip", "netns", "add", switch)
    call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    lines = ["link set lo up", "link set bridge up"]
    for index, host in enumerate(hosts):
        call("ip", "netns", "add", host)
        lines += [
            f"link add port{index} type veth peer name eth0 netns {host}",
            f"link set port{index} master bridge up",
        ]
    _batch(switch, lines)
    for index, host in enumerate(hosts):
        _batch(
            host,
            ["link set lo up", f"addr add {address(index)}/16 dev eth0", "link set eth0 up"],
        )


def shape(switch: str, host: str, index: int, rate: str | None) -> None:
    """Hold what a host sends and what it receives to a rate; None lifts it."""
    for namespace, device in ((host, "eth0"), (switch, f"port{index}")):
        qdisc = ["tc", "-n", namespace, "qdisc"]
        if rate is None:
            if "tbf" in call(*qdisc, "show", "dev", device):
                call(*qdisc, "del", "dev", device, "root")
            continue
        bits = bits_per_second(rate)
        # Room for what the kernel hands over at once (64 KiB), or it cuts it up at much CPU
        # time; but on a slow link no more than 10 ms of it, or the rate is not held.
        burst = int(max(bits / 8 * 0.002, min(2**17, bits / 8 * 0.01), 10 * _PACKET))
        queue = max(160 * _PACKET, int(bits / 8 * _QUEUE_SECONDS))
        call(
            *qdisc, "replace", "dev", device, "root", "tbf", "rate", f"{bits:.0f}bit",
            "burst", str(burst), "limit", str(queue),
        )  # fmt: skip


def join(switch: str, index: int, joined: bool) -> None:
    """Let the switch pass a host's packets, or drop them all without a word to anybody."""
    state = "3" if joined else "0"  # forwarding, disabled
    call("bridge", "-n", switch, "link", "set", "dev", f"port{index}", "state", state)


def joined(switch: str, index: int) -> bool:
    """Whether the switch passes this host's packets."""
    found = json.loads(call("bridge", "-n", switch, "-json", "link", "show", "dev", f"port{index}"))
    return bool(found[0]["state"] == "forwarding")


def traffic(host: str) -> tuple[int, int, int, int]:
    """Bytes sent, packets sent, bytes received, packets received by a host's eth0 so far."""
    found = json.loads(call("ip", "-n", host, "-json", "-stats", "link", "show", "dev", "eth0"))
    sent, received = found[0]["stats64"]["tx"], found[0]["stats64"]["rx"]
    return sent["bytes"], sent["packets"], received["bytes"], received["packets"]


def processes(namespace: str) -> list[int]:
    """Processes that live in a namespace; none where there is no such namespace."""
    if not (NAMESPACES / namespace).exists():
        return []
    return [int(word) for word in call("ip", "netns", "pids", namespace).split()]


def remove(namespace: str) -> None:
    """Remove a namespace, and with it its end of every link."""
    if (NAMESPACES / namespace).exists():
        call("ip", "netns", "del", namespace)


def call(*command: str, text: str | None = None) -> str:
    """Output of a command that has to succeed.

    Raises:
        TestBedError: it did not; the message is its own.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TestBedError(f"{' '.join(command)} gave no answer in {_SECONDS} s") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise TestBedError(f"{' '.join(command)} failed: {said}")
    return done.stdout


def _batch(namespace: str, lines: list[str]) -> None:
    call("ip", "-n", namespace, "-batch", "-", text="\n".join(lines) + "\n")
