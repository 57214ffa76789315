"""Counts in, decision out, with as many samples as it takes: anytime-valid certification. Nothing here samples.

A test asks of one class and one eps whether p_A > p0 = Phi(eps / sigma). Its evidence E is the likelihood ratio to p0,
averaged over a Beta(1/2, 1/2) prior on (p0, 1]. Under every p_A <= p0 that is a nonnegative supermartingale from 1, so
it ever reaches 1/a with probability at most a (Ville 1939; Howard & Ramdas 2021 and Waudby-Smith & Ramdas 2024 for such
mixtures). That holds at all n at once: when and why sampling stops cannot void it. Samples are taken in the order of
their numbers, and one that was not finite is a vote against every class. Everything is rounded to the weaker claim.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from densepure_rt.certification import MARGIN, EpsOutcome, Result, clopper_pearson_lower, l2_radius
from densepure_rt.errors import UsageError
from densepure_rt.rounding import exact, raised
from densepure_rt.runtime.device import NOT_FINITE

RESERVE = 0.25  # share of alpha for one Clopper-Pearson look at n_max (Cohen et al. 2019); the e-process has the rest
BETA = 0.01  # chance of giving up an eps that holds, by the same e-process on the failures (Waudby-Smith & Ramdas 2024)
LOOK = 32  # samples between looks; part of the rule, whatever the device's batch is
RADIUS_LOSS = 0.05  # of the radius that n_max samples would give; what is given up for stopping early

THRESHOLD_MARGIN = 1e-6  # on logs, where an integer threshold is sought
BOUND_MARGIN = 1e-9  # on logs, where a bound is; wider than the error of log_e
NEGLIGIBLE = 1e-15  # of a forecast: chances that are followed no further
HALVINGS = 50  # of (0, 1): to 1e-15
CACHED_LOOKS = 2**17


def log_e(successes: int, n: int, p0: float) -> float:
    """log E of n samples against p <= p0, 0 < p0 < 1 (truncated-beta mixture; Howard & Ramdas 2021).

    With S successes, F = n - S failures, a = S + 1/2, b = F + 1/2 and I_x the regularized incomplete beta function

        E = B(a, b) / B(1/2, 1/2) * (1 - I_p0(a, b)) / (1 - I_p0(1/2, 1/2)) / (p0^S (1 - p0)^F)

    -inf where 1 - I underflows: S / n is then far below p0. B(a, b) / (p0^S (1 - p0)^F) is written with deviances
    (Loader 2000), because the logs of its factors grow with n and cancel.
    """
    a, b, m, q0 = successes + 0.5, n - successes + 0.5, n + 1.0, 1.0 - p0
    tail = float(special.betaincc(a, b, p0))
    if tail < sys.float_info.min:  # what is left of it has lost its digits
        return -math.inf
    prior_tail = 2 / math.pi * math.asin(math.sqrt(q0))
    fit = _deviance(a, m * p0) + _deviance(b, m * q0) + _stirling_rest(a) + _stirling_rest(b) - _stirling_rest(m)
    return fit + 0.5 * math.log(2 * m * p0 * q0 / (math.pi * a * b)) + math.log(tail / prior_tail)


def _deviance(x: float, mean: float) -> float:
    """x log(x / mean) - (x - mean)."""
    return x * math.log1p((x - mean) / mean) - (x - mean)


def _stirling_rest(x: float) -> float:
    """log Gamma(x) - ((x - 1/2) log x - x + 1/2 log 2 pi); from 16 on its series (DLMF 5.11.1), good to 2e-14."""
    if x < 16:
        return math.lgamma(x) - (x - 0.5) * math.log(x) + x - 0.5 * math.log(2 * math.pi)
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * x * x)) / (x * x)) / (x * x)) / x


def _greatest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The greatest value found in [low, high) for which `holds`, which is true up to some value; low counts as true."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def anytime_lower(successes: int, n: int, level: float, any_class: bool = False, at_least: float = 0.0) -> float:
    """L_n, a lower bound on p that fails at any n at all with probability at most `level`; never below `at_least`.

    L solves E_n(L) = 1 / level. With `any_class` it solves E_n(L) = 1 / (level * L) and holds for all classes at once:
    that of class c fails with probability at most level * p_c, which sum to no more than level. E_n(p) falls up to
    p = (S - 1/2) / n and p E_n(p) up to (S - 3/2) / (n - 1), so below that the root is the only one. What is returned
    was confirmed by the forward function.
    """
    high = (successes - 1.5) / max(1, n - 1) if any_class else (successes - 0.5) / max(1, n)
    bar = -math.log(level) + BOUND_MARGIN

    def holds(p: float) -> bool:
        return log_e(successes, n, p) + (math.log(p) if any_class else 0.0) >= bar

    if high <= at_least or (at_least > 0 and not holds(at_least)):
        return at_least
    return max(at_least, _greatest(holds, 0.0, high))


def anytime_radius(successes: int, n: int, level: float, sigma: float, any_class: bool = False) -> float | None:
    """The radius of `anytime_lower`: sound whenever and why ever sampling stopped, as when time ran out."""
    return l2_radius(anytime_lower(successes, n, level, any_class), sigma)


def error_at_most(successes: int, n: int) -> float:
    """The least alpha at which `prediction_rule` answers a class with so many of n votes: 2 / E against p <= 1/2.

    It bounds the probability that any class with p <= 1/2 ever has evidence such as this. At most 1.
    """
    return min(1.0, 2 * math.exp(BOUND_MARGIN - log_e(successes, n, 0.5))) if successes else 1.0


@dataclass(frozen=True)
class EpsTest:
    """Whether p > p0, at `level`: E at every look and, with `reserve` of the level, the exact tail at n_max.

    Certifies when E >= 1 / ((1 - reserve) level), or at n_max when P(Bin(n_max, p0) >= S) <= reserve * level. Gives up
    when E of the failures against 1 - p0 reaches 1 / BETA, or when no run of successes could certify any more; that can
    only lose certificates, never add one.
    """

    p0: float
    level: float
    n_max: int
    reserve: float = RESERVE

    def certifies(self, successes: int, n: int) -> bool:
        if self.p0 >= 1:
            return False
        if log_e(successes, n, self.p0) >= -math.log((1 - self.reserve) * self.level) + THRESHOLD_MARGIN:
            return True
        if n < self.n_max or not self.reserve:
            return False
        tail = special.betainc(successes, n - successes + 1, self.p0)  # P(Bin(n, p0) >= successes)
        return bool(tail <= self.reserve * self.level * (1 - THRESHOLD_MARGIN))

    def gives_up(self, successes: int, n: int) -> bool:
        if successes + self.n_max - n < certify_at(self, self.n_max):
            return True
        return log_e(n - successes, n, 1 - self.p0) >= -math.log(BETA)


@lru_cache(CACHED_LOOKS)
def certify_at(test: EpsTest, n: int) -> int:
    """The fewest successes of n that certify; n + 1 when none do.

    Only S with (S - 3/2) / (n - 1) > p0 are admitted. For them p^(S - 1) (1 - p)^(n - S) rises up to p = p0, and so
    does f(p) / p, with f(p) the chance to certify ever. Where f(p0) <= alpha * p0, any of the classes with p_c <= p0 is
    certified with probability at most sum f(p_c) <= sum p_c f(p0) / p0 <= alpha. So every class can be tested, each at
    alpha * p0, and no sample is spent on choosing one.
    """
    lowest = min(n + 1, math.floor((n - 1) * test.p0 + 0.5) + 2)
    return bisect_left(range(n + 1), True, lo=lowest, key=lambda successes: test.certifies(successes, n))


@lru_cache(CACHED_LOOKS)
def give_up_at(test: EpsTest, n: int) -> int:
    """The most successes of n that give up; -1 when none do."""
    return bisect_left(range(certify_at(test, n)), True, key=lambda successes: not test.gives_up(successes, n)) - 1


class Decision(NamedTuple):
    """With probability at least 1 - alpha the smoothed classifier answers `predict` on the open l2 ball of `radius`.

    predict: None, as the radius, when nothing is certified. radius 0.0: the class is certified at the image itself.
    n: samples taken; n_a: those for the class, or for the one in question. p_lower: what p_A exceeds, 0.0 if nothing.
    """

    predict: int | None
    radius: float | None
    n: int
    n_a: int
    p_lower: float
    outcomes: tuple[EpsOutcome, ...]


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
class _Limits:
    """What both rules have in common.

    sigma: std of the smoothing noise in [0, 1] pixel units. charge: taken off alpha for the noise that is drawn not
    being exactly normal: n_max * pixels * total variation a pixel. look: samples between looks; n_max is always a look.
    labelled: one class is named before the first sample and only that is asked about; else every class is.
    """

    sigma: float
    n_max: int
    alpha: float
    charge: float = 0.0
    look: int = LOOK
    labelled: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UsageError(f"sigma is the standard deviation of the noise, above 0, got {self.sigma}")
        if self.n_max < 1 or self.look < 1:
            raise UsageError(f"n and look are counts of samples, at least 1, got {self.n_max} and {self.look}")
        if not 0 < self.alpha < 0.5:
            raise UsageError(f"alpha is a probability of failure, between 0 and 0.5, got {exact(self.alpha)}")
        if not self.alpha - self.charge > self.alpha / 2:
            raise UsageError(
                f"the noise's finite precision over n = {self.n_max} samples costs {raised(self.charge, figures=2)}, "
                f"more than half of alpha = {exact(self.alpha)}: ask for a smaller n or a larger alpha"
            )

    @property
    def test_level(self) -> float:
        """What is left of alpha for the tests themselves."""
        return self.alpha - self.charge

    def next_look(self, n: int) -> int:
        """The first look after n samples; n_max after that."""
        return min(self.n_max, (n // self.look + 1) * self.look)

    def looks(self, after: int = 0) -> Iterator[int]:
        """The looks beyond so many samples."""
        yield from range(self.next_look(after), self.n_max, self.look)
        yield self.n_max

    def test(self, p0: float, reserve: float) -> EpsTest:
        """Of p0 at all of the level; at level * p0 where every class is tested (see `certify_at`)."""
        return EpsTest(p0, self.test_level * (1.0 if self.labelled else p0), self.n_max, reserve)

    def check(self, label: int | None) -> None:
        """Raise UsageError unless a label comes exactly when the rule is for labelled images."""
        if self.labelled != (label is not None):
            raise UsageError(
                f"this rule is for images {'with' if self.labelled else 'without'} a known label, got label {label}: "
                f"ask for labelled={label is not None}"
            )


@dataclass(frozen=True, kw_only=True)
class SequentialRule(_Limits):
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

    def test_of(self, eps: float) -> EpsTest:
        """p0 = Phi(eps / sigma), rounded up."""
        return self.test(min(1.0, float(special.ndtr(eps / self.sigma)) * (1 + MARGIN)), self.reserve)

    @cached_property
    def tests(self) -> tuple[EpsTest, ...]:
        """Of the radii that n_max agreeing samples certify: the first so many."""
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
        """How many samples certify `eps` when all agree; None when n_max do not."""
        test, looks = self.test_of(eps), tuple(self.looks())
        place = bisect_left(looks, True, key=lambda n: certify_at(test, n) <= n)
        return looks[place] if place < len(looks) else None

    def limits(self, n: int) -> tuple[list[int], list[int]]:
        """At the look n, for each test: the fewest successes that certify and the most that give up. Both ascend."""
        certify = accumulate((certify_at(test, n) for test in self.tests), max)
        give_up = accumulate((give_up_at(test, n) for test in self.tests), max)
        return list(certify), list(give_up)

    def start(self, label: int | None = None) -> GridDecider:
        """Ready for the first sample of an image."""
        self.check(label)
        return GridDecider(self, label)

    def forecast(self, p: float) -> Forecast:
        """What comes of a class that each sample votes for with probability p, were no other asked about. Exact.

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
    return SequentialRule(sigma=1.0, radii=(0.0,), n_max=n_max, alpha=alpha, charge=charge, look=look, reserve=0.0)


