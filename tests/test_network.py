from __future__ import annotations

import socket
from pathlib import Path

import pytest

from wagontrain.errors import UsageError
from wagontrain.launch import network
from wagontrain.launch.cores import cores, cpu_limit
from wagontrain.launch.network import Interface
from wagontrain.launch.place import Place, place_from_environment
from wagontrain.launch.slurm import host_names, tasks_per_host, torchrun_variables


def test_loopback_leads_to_loopback() -> None:
    found = network.reaching("127.0.0.1", 29500)
    assert found.is_loopback
    assert found.address == "127.0.0.1"
    assert network.named(found.name).address == "127.0.0.1"


def test_a_name_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError, match="the master's name 'no.such.host.invalid' is unknown on"):
        network.reaching("no.such.host.invalid", 29500)


def test_the_interface_is_the_one_with_the_address_packets_leave_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [Interface("lo", "127.0.0.1"), Interface("wg0", "10.9.0.2"), Interface("wg0", "fe80::1")]
    monkeypatch.setattr(network, "interfaces", lambda: own)
    assert network.reaching("localhost", 1) == own[0]
    assert network.named("wg0") == own[1]
    with pytest.raises(UsageError, match="no network interface 'eth7' on .*known: lo, wg0"):
        network.named("eth7")


def test_every_interface_has_a_real_address() -> None:
    for interface in network.interfaces():
        family = socket.AF_INET6 if ":" in interface.address else socket.AF_INET
        assert socket.inet_pton(family, interface.address)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,7],gpu2", ["node01", "node02", "node03", "node7", "gpu2"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("tux[1-2].lab.org", ["tux1.lab.org", "tux2.lab.org"]),
    ],
)
def test_slurm_writes_lists_of_hosts_briefly(text: str, names: list[str]) -> None:
    assert host_names(text) == names


@pytest.mark.parametrize("text", ["", "node[a-b]"])
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="list of hosts"):
        host_names(text)


def test_slurm_writes_tasks_briefly() -> None:
    assert tasks_per_host("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_host("4") == [4]
    with pytest.raises(UsageError, match="cannot be read"):
        tasks_per_host("many")


STEP = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[01-03]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip


def test_the_place_of_a_slurm_task() -> None:
    place = place_from_environment(STEP)
    assert place == Place(4, 5, 0, 1, "node01", 20_000 + 71 * 31)
    given = place_from_environment(STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"})
    assert given == Place(4, 5, 0, 1, "10.0.0.9", 4000)


def test_a_batch_script_is_no_task() -> None:
    """It has the job's variables but not a step's, and nobody would come to meet it."""
    script = {"SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_JOB_ID": "71"}
    assert place_from_environment(script) is None
    assert torchrun_variables(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_half_of_slurms_variables_are_refused() -> None:
    with pytest.raises(UsageError, match="did not set SLURM_LOCALID: start the tasks with srun"):
        torchrun_variables({name: value for name, value in STEP.items() if name[6:8] != "LO"})


def test_torchrun_inside_slurm_goes_first() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert place_from_environment(STEP | torchrun) == Place(1, 2, 1, 2, "h", 1)


def test_control_groups_of_version_two_limit_the_cores(tmp_path: Path) -> None:
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    groups, mounts = tmp_path / "cgroup", tmp_path / "mounts"
    groups.write_text("0::/outer/inner\n")
    mounts.write_text(f"cgroup2 {tmp_path}/fs cgroup2 rw 0 0\n")
    assert cpu_limit(groups, mounts) == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert cpu_limit(groups, mounts) == 0.5


def test_control_groups_of_version_one_limit_the_cores(tmp_path: Path) -> None:
    group = tmp_path / "cpu" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("4500\n")
    (group / "cpu.cfs_period_us").write_text("10000\n")
    groups, mounts = tmp_path / "cgroup", tmp_path / "mounts"
    groups.write_text("4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    mounts.write_text(f"cgroup {tmp_path}/cpu cgroup rw,cpu,cpuacct 0 0\n")
    assert cpu_limit(groups, mounts) == 0.45
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_limit(groups, mounts) is None


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path / "none", tmp_path / "none") is None
    assert cores() >= 1
