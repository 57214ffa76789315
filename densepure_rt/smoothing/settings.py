"""What is asked of a certificate: noise, samples, rule; and what it may cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from typing import get_args

from densepure_rt.errors import UsageError
from densepure_rt.rounding import exact, raised
from densepure_rt.runtime.noise import smoothing_law
from densepure_rt.runtime.schedule import TimestepRule
from densepure_rt.smoothing.bounds import check_sampling
from densepure_rt.smoothing.certificate import Method
from densepure_rt.smoothing.decider import Rule
from densepure_rt.smoothing.fixed import FixedRule
from densepure_rt.smoothing.radius import RadiusRule
from densepure_rt.smoothing.sequential import SequentialRule, prediction_rule
from densepure_rt.smoothing.voting import Ballot

MAX_VOTES = 1000  # published work uses up to 40
MOST_N = 10**7  # samples, of what an error proposes
PREDICT_N = 1000  # samples of a prediction at most; 13 that agree are enough
RULES: dict[Method, type[Rule]] = {"fixed": FixedRule, "sequential": SequentialRule, "radius": RadiusRule}


@dataclass(frozen=True)
class Settings:
    """The question that is asked of an image, apart from the engines.

    sigma: std of the smoothing noise in [0, 1] pixel units. method: "sequential", which decides `radii` one after
    another and stops when all are; "radius", which stops when it has all but `radius_loss` of the largest one; or
    "fixed" (Cohen et al. 2019). n: what an image takes at most; with "fixed", what it takes after n0 that select its
    class. radii: l2, ascending; None for 0 and sigma. timestep_rule: see `make_chain`; None for the one that the
    engine's sidecar names.
    """

    sigma: float = 0.5
    steps: int = 2
    votes: int = 5
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    method: Method = "sequential"
    radii: tuple[float, ...] | None = None
    radius_loss: float | None = None
    timestep_rule: TimestepRule | None = None

    def __post_init__(self) -> None:
        check_sampling(self.n0, self.n, self.alpha)
        if not 1 <= self.votes <= MAX_VOTES:
            raise UsageError(f"`votes` is a count from 1 to {MAX_VOTES}, got {self.votes}")
        if self.steps < 0:
            raise UsageError(f"`steps` is a count of reverse steps, got {self.steps}")
        if self.method not in get_args(Method):
            raise UsageError(f"`method` {self.method} is not known: {', '.join(get_args(Method))}")
        if self.radii is not None and not self._asks("radii"):
            raise UsageError(f"`radii` are what the method sequential decides, and {self.method} was asked for")
        if self.radius_loss is not None and not self._asks("radius_loss"):
            raise UsageError(f"a radius loss is what the method radius accepts, and {self.method} was asked for")
        if self.timestep_rule not in (None, *get_args(TimestepRule)):
            raise UsageError(f"`timestep_rule` {self.timestep_rule} is not known: {', '.join(get_args(TimestepRule))}")

    @property
    def effective(self) -> Settings:
        """With fewer than two steps nothing is random after the smoothing noise: all votes would be the same one."""
        return replace(self, votes=1) if self.steps < 2 else self

    def rule(self, pixels: int, labelled: bool) -> Rule:
        """The rule of the method, its alpha charged for the finite precision of the noise on images of so many pixels.

        labelled: whether an anytime method is asked about one class, and not about every one.
        """
        given = vars(self) | {"charge": self._charge(pixels), "n_max": self.n, "labelled": labelled, "radii": self.grid}
        return RULES[self.method](
            **{name: given[name] for name in given if given[name] is not None and self._asks(name)}
        )

    def _asks(self, name: str) -> bool:
        """Say whether the rule of the method has a field of this name."""
        return name in {field.name for field in fields(RULES[self.method])}

    def prediction_rule(self, pixels: int) -> SequentialRule:
        """Which class has more than half of the votes, from n samples at most, its alpha charged as in `rule`."""
        return prediction_rule(self.n, self.alpha, self._charge(pixels))

    def _charge(self, pixels: int) -> float:
        """Return the part of alpha that n samples of noise cost that is not exactly normal."""
        return self.n * pixels * smoothing_law(self.sigma).total_variation

    @property
    def grid(self) -> tuple[float, ...]:
        """The radii that a rule decides which decides them one by one."""
        return (0.0, self.sigma) if self.radii is None else self.radii

    @property
    def decided(self) -> tuple[float, ...] | None:
        """The grid; None of a rule that finds the largest radius."""
        return self.grid if self._asks("radii") else None

    def check_reach(self, pixels: int, labelled: bool) -> None:
        """Raise UsageError when the smallest radius of a grid, and so every one, is beyond what n can certify.

        Where 0 is asked too there is an answer: whether the class holds at the image itself.
        """
        if self.decided is None or not self.grid[0] > 0 or (rule := self.rule(pixels, labelled)).reachable():
            return
        reach, smallest = rule.reach(), self.grid[0]
        most = "nothing is" if reach is None else f"no radius beyond {raised(reach)} is"
        enough = self._enough(pixels, labelled)
        more = (
            f"no n up to {MOST_N:,} is enough for it"
            if enough is None
            else f"{exact(smallest)} takes n = {enough:,} at least"
        )
        raise UsageError(
            f"`radii` from {exact(smallest)} on are all beyond reach: at sigma {exact(self.sigma)} and n = {self.n:,}, "
            f"even when all samples agree, {most} certified, and {more}; ask for a smaller radius or a larger sigma"
        )

    def _enough(self, pixels: int, labelled: bool) -> int | None:
        """Find the least n, above the present one, whose samples certify the smallest radius when all agree."""

        def reaches(n: int) -> bool:
            return bool(replace(self, n=n).rule(pixels, labelled).reachable())

        few = many = self.n
        while not reaches(many):
            few, many = many, 2 * many
            if many > MOST_N:
                return None
        return few + bisect_left(range(few, many + 1), True, key=reaches)

    def ballot(self) -> Ballot:
        return Ballot(self.effective.votes)


PAPER = Settings(steps=10, votes=40, n0=100, n=100_000, method="fixed")  # Xiao et al. 2023: K = 40, b = 10


@dataclass(frozen=True)
class Budget:
    """Wall seconds: for an image, from its first sample on, and for a run. What has come by then decides.

    Time is looked at as samples come in, so that a stop is late by up to a batch of each kind, on a cluster by half a
    second.
    """

    image: float = math.inf
    run: float = math.inf

    def __post_init__(self) -> None:
        if not min(self.image, self.run) > 0:
            raise UsageError(f"a budget is seconds above 0, got {self.image:g} an image and {self.run:g} a run")


UNLIMITED = Budget()
