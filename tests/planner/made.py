"""Clusters and profiles with round figures, made up for tests."""

from __future__ import annotations

from wagontrain.cluster import KINDS, Cluster, Host, Kind, Measured, traffic
from wagontrain.profile import Cut, Layer, Line, Part, Profile
from wagontrain.simulate import Interference


def links(rate: float, latency: float = 1e-4) -> dict[Kind, Measured]:
    """Every kind of exchange at one pace: bytes a second, and seconds for none."""
    sizes = [2**power for power in range(10, 31, 4)]
    return {
        kind: Measured(tuple((2, n, latency + traffic(kind, 2) * n / rate) for n in sizes))
        for kind in KINDS
    }


def cluster(
    hosts: int = 4, rate: float = 25e6, memory: float = 8e9, latency: float = 1e-4
) -> Cluster:
    """So many hosts with one worker each."""
    host = Host(hosts, 1, "cpu", int(memory), 10.0, Interference(1.0, 1.0))
    return Cluster("made up", (host,), links(rate, latency), {})


def layer(
    name: str, numbers: int, seconds: float, ends: tuple[int, int] = (4000, 4000),
    cuts: tuple[Cut, ...] = (), after: str = "",
) -> Layer:  # fmt: skip
    """A layer of so many numbers that takes so many seconds a sample, twice that backward."""
    parts = (Part(f"{name}.weight", (numbers,), 4 * numbers),) if numbers else ()
    each, twice = Line(0.0, seconds), Line(0.0, 2 * seconds)
    given, output = map(float, ends)
    return Layer(
        name, "Linear" if cuts else "Conv2d", parts, each, twice, 1.0, given, output, output,
        2.0 * numbers, cuts, after,
    )  # fmt: skip


def heavy_at_the_end(batch: int = 64) -> Profile:
    """Convolutions that compute and weigh little; two layers that weigh much and compute little."""
    both: tuple[Cut, ...] = ("column", "row")
    layers = (
        layer("conv1", 100_000, 4e-3, (150_528, 36_864)),
        layer("conv2", 400_000, 6e-3, (36_864, 36_864)),
        layer("fc1", 38_000_000, 5e-4, (36_864, 16_384), both, "fc2"),
        layer("fc2", 17_000_000, 3e-4, (16_384, 16_384), both),
        layer("out", 4_000_000, 1e-4, (16_384, 4_000), both),
    )
    return Profile(
        "made-up", batch, 1, layers, Line(0.0, 1e-10), 1.0, 0, 150_000.0, 200_000_000, 10.0, "cpu"
    )
