from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from wagontrain.ray_engine.scratch import Scratch, sweep

HOLD = (
    "from wagontrain.ray_engine.scratch import Scratch; import time\n"
    "print(Scratch().path, flush=True); time.sleep(100)"
)


def test_only_what_nobody_holds_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    own = Scratch()
    (tmp_path / "wagontrain-rank-new").mkdir()  # one that is only just being made
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=-1, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        sweep()
        assert theirs.is_dir()
        other.kill()
    sweep()
    assert sorted(tmp_path.iterdir()) == sorted([own.path, tmp_path / "wagontrain-rank-new"])
    own.remove()
    assert not own.path.exists()
