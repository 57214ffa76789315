"""A journal that keeps what it is told."""

from __future__ import annotations

from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.scheduling import NOTHING, Taken


class Notebook:
    """A journal that starts empty."""

    def __init__(self) -> None:
        self.labels: list[int] = []

    def taken(self, idx: int) -> Taken:
        return NOTHING

    def add(self, idx: int, outcome: Outcome) -> None:
        self.labels.append(outcome.label)
