"""The random numbers of a process: torch's (on the CPU), Python's and NumPy's, as one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded_numbers(seed: int) -> Iterator[None]:
    """Within, torch's, Python's and NumPy's random numbers begin at `seed`; then as before."""
    before = random_states()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        set_random_states(before)


def random_states() -> tuple[Any, Any, Any]:
    """Where torch's (on the CPU), Python's and NumPy's random numbers are."""
    return torch.default_generator.get_state(), random.getstate(), np.random.get_state()


def set_random_states(states: tuple[Any, Any, Any]) -> None:
    """Have them go on from there."""
    torch.default_generator.set_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
