from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from densepure_rt.errors import UsageError
from densepure_rt.smoothing.bounds import clopper_pearson_lower, l2_radius
from densepure_rt.smoothing.certificate import Certificate, Counts, certified_accuracy
from densepure_rt.smoothing.fixed import FixedRule
from tests.support.timing import at_most

# s, n, alpha, p_lower, radius / sigma (None: abstain): Cohen et al. 2019, core.py at 78a4d949, computed exactly
CLOPPER_PEARSON = [
    (100, 100, 0.001, 0.9332543008, 1.500475),
    (990, 1000, 0.001, 0.9760361872, 1.978010),
    (9000, 10000, 0.001, 0.8904097337, 1.228710),
    (9000, 10000, 0.0005, 0.8897747574, 1.225331),
    (9990, 10000, 0.001, 0.9975883080, 2.818598),
    (10000, 10000, 0.001, 0.9993094630, 3.198578),
    (99000, 100000, 0.001, 0.9889893404, 2.290000),
    (99990, 100000, 0.001, 0.9997586773, 3.490208),
    (5100, 10000, 0.001, 0.4944993067, None),
    (5200, 10000, 0.001, 0.5045018489, 0.011285),
]
ALPHAS = (0.01, 0.001, 0.0005, 1e-4, 1e-6)
# n -> largest radius / sigma at each of ALPHAS
LARGEST_RADIUS = {
    100: (1.6953, 1.5005, 1.4524, 1.3532, 1.1310),
    1000: (2.6049, 2.4633, 2.4289, 2.3588, 2.2052),
    2000: (2.8338, 2.7018, 2.6699, 2.6049, 2.4633),
    5000: (3.1147, 2.9931, 2.9639, 2.9043, 2.7751),
    10_000: (3.3137, 3.1986, 3.1709, 3.1147, 2.9931),
    20_000: (3.5028, 3.3933, 3.3670, 3.3137, 3.1986),
    50_000: (3.7398, 3.6366, 3.6119, 3.5618, 3.4539),
    100_000: (3.9105, 3.8115, 3.7878, 3.7398, 3.6366),
    1_000_000: (4.4349, 4.3468, 4.3257, 4.2832, 4.1922),
}


def counts(*values: int) -> Counts:
    return np.array(values, np.int64)


def binomial_tail(s: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """P(Bin(n, p) >= s) to 30 digits, summed upwards from s; for s above the mean."""
    with mpmath.workdps(60):
        term = mpmath.binomial(n, s) * p**s * (1 - p) ** (n - s)
        total, odds = term, p / (1 - p)
        for k in range(s, n):
            term *= odds * (n - k) / (k + 1)
            total += term
            if term < total * mpmath.mpf(10) ** -32:
                break
        return total


def exact_tail(s: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(s, n + 1)), Fraction(0))


def exact_quantile(p: float) -> mpmath.mpf:
    with mpmath.workdps(40):
        return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


def fixed(n0: int, n: int, alpha: float, sigma: float = 1.0, charge: float = 0.0) -> FixedRule:
    return FixedRule(n0=n0, n=n, alpha=alpha, sigma=sigma, charge=charge)


@pytest.mark.parametrize(("s", "n", "alpha", "p_lower", "radius"), CLOPPER_PEARSON)
def test_bound_and_radius_equal_the_reference_table(
    s: int, n: int, alpha: float, p_lower: float, radius: float | None
) -> None:
    found = fixed(100, n, alpha).certify(counts(0, 100), counts(n - s, s))
    assert found.p_lower == pytest.approx(p_lower, rel=0, abs=0.51e-10)
    assert (found.n0, found.n, found.n_a, found.alpha) == (100, n, s, alpha)
    if radius is None:
        assert (found.predict, found.radius) == (None, None)
    else:
        assert found.predict == 1
        assert found.radius == pytest.approx(radius, rel=0, abs=0.51e-6)


@pytest.mark.parametrize(("n", "radii"), LARGEST_RADIUS.items())
def test_largest_radius_equals_the_reference_table(n: int, radii: tuple[float, ...]) -> None:
    for alpha, radius in zip(ALPHAS, radii, strict=True):
        for sigma in (1.0, 0.25):
            found = fixed(1, n, alpha, sigma).reach()
            assert found == pytest.approx(sigma * radius, rel=0, abs=sigma * 0.51e-4)


@st.composite
def trials(draw: st.DrawFn) -> tuple[int, int, float]:
    n = draw(st.one_of(st.integers(1, 200), st.integers(1, 200_000)))
    failures = draw(st.one_of(st.integers(0, min(20, n - 1)), st.integers(0, n - 1)))
    return n - failures, n, draw(st.sampled_from([0.3, 0.05, 0.001, 1e-4, 1e-6, 1e-9]))


