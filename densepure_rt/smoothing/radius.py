"""The rule that certifies the largest radius: anytime-valid, ended when more samples would add little."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from densepure_rt.errors import UsageError
from densepure_rt.rounding import exact
from densepure_rt.smoothing.bounds import anytime_radius, clopper_pearson_lower, l2_radius
from densepure_rt.smoothing.certificate import EpsOutcome, Result
from densepure_rt.smoothing.decider import AnytimeDecider, AnytimeRule, Bound, Decision, EpsTest, give_up_at

RADIUS_LOSS = 0.05  # of the radius that n_max samples would give; what is given up for stopping early


@dataclass(frozen=True, kw_only=True)
class RadiusRule(AnytimeRule):
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
        """The test of p > 1/2, without which there is no radius."""
        return self.test(0.5, reserve=0.0)

    def reach(self) -> float | None:
        """The radius of n_max agreeing samples; None when they have none."""
        return anytime_radius(self.n_max, self.n_max, self.test_level, self.sigma, not self.labelled)

    def fixed_radius(self, successes: int, n: int) -> float | None:
        """Return the Clopper-Pearson radius of n_max samples at the rate of these n (Cohen et al. 2019)."""
        expected = successes * self.n_max // n
        return l2_radius(clopper_pearson_lower(expected, self.n_max, self.test_level), self.sigma)

    def start(self, label: int | None = None) -> RadiusDecider:
        """Ready for the first sample of an image."""
        return RadiusDecider(self, label)

    def sought(self) -> float:
        """The radius of n_max agreeing samples, less what is given up for stopping early."""
        return min(super().sought(), (1 - self.radius_loss) * (self.fixed_radius(self.n_max, self.n_max) or 0.0))


class RadiusDecider(AnytimeDecider):
    """Decides the radius of a `RadiusRule`. Its one outcome names the look that the bound is from."""

    _rule: RadiusRule

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
