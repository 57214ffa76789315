"""Which sample is drawn next, of which image: batches stay full, and few samples are drawn in vain.

An image is judged by the labels of its samples in their own order; what is scheduled here decides what that costs, and
never what comes of it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.decider import Decider, Phases

MOST_OPEN = 256  # images held at a time: enough for the others to go on beside one that takes thousands of samples


@dataclass
class Cost:
    """The cost of an image. samples: those that it was judged by; the calls are of all that were drawn, in vain too."""

    samples: int = 0
    unet_calls: int = 0
    classifier_calls: int = 0
    not_finite: int = 0
    seconds: float = 0.0


class LostSample(NamedTuple):
    """In place of an outcome: whatever draws the samples of this image dies of it, so that the image has failed."""

    image: int
    sample: int


class SavedLabels(NamedTuple):
    """The labels of an image's first samples from earlier, int32 [n], and the calls they took."""

    labels: NDArray[np.int32]
    unet_calls: int
    classifier_calls: int


NOTHING = SavedLabels(np.empty(0, np.int32), 0, 0)


class Journal(Protocol):
    """A place where the labels that judge an image are kept as they come, so that a run can be continued from them."""

    def saved(self, idx: int) -> SavedLabels: ...

    def add(self, idx: int, outcome: Outcome) -> None:
        """The next label of an image."""


D = TypeVar("D", bound=Decider)


class ImageProgress(Generic[D]):
    """An image that is being sampled, from where its saved labels end. It is judged in the order in which samples are
    drawn, whatever the order in which their outcomes come.

    handles: on the device, one a phase, once it is opened; saved labels may decide it before. deadline: when it is
    stopped undecided. journal: takes each label that judges it.
    """

    def __init__(
        self,
        image: LabelledImage,
        decider: D,
        open_handles: Callable[[Phases], list[int]],
        deadline: float = math.inf,
        journal: Journal | None = None,
        classes: float = math.inf,
    ) -> None:
        self.image, self.decider, self.deadline, self.journal = image, decider, deadline, journal
        self.stopped = self.failed = False
        saved = NOTHING if journal is None else journal.saved(image.idx)
        self._most = sum(samples for _, samples in decider.phases)
        if len(saved.labels) > self._most:
            raise CheckFailed(f"image {image} has {len(saved.labels)} labels, and takes {self._most} at most")
        for label in saved.labels.tolist():
            if not NOT_FINITE <= label < classes:
                raise CheckFailed(f"label {label} is none of the {classes} classes: the ledger is damaged")
        self.cost = Cost(unet_calls=saved.unet_calls, classifier_calls=saved.classifier_calls)
        for label in saved.labels.tolist():
            self._judge(label)
        self.returned = self.drawn = len(saved.labels)
        self.handles: list[int] = []
        self.opened = math.inf  # when it was, by time.monotonic
        self._open_handles = open_handles
        self._next = deque[tuple[int, int]]()  # the samples that are drawn and not judged
        self._early: dict[tuple[int, int], Outcome] = {}  # of them, those that came before their turn

    def open(self) -> None:
        """Take its handles, for the samples that are drawn from now on."""
        self.handles, self.opened = self._open_handles(self.decider.phases), time.monotonic()
        every = (
            (handle, sample)
            for handle, (_, samples) in zip(self.handles, self.decider.phases, strict=True)
            for sample in range(samples)
        )
        self._samples = islice(every, self.drawn, None)

    @property
    def decided(self) -> bool:
        """Return whether no further label is taken."""
        return self.stopped or self.failed or self.decider.needed == 0

    @property
    def idle(self) -> bool:
        """Return whether no sample of it is under way."""
        return self.returned == self.drawn

    @property
    def wants(self) -> bool:
        """Return whether another sample is certainly needed."""
        return len(self._next) < self.decider.needed

    @property
    def may_want(self) -> bool:
        return not self.decided and self.drawn < self._most

    def draw(self) -> tuple[int, int]:
        self.drawn += 1
        self._next.append(next(self._samples))
        return self._next[-1]

    def add(self, outcome: Outcome | LostSample) -> None:
        """An outcome of a sample that was drawn, in any order."""
        self.returned += 1
        if isinstance(outcome, LostSample):
            self.failed = self.failed or not self.decided
            return
        self.cost.unet_calls += outcome.unet_calls
        self.cost.classifier_calls += outcome.votes
        if self.decided:  # drawn in vain
            return
        self._early[outcome.image, outcome.sample] = outcome
        while not self.decided and self._next and self._next[0] in self._early:
            turn = self._early.pop(self._next.popleft())
            self._judge(turn.label)
            if self.journal is not None:
                self.journal.add(self.image.idx, turn)

    def _judge(self, label: int) -> None:
        self.cost.samples += 1
        self.cost.not_finite += label == NOT_FINITE
        self.decider.add(label)