@settings(deadline=None, max_examples=150)
@given(trials())
def test_bound_is_the_exact_inverse_or_less_than_a_billionth_below(trial: tuple[int, int, float]) -> None:
    s, n, alpha = trial
    bound = clopper_pearson_lower(s, n, alpha)
    with mpmath.workdps(60):
        assert binomial_tail(s, n, mpmath.mpf(bound)) <= mpmath.mpf(
            alpha
        )  # the tail rises with p: not above the inverse
        assert binomial_tail(s, n, mpmath.mpf(bound) * (1 + mpmath.mpf("1e-9"))) > mpmath.mpf(alpha)


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_no_success_probability_is_overstated_more_often_than_alpha(n: int, alpha: float) -> None:
    """The worst p for the bound of s successes is just below it: there the chance of s or more is all of alpha."""
    for s in range(1, n + 1):
        p = Fraction(math.nextafter(clopper_pearson_lower(s, n, alpha), 0.0))
        overstating = [k for k in range(n + 1) if Fraction(clopper_pearson_lower(k, n, alpha)) > p]
        level = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in overstating)
        assert overstating == list(range(s, n + 1))
        assert level == exact_tail(s, n, p)
        assert Fraction(alpha) * (1 - Fraction(1, 10**9)) <= level <= Fraction(alpha)


def test_no_successes_bound_nothing() -> None:
    assert clopper_pearson_lower(0, 100, 0.001) == 0.0


@settings(deadline=None)
@given(st.floats(0.5001, 1 - 1e-6), st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.7]))
def test_radius_is_never_above_the_exact_one_and_close_to_it(p: float, sigma: float) -> None:
    radius = l2_radius(p, sigma)
    assert radius is not None
    with mpmath.workdps(40):
        exact = mpmath.mpf(sigma) * exact_quantile(p)
        assert mpmath.mpf(radius) <= exact
        assert mpmath.mpf(radius) >= exact * (1 - mpmath.mpf("1e-7"))


@pytest.mark.parametrize("p", [0.0, 0.3, math.nextafter(0.5, 0), 0.5, math.nan])
def test_half_or_less_has_no_radius(p: float) -> None:
    assert l2_radius(p, 1.0) is None


@pytest.mark.parametrize("excess", [1e-9, 1e-12, 1e-15])
def test_radius_of_a_bound_barely_above_half_is_found_at_once(excess: float) -> None:
    with at_most(0.5):
        radius = l2_radius(0.5 + excess, 1.0)
    assert radius is None or 0 <= radius <= exact_quantile(0.5 + excess)


def test_charge_is_taken_off_alpha() -> None:
    rule = fixed(10, 1000, 0.01, 0.5, charge=0.004)
    found = rule.certify(counts(10, 0), counts(990, 10))
    assert rule.test_level == pytest.approx(0.006, rel=1e-12)
    assert found.p_lower == pytest.approx(float(stats.beta.ppf(0.006, 990, 11)), rel=1e-9)
    assert found.p_lower < fixed(10, 1000, 0.01, 0.5).certify(counts(10, 0), counts(990, 10)).p_lower
    assert found.alpha == 0.01


@pytest.mark.parametrize("share", [0.5, 0.51, 1.0, 3.0])
def test_charge_of_half_of_alpha_or_more_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="smaller n or a larger alpha"):
        fixed(10, 1000, 0.01, charge=share * 0.01)


def test_charge_just_below_half_of_alpha_is_accepted() -> None:
    assert fixed(10, 1000, 0.01, charge=0.00499).test_level == pytest.approx(0.00501, rel=1e-9)


@pytest.mark.parametrize(("n0", "n"), [(0, 10), (10, 0), (-1, 10), (10, -5)])
def test_counts_of_samples_below_one_are_refused(n0: int, n: int) -> None:
    with pytest.raises(UsageError, match="n0 and n"):
        fixed(n0, n, 0.001)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 1.0, math.nan, math.inf])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        fixed(10, 10, alpha)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_too_few_samples_reach_no_radius(alpha: float) -> None:
    """n agreeing samples bound p by alpha^(1/n), which passes one half at n = log2(1/alpha)."""
    enough = math.floor(math.log2(1 / alpha)) + 1
    reach = fixed(1, enough, alpha).reach()
    assert reach is not None
    assert reach > 0
    if enough > 1:
        assert fixed(1, enough - 1, alpha).reach() is None
        found = fixed(1, enough - 1, alpha).certify(counts(1, 0), counts(enough - 1, 0))
        assert (found.predict, found.radius, found.n_a) == (None, None, enough - 1)


