"""The face that all rules have, and what those share that look at growing counts: certify, go on or give up."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import ClassVar, NamedTuple

from scipy import special

from densepure_rt.errors import UsageError
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.runtime.noise import Purpose
from densepure_rt.smoothing.bounds import THRESHOLD_MARGIN, anytime_lower, check_alpha, log_e
from densepure_rt.smoothing.certificate import Certificate, EpsOutcome, Result

RESERVE = 0.25  # share of alpha for one Clopper-Pearson look at n_max (Cohen et al. 2019); the e-process has the rest
BETA = 0.01  # chance of giving up an eps that holds, by the same e-process on the failures (Waudby-Smith & Ramdas 2024)
LOOK = 32  # samples between looks; part of the rule, whatever the device's batch is
CACHED_LOOKS = 2**17
Phases = tuple[tuple[Purpose, int], ...]  # what the samples of an image are for, and the most of each, in their order


class Decider(ABC):
    """Takes the voted labels of an image in the order of its samples, whenever they come, and decides.

    n: how many labels were taken.
    """

    def __init__(self, phases: Phases) -> None:
        self.phases, self.n = phases, 0

    @property
    @abstractmethod
    def needed(self) -> int:
        """Samples before all can be decided, at the earliest; 0 when all is."""

    @abstractmethod
    def add(self, label: int) -> bool:
        """Take the next sample's label, or NOT_FINITE, which is a vote against every class; return whether all is
        decided. A label beyond the deciding one changes nothing.
        """

    @property
    @abstractmethod
    def votes(self) -> Mapping[int, int]:
        """Those for each class that has any."""

    @abstractmethod
    def certificate(self, stopped: bool = False) -> Certificate:
        """Return what may be claimed now. stopped: from outside, before all was decided."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule by which the labels of an image become its certificate.

    sigma: std of the smoothing noise in [0, 1] pixel units. charge: taken off alpha for the noise that is drawn not
    being exactly normal: n * pixels * total variation a pixel. tested: which classes are asked about.
    """

    tested: ClassVar[str]
    anytime: ClassVar[bool]  # whether there is an answer whenever sampling is stopped
    sigma: float
    alpha: float
    charge: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UsageError(f"sigma is the standard deviation of the noise, above 0, got {self.sigma}")
        check_alpha(self.alpha, self.charge, self.phases[-1][1])

    @property
    def test_level(self) -> float:
        """The part of alpha that is left for the tests themselves."""
        return self.alpha - self.charge

    @property
    @abstractmethod
    def phases(self) -> Phases:
        """The purposes of its samples, in order, with their numbers."""

    @property
    @abstractmethod
    def samples(self) -> tuple[int, int]:
        """The fewest and the most samples that an image takes."""

    @abstractmethod
    def reach(self) -> float | None:
        """The largest radius that an image can get, all its samples agreeing; None when even that certifies nothing."""

    @abstractmethod
    def start(self, label: int | None = None) -> Decider:
        """Ready for the first sample of an image. label: its class, where it is known."""

    def sought(self) -> float:
        """The largest radius that it takes samples for."""
        return self.reach() or 0.0

    def reachable(self) -> tuple[float, ...]:
        """Return the radii that all samples agreeing certify, if it decides radii one by one."""
        return ()

    def agreeing(self) -> Mapping[float, int | None]:
        """Return how many agreeing samples certify each of these radii; None where the most do not."""
        return {}

    def expected_samples(self, p: float) -> float:
        """Return the samples of a labelled image whose label has probability p per sample: of one run, unless exact."""
        decider, draw = self.start(0), random.Random(0)
        while not decider.add(int(draw.random() > p)):
            pass
        return decider.n


@dataclass(frozen=True)
class EpsTest:
    """A test of p > p0, at `level`: E at every look and, with `reserve` of the level, the exact tail at n_max.

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


