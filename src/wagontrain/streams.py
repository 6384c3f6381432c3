"""Streams: data sets that are read from their beginning on.

Every rank reads the whole stream and keeps its own share of each global batch: what is read is
read once for every rank, and what a resumed run has seen already is read again and let go.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from wagontrain.errors import ModelError, WagontrainError
from wagontrain.seeding import random_states, seeded_numbers, set_random_states
from wagontrain.task import origin


class Stream:
    """A stream, the same on every rank: what it draws is fixed by the seed of each epoch.

    Args:
        dataset: iterable; each time it begins anew. Its `set_epoch`, if it has one, is called.
        exhaustive: whether it has to end where an epoch does.
    """

    def __init__(self, dataset: Any, exhaustive: bool) -> None:
        self.dataset = dataset
        self.exhaustive = exhaustive

    def begin(self, epoch: int, seed: int) -> Reading:
        """Read it from its beginning."""
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(epoch)
        return Reading(self.dataset, epoch, seed)


class Reading:
    """A stream that is being read.

    Args:
        dataset: iterable.
        epoch: which pass over it.
        seed: of what it draws.
    """

    def __init__(self, dataset: Any, epoch: int, seed: int) -> None:
        self.epoch = epoch
        self.read = 0
        with seeded_numbers(seed):
            self._states = random_states()
        with self._draws():
            self._samples: Iterator[Any] = iter(dataset)

    def take(self, count: int) -> list[Any]:
        """The next samples.

        Raises:
            ModelError: there are not so many, or the stream failed.
        """
        with self._draws():
            found = list(itertools.islice(self._samples, count))
        self.read += len(found)
        if len(found) < count:
            raise ModelError(
                f"the stream ended after {self.read} samples of epoch {self.epoch}, but more were "
                "announced: correct Task.epoch_samples or its __len__"
            )
        return found

    def skip(self, count: int) -> None:
        """Read samples and let go of them."""
        while count:
            count -= len(self.take(min(count, _AT_A_TIME)))

    def require_end(self) -> None:
        """Refuse a stream that goes on.

        Raises:
            ModelError: it does.
        """
        with self._draws():
            more = list(itertools.islice(self._samples, 1))
        if more:
            raise ModelError(
                f"the stream goes on after {self.read} samples of epoch {self.epoch}, as many as "
                "its __len__ says: correct that, or say in Task.epoch_samples what an epoch is"
            )

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        """Within, random numbers are the stream's own; the model's are left alone."""
        before = random_states()
        set_random_states(self._states)
        try:
            yield
        except Exception as error:  # whatever the user's stream raises is theirs to read
            if isinstance(error, WagontrainError):
                raise
            raise ModelError(
                f"the stream failed after {self.read} samples of epoch {self.epoch}: "
                f"{origin(error)}"
            ) from error
        finally:
            self._states = random_states()
            set_random_states(before)


_AT_A_TIME = 256