@dataclass(frozen=True, kw_only=True)
class RadiusRule(_Limits):
    """The largest radius to be had: `anytime_lower`, the greatest of all looks.

    Stops when its radius is (1 - radius_loss) of what a fixed n_max would give at the present rate of votes, or when
    none can be hoped for. When to stop is free: the bound holds at all looks at once.
    """

    radius_loss: float = RADIUS_LOSS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.radius_loss < 1:
            raise UsageError(f"radius loss is a share of the radius, from 0 to below 1, got {exact(self.radius_loss)}")

    @cached_property
    def half(self) -> EpsTest:
        """Whether p > 1/2, without which there is no radius."""
        return self.test(0.5, reserve=0.0)

    def reach(self) -> float | None:
        """The radius of n_max agreeing samples; None when they have none."""
        return anytime_radius(self.n_max, self.n_max, self.test_level, self.sigma, not self.labelled)

    def fixed_radius(self, successes: int, n: int) -> float | None:
        """What Clopper-Pearson would give for n_max samples at the rate of these n (Cohen et al. 2019)."""
        expected = successes * self.n_max // n
        return l2_radius(clopper_pearson_lower(expected, self.n_max, self.test_level), self.sigma)

    def start(self, label: int | None = None) -> RadiusDecider:
        """Ready for the first sample of an image."""
        self.check(label)
        return RadiusDecider(self, label)


