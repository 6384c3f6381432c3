"""The Ray engine on a cluster of three hosts, which share no files with the launching process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from collections.abc import Iterator

import pytest
import safetensors.torch

from tests import rays
from tests.commands import ROOT, SCRIPTS
from tests.rays import HEAD, Cluster, end
from wagontrain.testbed.bed import why_not

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
]

SCRIPT = """
import parts
import wagontrain as wt

def task():
    return parts.task()

if __name__ == "__main__":
    result = wt.fit(task, engine="ray", workers=2, steps=4, quiet=True, run_dir="run")
    print(result.summary["steps"], sorted(result.state_dict()))
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why_not():
        pytest.skip(str(why_not()))
    with rays.up(tmp_path_factory.mktemp("r")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    with rays.used(running) as cluster:
        yield cluster


@pytest.mark.whole
def test_mnist_trains_and_the_whole_run_comes_back(cluster: Cluster) -> None:
    (cluster.files / "mnist.py").write_text((ROOT / "examples" / "mnist.py").read_text())
    process = cluster.launch_new(
        *cluster.command("mnist.py", "--workers", "3", "--strategy", "data-parallel")
    )
    status, out, err = end(process, 200)
    assert (status, err) == (0, "")
    assert "data-parallel over 3 workers on 3 hosts (cpu, 1 thread each)" in out
    assert "epoch 15/15  step 480/480" in out
    run = cluster.files / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.96
    assert summary["hosts"] == ["tb0", "tb1", "tb2"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(480))
    assert events[-1]["kind"] == "end"
    assert json.loads((run / "plan.json").read_text())["world_size"] == 3
    weights = safetensors.torch.load_file(run / "checkpoints" / "model.safetensors")
    assert weights["classifier.4.bias"].shape == (10,)
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert {file.name for file in (run / "logs").iterdir()} == {f"rank{n}.log" for n in range(3)}
    assert not list(run.rglob("*.part"))


def test_fit_sends_a_script_and_its_neighbours(cluster: Cluster) -> None:
    (cluster.files / "script.py").write_text(SCRIPT)
    process = cluster.launch("script.py", RAY_ADDRESS=HEAD)
    assert end(process, 60) == (0, "4 ['bias', 'weight']\n", "")


@pytest.mark.whole
def test_the_failing_ranks_own_traceback_is_shown_once(cluster: Cluster) -> None:
    status, _, err = end(cluster.train("job.py:one_raises", "--workers", "2"), 60)
    assert status == 1
    assert err.count("LookupError: only on rank one") == 1
    assert "worker rank 1 failed:" in err
    traceback = (cluster.files / "run" / "logs" / "rank1.traceback").read_text()
    assert "LookupError" in traceback


@pytest.mark.whole
@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("wagontrain.worker", r"worker rank \d on tb{} was killed by SIGKILL .*"),
        ("ray::Rank", r"the Ray actor of worker rank \d on tb{} is gone \(.*\).*"),
    ],
)
def test_a_killed_process_is_named(cluster: Cluster, victim: str, said: str) -> None:
    process = cluster.training("job.py:slow")
    host, number = max(cluster.processes(victim).items())
    os.kill(number, signal.SIGKILL)
    status, _, err = end(process, 20)
    assert status == 1
    assert re.fullmatch(rf"wagontrain: {said.format(host)}\n", err)


@pytest.mark.whole
def test_a_run_is_resumed_where_no_node_has_its_files(cluster: Cluster) -> None:
    """Saved by one strategy on two nodes, resumed by another on three: as one process."""
    program = str(SCRIPTS / "wagontrain")
    alone = cluster.launch(
        program, "run", "job.py:watched", "--strategy", "data-parallel", "--run-dir", "alone"
    )
    assert end(alone, 60)[::2] == (0, "")
    first = cluster.train(
        "job.py:watched", "--workers", "2", "--strategy", "sharded", "--steps", "6"
    )
    assert end(first, 60)[::2] == (0, "")
    rest = cluster.train(
        "job.py:watched", "--workers", "3", "--strategy", "split-weights", "--resume", "run",
        run="rest",
    )  # fmt: skip
    assert end(rest, 60)[::2] == (0, "")

    def losses(run: str) -> list[float]:
        lines = (cluster.files / run / "events.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [event["loss"] for event in found if event["kind"] == "step"]

    assert len(losses("run")) == 6
    assert losses("run") + losses("rest") == pytest.approx(losses("alone"), rel=1e-5)


@pytest.mark.whole
def test_ctrl_c_ends_all(cluster: Cluster) -> None:
    process = cluster.training("job.py:slow")
    process.send_signal(signal.SIGINT)
    status, _, err = end(process, 20)
    assert (status, err) == (130, "wagontrain: stopped by Ctrl-C; all workers were ended\n")


@pytest.mark.parametrize(
    ("workers", "variables", "said"),
    [
        (
            4, {},
            "4 workers were asked for, each with 1 CPU; the Ray cluster has 3 CPUs on 3 nodes: "
            "give --workers 3, or add nodes with `ray start`",
        ),
        (
            2, {"RAY_AUTH_TOKEN": "0" * 64},
            "the Ray cluster does not take this user's token: set RAY_AUTH_MODE=token, and put "
            "the token that the cluster was started with into ~/.ray/auth_token or RAY_AUTH_TOKEN",
        ),
    ],
)  # fmt: skip
def test_refusals_are_one_line(
    cluster: Cluster, workers: int, variables: dict[str, str], said: str
) -> None:
    process = cluster.train("job.py", "--workers", str(workers), **variables)
    assert end(process, 40) == (2, "", f"wagontrain: {said}\n")
    assert not (cluster.files / "run").exists()


@pytest.mark.whole
def test_a_lost_node_is_named(cluster: Cluster) -> None:
    """The last test: the cluster has two nodes afterwards."""
    process = cluster.training("job.py:slow")
    lost = max(cluster.processes("wagontrain.worker"))
    assert cluster.bed.kill(lost) > 3
    status, _, err = end(process, 30)
    assert status == 1
    # Either Ray notices first or the other ranks do.
    assert re.fullmatch(
        rf"wagontrain: (the Ray actor of worker rank \d on|rank \d on host) tb{lost} .*\n", err
    )


@pytest.mark.whole
def test_the_plan_of_a_run_is_followed_on_the_cluster(cluster: Cluster) -> None:
    common = ("job.py", "--workers", "2", "--steps", "4")
    assert end(cluster.train(*common), 120)[0] == 0
    chosen = json.loads((cluster.files / "run" / "plan.json").read_text())["chosen"]
    status, said, wrong = end(cluster.train(*common, "--plan", "run/plan.json", run="second"), 60)
    assert (status, wrong) == (0, "")
    assert chosen["title"] in said
    second = cluster.files / "second"
    summary = json.loads((second / "summary.json").read_text())
    assert (summary["strategy"], summary["settings"]) == (chosen["strategy"], chosen["settings"])
    assert summary["predicted"]["seconds_per_step"] > 0
    assert json.loads((second / "plan.json").read_text())["chosen"] == chosen
    status, _, wrong = end(cluster.train("job.py", "--workers", "3", "--plan", "run/plan.json"), 60)
    assert status == 2
    assert "the plan is for 2 workers, and here are 3" in wrong
