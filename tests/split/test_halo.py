"""Which rows each rank has and needs, against torch's convolution of the whole image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import wagontrain as wt
from wagontrain.split.chain import sides, window_of
from wagontrain.split.halo import Halo, Window, common, plan

WINDOWS = st.builds(
    lambda size, stride, before, after: Window(size, stride, min(before, size), min(after, size)),
    st.integers(1, 7), st.integers(1, 4), st.integers(0, 4), st.integers(0, 4),
)  # fmt: skip


def convolved(x: Tensor, window: Window) -> Tensor:
    kernel = torch.arange(1.0, window.size + 1).view(1, 1, -1, 1)
    padded = F.pad(x, (0, 0, window.before, window.after))
    return F.conv2d(padded, kernel, stride=(window.stride, 1))


@given(st.lists(WINDOWS, min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 6))
def test_strips_put_together_are_the_whole(windows: list[Window], height: int, ranks: int) -> None:
    whole = torch.arange(1.0, height + 1).view(1, 1, -1, 1)
    strips: list[Tensor] = []
    for window, halo in zip(windows, plan(windows, height, ranks), strict=False):
        if window.rows(height) < ranks or height < ranks:
            return
        strips = strips or [whole[:, :, rows.start : rows.stop] for rows in halo.owned]
        results = []
        for rank in range(ranks):
            wide = torch.zeros(1, 1, len(halo.needed[rank]), 1)
            start = halo.needed[rank].start
            for source in range(ranks):
                rows, first = halo.travelling(source, rank), halo.owned[source].start
                wide[:, :, rows.start - start : rows.stop - start] += strips[source][
                    :, :, rows.start - first : rows.stop - first
                ]
            plain = Window(window.size, window.stride)
            results.append(convolved(wide, plain))
        whole, strips, height = convolved(whole, window), results, window.rows(height)
        assert torch.cat(strips, 2).equal(whole)
        assert whole.shape[2] == height


@given(st.integers(0, 3), st.integers(4, 60), st.integers(2, 4))
def test_a_convolution_borrows_half_a_window_on_either_side(
    half: int, height: int, ranks: int
) -> None:
    if height // ranks < max(half, 1):
        return
    (halo, _) = plan([Window(2 * half + 1, 1, half, half)], height, ranks)
    for source in range(ranks):
        for to in range(ranks):
            rows = len(halo.travelling(source, to))
            assert rows == {0: len(halo.owned[to]), 1: half}.get(abs(source - to), 0)


def test_rows_of_a_thin_strip_come_from_afar() -> None:
    (halo, _) = plan([Window(5, 1, 2, 2)], 4, 4)
    assert [len(halo.travelling(source, 0)) for source in range(4)] == [1, 1, 1, 0]
    assert halo.returning(0, 2) == halo.travelling(2, 0) == range(2, 3)


def test_pooling_of_an_even_share_borrows_nothing() -> None:
    (halo, last) = plan([Window(2, 2)], 16, 4)
    assert all(halo.quiet(rank) for rank in range(4))
    assert last.owned == (range(2), range(2, 4), range(4, 6), range(6, 8))


def test_who_has_what_it_needs_may_still_have_to_send() -> None:
    halo = Halo((range(3), range(3, 4)), (range(3), range(2, 4)))
    assert not halo.quiet(0)
    assert not halo.quiet(1)


def test_ranges_without_common_numbers() -> None:
    assert len(common(range(3), range(5, 9))) == 0
    assert len(common(range(5, 9), range(3))) == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, (3, 2), (2, 1), (1, 0), (2, 1)),
        nn.Conv2d(1, 1, 4, padding="same"),
        nn.Conv2d(1, 1, 4, padding="valid"),
        nn.MaxPool2d(3, padding=1),
        nn.MaxPool2d((3, 2), (1, 2), dilation=2),
        nn.AvgPool2d(3, 2, padding=1),
        nn.BatchNorm2d(1),
        wt.nn.LocallyConnected2d(1, 1, 11, (3, 2), (2, 1), (1, 0)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_windows_of_layers(layer: nn.Module) -> None:
    assert window_of(layer).rows(11) == layer(torch.randn(2, 1, 11, 11)).shape[2]


def test_sides_of_padding_same() -> None:
    layer = nn.Conv2d(1, 1, (4, 3), padding="same", dilation=(1, 2))
    assert sides(layer, 0) == (1, 2)
    assert sides(layer, 1) == (2, 2)
