from __future__ import annotations

from pathlib import Path

import pytest

from wagontrain.errors import TestBedError, UsageError
from wagontrain.testbed import caps
from wagontrain.testbed.caps import CapsOne, CapsTwo


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("100", 100)]
)
def test_sizes(text: str, size: int) -> None:
    assert caps.memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "2T", "much"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="give a size such as"):
        caps.memory_bytes(text)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.45, (4500, 10_000)), (2, (20_000, 10_000)), (0.05, (1000, 20_000))]
)
def test_a_quota_is_short_but_never_below_what_the_kernel_takes(
    share: float, expected: tuple[int, int]
) -> None:
    assert caps.quota(share) == expected


def test_no_cpus_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match=r"0\.0 CPUs"):
        caps.quota(0.0)


def mounts(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "mounts"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_version_two_is_found_and_written(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpuset cpu io memory pids")
    found = caps.find("b", mounts(tmp_path, f"cgroup2 {root} cgroup2 rw 0 0"))
    assert isinstance(found, CapsTwo)
    found.make(1)
    group = root / "wagontrain-b" / "1"
    for folder in (root, root / "wagontrain-b"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +memory"
    found.set_cpus(1, 0.45)
    found.set_memory(1, 1 << 30)
    assert (group / "cpu.max").read_text() == "4500 10000"
    assert (group / "memory.max").read_text() == str(1 << 30)
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n")
    assert found.cpu_seconds(1) == 1.5
    assert found.peak_memory(1) is None
    (group / "memory.peak").write_text("4096\n")
    assert found.peak_memory(1) == 4096
    assert found.files(1) == [group / "cgroup.procs"]


def test_groups_that_cannot_be_divided_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").mkdir()  # nothing can be written to it
    with pytest.raises(TestBedError, match="--cgroupns=host"):
        CapsTwo("b", tmp_path).make(0)


def test_version_one_beside_an_empty_version_two(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("")
    found = caps.find(
        "b",
        mounts(
            tmp_path,
            f"cgroup {tmp_path}/c cgroup rw,relatime,cpu,cpuacct 0 0",
            f"cgroup {tmp_path}/m cgroup rw,relatime,memory 0 0",
            f"cgroup2 {tmp_path} cgroup2 rw 0 0",
        ),
    )
    assert isinstance(found, CapsOne)
    found.make(0)
    found.set_cpus(0, 0.45)
    assert (tmp_path / "c/wagontrain-b/0/cpu.cfs_quota_us").read_text() == "4500"
    assert (tmp_path / "c/wagontrain-b/0/cpu.cfs_period_us").read_text() == "10000"


def test_a_machine_without_control_groups_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has none with the controllers"):
        caps.find("b", mounts(tmp_path, "proc /proc proc rw 0 0"))
