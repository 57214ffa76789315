"""A decider that looks now and then, and what it sees of one image alone."""

from __future__ import annotations

from collections import Counter

from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.decider import Decider


def label_of(handle: int, sample: int) -> int:
    """What a sample is labelled: fixed by its image and index, and now and then not finite."""
    return (handle * 7919 + sample * 104_729) % 5 - 1


class Patient(Decider):
    """Looks after every `look` samples and is done at the `last` look, or when it has seen `enough` of class 0."""

    def __init__(self, look: int, last: int, enough: int = 10**6) -> None:
        super().__init__((("certify", look * last),))
        self.look, self.last, self.enough = look, last, enough
        self.seen: list[int] = []
        self.decided = False

    @property
    def needed(self) -> int:
        return 0 if self.decided else self.look - len(self.seen) % self.look

    def add(self, label: int) -> bool:
        assert not self.decided, "a sample beyond the deciding look reached the decider"
        self.seen.append(label)
        if len(self.seen) % self.look == 0:
            self.decided = self.seen.count(0) >= self.enough or len(self.seen) == self.look * self.last
        return self.decided

    @property
    def votes(self) -> Counter[int]:
        return Counter(self.seen)

    def certificate(self, stopped: bool = False) -> Certificate:
        raise AssertionError


def alone(handle: int, decider: Patient) -> list[int]:
    """What a decider sees that is fed with one image's samples, one at a time."""
    sample = 0
    while decider.needed:
        decider.add(label_of(handle, sample))
        sample += 1
    return decider.seen
