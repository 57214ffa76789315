"""The fixed rule of Cohen et al. (2019), CERTIFY: n0 samples select a class, n samples bound its probability."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.rounding import exact, raised
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.smoothing.bounds import check_sampling, clopper_pearson_lower, l2_radius
from densepure_rt.smoothing.certificate import Certificate, Counts
from densepure_rt.smoothing.scheduling import Phases


@dataclass(frozen=True)
class FixedRule:
    """Cohen's CERTIFY: n0 samples select a class, n fresh ones bound its probability.

    charge: taken off alpha for the noise that is drawn not being exactly normal: n * pixels * total variation a pixel.
    """

    n0: int
    n: int
    alpha: float
    charge: float = 0.0

    def __post_init__(self) -> None:
        check_sampling(self.n0, self.n, self.alpha)
        if self.alpha - self.charge <= self.alpha / 2:
            raise UsageError(
                f"the noise's finite precision over n = {self.n} samples costs {raised(self.charge, figures=2)}, "
                f"more than half of alpha = {exact(self.alpha)}: ask for a smaller n or a larger alpha"
            )

    @property
    def test_level(self) -> float:
        """What is left of alpha for the bound itself."""
        return self.alpha - self.charge

    def largest_radius(self, sigma: float) -> float | None:
        """What an image gets when all n samples agree; None when even that certifies nothing."""
        return l2_radius(clopper_pearson_lower(self.n, self.n, self.test_level), sigma)

    def certify(self, selection: Counts, estimation: Counts, sigma: float) -> Certificate:
        """The certificate of an image from the counts of its n0 and of its n samples.

        Samples that were not finite are in no count; n includes them, so they weigh against the class.
        """
        candidate = int(selection.argmax())
        n_a = int(estimation[candidate])
        p_lower = clopper_pearson_lower(n_a, self.n, self.test_level)
        radius = l2_radius(p_lower, sigma)
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


class Tally:
    """Counts the labels of a fixed number of samples in each phase, int64 [classes]."""

    def __init__(self, phases: Phases, classes: int) -> None:
        self.phases = phases
        self.counts = [np.zeros(classes, np.int64) for _ in phases]
        self.not_finite = 0
        self._ends = list(accumulate(samples for _, samples in phases))
        self._taken = 0

    @property
    def needed(self) -> int:
        return self._ends[-1] - self._taken

    def add(self, label: int) -> None:
        phase = bisect_right(self._ends, self._taken)
        self._taken += 1
        if label == NOT_FINITE:
            self.not_finite += 1
        elif not 0 <= label < len(self.counts[phase]):
            raise CheckFailed(f"label {label} is none of the {len(self.counts[phase])} classes: the ledger is damaged")
        else:
            self.counts[phase][label] += 1
