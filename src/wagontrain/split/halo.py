"""Which rows of an image each rank has and needs, layer by layer. Arithmetic only.

The rows that a layer puts out are shared evenly. Output rows [a, b) of a window of k rows, stride
s and padding p come from input rows [a · s - p, (b - 1) · s - p + k): what a rank needs of these
and does not have is its halo. With stride 1 and padding ⌊k/2⌋ that is ⌊k/2⌋ rows on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wagontrain.mesh import even_shares, ranges


@dataclass(frozen=True)
class Window:
    """The rows that one output row of a layer looks at.

    Args:
        size: rows from the first to the last one, holes of a dilation included.
        stride: rows from one window to the next.
        before: rows of padding above the image.
        after: rows of padding below it.
    """

    size: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0

    def rows(self, height: int) -> int:
        """Rows that come out for so many that go in."""
        return max(0, (height + self.before + self.after - self.size) // self.stride + 1)

    def needed(self, out: range) -> range:
        """Input rows for some output rows; those outside of the image are padding."""
        first = out.start * self.stride - self.before
        return range(first, first + (len(out) - 1) * self.stride + self.size)


@dataclass(frozen=True)
class Halo:
    """The rows of one layer's input that each rank has and needs.

    Args:
        owned: rows that each rank has.
        needed: rows that each rank needs; those outside of the image are padding.
    """

    owned: tuple[range, ...]
    needed: tuple[range, ...]

    def travelling(self, source: int, to: int) -> range:
        """Rows that one rank has and another needs; for a rank itself, those it keeps."""
        return common(self.owned[source], self.needed[to])

    def returning(self, source: int, to: int) -> range:
        """Rows whose gradient one rank has in part, and another in whole."""
        return self.travelling(to, source)

    def quiet(self, rank: int) -> bool:
        """Whether a rank has just what it needs, and nobody needs anything of it."""
        others = (to for to in range(len(self.owned)) if to != rank)
        return self.owned[rank] == self.needed[rank] and not any(
            self.travelling(rank, to) for to in others
        )


def common(one: range, other: range) -> range:
    """The numbers in both of two ranges."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def plan(windows: Sequence[Window], height: int, ranks: int) -> list[Halo]:
    """The halos of layers that follow each other.

    Args:
        windows: of each layer.
        height: rows of the image.
        ranks: how many there are. Of no layer's result may there be fewer rows.

    Returns:
        One halo per layer, and one more whose `owned` are the rows of the last result.
    """
    halos = []
    owned = tuple(ranges(even_shares(height, ranks)))
    for window in windows:
        height = window.rows(height)
        out = tuple(ranges(even_shares(height, ranks)))
        halos.append(Halo(owned, tuple(window.needed(rows) for rows in out)))
        owned = out
    return [*halos, Halo(owned, owned)]
