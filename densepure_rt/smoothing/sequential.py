"""Counts in, decision out, with as many samples as it takes: anytime-valid certification. Nothing here samples.

A test asks of one class and one eps whether p_A > p0 = Phi(eps / sigma). Its evidence E is the likelihood ratio to p0,
averaged over a Beta(1/2, 1/2) prior on (p0, 1]. Under every p_A <= p0 that is a nonnegative supermartingale from 1, so
it ever reaches 1/a with probability at most a (Ville 1939; Howard & Ramdas 2021 and Waudby-Smith & Ramdas 2024 for such
mixtures). That holds at all n at once: when and why sampling stops cannot void it. Samples are taken in the order of
their numbers, and one that was not finite is a vote against every class. Everything is rounded to the weaker claim.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from densepure_rt.errors import UsageError
from densepure_rt.rounding import exact
from densepure_rt.smoothing.bounds import MARGIN, _greatest, l2_radius
from densepure_rt.smoothing.certificate import EpsOutcome, Result
from densepure_rt.smoothing.decider import (
    RESERVE,
    AnytimeDecider,
    AnytimeRule,
    Bound,
    Decision,
    EpsTest,
    Standing,
    certify_at,
    give_up_at,
)

NEGLIGIBLE = 1e-15  # of a forecast: chances that are followed no further


class Forecast(NamedTuple):
    """samples: expected number. certified: for each eps, the chance that it is certified."""

    samples: float
    certified: tuple[float, ...]


_Chances = tuple[int, NDArray[np.float64]]  # the least count, and the probabilities of the counts from it


def _merged(parts: list[_Chances]) -> _Chances:
    """The sum of the parts."""
    least = min(first for first, _ in parts)
    total = np.zeros(max(first + len(chances) for first, chances in parts) - least)
    for first, chances in parts:
        total[first - least : first - least + len(chances)] += chances
    return least, total


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """P(Bin(n, p) = k) for k = 0 ... n."""
    k = np.arange(n + 1)
    ways = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return np.asarray(np.exp(ways + special.xlogy(k, p) + special.xlog1py(n - k, -p)))


@dataclass(frozen=True, kw_only=True)
class SequentialRule(AnytimeRule):
    """Which `radii` hold (l2 in [0, 1] pixel units, ascending), each told as soon as it is clear.

    A radius counts when its own test and those of all smaller ones certify the same class. The smallest that does not
    hold must then be certified before any false claim, so that the whole grid costs one alpha (fixed sequence).
    reserve: see `EpsTest`.
    """

    radii: tuple[float, ...]
    reserve: float = RESERVE

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = all(smaller < larger for smaller, larger in zip(self.radii, self.radii[1:], strict=False))
        if not self.radii or not ascending or not self.radii[0] >= 0 or not self.radii[-1] < math.inf:
            raise UsageError(f"radii are one or more, from 0 up and ascending, got {self.radii}")
        if not 0 <= self.reserve < 1:
            raise UsageError(f"reserve is a share of alpha, from 0 to below 1, got {exact(self.reserve)}")

    @property
    def anytime_level(self) -> float:
        return (1 - self.reserve) * self.test_level

    def test_of(self, eps: float) -> EpsTest:
        """p0 = Phi(eps / sigma), rounded up."""
        return self.test(min(1.0, float(special.ndtr(eps / self.sigma)) * (1 + MARGIN)), self.reserve)

    @cached_property
    def tests(self) -> tuple[EpsTest, ...]:
        """The tests of the radii that n_max agreeing samples certify: the first so many."""
        tests = (self.test_of(eps) for eps in self.radii)
        return tuple(takewhile(lambda test: certify_at(test, self.n_max) <= self.n_max, tests))

    def reachable(self) -> tuple[float, ...]:
        """The radii that n_max agreeing samples certify; the others are skipped."""
        return self.radii[: len(self.tests)]

    def reach(self) -> float | None:
        """The largest radius that n_max agreeing samples certify; None when they certify nothing."""
        n = self.n_max
        p_lower = _greatest(lambda p0: certify_at(self.test(p0, self.reserve), n) <= n, 0.5, 1.0)
        return l2_radius(p_lower * (1 - MARGIN), self.sigma)

    def needed(self, eps: float) -> int | None:
        """Return how many agreeing samples certify `eps`; None when n_max do not."""
        test, looks = self.test_of(eps), tuple(self.looks())
        place = bisect_left(looks, True, key=lambda n: certify_at(test, n) <= n)
        return looks[place] if place < len(looks) else None

    def limits(self, n: int) -> tuple[list[int], list[int]]:
        """Return, at the look n, the fewest successes that certify and the most that give up, per test. Both ascend."""
        certify = accumulate((certify_at(test, n) for test in self.tests), max)
        give_up = accumulate((give_up_at(test, n) for test in self.tests), max)
        return list(certify), list(give_up)

    def start(self, label: int | None = None) -> GridDecider:
        """Ready for the first sample of an image."""
        return GridDecider(self, label)

    def agreeing(self) -> Mapping[float, int | None]:
        return {eps: self.needed(eps) for eps in self.radii}

    def expected_samples(self, p: float) -> float:
        return self.forecast(p).samples

    def forecast(self, p: float) -> Forecast:
        """Forecast a class that each sample votes for with probability p, were no other asked about. Exact.

        The chances of all counts that leave the grid undecided are carried from look to look (binomial steps).
        """
        samples, before, finished = 0.0, 0, np.zeros(len(self.tests) + 1)  # the chance that so many are certified
        under_way = {Standing(0, len(self.tests)): [(0, np.ones(1))]} if self.tests else {}
        for n in self.looks():
            certify, give_up = self.limits(n)
            edges = {*certify, *(count + 1 for count in give_up)}  # between two of these all counts fare the same
            step, arrived = _binomial(n - before, p), defaultdict(list)
            for standing, parts in under_way.items():
                least, chances = _merged(parts)
                samples += (n - before) * float(chances.sum())
                chances = np.convolve(chances, step)
                end = least + len(chances)
                for first, stop in pairwise(sorted({least, end, *(edge for edge in edges if least < edge < end)})):
                    part, reached = chances[first - least : stop - least], standing.after(first, certify, give_up)
                    if reached.decided:  # at n_max every standing is
                        finished[reached.certified] += part.sum()
                    elif part.sum() > NEGLIGIBLE:
                        arrived[reached].append((first, part))
            under_way, before = arrived, n
            if not under_way:
                break
        certified = np.cumsum(finished[::-1])[-2::-1]  # the chance of j or more
        return Forecast(samples, (*map(float, certified), *(0.0 for _ in self.radii[len(self.tests) :])))


def prediction_rule(n_max: int, alpha: float, charge: float = 0.0, look: int = 1) -> SequentialRule:
    """PREDICT (Cohen et al. 2019) with as many samples as it takes: a class with p > 1/2, or an abstention.

    Every class is tested at alpha / 2 with E alone, after every sample: 13 that agree do at alpha = 0.001.
    """
    return SequentialRule(
        sigma=1.0, radii=(0.0,), n_max=n_max, alpha=alpha, charge=charge, look=look, reserve=0.0, purpose="predict"
    )


class GridDecider(AnytimeDecider):
    """Decides which of a `SequentialRule`'s radii hold.

    Without a label the class that leads is in question, until it has a certificate, and then no other is: certificates
    take more than half of the votes. An eps that the leading class gives up is given up for all.
    """

    _rule: SequentialRule

    def __init__(self, rule: SequentialRule, label: int | None) -> None:
        super().__init__(rule, label)
        self._standing = Standing(0, len(rule.tests))
        self._outcomes = [
            EpsOutcome(eps, "undecided" if place < len(rule.tests) else "skipped", None, None)
            for place, eps in enumerate(rule.radii)
        ]
        if self._standing.decided:
            self.decision = self._certified()
        else:
            self._deciding_look = self._earliest()

    def _earliest(self) -> int:
        """The first look where the first j radii can be certified and the next one given up, for any j.

        The class in question then has at least the votes that it has now, and at most all that come until then.
        """
        (certified, still_open), successes = self._standing, self._votes().n_a
        for n in self._rule.looks(self.n):
            certify, give_up = self._rule.limits(n)
            most = successes + n - self.n
            for j in range(certified, still_open + 1):
                if (j == certified or most >= certify[j - 1]) and (j == still_open or successes <= give_up[j]):
                    return n
        return self._rule.n_max

    def _look(self) -> Decision | None:
        before, (label, n, n_a) = self._standing, self._votes()
        now = self._standing = before.after(n_a, *self._rule.limits(n))
        for place in range(before.certified, now.certified):
            self._label = label
            self._outcomes[place] = EpsOutcome(self._rule.radii[place], "certified", n, n_a)
        if now.open < before.open:
            failed: Result = "abstained" if n == self._rule.n_max else "gave up"
            self._outcomes[now.open] = EpsOutcome(self._rule.radii[now.open], failed, n, n_a)
        if not now.decided:
            return None
        self._outcomes = [
            replace(outcome, result="not reached") if outcome.result == "undecided" else outcome
            for outcome in self._outcomes
        ]
        return self._certified()

    def _certified(self) -> Decision:
        certified, (label, n, n_a) = self._standing.certified, self._votes()
        return Decision(
            predict=label if certified else None,
            radius=self._rule.radii[certified - 1] if certified else None,
            n=n,
            n_a=n_a,
            p_lower=self._rule.tests[certified - 1].p0 if certified else 0.0,
            outcomes=tuple(self._outcomes),
        )

    def _claim(self, bound: Bound, failed: Result) -> Decision:
        """The grid's certificates so far, or the anytime bound where that says more; both cost one and the same alpha.

        A false certificate, p <= p0 with p0 E_n(p0) >= 1 / level, implies p E_n(p) >= 1 / level, as p E_n(p) falls
        with p. That is the event in which the bound fails, so it adds nothing to the chance of an error.
        """
        certified, radius = self._certified(), l2_radius(bound.p_lower, self._rule.sigma)
        if radius is None or (certified.radius is not None and radius <= certified.radius):
            return certified
        label, _, n_a = self._votes(bound.votes.label)
        return certified._replace(predict=label, radius=radius, n_a=n_a, p_lower=bound.p_lower)
