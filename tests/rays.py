"""A Ray cluster in hosts of a test bed."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.commands import SCRIPTS, TASK, clean_environment
from tests.forks import Fork
from tests.hosts import way_into
from wagontrain.testbed import links
from wagontrain.testbed.bed import Bed, Shape

HEAD = "10.77.0.1:6379"


@dataclass
class Cluster:
    """Ray nodes in hosts tb0 to tb2, the head in tb0, with one CPU each.

    `files` is seen as `seen` by what is launched, where the nodes see an empty folder.
    """

    bed: Bed
    folder: Path
    environment: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def start_node(self, host: int, *arguments: str) -> None:
        log = self.folder / f"node{host}.log"
        command = [
            SCRIPTS / "ray", "start", *arguments, f"--node-ip-address=10.77.0.{host + 1}",
            f"--temp-dir={self.folder / str(host)}", "--num-cpus=1",
            "--object-store-memory=80000000", "--disable-usage-stats", "--block",
        ]  # fmt: skip
        with log.open("w") as out:
            node = self.bed.start(
                host, [str(word) for word in command], self.environment, stdout=out,
                stderr=subprocess.STDOUT, env=clean_environment(),
            )  # fmt: skip
        self.nodes.append(node)
        until(lambda: "Ray runtime started" in log.read_text(), f"node {host} is up")

    def launch(self, *command: str, **variables: str) -> Fork:
        """Start a script in tb0, in the folder that nobody else sees, as a fork."""
        return Fork(
            command, self._seen, clean_environment() | self.environment | variables,
            before=partial(_see, way_into(self.bed, 0), self.files, self._seen), starts=1,
        )  # fmt: skip

    def launch_new(self, *command: str) -> subprocess.Popen[str]:
        """Likewise, in a new interpreter."""
        enter = f'mount --bind {self.files} {self._seen} && cd {self._seen} && exec "$@"'
        process: subprocess.Popen[str] = self.bed.start(
            0, ["sh", "-c", enter, "sh", *command], self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(),
        )  # fmt: skip
        return process

    @property
    def _seen(self) -> Path:
        seen = self.folder / "seen"
        seen.mkdir(exist_ok=True)
        return seen

    def train(self, *arguments: str, run: str = "run", **variables: str) -> Fork:
        return self.launch(*self.command(*arguments, run=run), **variables)

    @staticmethod
    def command(*arguments: str, run: str = "run") -> list[str]:
        program = str(SCRIPTS / "wagontrain")
        return [program, "run", *arguments, "--engine", "ray", "--address", HEAD, "--run-dir", run]

    def training(self, task: str) -> Fork:
        """A run on two nodes, of which some steps are done."""
        process = self.train(task, "--workers", "2")
        events = self.files / "run" / "events.jsonl"
        until(
            lambda: (
                process.poll() is not None
                or (events.exists() and '"step": 3' in events.read_text())
            ),
            "training is under way",
        )
        assert process.poll() is None, process.communicate(10)
        return process

    def processes(self, kind: str) -> dict[int, int]:
        """Process numbers of actors ("ray::Rank") or workers ("wagontrain.worker"), by host."""
        found = {}
        for host, namespace in enumerate(self.bed.namespaces):
            for process in links.processes(namespace):
                folder = Path(f"/proc/{process}")
                try:  # a fork has its name, of 15 letters, in another place
                    named = (folder / "cmdline").read_text() + (folder / "comm").read_text()
                except OSError:  # it has ended
                    continue
                if kind[:15] in named:
                    found[host] = process
        return found


def until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, f"not in {seconds} s: {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def up(folder: Path) -> Iterator[Cluster]:
    """A cluster of three nodes, whose files are in `folder`."""
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "tmp").mkdir()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "TMPDIR": str(folder / "tmp"),
    }
    with Bed.up(Shape(3)) as bed:
        cluster = Cluster(bed, folder, environment)
        cluster.start_node(0, "--head", "--port=6379", "--include-dashboard=false")
        for host in (1, 2):
            cluster.start_node(host, f"--address={HEAD}")
        yield cluster
    for node in cluster.nodes:
        node.wait(10)


@contextlib.contextmanager
def used(running: Cluster) -> Iterator[Cluster]:
    """The cluster, on which nothing is left afterwards, unless a node was lost."""
    running.files.mkdir()
    (running.files / "parts.py").write_text(TASK)
    (running.files / "job.py").write_text("from parts import *\n")
    yield running
    running.files.rename(running.folder / f"files-{secrets.token_hex(4)}")
    for kind in ("ray::Rank", "wagontrain.worker", "servers.serving", "ray_engine."):
        until(lambda kind=kind: not running.processes(kind), f"no {kind} is left", 10)
    if all(node.poll() is None for node in running.nodes):
        assert not list((running.folder / "tmp").glob("wagontrain-*"))


def _see(enter: Any, files: Path, seen: Path) -> None:
    enter()
    subprocess.run(["mount", "--bind", files, seen], check=True, timeout=10)


def end(process: subprocess.Popen[str] | Fork, within: float) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err
