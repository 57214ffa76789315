"""Bounds of a probability from counts, and the radius that a bound certifies."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from scipy import special

from densepure_rt.errors import UsageError
from densepure_rt.rounding import exact, raised

MARGIN = 1e-12  # relative; wider than the error of scipy's betainc and ndtr where they are used
THRESHOLD_MARGIN = 1e-6  # on logs, where an integer threshold is sought
BOUND_MARGIN = 1e-9  # on logs, where a bound is; wider than the error of log_e
HALVINGS = 50  # of (0, 1): to 1e-15


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
    check_alpha(alpha)


def check_alpha(alpha: float, charge: float = 0.0, n: int = 0) -> None:
    """Raise UsageError unless alpha is a probability of failure of which the noise of n samples leaves more than half.

    charge: taken off alpha for the noise that is drawn not being exactly normal.
    """
    if not 0 < alpha < 0.5:
        raise UsageError(f"alpha is a probability of failure, between 0 and 0.5, got {exact(alpha)}")
    if not alpha - charge > alpha / 2:
        raise UsageError(
            f"the noise's finite precision over n = {n} samples costs {raised(charge, figures=2)}, "
            f"more than half of alpha = {exact(alpha)}: ask for a smaller n or a larger alpha"
        )


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
