from __future__ import annotations

import collections
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wagontrain import plain
from wagontrain.errors import UsageError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, st.integers()).map(collections.Counter)
    ),
)


@given(VALUES)
def test_what_is_read_is_what_was_written(value: object) -> None:
    again = plain.decode(plain.encode(value))
    assert again == value
    assert type(again) is type(value)


def test_a_schedulers_milestones_are_still_met() -> None:
    """As text keys they never would be, and the rate would stay high without a word."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    make = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 4])
    state = plain.decode(plain.encode(make(optimizer).state_dict()))
    again = make(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))
    again.load_state_dict(state)
    assert again.milestones == collections.Counter([2, 4])


def test_an_object_is_refused() -> None:
    with pytest.raises(UsageError, match="holds a Linear, which is no plain data"):
        plain.encode({"a": [nn.Linear(1, 1)]})