@dataclass(frozen=True, kw_only=True)
class AnytimeRule(Rule):
    """The common part of the rules that hold at every look.

    look: samples between looks; n_max is always a look. labelled: one class is named before the first sample and only
    that is asked about; else every class is. purpose: of the samples.
    """

    tested = "the label of an image that has one, else every class"
    anytime = True
    n_max: int
    look: int = LOOK
    labelled: bool = False
    purpose: Purpose = "certify"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_max < 1 or self.look < 1:
            raise UsageError(f"n and look are counts of samples, at least 1, got {self.n_max} and {self.look}")

    @property
    def phases(self) -> Phases:
        return ((self.purpose, self.n_max),)

    @property
    def samples(self) -> tuple[int, int]:
        return self.next_look(0), self.n_max

    def next_look(self, n: int) -> int:
        """The first look after n samples; n_max after that."""
        return min(self.n_max, (n // self.look + 1) * self.look)

    def looks(self, after: int = 0) -> Iterator[int]:
        """The looks beyond so many samples."""
        yield from range(self.next_look(after), self.n_max, self.look)
        yield self.n_max

    @property
    def anytime_level(self) -> float:
        """The part of the level for the bound that holds at all n at once."""
        return self.test_level

    def test(self, p0: float, reserve: float) -> EpsTest:
        """Make the test of p0 at all of the level; at level * p0 where every class is tested (see `certify_at`)."""
        return EpsTest(p0, self.test_level * (1.0 if self.labelled else p0), self.n_max, reserve)

    def check(self, label: int | None) -> None:
        """Raise UsageError unless a label comes exactly when the rule is for labelled images."""
        if self.labelled != (label is not None):
            raise UsageError(
                f"this rule is for images {'with' if self.labelled else 'without'} a known label, got label {label}: "
                f"ask for labelled={label is not None}"
            )


class Standing(NamedTuple):
    """The state of a grid: how many tests have certified, and how many have not been given up, nor any smaller one."""

    certified: int
    open: int

    @property
    def decided(self) -> bool:
        return self.certified == self.open

    def after(self, successes: int, certify: list[int], give_up: list[int]) -> Standing:
        """Return the standing after a look, with its limits in ascending order."""
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


class AnytimeDecider(Decider):
    """Decides at looks, which are at fixed numbers of samples."""

    _rule: AnytimeRule  # a subclass names its own

    def __init__(self, rule: AnytimeRule, label: int | None) -> None:
        rule.check(label)
        super().__init__(rule.phases)
        self.decision: Decision | None = None
        self._rule, self._label = rule, label
        self._next_look = self._deciding_look = rule.next_look(0)
        self._counts: Counter[int] = Counter()
        self._bound, self._looked_at = Bound(0.0, self._votes()), list[Votes]()  # the latter is not in the bound yet

    def add(self, label: int) -> bool:
        if self.decision is None:
            self.n += 1
            if label != NOT_FINITE:
                self._counts[label] += 1
            if self.n == self._next_look:
                self._looked_at.append(self._votes())
                self.decision = self._look()
                self._next_look = self._rule.next_look(self.n)
                if self._next_look > self._deciding_look and self.decision is None:
                    self._deciding_look = self._earliest()
        return self.decision is not None

    @property
    def needed(self) -> int:
        return 0 if self.decision else self._deciding_look - self.n

    @property
    def votes(self) -> Mapping[int, int]:
        return self._counts

    def so_far(self) -> Decision:
        """Return what may be claimed if sampling is stopped from outside now, for any reason. Changes nothing."""
        return self.decision or self._claim(self._raised(self._best(), self._votes()), "undecided")

    def certificate(self, stopped: bool = False) -> Certificate:
        """Return what may be claimed now; there was no selection."""
        claimed = self.so_far()
        return Certificate(
            predict=claimed.predict,
            radius=claimed.radius,
            n0=0,
            n=claimed.n,
            n_a=claimed.n_a,
            alpha=self._rule.alpha,
            p_lower=claimed.p_lower,
            outcomes=claimed.outcomes,
            stopped=stopped,
        )

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
        level, any_class = self._rule.anytime_level, not self._rule.labelled
        p_lower = anytime_lower(votes.n_a, votes.n, level, any_class, bound.p_lower)
        return Bound(p_lower, votes) if p_lower > bound.p_lower else bound
