"""Profiles that are kept: the same task on the same machine is measured once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from pathlib import Path

import torch

from wagontrain.building import skeleton
from wagontrain.errors import UsageError
from wagontrain.planner.choosing import sizes
from wagontrain.planner.profiling import fingerprint, measure
from wagontrain.profile import Profile
from wagontrain.task import Task


def mark_of(task: Task) -> str:
    """The fingerprint of a task's model, built without memory where it can be."""
    return fingerprint(task, skeleton(task) or task.build_model())


def profile_of(task: Task, workers: int, folder: Path) -> Profile:
    """The profile of a task on this machine, measured here unless that was done before.

    Args:
        task: what is to be trained.
        workers: that are going to share a batch.
        folder: where profiles are kept.

    Raises:
        ModelError: the model or loss failed on a batch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = sizes(task, workers)
    machine = [platform.node(), platform.processor(), torch.get_num_threads(), torch.__version__]
    told = json.dumps([mark_of(task), counts, machine, str(device)])
    file = folder / f"profile-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, UsageError):  # none yet, or of another version
        return Profile.from_json(file.read_text())
    profile = measure(task, device, counts)
    with contextlib.suppress(OSError):  # a folder that cannot be written keeps nothing
        folder.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".new").write_text(profile.to_json())
        file.with_suffix(".new").replace(file)
    return profile
