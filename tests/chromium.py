"""Headless Chromium, for tests that look at pages; skipped where it is not there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

_PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

needed = pytest.mark.skipif(_PROGRAM is None, reason="needs Chromium (apt-get install chromium)")


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Any]:
    """A browser; `profile` is an empty folder for what it keeps."""
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=_PROGRAM, headless=True, args=_FLAGS
        )
        context.set_default_timeout(15_000)
        yield context
        context.close()
