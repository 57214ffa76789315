"""A journal that starts empty and keeps the labels that come."""

from __future__ import annotations

from collections import defaultdict

from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.scheduling import NOTHING, SavedLabels


class Notebook:
    """labels: by image."""

    def __init__(self) -> None:
        self.labels: dict[int, list[int]] = defaultdict(list)

    def saved(self, idx: int) -> SavedLabels:
        return NOTHING

    def add(self, idx: int, outcome: Outcome) -> None:
        self.labels[idx].append(outcome.label)
