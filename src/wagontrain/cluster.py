"""The machines, and what was measured of them: plain data, as a TOML file that people can edit.

Nothing is assumed that the file does not say: a figure that is missing is an error.
"""

from __future__ import annotations

import bisect
import dataclasses
import importlib.resources
import itertools
import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from wagontrain.errors import UsageError, nearest
from wagontrain.simulate import Interference

Kind = Literal["all_reduce", "exchange", "broadcast", "send"]
KINDS: tuple[Kind, ...] = get_args(Kind)


_SAFETY = 0.95


def traffic(kind: Kind, ranks: int) -> float:
    """Bytes that a rank sends for each byte of the tensor, with the algorithms in use.

    The tensor is the whole one that is summed; of an exchange, in which every rank sends each
    other one its part (to gather, to sum and scatter, to transpose), what a rank has of all.

    Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH",
    section 4; Patarasuk and Yuan 2009 (ring all-reduce).
    """
    if ranks == 1:
        return 0.0
    if kind == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if kind in ("broadcast", "send"):
        return 1.0
    return (ranks - 1) / ranks


@dataclass(frozen=True)
class Measured:
    """What exchanges of one kind took on one kind of link.

    Args:
        points: (ranks, bytes, seconds), of at least one number of ranks.
    """

    points: tuple[tuple[int, int, float], ...]

    def seconds(self, kind: Kind, ranks: int, count: float) -> float:
        """Seconds for `count` bytes among so many ranks.

        Between measured sizes in proportion; beyond the largest at its pace; below the smallest
        what that took, for nothing is free. For a number of ranks that was not measured the
        nearest one's figures are scaled by the bytes that a rank sends.
        """
        if ranks == 1:
            return 0.0
        groups = {group for group, _, _ in self.points}
        near = min(groups, key=lambda group: (abs(math.log(group / ranks)), group))
        rows = sorted((size, seconds) for group, size, seconds in self.points if group == near)
        scaled = count * traffic(kind, ranks) / traffic(kind, near)
        found = _between(rows, scaled)
        # A ring has a round less than ranks, and each has the latency.
        if kind not in ("broadcast", "send"):
            found += rows[0][1] * max(0.0, (ranks - near) / (near - 1))
        return found


def _between(rows: Sequence[tuple[int, float]], size: float) -> float:
    if size <= rows[0][0]:
        return rows[0][1]
    place = bisect.bisect_left([each for each, _ in rows], size)
    if place == len(rows):
        largest, seconds = rows[-1]
        return seconds * size / largest
    (low, first), (high, second) = rows[place - 1], rows[place]
    return first + (second - first) * (size - low) / (high - low)


@dataclass(frozen=True)
class Host:
    """Hosts that are alike.

    Args:
        count: how many.
        workers: on each.
        device: "cpu" or what the accelerator is called.
        memory: bytes that a worker may take.
        speed: arithmetic of a worker, in 10⁹ operations a second: of a product of matrices in
            the task's type, while all workers of the host are at it.
        interference: what computing and exchanging at the same time costs either, and what
            others' computing costs.
    """

    count: int
    workers: int
    device: str
    memory: int
    speed: float
    interference: Interference = field(default_factory=Interference)


