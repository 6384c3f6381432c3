"""The page beside a training that was started with `--dashboard`.

It is a process of its own, which gives way to others: the launching process may train itself, and
a thread would take its turns. It ends when its standard input does, so with the launching
process, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from wagontrain.errors import UsageError

NEEDED = "the live page needs packages that are not there: pip install 'wagontrain[dashboard]'"

_END_SECONDS = 5.0

# The package imports torch, which takes seconds and much memory, and which the page has no use
# for: the process is told where the package is, without running its __init__.
_PROGRAM = """
import sys, types
package = types.ModuleType("wagontrain")
package.__path__ = [sys.argv[1]]
sys.modules["wagontrain"] = package
from wagontrain.dashboard.beside import main
main(sys.argv[2])
"""


def require() -> None:
    """Make sure that what the server is made of is there.

    Raises:
        UsageError: it is not, and how to get it.
    """
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UsageError(NEEDED)


@contextlib.contextmanager
def page(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Within, the page of a run is there.

    Args:
        folder: of the run; it need not be there yet.
        say: takes a line for the user: where the page is, or why there is none.
    """
    package = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(package), str(folder.absolute())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,  # Ctrl-C is for the run, whose end the page shows
    )  # fmt: skip
    over = threading.Event()
    listener = threading.Thread(target=_hear, args=(process, say, over), daemon=True, name="page")
    listener.start()
    try:
        yield
    finally:
        over.set()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_END_SECONDS)
        listener.join(_END_SECONDS)
        assert process.stdout is not None
        process.stdout.close()


def _hear(
    process: subprocess.Popen[str], say: Callable[[str], None], over: threading.Event
) -> None:
    """Pass on what the process has to say: its address, or in the last line why it has none."""
    assert process.stdout is not None
    last, found = "", False
    for line in process.stdout:
        last = line.strip()
        if last.startswith("http://") and not found:
            found = True
            say(f"live page: {last}")
    if not found and not over.is_set():
        say(f"there is no live page, and training goes on without: {last}")


def main(folder: str) -> None:
    """What the process runs."""
    from wagontrain.dashboard.serving import Place, Server

    os.nice(10)
    server = Server(Path(folder), Place())
    print(server.url, flush=True)
    server.run(until=_end_of_input)


async def _end_of_input() -> None:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while await reader.read(1024):
        pass
