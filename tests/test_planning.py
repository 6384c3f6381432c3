"""`wagontrain plan`, `probe` and `run --plan`, as a person types them."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gang import Gang
from tests.planner.made import cluster as cluster_of
from wagontrain import cli, cluster, planning
from wagontrain.planner import choosing
from wagontrain.planner.probing import probe
from wagontrain.task import load_task
from wagontrain.transport import Context

SHIPPED = "8-workstations-1gbe"


@pytest.fixture
def typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Exit status, output and errors of a command, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wagontrain", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_a_plan_for_a_cluster_that_is_not_here(task_file: Path, typed: Any, tmp_path: Path) -> None:
    status, said, wrong = typed("plan", task_file, "--cluster", SHIPPED, "--json")
    assert (status, wrong) == (0, "")
    plan = json.loads(said)
    assert plan["world_size"] == 8
    assert plan["cluster"] == SHIPPED
    assert all(each["why"] for each in plan["others"])
    assert list((tmp_path / "cache" / "wagontrain").glob("profile-*.json"))
    page = tmp_path / "plan.html"
    status, said, _ = typed("plan", task_file, "--cluster", SHIPPED, "--html", page)
    assert status == 0
    assert plan["chosen"]["title"] in said
    assert "wins" in said
    assert plan["chosen"]["strategy"] in page.read_text()


def test_a_plan_is_followed_or_refused(task_file: Path, typed: Any, tmp_path: Path) -> None:
    status, said, wrong = typed("plan", task_file, "--json")  # one worker
    assert status == 0, wrong
    file, folder = tmp_path / "plan.json", tmp_path / "run"
    file.write_text(said)
    done = typed("run", task_file, "--plan", file, "--run-dir", folder)
    assert done[0] == 0, done
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategy"] == json.loads(said)["chosen"]["strategy"]
    foretold = summary["predicted"]
    assert foretold["seconds_per_step"] > 0
    assert foretold["peak_memory"] > 1e7
    for more, why in [
        (["--workers", "2"], "the plan is for 1 workers, and here are 2"),
        (["--batch-size", "4"], "made for another model, optimizer or batch size"),
        (["--strategy", "hybrid"], "leave out either the plan or the strategy"),
    ]:
        place = tmp_path / "refused"
        status, _, wrong = typed("run", task_file, "--plan", file, "--run-dir", place, *more)
        assert (status, len(wrong.splitlines())) == (2, 1)
        assert why in wrong
        assert not place.exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--cluster", "none.toml"], "none.toml"),
        (["--cluster", "8-workstations"], SHIPPED),
        (["--cluster", SHIPPED, "--workers", "2"], "leave out --workers"),
        (["--cluster", SHIPPED, "--trial"], "starts none"),
        (["--workers", "0"], "0 workers were asked for"),
    ],
)
def test_slips_are_one_line(task_file: Path, typed: Any, arguments: list[str], why: str) -> None:
    status, _, wrong = typed("plan", task_file, *arguments)
    assert status == 2
    assert why in wrong
    assert len(wrong.splitlines()) == 1


def test_relaxed_strategies_only_with_leave(task_file: Path, typed: Any) -> None:
    for more, told in [((), False), (("--allow", "relaxed"), True)]:
        status, said, wrong = typed("plan", task_file, "--cluster", SHIPPED, "--json", *more)
        assert (status, wrong) == (0, "")
        plan = json.loads(said)
        everybody = [plan["chosen"], *plan["others"]]
        assert any(not each["exact"] for each in everybody) == told
        assert ("nothing was measured here" in " ".join(plan["notes"])) == told


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["plan", "--cluster", SHIPPED, "--allow", "all"], "--allow relaxed does"),
        (["run", "--allow", "relaxed", "--strategy", "hybrid"], "needs no leave"),
        (["run", "--allow", "relaxed", "--plan", "plan.json"], "needs no leave"),
    ],
)
def test_leave_for_nothing(task_file: Path, typed: Any, arguments: list[str], why: str) -> None:
    command, *rest = arguments
    status, _, wrong = typed(command, task_file, *rest)
    assert (status, len(wrong.splitlines())) == (2, 1)
    assert why in wrong


def test_the_plan_of_a_run_is_followed_and_that_of_another_cluster_refused(
    task_file: Path, typed: Any, tmp_path: Path
) -> None:
    status, said, wrong = typed("plan", task_file, "--json")
    assert status == 0, wrong
    (tmp_path / "plan.json").write_text(said)
    first, second = tmp_path / "first", tmp_path / "second"
    assert typed("run", task_file, "--plan", tmp_path / "plan.json", "--run-dir", first)[0] == 0
    file = first / "plan.json"
    assert typed("run", task_file, "--plan", file, "--run-dir", second)[0] == 0
    assert json.loads((second / "plan.json").read_text())["chosen"] == json.loads(said)["chosen"]
    told = json.loads(said)
    for change, what in [({"hosts": 2}, "on 2 hosts"), ({"device": "cuda"}, "(cuda)")]:
        file.write_text(json.dumps(told | change))
        status, _, wrong = typed("run", task_file, "--plan", file, "--run-dir", tmp_path / "no")
        assert (status, len(wrong.splitlines())) == (2, 1)
        assert f"the plan is for 1 workers {'(cpu) ' * ('hosts' in change)}" in wrong
        assert what in wrong
        assert not (tmp_path / "no").exists()


FAILING = """
import torch
from torch import nn