@dataclass(frozen=True)
class Cluster:
    """All hosts and links.

    Args:
        name: for people.
        hosts: kinds of hosts; workers are numbered in this order.
        between: exchanges of ranks on several hosts, by kind, all workers of these taking part:
            the pace is that of a host's link, not of a worker's part of it.
        within: of ranks on one host.
    """

    name: str
    hosts: tuple[Host, ...]
    between: Mapping[Kind, Measured] = field(default_factory=dict)
    within: Mapping[Kind, Measured] = field(default_factory=dict)

    @cached_property
    def size(self) -> int:
        """Workers in all."""
        return sum(host.count * host.workers for host in self.hosts)

    @cached_property
    def _ends(self) -> list[int]:
        """The first rank behind each kind of host."""
        return list(itertools.accumulate(host.count * host.workers for host in self.hosts))

    def _kind_of(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise IndexError("no such rank")
        return bisect.bisect_right(self._ends, rank)

    def host_of(self, rank: int) -> Host:
        """The kind of host that a worker is on."""
        return self.hosts[self._kind_of(rank)]

    def room(self, rank: int) -> float:
        """Bytes that a plan may take of a worker: some is left for what cannot be foreseen."""
        return self.host_of(rank).memory * _SAFETY

    def node_of(self, rank: int) -> int:
        """The number of the host that a worker is on."""
        kind = self._kind_of(rank)
        host = self.hosts[kind]
        first = self._ends[kind] - host.count * host.workers
        return sum(each.count for each in self.hosts[:kind]) + (rank - first) // host.workers

    def seconds(self, kind: Kind, count: float, ranks: Sequence[int]) -> float:
        """Seconds of an exchange among these ranks.

        Workers of the same hosts that are not among them do the same at that time, in groups of
        their own, and share the hosts' links with them; but for a send, which one of a host does.

        Raises:
            UsageError: such exchanges were not measured.
        """
        if len(ranks) < 2:
            return 0.0
        inside = self.node_of(ranks[0]) == self.node_of(ranks[-1])
        place, found = ("within", self.within) if inside else ("between", self.between)
        if kind not in found:
            raise UsageError(
                f"the cluster {self.name!r} has no figures for {kind} {place} hosts: measure it "
                f"again with `wagontrain probe`, or add [{place}.{kind}]"
            )
        groups = 1.0 if inside or kind == "send" else self._groups(ranks)
        return found[kind].seconds(kind, len(ranks), count * groups)

    def _groups(self, ranks: Sequence[int]) -> float:
        """How many groups like this one share the link of the host that has most of them."""
        if len(ranks) == self.size or all(host.workers == 1 for host in self.hosts):
            return 1.0
        key = ranks if isinstance(ranks, range) else tuple(ranks)
        if key not in self._shared:
            members = Counter(self.node_of(rank) for rank in ranks)
            on = {self.node_of(rank): self.host_of(rank).workers for rank in ranks}
            self._shared[key] = max(on[node] / count for node, count in members.items())
        return self._shared[key]

    @cached_property
    def _shared(self) -> dict[Sequence[int], float]:
        return {}


# --- as a file ----------------------------------------------------------------------------------


def parse(text: str, name: str) -> Cluster:
    """A cluster from the text of a file.

    Args:
        text: as TOML.
        name: of the file, for messages.

    Raises:
        UsageError: it has missing or impossible figures; says which.
    """
    try:
        return _cluster(tomllib.loads(text))
    except (ValueError, _WrongError) as error:
        raise UsageError(f"cluster file {name}: {error}") from error


def load(path: Path) -> Cluster:
    """Read a cluster file.

    Raises:
        UsageError: there is none, or it has missing or impossible figures; says which.
    """
    try:
        return parse(path.read_text(), repr(str(path)))
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(path)!r} is no cluster file, for it is no text") from error


class _WrongError(Exception):
    """What is wrong in a file."""


def _cluster(content: Mapping[str, Any]) -> Cluster:
    _only(content, {"name", "hosts", "between", "within"}, "the file")
    hosts = content.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        raise _WrongError("there is no [[hosts]]: say what machines there are")
    made = tuple(_host(each, number) for number, each in enumerate(hosts, 1))
    cluster = Cluster(
        str(content.get("name", "unnamed")),
        made,
        _links(content.get("between", {}), "between"),
        _links(content.get("within", {}), "within"),
    )
    if sum(host.count for host in made) > 1 and not cluster.between:
        raise _WrongError("several hosts, and no [between.all_reduce] and so on: what links them?")
    if any(host.workers > 1 for host in made) and not cluster.within:
        raise _WrongError("several workers on a host, and no [within.all_reduce] and so on")
    return cluster


def _host(content: Any, number: int) -> Host:
    where = f"[[hosts]] number {number}"
    if not isinstance(content, dict):
        raise _WrongError(f"{where} is no table")
    _only(
        content,
        {"count", "workers", "device", "memory_gb", "gflops", "compute_slowed", "exchange_slowed",
         "crowded"},
        where,
    )  # fmt: skip
    slowed = [_number(content, name, where, least=1.0)
              for name in ("compute_slowed", "exchange_slowed")]  # fmt: skip
    workers, device = _whole(content, "workers", where), str(_needed(content, "device", where))
    shares = device == "cpu" and workers > 1  # whoever has a machine or a device has it alone
    if shares or "crowded" in content:
        slowed.append(_number(content, "crowded", where, least=1.0))
    return Host(
        count=_whole(content, "count", where),
        workers=workers,
        device=device,
        memory=int(_number(content, "memory_gb", where) * 1e9),
        speed=_number(content, "gflops", where),
        interference=Interference(*slowed),
    )


def _links(content: Any, place: str) -> dict[Kind, Measured]:
    if not isinstance(content, dict):
        raise _WrongError(f"[{place}] is no table")
    made: dict[Kind, Measured] = {}
    for kind, table in content.items():
        where = f"[{place}.{kind}]"
        if kind not in KINDS:
            raise _WrongError(f"{where} is no kind of exchange: {nearest(kind, KINDS)}")
        if not isinstance(table, dict):
            raise _WrongError(f"{where} is no table")
        if "points" in table:
            _only(table, {"points"}, where)
            made[kind] = _points(table["points"], where)
        else:
            _only(table, {"bandwidth_gbit", "latency_us"}, where)
            rate = _number(table, "bandwidth_gbit", where) * 1e9 / 8
            made[kind] = _even(kind, rate, _number(table, "latency_us", where) * 1e-6)
    return made


