"""The command line: what is run, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.commands import TASK, Running, python, really, torchrun, wagontrain

PLAIN = ("--strategy", "data-parallel", "--workers", "2")


@pytest.mark.whole
def test_one_and_two_workers_and_torchrun_train_alike(task_file: Path, tmp_path: Path) -> None:
    summaries = []
    for workers, program in (("1", wagontrain), ("2", partial(really, "wagontrain"))):
        folder = tmp_path / f"run{workers}"
        done = program(
            "run", str(task_file), "--workers", workers, "--seed", "3", "--run-dir", str(folder),
            folder=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"over {workers} worker" in done.stdout
        assert str(folder) in done.stdout.replace("\n", "")
        summaries.append(json.loads((folder / "summary.json").read_text()))
    assert [summary["world_size"] for summary in summaries] == [1, 2]
    script = really("torchrun", "--nproc-per-node", "2", task_file, folder=tmp_path)
    assert script.returncode == 0, script.stderr
    summaries.append(json.loads((tmp_path / "from_script" / "summary.json").read_text()))
    assert {summary["steps"] for summary in summaries} == {8}


def test_verify_passes_and_fails(task_file: Path, tmp_path: Path) -> None:
    good = wagontrain("verify", str(task_file), "--json", "--steps", "9", folder=tmp_path)
    assert good.returncode == 0, good.stderr
    verdict = json.loads(good.stdout)
    assert verdict["exact"] is True
    assert verdict["passed"] is True
    assert verdict["max_loss_deviation"] < 1e-12
    assert verdict["max_parameter_deviation"] < 1e-12
    bad = wagontrain("verify", f"{task_file}:wrong", "--workers", "2", folder=tmp_path)
    assert bad.returncode == 1
    assert "FAILED: not the training that one process would do" in bad.stdout


def test_a_model_that_insists_on_float32_is_told_how(task_file: Path, tmp_path: Path) -> None:
    refused = wagontrain("verify", f"{task_file}:insists", folder=tmp_path)
    assert refused.returncode == 1
    assert "give --dtype float32" in refused.stderr


def test_a_relaxed_strategy_may_differ(task_file: Path, tmp_path: Path) -> None:
    done = wagontrain(
        "verify", str(task_file), "--set", "compression=bf16", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["exact"], verdict["passed"]) == (False, False)


def test_a_strategy_that_does_not_know_every_loss_says_so(task_file: Path, tmp_path: Path) -> None:
    done = wagontrain("verify", str(task_file), "--strategy", "local-sgd", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  loss        not known of every step$", done.stdout, re.MULTILINE)
    assert "not the same, as expected: the strategy is relaxed" in done.stdout


def test_a_loss_that_is_no_number_on_one_rank_ends_all(task_file: Path, tmp_path: Path) -> None:
    """With local-sgd, whose ranks do not meet in that step."""
    done = wagontrain(
        "run", f"{task_file}:one_diverges", "--workers", "2", "--strategy", "local-sgd",
        "--run-dir", "R", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "wagontrain: rank 1: the loss is nan at step 5 (epoch 0) on rank 1" in done.stderr
    assert "the weights are still those before this step" in done.stderr
    assert not list((tmp_path / "R" / "checkpoints").glob("step-*"))


def test_the_failing_ranks_own_traceback_is_shown_once(task_file: Path, tmp_path: Path) -> None:
    done = wagontrain("run", f"{task_file}:one_raises", *PLAIN, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("LookupError: only on rank one") == 1
    assert "worker rank 1 failed:" in done.stderr


def test_a_diverging_loss_ends_the_run_with_status_one(task_file: Path, tmp_path: Path) -> None:
    done = wagontrain("run", f"{task_file}:diverges", *PLAIN, folder=tmp_path)
    assert done.returncode == 1
    assert re.search(r"^wagontrain: the loss is (inf|nan) at step 0", done.stderr)
    assert "Traceback" not in done.stderr


def test_killing_a_worker_ends_all_and_names_it(task_file: Path) -> None:
    with Running(task_file) as running:
        os.kill(running.workers[1], signal.SIGKILL)
        _, err = running.end(within=10)
        assert running.process.returncode == 1
        assert "worker rank 1 was killed by SIGKILL" in err
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1
        assert json.loads((running.folder / "events.jsonl").read_text().splitlines()[-1])


def test_ctrl_c_ends_all(task_file: Path) -> None:
    with Running(task_file, new=True) as running:
        running.process.send_signal(signal.SIGINT)
        _, err = running.end(within=10)
        assert running.process.returncode == 130
        assert err.strip() == "wagontrain: stopped by Ctrl-C; all workers were ended"


def test_nothing_listens_beyond_loopback(task_file: Path) -> None:
    with Running(task_file) as running:
        pids = {running.process.pid, *running.workers.values()}
        inodes = set()
        for pid in pids:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                target = str(link.readlink())
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        listening = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    listening.append(fields[1].rpartition(":")[0])
        assert listening
        assert set(listening) == {"0100007F"}
        os.kill(running.process.pid, signal.SIGTERM)
        running.end(within=10)


NOTEBOOK = """
import torch, wagontrain as wt
from functools import partial
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(width, 1)
    def forward(self, x):
        return self.head(x)

