"""How many CPU cores this process may use: what affinity and control groups leave of them.

A container limited to two of a machine's 64 cores that starts 64 threads spends its time being
throttled.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores() -> int:
    """CPU cores this process may use, at least 1."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    limit = cpu_limit()
    return count if limit is None else max(1, min(count, math.ceil(limit)))


def cpu_limit(
    groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/proc/mounts")
) -> float | None:
    """Cores that control groups (v1 or v2) leave to this process; None for no limit."""
    if not groups.exists() or not mounts.exists():
        return None
    limits = []
    for line in groups.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for mount in _mounts(mounts, "cgroup2" if number == "0" else "cgroup"):
            limits += _limits_above(mount, path)
    return min(limits, default=None)


def _mounts(mounts: Path, wanted: str) -> list[Path]:
    found = []
    for line in mounts.read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == wanted and (kind == "cgroup2" or "cpu" in options.split(",")):
            found.append(Path(place))
    return found


def _limits_above(mount: Path, path: str) -> list[float]:
    """The limits of a group and of those it is in."""
    group = mount / path.lstrip("/")
    if not group.is_dir():  # inside a container the path is the host's, the mount its own
        group = mount
    found = []
    while group.is_relative_to(mount):
        limit = _limit(group)
        if limit is not None:
            found.append(limit)
        group = group.parent
    return found


def _limit(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except OSError:  # not this controller's, or not for us to read
        return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
