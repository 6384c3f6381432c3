from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wagontrain.errors import UsageError
from wagontrain.servers.parts import (
    ASSIGNED,
    CONSTANT,
    PARAMETERS,
    PUSHED,
    WHOLE,
    Buffer,
    Entry,
    Whole,
    divide,
    region_of,
)

MODEL = [
    Entry("weight", (5, 3), "float32", 0),
    Entry("bias", (5,), "float32", 1),
    Entry("half", (4, 2), "bfloat16", 0),
    Entry("mean", (5,), "float32", "assigned"),
    Entry("count", (), "int64", "assigned"),
    Entry("frozen", (7,), "float64", "constant"),
    Entry("empty", (0, 3), "float32", 0),
]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
entries = st.lists(
    st.tuples(
        shapes,
        st.sampled_from(["float32", "float64", "bfloat16", "int64", "uint8"]),
        st.sampled_from([0, 1, "assigned", "constant"]),
    ),
    max_size=8,
).map(lambda drawn: [Entry(f"t{at}", *each) for at, each in enumerate(drawn)])


@given(entries, st.integers(1, 7))
def test_every_element_is_on_one_shard(model, shards):
    held = {entry.name: [0] * entry.bytes for entry in model}
    for parts in divide(model, shards):
        for part in parts:
            assert part.start < part.stop
            size = part.bytes // (part.stop - part.start)
            for at in range(part.start * size, part.stop * size):
                held[part.name][at] += 1
    assert all(count == 1 for counts in held.values() for count in counts)


@given(entries, st.integers(1, 7))
def test_shards_are_even_within_a_row(model, shards):
    for region in (PARAMETERS, ASSIGNED, CONSTANT):
        inside = [entry for entry in model if region_of(entry.group) == region]
        fair = sum(entry.bytes for entry in inside) / shards
        row = max((entry.row for entry in inside), default=0)
        for parts in divide(model, shards):
            own = sum(part.bytes for part in parts if region_of(part.group) == region)
            assert abs(own - fair) <= row


@given(entries, st.integers(1, 7))
def test_cuts_are_between_rows_and_few(model, shards):
    divided = divide(model, shards)
    by_name = {entry.name: entry for entry in model}
    for part in (part for parts in divided for part in parts):
        entry = by_name[part.name]
        size = part.bytes // (part.stop - part.start)
        assert part.start * size % entry.row == 0
        assert part.stop * size % entry.row == 0
    filled = sum(entry.bytes > 0 for entry in model)
    assert sum(map(len, divided)) <= filled + 3 * (shards - 1)


@given(entries, st.integers(1, 7), st.integers(0, 2**31))
def test_slices_of_a_whole_model_are_the_shards_memory(model, shards, seed):
    whole = Whole(model, shards)
    generator = torch.Generator().manual_seed(seed)
    for view in whole.views.values():
        view.copy_(torch.randint(0, 100, view.shape, generator=generator))
    for shard, parts in enumerate(divide(model, shards)):
        buffer = Buffer(parts)
        for own, sent in zip(buffer.regions, whole.slices(shard, WHOLE), strict=True):
            own.copy_(sent)
        for part, view in zip(buffer.parts, buffer.views, strict=True):
            expected = whole.views[part.name].reshape(-1)[part.start : part.stop]
            assert torch.equal(view, expected)


def test_views_of_a_whole_model_share_its_memory():
    whole = Whole(MODEL, 2, PUSHED)
    assert "frozen" not in whole.views
    whole.views["weight"].fill_(1)
    sent = torch.cat([whole.slices(shard)[PARAMETERS] for shard in range(2)])
    assert int((sent.view(torch.uint8) != 0).sum()) == 2 * 15  # 1.0 has two bytes that are not 0
    assert whole.views["weight"].shape == (5, 3)
    assert whole.views["count"].shape == ()


def test_runs_hold_all_parameters_of_a_type():
    (parts,) = divide(MODEL, 1)
    buffer = Buffer(parts)
    buffer.views[0].fill_(3)
    assert [run.dtype for run in buffer.runs] == [torch.float32, torch.bfloat16]
    assert [len(run) for run in buffer.runs] == [20, 8]
    assert float(buffer.runs[0].sum()) == 3 * len(buffer.views[0])
    assert [len(region) for region in buffer.regions] == [20 * 4 + 8 * 2, 8 + 5 * 4, 7 * 8]


def test_large_tensors_are_cut_and_small_ones_stay_whole():
    model = [Entry("large", (100, 10), "float32", 0), Entry("small", (10,), "float32", 0)]
    parts = divide(model, 2)
    assert [(part.name, part.start, part.stop) for part in parts[0]] == [("large", 0, 500)]
    assert [(part.name, part.start, part.stop) for part in parts[1]] == [
        ("large", 500, 1000),
        ("small", 0, 10),
    ]


def test_wide_rows_of_one_are_cut_inside():
    parts = divide([Entry("wide", (1, 100), "float32", 0)], 4)
    assert [[part.bytes for part in each] for each in parts] == [[100]] * 4


def test_more_shards_than_numbers():
    parts = divide([Entry("scalar", (), "float32", 0)], 3)
    assert sorted(map(len, parts)) == [0, 0, 1]
    assert all(Buffer(each).regions[PARAMETERS] is not None for each in parts)


def test_no_shard_is_refused():
    with pytest.raises(UsageError, match="over 0 shards: give at least 1"):
        divide(MODEL, 0)


def test_an_unknown_type_is_refused():
    with pytest.raises(UsageError, match="no type of tensor 'float33'"):
        divide([Entry("odd", (3,), "float33", 0)], 1)