def _even(kind: Kind, rate: float, latency: float) -> Measured:
    """Figures of a link with one latency and one pace, for two ranks."""
    sizes = [2**power for power in range(10, 31, 2)]
    return Measured(tuple((2, size, latency + traffic(kind, 2) * size / rate) for size in sizes))


def _points(rows: Any, where: str) -> Measured:
    if not isinstance(rows, list) or not rows:
        raise _WrongError(f"{where} has no points: give rows of [ranks, bytes, seconds]")
    made = []
    for row in rows:
        good = (
            isinstance(row, list) and len(row) == 3
            and all(isinstance(each, int | float) and 0 < each < math.inf for each in row)
            and row[0] >= 2
        )  # fmt: skip
        if not good:
            raise _WrongError(f"{where}: {row} is no [ranks, bytes, seconds] with 2 ranks or more")
        made.append((int(row[0]), int(row[1]), float(row[2])))
    return Measured(tuple(made))


def _needed(content: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in content:
        raise _WrongError(f"{where} does not say {name}")
    return content[name]


def _number(content: Mapping[str, Any], name: str, where: str, least: float = 0.0) -> float:
    value = _needed(content, name, where)
    good = isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf
    if not good or not (value >= least if least else value > 0):
        above = f"of {least:g} or more" if least else "above 0"
        raise _WrongError(f"{where} says {name} = {value!r}: give a number {above}")
    return float(value)


def _whole(content: Mapping[str, Any], name: str, where: str) -> int:
    value = _needed(content, name, where)
    if type(value) is not int or value < 1:
        raise _WrongError(f"{where} says {name} = {value!r}: give a whole number from 1")
    return value


def _only(content: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in content:
        if name not in known:
            raise _WrongError(f"{where} has {name!r}: {nearest(name, sorted(known))}")


def dump(cluster: Cluster) -> str:
    """The text of a cluster file."""
    lines = [f"name = {json.dumps(cluster.name)}", ""]
    for host in cluster.hosts:
        lines += [
            "[[hosts]]",
            f"count = {host.count}",
            f"workers = {host.workers}  # on each",
            f"device = {json.dumps(host.device)}",
            f"memory_gb = {host.memory / 1e9:.6g}  # that a worker may take",
            f"gflops = {host.speed:.6g}  # of a worker, while all are at work",
            f"compute_slowed = {host.interference.compute:.4g}  # while it exchanges",
            f"exchange_slowed = {host.interference.exchange:.4g}  # while it computes",
            f"crowded = {host.interference.crowded:.4g}  # as long while all compute, as for one",
            "",
        ]
    for place in ("between", "within"):
        for kind, measured in getattr(cluster, place).items():
            lines += [f"[{place}.{kind}]", "points = [  # ranks, bytes, seconds"]
            lines += [f"  [{n}, {size}, {seconds:.4g}]," for n, size, seconds in measured.points]
            lines += ["]", ""]
    return "\n".join(lines)


def scaled(cluster: Cluster, factor: float) -> Cluster:
    """The same with links between hosts so many times as fast; of one host, those within it."""

    def faster(measured: Measured) -> Measured:
        # What the smallest takes is latency, which a wider link does not shorten.
        least = {n: min(s for m, _, s in measured.points if m == n) for n, _, _ in measured.points}
        return Measured(
            tuple((n, b, least[n] + (s - least[n]) / factor) for n, b, s in measured.points)
        )

    between = {kind: faster(measured) for kind, measured in cluster.between.items()}
    within = cluster.within
    if not between:
        within = {kind: faster(measured) for kind, measured in within.items()}
    return dataclasses.replace(cluster, between=between, within=within)


# --- those that come with the package -----------------------------------------------------------


def shipped() -> dict[str, Path]:
    """Cluster files that come with wagontrain, by name."""
    folder = Path(str(importlib.resources.files("wagontrain"))) / "clusters"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find(name: str | Path) -> Cluster:
    """The cluster of a file, or one that comes with wagontrain, by its name.

    Raises:
        UsageError: there is neither, or the file is wrong.
    """
    path, known = Path(name), shipped()
    if str(name) in known and not path.is_file():
        path = known[str(name)]
    elif path.suffix != ".toml" and not path.is_file():
        raise UsageError(
            f"there is no cluster {str(name)!r}, and no file of this name: "
            f"{nearest(str(name), known)}"
        )
    return load(path)
