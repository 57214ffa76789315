"""Counts in, bound and radius out (Cohen, Rosenfeld & Kolter 2019). Nothing here samples.

The bounded quantity is p_A = P(voted label = A) over the smoothing noise and all vote noise, jointly. Everything that
is reported is rounded towards the weaker claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from densepure_rt.errors import UsageError
from densepure_rt.json_files import Count, Radius
from densepure_rt.rounding import exact, raised

Counts = NDArray[np.int64]  # [classes]: samples whose voted label was each class
Method = Literal["fixed", "sequential", "radius"]
Result = Literal["certified", "gave up", "abstained", "skipped", "not reached", "undecided"]
MARGIN = 1e-12  # relative; wider than the error of scipy's betainc and ndtr where they are used


@dataclass(frozen=True)
class EpsOutcome:
    """What came of one eps: after n samples, n_a of them for the class. None: its test had no such moment.

    "gave up": more samples were thought futile; "abstained": all n_max were taken. "skipped": n_max agreeing samples
    would not do. "not reached": a smaller eps failed. "undecided": sampling was stopped from outside.
    """

    eps: Radius
    result: Result
    n: Count | None
    n_a: Count | None


@dataclass(frozen=True)
class Certificate:
    """With probability at least 1 - alpha over the sampling, the smoothed classifier answers `predict` on the whole
    open l2 ball of `radius` around the image ([0, 1] pixel units). None, None: the procedure abstains.

    n_a: of the n estimation samples, those that voted for the class that n0 others selected. p_lower: the bound on its
    probability, at alpha less what the noise's finite precision is charged. An anytime rule selects nothing: n0 is 0, n
    what it took, and outcomes what came of each radius. stopped: time was up before the rule had decided.
    """

    predict: int | None
    radius: float | None
    n0: int
    n: int
    n_a: int
    alpha: float
    p_lower: float
    outcomes: tuple[EpsOutcome, ...] = ()
    stopped: bool = False

    def covers(self, label: int | None, radius: float) -> bool:
        """Whether `label` is certified at `radius`."""
        return self.predict is not None and self.predict == label and self.radius is not None and self.radius >= radius


def clopper_pearson_lower(successes: int, n: int, alpha: float) -> float:
    """The one-sided Clopper-Pearson bound: P(Bin(n, p) >= successes) <= alpha for every p up to the returned value.

    The inverse is checked with the forward function and moved down until that holds.
    """
    if successes == 0:
        return 0.0
    a, b = successes, n - successes + 1
    bound, step = float(special.betaincinv(a, b, alpha)), MARGIN
    while bound > 0 and special.betainc(a, b, bound) > alpha * (1 - MARGIN):
        bound, step = bound * (1 - step), 2 * step
    return max(0.0, bound)


def l2_radius(p_lower: float, sigma: float) -> float | None:
    """sigma * Phi^-1(p_lower), rounded down, in the units of sigma; None unless p_lower is above one half.

    The inverse starts from a p_lower moved down by more than its own error, and is checked with the forward function.
    """
    if not p_lower > 0.5:
        return None
    step = 2 * MARGIN
    quantile = float(special.ndtri(p_lower * (1 - step)))
    while quantile > 0 and special.ndtr(quantile) > p_lower * (1 - MARGIN):
        quantile, step = quantile - step, 2 * step
    return max(0.0, math.nextafter(sigma * quantile, 0.0))


def check_sampling(n0: int, n: int, alpha: float) -> None:
    """Raise UsageError unless n0 and n are counts and alpha is a probability of failure."""
    if n0 < 1 or n < 1:
        raise UsageError(f"n0 and n are counts of samples, at least 1, got {n0} and {n}")
    if not 0 < alpha < 0.5:
        raise UsageError(f"alpha is a probability of failure, between 0 and 0.5, got {exact(alpha)}")


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


def certified_accuracy(
    certificates: Sequence[tuple[int | None, Certificate]], radii: Sequence[float], reach: float | None
) -> list[float | None]:
    """The share of (label, certificate) pairs that are right at each radius; None where n cannot reach the radius."""
    return [
        None
        if radius > (reach or 0.0)
        else sum(certificate.covers(label, radius) for label, certificate in certificates) / max(1, len(certificates))
        for radius in radii
    ]