def test_candidate_comes_from_the_selection_alone() -> None:
    found = fixed(10, 100, 0.001).certify(counts(2, 5, 3), counts(100, 0, 0))
    assert (found.predict, found.radius, found.n_a, found.p_lower) == (None, None, 0, 0.0)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_samples_that_are_not_finite_only_weaken(n_a: int, others: int, lost: int) -> None:
    n = 300
    n_a = min(n_a, n)
    others = min(others, n - n_a)
    rule = fixed(10, n, 0.01, 0.5)
    whole = rule.certify(counts(10, 0), counts(n_a, n - n_a))
    some_lost = rule.certify(counts(10, 0), counts(n_a, others))
    a_lost = rule.certify(counts(10, 0), counts(max(0, n_a - lost), others))
    assert some_lost == whole  # each counts against the class, as another label does
    assert a_lost.n == n
    assert a_lost.p_lower <= whole.p_lower
    assert (a_lost.radius or 0.0) <= (whole.radius or 0.0)


def test_samples_that_are_not_finite_are_not_dropped() -> None:
    """98 of 98 finite samples agree; were the 2 others dropped, the radius would be that of n = 98."""
    found = fixed(10, 100, 0.001).certify(counts(10, 0), counts(98, 0))
    dropped = fixed(10, 98, 0.001).reach()
    assert found.p_lower == pytest.approx(float(stats.beta.ppf(0.001, 98, 3)), rel=1e-9)
    assert found.radius is not None
    assert dropped is not None
    assert found.radius < 0.95 * dropped


@pytest.mark.parametrize(("taken", "n0", "n"), [(0, 0, 0), (7, 7, 0), (10, 10, 0), (52, 10, 42)])
def test_a_fixed_n_says_nothing_of_fewer_samples(taken: int, n0: int, n: int) -> None:
    found = fixed(10, 100, 0.001).stopped(counts(n0, 0), counts(n, 0), taken)
    assert (found.predict, found.radius, found.p_lower, found.stopped) == (None, None, 0.0, True)
    assert (found.n0, found.n, found.n_a) == (n0, n, n)


def certificate(predict: int | None, radius: float | None) -> Certificate:
    return Certificate(predict, radius, n0=10, n=100, n_a=99, alpha=0.001, p_lower=0.9)


def test_certified_accuracy_counts_right_labels_that_reach_the_radius() -> None:
    pairs = [
        (3, certificate(3, 0.5)),
        (3, certificate(4, 0.9)),  # wrong
        (1, certificate(1, 0.25)),
        (0, certificate(None, None)),  # abstains
        (None, certificate(2, 0.9)),  # no label is known
    ]
    radii = (0.0, 0.25, 0.3, 0.5, 0.500001, 0.9, 1.0)
    assert certified_accuracy(pairs, radii, 0.9) == [0.4, 0.4, 0.2, 0.2, 0.0, 0.0, None]


def test_certified_accuracy_is_unknown_beyond_reach() -> None:
    pairs = [(3, certificate(None, None))]
    assert certified_accuracy(pairs, (0.0, 0.1), None) == [0.0, None]
    assert certified_accuracy([], (0.0,), 1.0) == [0.0]


def false_rate(probabilities: list[float], rule: FixedRule, images: int, seed: int) -> float:
    """How often Cohen's procedure claims too much of a classifier that votes with these probabilities."""
    draw = np.random.default_rng(seed)
    selections = draw.multinomial(rule.n0, probabilities, images)
    estimations = draw.multinomial(rule.n, probabilities, images)
    wrong = 0
    for selection, estimation in zip(selections, estimations, strict=True):
        found = rule.certify(selection, estimation)
        if found.predict is not None and found.radius is not None:
            wrong += found.radius > float(stats.norm.ppf(probabilities[found.predict]))
    return wrong / images


def test_false_certificates_are_as_rare_as_alpha_where_the_bound_is_tightest() -> None:
    """A p just below the bound of 85 of 100: certificates from 85 agreeing samples or more are all false."""
    rule, images = fixed(20, 100, 0.05), 20_000
    p = float(stats.beta.ppf(0.05, 85, 16)) - 1e-6
    error = math.sqrt(0.05 * 0.95 / images)
    assert abs(false_rate([0.1, p, 0.9 - p], rule, images, seed=1) - 0.05) < 4 * error


@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.34, 0.33, 0.33], [0.49, 0.51], [0.02, 0.98]])
def test_false_certificates_are_no_more_frequent_than_alpha(probabilities: list[float]) -> None:
    rule, images = fixed(20, 100, 0.05), 5000
    assert false_rate(probabilities, rule, images, seed=2) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / images)
