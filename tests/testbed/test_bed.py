"""Real hosts: needs Linux, root and iproute2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import SCRIPTS, wagontrain
from wagontrain.errors import UsageError
from wagontrain.testbed import bed as beds
from wagontrain.testbed import links
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.run import run

pytestmark = pytest.mark.testbed

SEND = """
import os, socket, sys, time
rank, count = int(os.environ["RANK"]), int(sys.argv[1])
if rank == 0:
    with socket.create_server(("", 5000)) as server:
        peer = server.accept()[0]
        began, got = time.time(), 0
        while got < count:
            got += len(peer.recv(1 << 20))
        print(count * 8 / (time.time() - began))
else:
    limit = time.time() + 10
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 5000))
            break
        except ConnectionRefusedError:
            assert time.time() < limit
            time.sleep(0.05)
    peer.sendall(bytes(count))
    peer.recv(1)
"""

BURN = "import time; end = time.time() + 2\nwhile time.time() < end: pass"


@pytest.fixture
def pair() -> Iterator[Bed]:
    with Bed.up(Shape(2)) as bed:
        yield bed


def output(bed: Bed, host: int, *command: str) -> str:
    process = bed.start(host, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = process.communicate(timeout=20)
    return str(out)


def transfer(bed: Bed, count: int) -> float:
    """Bits a second from tb1 to tb0."""
    lines: list[str] = []
    ended = run(bed, [sys.executable, "-c", SEND, str(count)], say=lines.append, timeout=60)
    assert ended.status == 0, lines
    return float(lines[0].partition("| ")[2])


@pytest.mark.parametrize(("rate", "count"), [("100mbit", 4_000_000), ("20mbit", 1_000_000)])
def test_a_link_is_as_fast_as_asked_and_the_kernel_counts(rate: str, count: int) -> None:
    with Bed.up(Shape(2, rate=rate)) as bed:
        measured = transfer(bed, count)
        used = bed.usage()
    assert 0.7 < measured / links.bits_per_second(rate) < 1.1
    assert count < used[1].bytes_sent < 1.1 * count
    assert count < used[0].bytes_received < 1.1 * count
    assert used[0].bytes_sent < 0.1 * count
    assert used[1].packets_sent > 0


def test_the_rate_can_be_changed_and_lifted(pair: Bed) -> None:
    pair.set_rate(1, "20mbit")
    slow = transfer(pair, 1_000_000)
    pair.set_rate(1, None)
    assert transfer(pair, 20_000_000) > 10 * slow


def test_cpu_share_is_held_and_can_be_changed() -> None:
    with Bed.up(Shape(2, cpus=0.2, slow={1: 0.5})) as bed:
        processes = [bed.start(host, [sys.executable, "-c", BURN]) for host in (0, 1)]
        assert [process.wait(20) for process in processes] == [0, 0]
        first, second = (host.cpu_seconds for host in bed.usage())
        # No more than their share; less where the machine has not so much to give.
        assert first < 0.6
        assert first < second < 1.3
        bed.set_cpus(0, 0.6)
        assert bed.start(0, [sys.executable, "-c", BURN]).wait(20) == 0
        assert bed.usage()[0].cpu_seconds - first > 1.2 * first


def test_memory_is_capped() -> None:
    with Bed.up(Shape(1, memory="64M")) as bed:
        eater = "import os; block = bytearray(200 << 20); print(len(block))"
        process = bed.start(0, [sys.executable, "-c", eater], stdout=subprocess.DEVNULL)
        assert process.wait(20) == -signal.SIGKILL
        peak = bed.usage()[0].peak_memory
        assert peak is not None
        assert 30 << 20 < peak <= 64 << 20


def test_hosts_have_names_and_see_only_each_other(pair: Bed) -> None:
    script = (
        "import os, socket; print(socket.gethostname(), socket.gethostbyname('tb1'), "
        "[name for _, name in socket.if_nameindex()], os.environ['TESTBED_HOST'])"
    )
    assert output(pair, 1, sys.executable, "-c", script).strip() == (
        "tb1 10.77.0.2 ['lo', 'eth0'] tb1"
    )
    assert Path("/proc/sys/kernel/hostname").read_text().strip() != "tb1"
    names = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True)
    assert "port0" not in names.stdout


REACH = """
import socket, sys
try:
    socket.create_connection(("tb0", 6000), timeout=1.5)
    print("reached")
except OSError:
    print("not reached")
