"""CPU and memory of a test bed's hosts: one control group each, of cgroup v1 or v2.

Sources: Linux documentation, admin-guide/cgroup-v1 and admin-guide/cgroup-v2.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from abc import ABC, abstractmethod
from pathlib import Path

from wagontrain.errors import TestBedError, UsageError

# A short period, or throttling looks like the network stalling; the kernel takes no quota
# below a millisecond.
_PERIOD = 10_000
_LEAST_QUOTA = 1_000
_SECONDS = 5.0


def memory_bytes(size: str) -> int:
    """A size such as 2G, 512M or 1500000 in bytes (powers of 1024).

    Raises:
        UsageError: it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)(?:i?b)?", size.strip().lower())
    if match is None or not float(match[1]) > 0:
        raise UsageError(f"memory {size!r}: give a size such as 2G or 512M")
    return int(float(match[1]) * 1024 ** " kmg".index(match[2] or " "))


def quota(share: float) -> tuple[int, int]:
    """Microseconds of CPU time per period of so many microseconds, for a share of a core."""
    if not 0 < share < 10_000:
        raise UsageError(f"{share} CPUs: give a number above 0, such as 0.45")
    period = max(_PERIOD, int(_LEAST_QUOTA / share))
    return round(share * period), period


class Caps(ABC):
    """The control groups of one test bed."""

    @abstractmethod
    def make(self, host: int) -> None:
        """Make a host's group."""

    @abstractmethod
    def files(self, host: int) -> list[Path]:
        """Where a process writes its number to belong to a host."""

    @abstractmethod
    def set_cpus(self, host: int, share: float) -> None:
        """Limit a host to so many cores."""

    @abstractmethod
    def set_memory(self, host: int, limit: int) -> None:
        """Limit a host to so many bytes."""

    @abstractmethod
    def cpu_seconds(self, host: int) -> float:
        """CPU time that a host has used."""

    @abstractmethod
    def peak_memory(self, host: int) -> int | None:
        """Most bytes that a host has used at a time; None where the kernel does not say."""

    @abstractmethod
    def folders(self) -> list[Path]:
        """The groups of this bed, in each hierarchy."""

    def remove(self) -> None:
        """Remove all groups, and whatever is still in them.

        A command whose owner was killed as it was started is in the group before it is in the
        host, or comes a moment later.

        Raises:
            TestBedError: a group is still in use.
        """
        for folder in self.folders():
            if not folder.exists():
                continue
            for group in [*(entry for entry in folder.iterdir() if entry.is_dir()), folder]:
                _remove(group)


class CapsOne(Caps):
    """Control groups of version 1: one hierarchy per controller."""

    def __init__(self, bed: str, mounts: dict[str, Path]) -> None:
        self._roots = {name: mount / f"wagontrain-{bed}" for name, mount in mounts.items()}

    def make(self, host: int) -> None:
        for root in self._roots.values():
            (root / str(host)).mkdir(parents=True, exist_ok=True)

    def files(self, host: int) -> list[Path]:
        return [root / str(host) / "cgroup.procs" for root in self._roots.values()]

    def set_cpus(self, host: int, share: float) -> None:
        time_of, period = quota(share)
        group = self._roots["cpu"] / str(host)
        _write(group / "cpu.cfs_quota_us", -1)  # or a longer period may be refused
        _write(group / "cpu.cfs_period_us", period)
        _write(group / "cpu.cfs_quota_us", time_of)

    def set_memory(self, host: int, limit: int) -> None:
        _write(self._roots["memory"] / str(host) / "memory.limit_in_bytes", limit)

    def cpu_seconds(self, host: int) -> float:
        return int((self._roots["cpuacct"] / str(host) / "cpuacct.usage").read_text()) / 1e9

    def peak_memory(self, host: int) -> int | None:
        group = self._roots["memory"] / str(host)
        return int((group / "memory.max_usage_in_bytes").read_text())

    def folders(self) -> list[Path]:
        return sorted(set(self._roots.values()))


class CapsTwo(Caps):
    """Control groups of version 2: one hierarchy for all controllers."""

    def __init__(self, bed: str, mount: Path) -> None:
        self._mount = mount
        self._root = mount / f"wagontrain-{bed}"

    def make(self, host: int) -> None:
        self._root.mkdir(exist_ok=True)
        for folder in (self._mount, self._root):
            try:
                (folder / "cgroup.subtree_control").write_text("+cpu +memory")
            except OSError as error:
                raise TestBedError(
                    f"control groups cannot be divided in {folder} ({error.strerror}): inside a "
                    "container start it with the host's groups (--cgroupns=host, /sys/fs/cgroup "
                    "writable)"
                ) from error
        (self._root / str(host)).mkdir(exist_ok=True)

    def files(self, host: int) -> list[Path]:
        return [self._root / str(host) / "cgroup.procs"]

    def set_cpus(self, host: int, share: float) -> None:
        time_of, period = quota(share)
        _write(self._root / str(host) / "cpu.max", f"{time_of} {period}")

    def set_memory(self, host: int, limit: int) -> None:
        _write(self._root / str(host) / "memory.max", limit)

    def cpu_seconds(self, host: int) -> float:
        text = (self._root / str(host) / "cpu.stat").read_text()
        fields = dict(line.split() for line in text.splitlines())
        return int(fields["usage_usec"]) / 1e6

    def peak_memory(self, host: int) -> int | None:
        file = self._root / str(host) / "memory.peak"  # Linux 5.19
        return int(file.read_text()) if file.exists() else None

    def folders(self) -> list[Path]:
        return [self._root]


def find(bed: str, mounts: Path = Path("/proc/mounts")) -> Caps:
    """The control groups for a bed of this name, of the version that this machine has.

    Raises:
        UsageError: it has neither with the controllers cpu and memory.
    """
    one: dict[str, Path] = {}
    for line in mounts.read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup":
            for name in {"cpu", "cpuacct", "memory"} & set(options.split(",")):
                one[name] = Path(place)
        elif kind == "cgroup2":
            listed = Path(place) / "cgroup.controllers"
            if listed.exists() and {"cpu", "memory"} <= set(listed.read_text().split()):
                return CapsTwo(bed, Path(place))
    if one.keys() == {"cpu", "cpuacct", "memory"}:
        return CapsOne(bed, one)
    raise UsageError(
        "a test bed limits and counts with control groups, and this machine has none with the "
        "controllers cpu and memory mounted"
    )


def _write(file: Path, value: object) -> None:
    try:
        file.write_text(str(value))
    except OSError as error:
        raise TestBedError(f"{file.name} takes no {value} ({error.strerror})") from error


def _remove(group: Path) -> None:
    limit = time.monotonic() + _SECONDS
    while group.exists():
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        with contextlib.suppress(OSError):  # gone meanwhile
            for process in (group / "cgroup.procs").read_text().split():
                os.kill(int(process), signal.SIGKILL)
        if time.monotonic() > limit:
            raise TestBedError(f"control group {group} is still in use")
        time.sleep(0.05)