width = 3
data = TensorDataset(torch.randn(40, width), torch.randn(40, 1))
rate = 0.1
task = lambda: wt.Task(model=Net, loss=nn.functional.mse_loss, train=data, batch_size=10,
                       optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate))
from dataclasses import dataclass
from wagontrain.strategies.data_parallel import DataParallel

@dataclass(frozen=True)
class Mine(DataParallel):
    name = "mine"

result = wt.fit(task, Mine(bucket_mb=1), workers=2, run_dir="notebook", quiet=True)
assert result.summary["strategy"] == "mine"
again = wt.fit(task, "data-parallel", workers=2, run_dir="again", quiet=True)
assert result.summary["world_size"] == 2
net = Net()
net.load_state_dict(result.state_dict())
for name, value in again.state_dict().items():
    assert torch.equal(value, result.state_dict()[name])
print("trained", result.summary["steps"])
"""


def test_fit_from_a_notebook(tmp_path: Path) -> None:
    """Classes, lambdas and variables of an interactive session, which is no file."""
    done = python("-", text=NOTEBOOK, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained 4\n"


def test_torchrun_lets_one_rank_speak(task_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("import wagontrain as wt, job\nwt.fit(job.diverges, run_dir='bad')\n")
    done = torchrun("--nproc-per-node", "2", script, folder=tmp_path)
    assert done.returncode == 1
    assert len(re.findall(r"wagontrain: rank \d: the loss is", done.stderr)) == 1


EARLY = """
import os, sys
import job

def task():
    task = job.make(epochs=500)
    return task

def leaving(how, rank):
    def optimizer(parameters):
        import torch, torch.distributed as dist
        if rank in (None, dist.get_rank()):
            how()
        return torch.optim.SGD(parameters, lr=0.1)
    return lambda: job.make(optimizer=optimizer)

exits = leaving(lambda: sys.exit(3), 1)
all_vanish = leaving(lambda: os._exit(0), None)
one_vanishes = leaving(lambda: os._exit(0), 1)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exits", "rank 1: the task ended the process by sys.exit(3)"),
        ("all_vanish", "all workers ended with status 0 before the training did"),
        ("one_vanishes", "has not been heard of for 5 s"),
    ],
)
def test_a_worker_that_leaves_is_named(
    task_file: Path, tmp_path: Path, name: str, message: str
) -> None:
    file = tmp_path / "early.py"
    file.write_text(EARLY)
    done = wagontrain("run", f"{file}:{name}", *PLAIN, folder=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_fit_takes_along_what_the_script_can_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in another folder whose neighbour module the task needs."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "neighbour.py").write_text(TASK)
    script = folder / "script.py"
    script.write_text(
        "import wagontrain as wt\nimport neighbour\n"
        "if __name__ == '__main__':\n"
        "    wt.fit(neighbour.task, 'data-parallel', workers=2, quiet=True)\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    done = python(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not list(temporary.glob("wagontrain-*"))


def test_killing_the_launcher_leaves_nothing(
    task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Running(task_file) as running:
        own = list(tmp_path.glob("wagontrain-*"))
        assert own
        running.process.send_signal(signal.SIGKILL)
        running.end(within=10)
        limit = time.monotonic() + 5
        while any(folder.exists() for folder in own) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(folder.exists() for folder in own)


LAZY = """
import job, torch
def task():
    return job.make(model=lambda: torch.nn.LazyLinear(2))
"""


def test_a_refusal_in_the_workers_leaves_no_folder(task_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text(LAZY)
    done = wagontrain("run", str(file), "--workers", "2", "--run-dir", "R", folder=tmp_path)
    assert done.returncode == 2
    assert "lazy layers" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "R").exists()