"""


def test_cut_and_heal(pair: Bed) -> None:
    listen = "import socket, time; s = socket.create_server(('', 6000)); time.sleep(60)"
    server = pair.start(0, [sys.executable, "-c", listen])
    limit = time.monotonic() + 10
    while output(pair, 1, sys.executable, "-c", REACH) != "reached\n":
        assert time.monotonic() < limit
    pair.cut(0)
    assert pair.is_cut(0)
    assert output(pair, 1, sys.executable, "-c", REACH) == "not reached\n"
    pair.heal(0)
    assert output(pair, 1, sys.executable, "-c", REACH) == "reached\n"
    assert pair.kill(0) == 1
    assert server.wait(5) == -signal.SIGKILL


def test_two_beds_side_by_side(pair: Bed) -> None:
    with Bed.up(Shape(2)) as other:
        names = {bed.name for bed in beds.everything()}
        assert {pair.name, other.name} <= names
        assert pair.name != other.name
        transfer(other, 1000)
    assert pair.usage()[0].bytes_received < 1000
    assert pair.name in {bed.name for bed in beds.everything()}


def traces(name: str) -> list[str]:
    """What is left of a bed."""
    groups = Path("/sys/fs/cgroup").glob(f"**/wagontrain-{name}")
    spaces = links.NAMESPACES.glob(f"wagontrain-{name}-*")
    return [str(path) for path in (*groups, *spaces, *beds.STATE.glob(name))]


def test_a_bed_whose_owner_was_killed_is_removed_by_the_next() -> None:
    script = (
        "import time\nfrom wagontrain.testbed.bed import Bed, Shape\nbed = Bed.up(Shape(1))\n"
        "bed.start(0, ['sleep', '1000'])\nprint(bed.name, flush=True)\ntime.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, text=True) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert traces(name)
        owner.kill()
    with Bed.up(Shape(1)):
        assert not traces(name)


def test_a_command_that_is_not_in_its_host_yet_is_ended_as_well() -> None:
    bed = Bed.up(Shape(1))
    joining = " && ".join(f"echo $$ > {file}" for file in bed.caps.files(0))
    # As one whose owner is killed between the two: in the group, and never in the host.
    with subprocess.Popen(
        ["sh", "-c", f"{joining} && echo in && exec sleep 1000"], stdout=-1
    ) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"in\n"
        bed.down()
        assert one.wait(5) == -signal.SIGKILL
    assert not traces(bed.name)


def test_everything_step_by_step(tmp_path: Path) -> None:
    def testbed(*arguments: str) -> str:
        done = wagontrain("testbed", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    assert testbed("up", "--hosts", "2", "--name", "steps", "--rate", "1gbit") == "steps\n"
    try:
        again = wagontrain("testbed", "up", "--name", "steps", folder=tmp_path)
        assert again.returncode == 2
        assert "is up: take it down first" in again.stderr
        said = testbed("exec", "--bed", "steps", "1", "--", "sh", "-c", "echo $RANK of $WORLD_SIZE")
        assert said == "1 of 2\n"
        failing = wagontrain("testbed", "exec", "--bed", "steps", "tb0", "false", folder=tmp_path)
        assert failing.returncode == 1
        testbed("cut", "tb1", "--bed", "steps")
        assert "cut off: tb1" in testbed("status", "--bed", "steps")
        wrong = wagontrain("testbed", "heal", "tb7", "--bed", "steps", folder=tmp_path)
        assert wrong.stderr == "wagontrain: no host 'tb7': there are tb0 to tb1\n"
    finally:
        assert testbed("down", "steps") == "steps: down\n"
    assert not traces("steps")


def test_run_reports_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "used.json"
    done = wagontrain(
        "testbed", "run", "--hosts", "2", "--per-host", "2", "--cpus", "0.5", "--json", str(file),
        "--", "sh", "-c", "echo I am $RANK; exit $((RANK == 3 ? 7 : 0))", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 7
    assert sorted(line for line in done.stdout.splitlines() if "|" in line) == [
        "tb0.0 | I am 0", "tb0.1 | I am 1", "tb1.0 | I am 2", "tb1.1 | I am 3",
    ]  # fmt: skip
    used = json.loads(file.read_text())
    assert used["statuses"] == [0, 0, 0, 7]
    assert [host["host"] for host in used["hosts"]] == ["tb0", "tb1"]
    assert all(host["cpu_seconds"] > 0 for host in used["hosts"])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing(stop: signal.Signals) -> None:
    before = {bed.name for bed in beds.everything()}
    process = subprocess.Popen(
        [SCRIPTS / "wagontrain", "testbed", "run", "--hosts", "1", "--",
         "sh", "-c", "echo up; sleep 1000 & sleep 1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "tb0 | up\n"
    (name,) = {bed.name for bed in beds.everything()} - before
    os.killpg(process.pid, stop)
    process.communicate(timeout=20)
    assert process.returncode == 128 + stop
    assert not traces(name)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hosts": 0}, "0 hosts"),
        ({"hosts": 2, "rate": "fast"}, "rate 'fast'"),
        ({"hosts": 2, "rate": "10MB"}, "rate '10MB'"),
        ({"hosts": 2, "memory": "lots"}, "memory 'lots'"),
        ({"hosts": 2, "cpus": 0}, "0 CPUs"),
        ({"hosts": 2, "slow": {2: 0.1}}, "hosts are numbered 0 to 1"),
    ],
)
def test_shapes_that_cannot_be(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Shape(**shape)


def test_who_may_not_make_a_bed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="needs root"):
        Bed.up(Shape(1))
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="this is darwin"):
        Bed.up(Shape(1))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="install the packages iproute2"):
        Bed.up(Shape(1))
