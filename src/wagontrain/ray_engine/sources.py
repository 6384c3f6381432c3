"""The Python files that a task is made of, for hosts that do not have them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from wagontrain.errors import UsageError

SOURCES = "sources"
"""Where a job that travels has its Python files, in its folder."""

RUN = "run"
"""Where the run's files are on a node, in the job's folder."""

MOST_BYTES = 32 << 20
"""Most bytes of Python files that travel with a job."""


def carry(folder: Path, main: Path | None) -> None:
    """Copy a task's Python files into a job's folder.

    Those are the files beside it, the packages beside it, and what has been imported from below
    its folder. Installed packages are not among them.

    Args:
        folder: the job's.
        main: the task's file, or the script's; None for a notebook, whose working directory
            counts as its folder.

    Raises:
        UsageError: they are too many.
    """
    root = (main.parent if main else Path.cwd()).resolve()
    if "site-packages" in root.parts:
        return
    left = MOST_BYTES
    for file in sorted(_files(root)):
        left -= file.stat().st_size
        if left < 0:
            raise UsageError(
                f"the Python files in {root} are more than {MOST_BYTES >> 20} MB, too many to "
                "send to the cluster: put the task and what it imports into a folder of its own"
            )
        target = folder / SOURCES / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _files(root: Path) -> set[Path]:
    beside = {path for path in root.glob("*.py") if path.is_file()}
    packages = {
        path
        for package in root.glob("*/__init__.py")
        for path in package.parent.rglob("*.py")
        if path.is_file()
    }
    return beside | packages | set(_imported(root))


def _imported(root: Path) -> Iterator[Path]:
    """Files of modules that were imported from below a folder, packages of others left out."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        inside = path.is_relative_to(root) and path.is_file()
        if inside and "site-packages" not in path.relative_to(root).parts:
            yield path