class Standing(NamedTuple):
    """Of a grid: how many of its tests have certified, and how many have not been given up, nor any smaller one."""

    certified: int
    open: int

    @property
    def decided(self) -> bool:
        return self.certified == self.open

    def after(self, successes: int, certify: list[int], give_up: list[int]) -> Standing:
        """At a look, with its limits in ascending order."""
        certified = max(self.certified, min(self.open, bisect_right(certify, successes)))
        return Standing(certified, max(certified, min(self.open, bisect_left(give_up, successes))))


class Votes(NamedTuple):
    """n_a of n samples are for `label`."""

    label: int | None
    n: int
    n_a: int


class Bound(NamedTuple):
    """The greatest `anytime_lower` so far, and what it is from."""

    p_lower: float
    votes: Votes


class _Decider(ABC):
    """Takes the voted labels of an image in the order of its samples, whenever they come, and decides.

    Only that order counts: looks are at fixed numbers of samples, and labels beyond the deciding one change nothing.
    """

    def __init__(self, limits: _Limits, label: int | None, anytime_level: float) -> None:
        self.n = 0
        self.decision: Decision | None = None
        self._limits, self._label, self._level = limits, label, anytime_level
        self._next_look = self._deciding_look = limits.next_look(0)
        self._counts: Counter[int] = Counter()
        self._bound, self._looked_at = Bound(0.0, self._votes()), list[Votes]()  # the latter is not in the bound yet

    def add(self, label: int) -> bool:
        """The next sample's label, or NOT_FINITE, which counts against every class. Returns whether all is decided."""
        if self.decision is None:
            self.n += 1
            if label != NOT_FINITE:
                self._counts[label] += 1
            if self.n == self._next_look:
                self._looked_at.append(self._votes())
                self.decision = self._look()
                self._next_look = self._limits.next_look(self.n)
                if self._next_look > self._deciding_look and self.decision is None:
                    self._deciding_look = self._earliest()
        return self.decision is not None

    @property
    def needed(self) -> int:
        """Samples before all can be decided, at the earliest; 0 when all is."""
        return 0 if self.decision else self._deciding_look - self.n

    @property
    def counts(self) -> Mapping[int, int]:
        """The votes for each class that has any."""
        return self._counts

    def so_far(self) -> Decision:
        """What may be claimed if sampling is stopped from outside now, for whatever reason. Changes nothing."""
        return self.decision or self._claim(self._raised(self._best(), self._votes()), "undecided")

    @abstractmethod
    def _look(self) -> Decision | None:
        """Called at a look."""

    def _earliest(self) -> int:
        """A look before which nothing can be decided."""
        return self._next_look

    @abstractmethod
    def _claim(self, bound: Bound, failed: Result) -> Decision:
        """Stopping now, with the greatest bound so far; what to say of an eps that then fails."""

    def _votes(self, label: int | None = None) -> Votes:
        """For `label`; else for the class that was named or has a certificate; else for the one that leads."""
        label = self._label if label is None else label
        if label is None:
            label = max(self._counts, key=self._counts.__getitem__, default=None)
        return Votes(label, self.n, 0 if label is None else self._counts[label])

    def _best(self) -> Bound:
        """The greatest bound of all looks so far."""
        self._bound = reduce(self._raised, self._looked_at, self._bound)
        self._looked_at.clear()
        return self._bound

    def _raised(self, bound: Bound, votes: Votes) -> Bound:
        any_class = not self._limits.labelled
        p_lower = anytime_lower(votes.n_a, votes.n, self._level, any_class, bound.p_lower)
        return Bound(p_lower, votes) if p_lower > bound.p_lower else bound


