"""Whose sample is drawn next while somebody waits for each answer: the urgent first, then whoever has had the least.

The sibling of `scheduling.Scheduler` for images that come at any time and are answered as they are decided. An image is
judged by the labels of its samples in their own order; what is scheduled here decides when, and never what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.decider import LOOK, Decider, Phases
from densepure_rt.smoothing.scheduling import ImageProgress

URGENT_LOOKS = 3  # in a row, before one of another image that waits: short ones without end starve nobody either
D = TypeVar("D", bound=Decider)


class QueuedImage(ImageProgress[D]):
    """An image that somebody waits for. urgent: it comes before those that are not, but for URGENT_LOOKS."""

    def __init__(
        self, image: LabelledImage, decider: D, urgent: bool, open_handles: Callable[[Phases], list[int]]
    ) -> None:
        super().__init__(image, decider, open_handles)
        self.urgent = urgent

    @property
    def turn(self) -> tuple[bool, int]:
        """The least comes first. Shares are counted in looks: to stop within one would only delay its answer."""
        return not self.urgent, self.drawn // LOOK


class FairShare(Generic[D]):
    """The work of `runtime.reverse.decide`, (image handle, sample) pairs, for images that come and go meanwhile.

    A sample that is needed for certain comes before any that may be needed; of the latter an image has up to `ahead`
    under way. An image is opened on the device with its first sample, so that one that waits holds nothing there.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self.undecided: list[QueuedImage[D]] = []  # in the order in which they came
        self._turn: QueuedImage[D] | None = None
        self._urgent_draws = 0  # since another image had a turn
        self._by_handle: dict[int, QueuedImage[D]] = {}
        self._leaving: list[QueuedImage[D]] = []  # decided, with handles

    def put(self, image: QueuedImage[D]) -> None:
        self.undecided.append(image)
        if not self._overdue:
            self._turn = None

    def draw(self) -> tuple[int, int] | None:
        """The next sample to take; None before another outcome or image comes."""
        image = self._turn
        if image is None or not image.wants or image.drawn % LOOK == 0:
            image = self._turn = self._next()
        if image is None:
            return None
        if not image.handles:
            image.open()
            self._by_handle |= dict.fromkeys(image.handles, image)
        self._urgent_draws += image.urgent
        return image.draw()

    @property
    def _overdue(self) -> bool:
        """Return whether it is the turn of an image that is not urgent."""
        return self._urgent_draws >= URGENT_LOOKS * LOOK

    def _next(self) -> QueuedImage[D] | None:
        if self._turn is not None and not self._turn.urgent:
            self._urgent_draws = 0
        certain = [image for image in self.undecided if image.wants]
        if self._overdue:
            certain = [image for image in certain if not image.urgent] or certain
        useful = certain or [image for image in self.undecided if image.may_want and self._room_for(image)]
        return min(useful, key=lambda image: image.turn, default=None)  # of equals the one that came first

    def _room_for(self, image: QueuedImage[D]) -> bool:
        return image.drawn - image.returned < image.decider.needed + self._ahead

    def add(self, outcome: Outcome) -> QueuedImage[D] | None:
        """Count an outcome; its image, where that decides it."""
        image = self._by_handle[outcome.image]
        undecided = not image.decided
        image.add(outcome)
        if not (undecided and image.decided):
            return None
        self._remove(image)
        return image

    def stop(self, image: QueuedImage[D]) -> None:
        """Draw no more of an undecided image."""
        image.stopped = True
        self._remove(image)

    def _remove(self, image: QueuedImage[D]) -> None:
        self.undecided.remove(image)
        if image is self._turn:
            self._turn = None
        if image.handles:
            self._leaving.append(image)

    @property
    def under_way(self) -> bool:
        """Return whether an outcome is still to come."""
        return any(not image.idle for image in self._by_handle.values())

    def settled(self) -> Iterator[int]:
        """The handles of images that are decided and of which nothing is under way, for once and all."""
        for image in [image for image in self._leaving if image.idle]:
            self._leaving.remove(image)
            yield from map(self._forget, image.handles)

    def _forget(self, handle: int) -> int:
        del self._by_handle[handle]
        return handle

    @property
    def handles(self) -> list[int]:
        """All that are held on the device."""
        return list(self._by_handle)
