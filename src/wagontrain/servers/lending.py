"""Values that change in place, and are sent without a copy meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from wagontrain.servers.parts import PARAMETERS, Buffer, Part, region_of

Returned = Callable[[], bool]
"""Says whether what was lent is needed no longer."""


class Values:
    """A shard's values. Before they change, those that are being sent are left where they are.

    So a reply costs no copy while nobody commits, and a commit at most one however many are
    under way. There are at most as many buffers as replies under way, and one more.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.now = Buffer(parts)
        self._lent: list[Returned] = []
        self._behind: list[tuple[Buffer, list[Returned]]] = []

    def lend(self, returned: Returned) -> None:
        """What is here now is being sent, until `returned` says so."""
        self._lent = _still(self._lent)
        self._lent.append(returned)

    def make_way(self) -> bool:
        """Before values change; whether they are in another place now."""
        self._lent = _still(self._lent)
        if not self._lent:
            return False
        target = self._free()
        target.copy_(self.now)
        self._behind.append((self.now, self._lent))
        self.now, self._lent = target, []
        return True

    def _free(self) -> Buffer:
        for at, (buffer, lent) in enumerate(self._behind):
            if not _still(lent):
                del self._behind[at]
                return buffer
        return Buffer(self.parts)

    def copy(self) -> Buffer:
        """Another of the same content."""
        copy = Buffer(self.parts)
        copy.copy_(self.now)
        return copy

    @property
    def parameters(self) -> list[Tensor]:
        """Each part of a parameter, as it lies now."""
        return [
            view
            for part, view in zip(self.now.parts, self.now.views, strict=True)
            if region_of(part.group) == PARAMETERS
        ]


def _still(lent: list[Returned]) -> list[Returned]:
    return [returned for returned in lent if not returned()]
