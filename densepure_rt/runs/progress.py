"""Track how far a run is: its samples, the time left and the image in progress. Any thread may ask."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from densepure_rt.runs.records import ImageRecord, TimingRecord
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.decider import Rule
from densepure_rt.smoothing.forecast import Range, samples_left
from densepure_rt.smoothing.scheduling import ImageProgress
from densepure_rt.smoothing.settings import UNLIMITED, Budget

SLOW_SECONDS = 10.0  # after which an image that is being sampled is named
Done = Sequence[tuple[ImageRecord, TimingRecord]]


class Progress:
    """A run that begins now.

    Args:
        classifier: What certifies the images.
        rule: How it judges them.
        asked: Images of the run, with those that are done.
        done: Returns those that are done.
        budget: Beyond which nothing is sampled.
        clock: Of the seconds.
    """

    def __init__(
        self,
        classifier: SmoothedClassifier,
        rule: Rule,
        asked: int,
        done: Callable[[], Done],
        budget: Budget = UNLIMITED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._classifier, self._rule, self._asked, self._done, self._clock = classifier, rule, asked, done, clock
        self._budget = budget
        self._started, self._before = clock(), sum(timing.samples for _, timing in done())

    def samples(self) -> int:
        """All that images were judged by, earlier calls of the run with them."""
        return sum(timing.samples for _, timing in self._done()) + sum(image.cost.samples for image in self._held())

    def left(self) -> Range | None:
        """Seconds that it still takes, judged by what its images took so far; None while nothing is known."""
        came, seconds = self.samples() - self._before, self._clock() - self._started
        if came <= 0:
            return None
        seen, held = [timing.samples for _, timing in self._done()], self._held()
        seen += [image.cost.samples for image in held if image.decided]
        taken = [image.cost.samples for image in held if not image.decided]
        untouched = max(0, self._asked - len(seen) - len(taken) - len(self._classifier.failed))
        found = samples_left(self._rule, seen, taken, untouched)
        rest = untouched + len(taken)
        most = min(max(0.0, self._budget.run - seconds), rest * self._budget.image if rest else 0.0)
        return Range(*(min(most, samples * seconds / came) for samples in found))

    def slow(self) -> str:
        """Name the image that has been sampled longest, where that is long; else nothing."""
        oldest = next((image for image in self._held() if not image.decided), None)
        if oldest is None or self._clock() - oldest.opened < SLOW_SECONDS:
            return ""
        return f"image {oldest.image} at {oldest.cost.samples:,} of {self._rule.samples[1]:,} samples at most"

    def _held(self) -> tuple[ImageProgress[Any], ...]:
        scheduler = self._classifier.scheduler
        return () if scheduler is None else scheduler.held