class Fails(nn.Linear):
    def forward(self, x):
        raise LookupError("nothing here")

def fails():
    return make(model=partial(Fails, 4, 2))

def lbfgs():
    return make(optimizer=torch.optim.LBFGS)
"""


@pytest.mark.whole
def test_servers_are_started_where_a_plan_with_leave_chose_them(
    task_file: Path, typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which wins is chance here; so the plan is made for a cluster on which it is this one."""
    made = planning.plan_offline(load_task(str(task_file)), cluster_of(2), relaxed=True)
    served = [each for each in made.others if each.title == "parameter-server"]
    asked: list[Any] = []

    def plan(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return replace(made, chosen=served[0], others=(made.chosen,))

    monkeypatch.setattr(planning, "plan", plan)
    folder = tmp_path / "run"
    told = ("--workers", "2", "--steps", "4", "--run-dir", folder)
    status, said, wrong = typed("run", task_file, "--allow", "relaxed", *told)
    assert (status, wrong) == (0, "")
    assert asked[0]["relaxed"]
    assert "nothing was measured here" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["strategy"], summary["exact"], summary["steps"]) == (
        "parameter-server",
        False,
        4,
    )
    assert summary["predicted"]["seconds_per_step"] > 0
    assert (
        json.loads((folder / "plan.json").read_text())["chosen"]["strategy"] == "parameter-server"
    )


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_task_whose_first_batch_fails(task_file: Path, typed: Any, command: str) -> None:
    task_file.write_text(task_file.read_text().replace("if __name__", FAILING + "if __name__"))
    status, _, wrong = typed(command, f"{task_file}:fails")
    assert status == 1
    assert "forward failed on the first batch" in wrong
    assert "LookupError: nothing here" in wrong
    assert len(wrong.splitlines()) == 1


def test_lbfgs_leaves_nothing_to_choose(task_file: Path, typed: Any) -> None:
    task_file.write_text(task_file.read_text().replace("if __name__", FAILING + "if __name__"))
    status, _, wrong = typed("plan", f"{task_file}:lbfgs", "--cluster", SHIPPED)
    assert status == 2
    assert "sandblaster" in wrong
    assert len(wrong.splitlines()) == 1


def test_what_cannot_be_read_is_no_plan(task_file: Path, typed: Any, tmp_path: Path) -> None:
    for content in ("{", "{}"):
        (tmp_path / "plan.json").write_text(content)
        status, _, wrong = typed("run", task_file, "--plan", tmp_path / "plan.json")
        assert status == 2
        assert "plan.json" in wrong
        assert len(wrong.splitlines()) == 1


def probed(context: Context) -> str:
    return cluster.dump(probe(context, "gang"))


def test_a_probe_is_a_file_that_can_be_planned_for(
    gang: Gang, task_file: Path, typed: Any, tmp_path: Path
) -> None:
    texts = gang.run(3, probed)
    assert len(set(texts)) == 1  # all ranks came to the same
    file = tmp_path / "cluster.toml"
    file.write_text(texts[0])
    content = tomllib.loads(texts[0])
    assert sum(host["count"] * host["workers"] for host in content["hosts"]) == 3
    assert content["within"].keys() == {"all_reduce", "exchange", "broadcast", "send"}
    assert {row[0] for row in content["within"]["all_reduce"]["points"]} == {2, 3}
    assert all(host["crowded"] >= 1 for host in content["hosts"])
    status, said, _ = typed("plan", task_file, "--cluster", file, "--json")
    assert status == 0
    assert json.loads(said)["world_size"] == 3


def test_samples_that_are_profiled() -> None:
    class Some:
        batch_size, accumulate = 128, 2

    assert choosing.sizes(Some(), 4) == [8, 16, 32]  # type: ignore[arg-type]
    Some.batch_size = 1
    assert choosing.sizes(Some(), 4) == [1, 1, 1]  # type: ignore[arg-type]
