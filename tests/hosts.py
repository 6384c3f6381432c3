"""Processes on test-bed hosts that tests share: torch is imported once per host, not per test.

In each host a nursery process waits for requests and forks a child for each, which then is what
`wagontrain run` would have been. A child can be told to stop in a phase, so that a test can kill
it, stop it or cut it off right there.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.commands import ROOT
from wagontrain.testbed.bed import Bed, Shape
from wagontrain.testbed.run import variables

# Long enough for processes that get little of a busy machine.
PATIENCE = 5.0
ASKED = ("run", "job.py:watched", "--run-dir", "R", "--patience", str(PATIENCE))


def wait_for(file: Path, seconds: float = 60) -> None:
    """Return when the file is there."""
    limit = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < limit, f"no {file.name}"
        time.sleep(0.05)


class Nursery:
    """Hosts with a nursery process in each.

    Args:
        hosts: how many.
        modules: what else the processes import before they have children.
        shape: of the test bed.
    """

    def __init__(self, hosts: int, modules: Sequence[str] = (), **shape: Any) -> None:
        self.bed = Bed.up(Shape(hosts, **shape))
        self._nurseries = [
            self.bed.start(
                host, [sys.executable, "-m", "tests.hosts", *modules], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for host in range(hosts)
        ]  # fmt: skip
        self.children: list[Child] = []
        for nursery in self._nurseries:
            assert nursery.stdout is not None
            assert nursery.stdout.readline() == "ready\n"

    def run(
        self,
        host: int,
        size: int,
        folder: Path,
        *arguments: str,
        phase: str = "",
        environment: Mapping[str, str | None] | None = None,
    ) -> Child:
        """Start `wagontrain ARGUMENTS` as the rank of a host in a job of so many.

        With `phase`, it writes its rank to a file `reached` when it comes to that phase, and
        stays there. `environment` replaces variables, or with None removes them.
        """
        nursery = self._nurseries[host]
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        changes = dict(environment or {})
        usual = variables(self.bed, host, 0, 1) | {
            # A port of its own for each job.
            "WORLD_SIZE": str(size), "MASTER_PORT": str(20_000 + zlib.crc32(bytes(folder)) % 9_000),
        }  # fmt: skip
        request = {
            "environment": usual | changes, "name": f"rank{host}", "folder": str(folder),
            "arguments": arguments, "phase": phase,
        }  # fmt: skip
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        child = Child(int(nursery.stdout.readline()), folder / f"rank{host}.out")
        self.children.append(child)
        return child

    def reset(self) -> None:
        """End all children, and heal all links."""
        for child in self.children:
            child.signal(signal.SIGKILL)
        for host in range(self.bed.shape.hosts):
            self.bed.heal(host)

    def down(self) -> None:
        """Take the hosts down."""
        self.bed.down()
        for nursery in self._nurseries:
            nursery.communicate(timeout=10)


class Child:
    """One rank under way."""

    def __init__(self, process: int, output: Path) -> None:
        self.process = process
        self.output = output

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        if self.status() is None:
            os.kill(self.process, number)

    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        file = self.output.with_suffix(".status")
        return int(file.read_text()) if file.exists() and file.read_text() else None

    def end(self, within: float) -> tuple[int, str]:
        """Its exit status and what it said, once it has ended, which has to be in time."""
        limit = time.monotonic() + within
        while (status := self.status()) is None:
            assert time.monotonic() < limit, f"still running: {self.output.read_text()}"
            time.sleep(0.05)
        return status, self.output.read_text()


def _serve() -> None:
    """What a nursery does."""
    import threading

    import torch

    from wagontrain import cli  # noqa: F401  imported here, so that children need not

    for module in sys.argv[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # or a child's first collection makes every page its own
    own_process = threading.Lock()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        name = request["name"]
        with own_process:
            child = os.fork()
            if child == 0:
                _live(request, folder / f"{name}.out")
        print(child, flush=True)
        threading.Thread(target=_bury, args=(child, folder / f"{name}.status"), daemon=True).start()


def _bury(child: int, file: Path) -> None:
    _, status = os.waitpid(child, 0)
    file.write_text(str(os.waitstatus_to_exitcode(status)))


def _live(request: dict[str, Any], output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for key, value in request["environment"].items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    os.chdir(request["folder"])
    sys.argv = ["wagontrain", *request["arguments"]]
    _stay_in(request["phase"], Path(request["folder"]) / "reached")
    status: Any = 1
    try:
        from wagontrain import cli

        cli.main()
    except SystemExit as end:
        status = end.code
    except Exception:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0)


def _stay_in(phase: str, reached: Path) -> None:
    from wagontrain.watch import RankWatch

    usual = RankWatch.at

    def at(watch: RankWatch, doing: str, patient: bool = False) -> None:
        usual(watch, doing, patient)
        if phase and doing.startswith(phase) and not reached.exists():
            reached.write_text(str(watch.rank))
            time.sleep(60)

    RankWatch.at = at  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve()
