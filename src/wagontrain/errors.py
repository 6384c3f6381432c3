"""Everything wagontrain raises on purpose.

    WagontrainError
    ├── UsageError          the request cannot be honoured; nothing was started     exit status 2
    │   └── TaskError       ... because of what the task says
    ├── StoppedError        the user stopped it                                     exit status 130
    ├── TestBedError        the kernel refused something a test bed needs           exit status 1
    └── TrainingError       training began and could not go on                      exit status 1
        ├── ModelError      the user's model or loss failed on a batch
        ├── LossError       the loss is not a finite number
        ├── ReplicaError    copies that must be equal no longer are
        └── WorkerError     a worker process ended or cannot be reached

A message says what was asked, why it cannot be, and what to do instead, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WagontrainError(Exception):
    """Base of all errors that wagontrain raises on purpose."""

    exit_status = 1


class UsageError(WagontrainError):
    """The request cannot be honoured; nothing was started and nothing was changed."""

    exit_status = 2


class TaskError(UsageError):
    """The task itself is not trainable as it stands."""


class StoppedError(WagontrainError):
    """The user stopped it, by Ctrl-C on the command line."""

    exit_status = 130


class TestBedError(WagontrainError):
    """A test bed could not be made, changed or taken down."""

    __test__ = False  # pytest takes a class of this name for tests


class TrainingError(WagontrainError):
    """Training began and could not go on."""


class ModelError(TrainingError):
    """The user's model or loss failed on a batch."""


class LossError(TrainingError):
    """The loss is not a finite number."""


class ReplicaError(TrainingError):
    """Copies of a tensor that must be equal on all ranks no longer are."""


class WorkerError(TrainingError):
    """A worker process ended early, or cannot be reached."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which of `known` the user may have meant by `word`: a sentence, ready to append."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? (known: {', '.join(known)})"
    return f"known: {', '.join(known) or 'none'}"
