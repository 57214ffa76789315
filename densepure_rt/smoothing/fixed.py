"""The fixed rule of Cohen et al. (2019), CERTIFY: n0 samples select a class, n samples bound its probability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.smoothing.bounds import check_sampling, clopper_pearson_lower, l2_radius
from densepure_rt.smoothing.certificate import Certificate, Counts
from densepure_rt.smoothing.decider import Decider, Phases, Rule


@dataclass(frozen=True, kw_only=True)
class FixedRule(Rule):
    """Cohen's CERTIFY (Algorithm 1, section 3.2.2): n0 samples select a class, n fresh ones bound its probability."""

    tested = "the class that n0 samples select"
    anytime = False
    n0: int
    n: int

    def __post_init__(self) -> None:
        check_sampling(self.n0, self.n, self.alpha)
        super().__post_init__()

    @property
    def phases(self) -> Phases:
        return ("select", self.n0), ("certify", self.n)

    @property
    def samples(self) -> tuple[int, int]:
        return (self.n0 + self.n,) * 2

    def start(self, label: int | None = None) -> FixedDecider:
        """Ready for the first sample of an image. Its label changes nothing: n0 samples select the class."""
        return FixedDecider(self)

    def reach(self) -> float | None:
        """Return the radius of an image whose n samples all agree; None when even that certifies nothing."""
        return l2_radius(clopper_pearson_lower(self.n, self.n, self.test_level), self.sigma)

    def certify(self, selection: Counts, estimation: Counts) -> Certificate:
        """The certificate of an image from the counts of its n0 and of its n samples.

        Samples that were not finite are in no count; n includes them, so they weigh against the class.
        """
        candidate = int(selection.argmax())
        n_a = int(estimation[candidate])
        p_lower = clopper_pearson_lower(n_a, self.n, self.test_level)
        radius = l2_radius(p_lower, self.sigma)
        return Certificate(
            predict=None if radius is None else candidate,
            radius=radius,
            n0=self.n0,
            n=self.n,
            n_a=n_a,
            alpha=self.alpha,
            p_lower=p_lower,
        )

    def stopped(self, selection: Counts, estimation: Counts, taken: int) -> Certificate:
        """The abstention after `taken` samples, when time was up: of fewer than n this rule says nothing."""
        return Certificate(
            predict=None,
            radius=None,
            n0=min(taken, self.n0),
            n=max(0, taken - self.n0),
            n_a=int(estimation[selection.argmax()]),
            alpha=self.alpha,
            p_lower=0.0,
            stopped=True,
        )


class FixedDecider(Decider):
    """Counts the labels of the n0 samples that select a class, and of the n that bound its probability."""

    def __init__(self, rule: FixedRule) -> None:
        super().__init__(rule.phases)
        self._rule = rule
        self._selection, self._estimation = Counter[int](), Counter[int]()

    @property
    def needed(self) -> int:
        return self._rule.n0 + self._rule.n - self.n

    def add(self, label: int) -> bool:
        if self.needed:
            if label != NOT_FINITE:
                (self._selection if self.n < self._rule.n0 else self._estimation)[label] += 1
            self.n += 1
        return self.needed == 0

    @property
    def votes(self) -> Mapping[int, int]:
        return self._selection + self._estimation

    @property
    def counts(self) -> tuple[Counts, Counts]:
        """The votes for each class of the selection and of the estimation, up to the last class that has any."""
        classes = range(1 + max((*self._selection, *self._estimation), default=0))
        selection, estimation = (
            np.array([votes[label] for label in classes], np.int64) for votes in (self._selection, self._estimation)
        )
        return selection, estimation

    def certificate(self, stopped: bool = False) -> Certificate:
        if stopped or self.needed:
            return self._rule.stopped(*self.counts, self.n)
        return self._rule.certify(*self.counts)
