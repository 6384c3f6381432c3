"""What a fork of the waiting process does to be a script or a module; see `forks`.

Imported by the waiting process, before it has any threads.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# What commands import sooner or later, so that forks need not. Not Ray, whose own code reads the
# environment when it is loaded.
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.fsdp
import torch.distributed.run
import torch.utils.tensorboard  # noqa: F401
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import wagontrain.cli
import wagontrain.pieces
from wagontrain.launch import local
from wagontrain.ray_engine import lead

wagontrain.discover()  # imports the strategies
gc.freeze()  # a fork that collects garbage need not make every page its own

_ROOT = Path(__file__).parents[1]
# Where an interpreter looks for modules, save for the folder of what it runs.
_PATH = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]


def redirect(number: int, file: Path) -> None:
    """Make a file this process's standard input (0), output or errors."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY)
    os.dup2(descriptor, number)
    os.close(descriptor)


def become(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be `python WORDS` to its end: a script, `-m` and a module, or "-"."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # where it is hangs on the environment
    sys.stdin = os.fdopen(0, closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    what, *arguments = words
    sys.path[:] = _PATH
    if what == "-m":
        what, *arguments = arguments
        Path("/proc/self/comm").write_text(what.removeprefix("wagontrain."))  # for `ps`
        sys.path.insert(0, str(Path.cwd()))
        end(lambda: runpy.run_module(what, run_name="__main__", alter_sys=True), what, arguments)
    sys.path.insert(0, "" if what == "-" else str(Path(what).resolve().parent))
    end(lambda: _run_script(what), what, arguments)


def _run_script(what: str) -> None:
    """As the interpreter does; `runpy` would take the variables away at the end."""
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if what == "-":
        code = compile(sys.stdin.read(), "<stdin>", "exec")
    else:
        main.__file__ = what
        code = compile(Path(what).read_bytes(), what, "exec")
    exec(code, main.__dict__)  # noqa: S102


def end(program: Callable[[], Any], name: str, arguments: Sequence[str]) -> NoReturn:
    """Run a program, and end this process as the interpreter would."""
    sys.argv = [name, *arguments]
    status: Any = 1
    try:
        program()
        status = 0
    except SystemExit as asked:
        status = 0 if asked.code is None else asked.code
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Spare:
    """A fork of a launcher at its beginning, which waits to become what the launcher starts.

    So it is the launcher's child, and has none of its threads.
    """

    _left: list[Spare]

    def __init__(self, before: Sequence[Spare]) -> None:
        orders, self._orders = os.pipe()
        said, writing = os.pipe()
        self.stdin = os.fdopen(writing, "wb")
        self.pid = os.fork()
        if self.pid == 0:
            for other in (*before, self):
                os.close(other._orders)  # or the others would wait on when the launcher is gone
                other.stdin.close()
            with os.fdopen(orders) as file:
                order = file.read()
            if not order:
                os._exit(0)
            self._take(said, **json.loads(order))
        os.close(orders)
        os.close(said)
        self.returncode: int | None = None

    @classmethod
    def prepare(cls, count: int) -> None:
        """Have torch's agent and the Ray engine here start forks of what this process is now."""
        cls._left = []
        for _ in range(count):
            cls._left.append(cls(cls._left))
        subprocess_handler.Popen = cls._start
        lead.subprocess = ModuleType("subprocess")
        lead.subprocess.__dict__.update(subprocess.__dict__, Popen=cls._start)

    @classmethod
    def _start(
        cls,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        start_new_session: bool = False,
        **_: Any,
    ) -> Spare:
        """As subprocess.Popen, for Python, or for a shell that becomes Python."""
        words, log = list(args), stdout.name if stdout else None
        variables = dict(os.environ if env is None else env)
        if words[0] == "/bin/sh":
            script, folder, *words = words[2:]
            assert script == local._INTO_OWN_LOG
            log = f"{folder}/rank{variables['RANK']}.log"
        python, unbuffered, *words = words
        assert (python, unbuffered, start_new_session) == (sys.executable, "-u", True)
        spare = cls._left.pop()
        with os.fdopen(spare._orders, "w") as orders:
            json.dump({"words": words, "environment": variables, "log": log}, orders)
        return spare

    @staticmethod
    def _take(
        said: int, words: list[str], environment: dict[str, str], log: str | None
    ) -> NoReturn:
        os.setsid()
        os.dup2(said, 0)
        if log is not None:
            redirect(1, Path(log))
            os.dup2(1, 2)
        become(words, environment)

    def poll(self) -> int | None:
        """As of subprocess.Popen."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """As of subprocess.Popen."""
        limit = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        return status

    def terminate(self) -> None:
        """As of subprocess.Popen."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """As of subprocess.Popen."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
