from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import wagontrain as wt
from wagontrain import launch
from wagontrain.launch import Failure, Place, cause, place_from_environment, start_workers
from wagontrain.launch.ending import await_gloo
from wagontrain.launch.place import threads_per_worker
from wagontrain.launch.rendezvous import LoopbackRendezvous

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_place_that_torchrun_gives() -> None:
    assert place_from_environment({}) is None
    assert place_from_environment(TORCHRUN) == Place(1, 4, 1, 4, "127.0.0.1", 29500)
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert place_from_environment(TORCHRUN | local) == Place(1, 4, 0, 2, "127.0.0.1", 29500)
    held = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert place_from_environment(TORCHRUN | held) == Place(1, 4, 1, 4, "127.0.0.1", 29500, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": None}, "but not RANK"),
        ({"RANK": "4"}, "RANK=4 is not among WORLD_SIZE=4"),
        ({"RANK": "one"}, "are wrong: invalid literal"),
        ({"MASTER_PORT": "http"}, "are wrong"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "not among LOCAL_WORLD_SIZE=0"),
    ],
)
def test_half_an_environment_is_refused(changes: dict[str, Any], message: str) -> None:
    environment = {key: value for key, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(wt.UsageError, match=message):
        place_from_environment(environment)


def test_cores_are_divided_among_local_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wagontrain.launch.place.cores", lambda: 8)
    here = Place(0, 4, 0, 4)
    assert threads_per_worker(here, {}) == 2
    assert threads_per_worker(Place(0, 16, 0, 16), {}) == 1
    assert threads_per_worker(here, {"OMP_NUM_THREADS": "3"}) == 3
    assert threads_per_worker(here, {"OMP_NUM_THREADS": "1"}) == 1
    torchrun = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert threads_per_worker(here, torchrun) == 2


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device_for(Place(3, 4, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(wt.UsageError, match=r"3 workers .* with 2 GPU\(s\)"):
        launch.device_for(Place(0, 3, 0, 3))


def said(rank: int, kind: str, when: float = 1.0) -> Failure:
    return Failure(rank, kind, f"message of {rank}", f"traceback of {rank}", when)


@pytest.mark.parametrize(
    ("codes", "failures", "kind", "message"),
    [
        # one was killed; the other noticed, and spoke first
        ({0: 1, 1: -9}, [said(0, "peer")], wt.WorkerError, "rank 1 was killed by SIGKILL"),
        ({1: -9, 0: -15}, [], wt.WorkerError, "rank 1 was killed by SIGKILL"),
        ({2: -11, 0: 1, 1: -15}, [said(0, "peer")], wt.WorkerError, "rank 2 was killed by SIGSEGV"),
        # one raised; the other lost it, or was ended by the agent, by force if need be
        ({1: 1, 0: -15}, [said(1, "crash")], wt.TrainingError, "rank 1 failed:\ntraceback of 1"),
        ({1: 1, 0: -9}, [said(1, "crash")], wt.TrainingError, "rank 1 failed"),
        ({0: 1, 1: 1}, [said(0, "peer", 1), said(1, "training", 2)], wt.TrainingError, "of 1"),
        # all say the same; the first is enough
        ({0: 2, 1: 2}, [said(0, "usage", 5), said(1, "usage", 4)], wt.UsageError, "message of 1"),
        # nobody says anything
        ({1: 3, 0: -15}, [], wt.WorkerError, "rank 1 ended with status 3 without saying why"),
        ({1: -15, 0: -15}, [], wt.WorkerError, "rank 1 was ended by SIGTERM"),
        ({0: 1, 1: 1}, [said(0, "peer", 2), said(1, "peer", 1)], wt.WorkerError, "rank 1 message"),
    ],
)
def test_the_cause_is_told_from_its_consequences(
    tmp_path: Path,
    codes: dict[int, int],
    failures: list[Failure],
    kind: type[Exception],
    message: str,
) -> None:
    found = cause(codes, failures, tmp_path)
    assert isinstance(found, kind)
    assert message in str(found)


def test_errors_become_failures() -> None:
    assert Failure.of(0, wt.TaskError("x")).kind == "usage"
    assert Failure.of(0, wt.LossError("x")).kind == "training"
    assert Failure.of(0, KeyError("x")).kind == "crash"
    lost = Failure.of(0, dist.DistNetworkError("reset\nmore"))
    assert (lost.kind, lost.message) == ("peer", "lost contact with another worker (reset)")
    assert [Failure.of(0, error).exit_status for error in (wt.TaskError(), KeyError())] == [2, 1]


def test_the_rendezvous_listens_on_loopback_alone() -> None:
    meeting = LoopbackRendezvous(launch.WAIT)
    port = meeting.next_rendezvous().bootstrap_store_info.master_port
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    addresses = [
        line.split()[1].rpartition(":")
        for line in listening.splitlines()
        if ":" in line and line.split()[3] == "0A"
    ]
    own = [address for address, _, number in addresses if int(number, 16) == port]
    assert own == ["0100007F"]
    meeting.shutdown()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def started(tmp_path: Path, program: str, workers: int = 2) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    start_workers([sys.executable, "-c", program], workers, tmp_path, logs)


def test_workers_get_torchruns_variables(tmp_path: Path) -> None:
    program = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR')))"
    started(tmp_path, program)
    for rank in (0, 1):
        assert (tmp_path / "logs" / f"rank{rank}.log").read_text() == f"{rank} 2 127.0.0.1\n"


def test_a_worker_that_ends_ends_all(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "print('last words', flush=True)\n"
        "sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    )
    began = time.monotonic()
    with pytest.raises(wt.WorkerError, match="rank 1 ended with status 7") as found:
        started(tmp_path, program)
    assert "last words" in str(found.value)
    assert time.monotonic() - began < 10


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    started(tmp_path, "pass", 1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Even when the parent is killed and can tell nobody."""
    program = (
        "import os, time; from wagontrain.launch import local; local.end_with(os.getppid());"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    limit = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (TORCHRUN | {"RANK": "0", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(wt.UsageError, match=f"port {port} is in use"):
            launch.join(place_from_environment(os.environ))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are files on Linux only")
def test_the_end_waits_for_threads_of_gloo(tmp_path: Path) -> None:
    def task(number: int, name: str, state: str) -> None:
        (tmp_path / str(number)).mkdir(exist_ok=True)
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")
        (tmp_path / str(number) / "stat").write_text(f"{number} ({name}) {state} 1 1")

    task(1, "python", "R")
    task(2, "pt_gloo_runloop", "S")
    assert await_gloo(tmp_path, 2.0)
    task(2, "pt_gloo_runloop", "R")
    assert not await_gloo(tmp_path, 0.1)
    threading.Timer(0.2, task, (2, "pt_gloo_runloop", "S")).start()
    began = time.monotonic()
    assert await_gloo(tmp_path, 10.0)
    assert 0.1 < time.monotonic() - began < 5


def test_large_pages_are_asked_for_unless_somebody_has_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    launch.ask_for_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    launch.ask_for_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
