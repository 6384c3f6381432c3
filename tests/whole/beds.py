"""`wagontrain testbed run`, as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.commands import SCRIPTS, clean_environment


def said_on_hosts(
    folder: Path, *command: str | Path, hosts: int = 4, more: Sequence[str] = ()
) -> tuple[int, str]:
    """Exit status and output of a command run once on each host of a bed."""
    asked = ["wagontrain", "testbed", "run", "--hosts", str(hosts), "--rate", "1gbit",
             "--json", "usage.json", *more, "--"]  # fmt: skip
    environment = clean_environment() | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*asked, *command], cwd=folder, env=environment, timeout=280, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def on_hosts(folder: Path, *command: str | Path, **how: Any) -> list[dict[str, Any]]:
    """What was counted on each host of a bed, on all of which the command ended well."""
    status, said = said_on_hosts(folder, *command, **how)
    assert status == 0, said[-4000:]
    usage: list[dict[str, Any]] = json.loads((folder / "usage.json").read_text())["hosts"]
    return usage