class GridDecider(_Decider):
    """Decides which of a `SequentialRule`'s radii hold.

    Without a label the class that leads is in question, until it has a certificate, and then no other is: certificates
    take more than half of the votes. An eps that the leading class gives up is given up for all.
    """

    def __init__(self, rule: SequentialRule, label: int | None) -> None:
        super().__init__(rule, label, (1 - rule.reserve) * rule.test_level)
        self._rule, self._standing = rule, Standing(0, len(rule.tests))
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
        for n in self._limits.looks(self.n):
            certify, give_up = self._rule.limits(n)
            most = successes + n - self.n
            for j in range(certified, still_open + 1):
                if (j == certified or most >= certify[j - 1]) and (j == still_open or successes <= give_up[j]):
                    return n
        return self._limits.n_max

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


class RadiusDecider(_Decider):
    """Decides the radius of a `RadiusRule`. Its one outcome names the look that the bound is from."""

    def __init__(self, rule: RadiusRule, label: int | None) -> None:
        super().__init__(rule, label, rule.test_level)
        self._rule = rule

    def _look(self) -> Decision | None:
        if self.n == self._rule.n_max:
            return self._claim(self._best(), "abstained")
        found = self._claim(self._best(), "gave up")
        if found.radius is None:
            stop = found.n_a <= give_up_at(self._rule.half, self.n)
        else:
            fixed = self._rule.fixed_radius(found.n_a, self.n)
            stop = found.radius >= (1 - self._rule.radius_loss) * (fixed or 0.0)
        return found if stop else None

    def _claim(self, bound: Bound, failed: Result) -> Decision:
        radius = l2_radius(bound.p_lower, self._rule.sigma)
        if radius is None:
            _, n, n_a = self._votes()
            return Decision(None, None, n, n_a, bound.p_lower, (EpsOutcome(0.0, failed, n, n_a),))
        outcome = EpsOutcome(radius, "certified", bound.votes.n, bound.votes.n_a)
        label, n, n_a = self._votes(bound.votes.label)
        return Decision(label, radius, n, n_a, bound.p_lower, (outcome,))