class Scheduler(Generic[D]):
    """The work of `runtime.reverse.decide`: (image handle, sample) pairs, of many images at once.

    The oldest image that needs a sample for certain comes first; then a new image; then, with no more images or with
    `most_open` of them held, a sample that may be needed, for a batch is no cheaper with a gap in it. None, when all
    that there is to know is under way.
    """

    def __init__(self, images: Iterator[ImageProgress[D]], most_open: int = MOST_OPEN) -> None:
        self._images, self._most_open, self._exhausted = images, most_open, False
        self._undecided: list[ImageProgress[D]] = []
        self._in_order: deque[ImageProgress[D]] = deque()
        self._by_handle: dict[int, ImageProgress[D]] = {}

    def __iter__(self) -> Iterator[tuple[int, int] | None]:
        while True:
            image = self._next()
            if image is not None:
                yield image.draw()
            elif self._in_order:
                yield None
            else:
                return

    def _next(self) -> ImageProgress[D] | None:
        for image in self._undecided:
            if image.wants:
                return image
        while not self._exhausted and len(self._in_order) < self._most_open:
            opened = next(self._images, None)
            if opened is None:
                self._exhausted = True
                break
            self._in_order.append(opened)
            if not opened.decided:
                opened.open()
                self._undecided.append(opened)
                self._by_handle |= dict.fromkeys(opened.handles, opened)
                return opened
        return next((image for image in self._undecided if image.may_want), None)

    def add(self, outcome: Outcome | LostSample) -> Iterator[ImageProgress[D]]:
        """Count an outcome. Yields its image once it is decided and nothing more of it is under way."""
        image = self._by_handle[outcome.image]
        image.add(outcome)
        yield from self._decided(image)

    def stop_late(self, now: float) -> Iterator[ImageProgress[D]]:
        """Decide the images whose deadline has come by what they have. Yields those of which nothing is under way."""
        for image in [image for image in self._undecided if image.deadline <= now]:
            image.stopped = True
            yield from self._decided(image)

    def _decided(self, image: ImageProgress[D]) -> Iterator[ImageProgress[D]]:
        if image.decided and image in self._undecided:
            self._undecided.remove(image)
        if image.decided and image.idle:
            for handle in image.handles:
                del self._by_handle[handle]
            yield image

    def finished(self) -> Iterator[ImageProgress[D]]:
        """Images whose turn it is and that are decided, in the order in which they came.

        Those that were not stopped have nothing under way any more, so that their cost is whole.
        """
        while self._in_order and self._in_order[0].decided and (self._in_order[0].idle or self._in_order[0].stopped):
            yield self._in_order.popleft()

    @property
    def held(self) -> tuple[ImageProgress[D], ...]:
        """Images that were begun and are not `finished`, decided ones too, the oldest first; any thread may ask."""
        return tuple(self._in_order)

    @property
    def done(self) -> bool:
        return self._exhausted and not self._in_order

    @property
    def open(self) -> set[ImageProgress[D]]:
        """Images with handles on the device."""
        return set(self._by_handle.values())
