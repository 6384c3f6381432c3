"""Which samples are still to be applied, and how they are cut into work for leases.

Positions are counted through all epochs here: sample i of epoch e's order is at e * samples + i.
What a range of them means, as dataset indices, is `batches.Order`'s affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from wagontrain.errors import UsageError


@dataclass(frozen=True)
class Reached:
    """How far training is: every sample before `position` is applied, but those in `gaps`.

    A number of steps does not say it: workers at work side by side finish batches in any order,
    and the first batches of an epoch may be applied before the last ones of the epoch before.
    Plain numbers, to be kept with a checkpoint.
    """

    position: int = 0
    gaps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Course:
    """What there is to train.

    Args:
        samples: in one epoch.
        batch_size: of one update.
        epochs: how often each sample is applied.
        steps: limit on updates, those before `first_step` included; None for no limit.
        validation_samples: to be measured at the end of each epoch; 0 for none.
        validation_batch: how many of them make one lease.
        first_step: updates that were applied before, where training is taken up again.

    Raises:
        UsageError: a number is too small to train with.
    """

    samples: int
    batch_size: int
    epochs: int
    steps: int | None = None
    validation_samples: int = 0
    validation_batch: int = 1
    first_step: int = 0

    def __post_init__(self) -> None:
        at_least_one = (self.samples, self.batch_size, self.epochs, self.validation_batch)
        from_zero_on = (self.validation_samples, self.first_step, self.steps or 0)
        if min(at_least_one) < 1 or min(from_zero_on) < 0:
            raise UsageError(
                f"{self} cannot be trained: give at least one sample, epoch and sample per batch, "
                "and no negative number"
            )

    @property
    def steps_of_epoch(self) -> int:
        """Global batches in one epoch."""
        return -(-self.samples // self.batch_size)

    @property
    def end(self) -> int:
        """One after the last position."""
        return self.samples * self.epochs

    def step_at(self, position: int) -> int:
        """The number of the global batch that a position belongs to, through all epochs."""
        epoch, within = divmod(position, self.samples)
        return epoch * self.steps_of_epoch + within // self.batch_size

    def batch(self, step: int) -> range:
        """The positions of a global batch: what `step_at` gives this step for."""
        epoch, within = divmod(step, self.steps_of_epoch)
        start = epoch * self.samples + within * self.batch_size
        return range(start, min(start + self.batch_size, (epoch + 1) * self.samples))

    def reached(self) -> Reached:
        """Where training is if its first steps were one whole batch each, in order.

        So it is after a strategy that makes one update after the other. What a parameter server
        has reached comes with its snapshots instead.
        """
        epoch, step = divmod(self.first_step, self.steps_of_epoch)
        return Reached(min(self.end, epoch * self.samples + step * self.batch_size))


@dataclass(frozen=True)
class Work:
    """What a lease is about, whoever holds it.

    Args:
        start, stop: positions through all epochs of the batch that is divided; for validation,
            positions in the validation data.
        share, shares: which of how many equal shares of that batch.
        snapshot: whose parameters are to be validated; None for training.
        spoiled_by: the worker that could not give a finite gradient for it.
        again: it was given to a worker before.
    """

    start: int
    stop: int
    share: int = 0
    shares: int = 1
    snapshot: int | None = None
    spoiled_by: int | None = None
    again: bool = False

    @property
    def samples(self) -> int:
        """Samples in the share, as `mesh.equal_shares` cuts."""
        whole = self.stop - self.start
        each = -(-whole // self.shares)
        return max(0, min(each, whole - self.share * each))

    @property
    def purpose(self) -> Literal["train", "validate"]:
        """What is to be sent back."""
        return "train" if self.snapshot is None else "validate"


Allowed = Callable[[Work], bool]


def take_first(works: deque[Work], allowed: Allowed) -> Work | None:
    """Remove and return the first that is allowed."""
    for index, work in enumerate(works):
        if allowed(work):
            del works[index]
            return work
    return None


class Supply:
    """The samples still to be applied: to be taken, taken, or given back.

    Each position is in exactly one of four places: `fresh`, `back`, `out`, or applied. All of it
    is ranges: nothing here grows with the number of samples.
    """

    def __init__(self, course: Course, reached: Reached) -> None:
        self.course = course
        self.fresh = deque(range(*gap) for gap in reached.gaps)
        self.fresh.append(range(reached.position, course.end))
        self.back: deque[Work] = deque()
        self.out: set[tuple[int, int]] = set()
        self.ended: list[int] = []
        self._begun = -(-reached.position // course.samples)
        self._left: dict[int, int] = {}
        for start, stop in [*reached.gaps, (reached.position, self._begun * course.samples)]:
            for epoch in range(start // course.samples, -(-stop // course.samples)):
                within = self._range(epoch)
                part = min(stop, within.stop) - max(start, within.start)
                self._left[epoch] = self._left.get(epoch, 0) + part
        self.epoch = 0
        self._advance()
        self.ended.clear()

    def _range(self, epoch: int) -> range:
        return range(epoch * self.course.samples, (epoch + 1) * self.course.samples)

    @property
    def exhausted(self) -> bool:
        """Whether every sample of every epoch is applied."""
        return self.epoch == self.course.epochs

    def dry(self, epoch: int) -> bool:
        """Whether nothing of this epoch can be taken; what is out may still come back."""
        return not self.back and self._peek(epoch) is None

    def take(self, allowed: Allowed) -> Work | None:
        """The next whole batch, or what is left of one; what was given back goes first."""
        work = take_first(self.back, allowed) or self._cut(None, self.course.batch_size)
        return self._taken(work)

    def take_piece(self, allowed: Allowed, epoch: int, size: int) -> Work | None:
        """The next at most `size` samples of this epoch, batches' borders not minded."""
        work = take_first(self.back, allowed)
        if work is None:
            return self._taken(self._cut(epoch, size))
        if work.samples > size:
            self.back.appendleft(replace(work, start=work.start + size))
            work = replace(work, stop=work.start + size)
        return self._taken(work)

    def _taken(self, work: Work | None) -> Work | None:
        if work is not None:
            self.out.add((work.start, work.stop))
        return work

    def _peek(self, epoch: int | None) -> range | None:
        while self.fresh and not self.fresh[0]:
            self.fresh.popleft()
        if not self.fresh or epoch not in (None, self.fresh[0].start // self.course.samples):
            return None
        return self.fresh[0]

    def _cut(self, epoch: int | None, size: int) -> Work | None:
        first = self._peek(epoch)
        if first is None:
            return None
        within = self._range(first.start // self.course.samples)
        begun = (first.start - within.start) % size if epoch is None else 0
        stop = min(first.stop, within.stop, first.start + size - begun)
        self.fresh[0] = range(stop, first.stop)
        return Work(first.start, stop)

    def put_back(self, work: Work) -> None:
        """What was taken will not be applied this time."""
        self.out.remove((work.start, work.stop))
        self.back.appendleft(replace(work, again=True))

    def apply(self, work: Work) -> None:
        """What was taken is applied; epochs that end by it are put into `ended`, in order."""
        self.out.remove((work.start, work.stop))
        epoch = work.start // self.course.samples
        self._left[epoch] = self._unapplied(epoch) - (work.stop - work.start)
        self._advance()

    def _unapplied(self, epoch: int) -> int:
        return self._left.get(epoch, self.course.samples if epoch >= self._begun else 0)

    def _advance(self) -> None:
        while self.epoch < self.course.epochs and not self._unapplied(self.epoch):
            self._left.pop(self.epoch, None)
            self.ended.append(self.epoch)
            self.epoch += 1

    def reached(self) -> Reached:
        """How far training is now."""
        open_ = [(work.start, work.stop) for work in self.back]
        open_ += [*self.out, *((part.start, part.stop) for part in self.fresh if part)]
        gaps = list(_joined(open_))
        last = gaps.pop()[0] if gaps and gaps[-1][1] == self.course.end else self.course.end
        return Reached(last, tuple(gaps))


def _joined(parts: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The same positions with ranges that touch made one, in order."""
    whole: tuple[int, int] | None = None
    for start, stop in sorted(parts):
        if whole is not None and whole[1] == start:
            whole = whole[0], stop
        else:
            if whole is not None:
                yield whole
            whole = start, stop
    if whole is not None:
        yield whole
