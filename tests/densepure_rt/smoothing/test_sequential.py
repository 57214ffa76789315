from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import mpmath
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from densepure_rt.errors import UsageError
from densepure_rt.runtime.device import NOT_FINITE
from densepure_rt.smoothing.bounds import (
    MARGIN,
    anytime_lower,
    anytime_radius,
    clopper_pearson_lower,
    error_at_most,
    l2_radius,
    log_e,
)
from densepure_rt.smoothing.certificate import EpsOutcome
from densepure_rt.smoothing.decider import BETA, RESERVE, Decision, EpsTest, certify_at, give_up_at
from densepure_rt.smoothing.radius import RadiusDecider, RadiusRule
from densepure_rt.smoothing.sequential import SequentialRule, prediction_rule

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
RATIOS = (0.5, 1.0, 2.0, 3.0)  # eps / sigma
# S, n, eps / sigma, log E: the closed form, evaluated with mpmath
LOG_E = [
    (60, 60, 1.0, "9.087564"),
    (64, 64, 1.0, "9.7464422490"),
    (95, 96, 1.0, "11.4884782361"),
    (95, 100, 1.0, "4.570797"),
    (900, 1000, 1.0, "12.161339"),
    (990, 1000, 2.0, "3.267125"),
    (512, 512, 2.0, "10.4301881318"),
    (320, 320, 2.0, "6.2464426499"),
    (60, 100, 0.0, "0.153018"),
]
# S, n, L_n at level 0.001
ANYTIME_LOWER = [
    (100, 100, 0.92249802),
    (90, 100, 0.73629040),
    (990, 1000, 0.97124826),
    (9000, 10_000, 0.88589237),
    (9990, 10_000, 0.99710011),
    (10_000, 10_000, 0.99919305),
    (99_990, 100_000, 0.99970976),
]
# ratio -> n -> (certify at or above, give up at or below), alpha = 0.001, n_max = 10000; None: no count certifies
LIMITS: dict[float, dict[int, tuple[int | None, int]]] = {
    1.0: {
        32: (None, 18),
        64: (64, 41),
        96: (94, 66),
        128: (123, 90),
        160: (152, 115),
        192: (181, 140),
        224: (210, 166),
        256: (238, 191),
        320: (295, 242),
        384: (352, 293),
        10_000: (8540, 8539),
    },
    2.0: {384: (384, 361), 10_000: (9824, 9823)},
}
# ratio -> samples that certify when all agree: Clopper-Pearson of fixed n, E at 1 / alpha, this rule for every class
UNANIMOUS = {0.5: (19, 22, 24), 1.0: (40, 47, 50), 1.5: (100, 117, 123), 2.0: (301, 351, 366), 2.5: (1109, 1296, 1347)}
# look -> expected samples at RATES, eps = sigma, n_max = 10000, alpha = 0.001: computed apart from this package, and
# printed to tenths before they were rounded
EXPECTED_BY_LOOK = {
    1: (19, 36, 102, 1231, 595, 139, 60, 50, 49),
    32: (38, 59, 135, 1327, 645, 169, 82, 66, 64),
    128: (128, 129, 190, 1430, 716, 215, 128, 128, 128),
}
# (ratio, n_max) -> expected samples at RATES for looks of 32
EXPECTED = {
    (0.5, 10_000): (103, 402, 9732, 326, 84, 59, 41, 33, 32),
    (1.0, 10_000): (38, 59, 135, 1327, 645, 169, 82, 66, 64),
    (2.0, 10_000): (32, 32, 34, 45, 121, 654, 1821, 439, 389),
    (3.0, 10_000): (32, 32, 32, 33, 45, 75, 316, 3006, 7388),
    (0.5, 100_000): (103, 402, 63_996, 326, 84, 59, 41, 33, 32),
    (1.0, 100_000): (38, 59, 135, 1327, 645, 169, 82, 66, 64),
    (2.0, 100_000): (32, 32, 34, 45, 121, 654, 1821, 439, 389),
    (3.0, 100_000): (32, 32, 32, 33, 45, 83, 751, 87_861, 7937),
}
# (ratio, look, n_max) -> exact chance to certify at p = p0
LEVEL = {
    (0.5, 32, 10_000): 4.1e-4,
    (1.0, 32, 10_000): 4.4e-4,
    (2.0, 32, 10_000): 6.6e-4,
    (3.0, 32, 10_000): 3.8e-4,
    (0.5, 32, 100_000): 4.5e-4,
    (1.0, 32, 100_000): 4.8e-4,
    (2.0, 32, 100_000): 7.9e-4,
    (3.0, 32, 100_000): 7.5e-4,
    (1.0, 1, 10_000): 8.9e-4,  # 9.0e-4 without giving up
    (1.0, 128, 10_000): 3.5e-4,
}


def phi(ratio: float) -> float:
    return float(stats.norm.cdf(ratio))


def whole(samples: float) -> int:
    """As in the reference tables: to tenths, then half up."""
    return math.floor(round(samples, 1) + 0.5)


def grid(
    *ratios: float,
    n_max: int = 10_000,
    alpha: float = 0.001,
    look: int = 32,
    labelled: bool = True,
    reserve: float = RESERVE,
    charge: float = 0.0,
    sigma: float = 1.0,
) -> SequentialRule:
    return SequentialRule(
        sigma=sigma,
        radii=ratios,
        n_max=n_max,
        alpha=alpha,
        look=look,
        labelled=labelled,
        reserve=reserve,
        charge=charge,
    )


def radius_rule(
    n_max: int = 10_000, alpha: float = 0.001, labelled: bool = True, loss: float = 0.05, look: int = 32
) -> RadiusRule:
    return RadiusRule(sigma=1.0, n_max=n_max, alpha=alpha, look=look, labelled=labelled, radius_loss=loss)


def decided(rule: SequentialRule | RadiusRule, labels: Iterable[int], label: int | None = None) -> Decision:
    decider = rule.start(label)
    for voted in labels:
        decider.add(voted)
    assert decider.decision is not None
    return decider.decision


def exact_log_e(successes: int, n: int, p0: mpmath.mpf) -> mpmath.mpf:
    """From the definition, by quadrature: with q = cos^2 t the prior is uniform on 0 < t < asin sqrt(1 - p0)."""
    with mpmath.workdps(35):
        p0, failures = mpmath.mpf(p0), n - successes
        end = mpmath.asin(mpmath.sqrt(1 - p0))

        def log_ratio(t: mpmath.mpf) -> mpmath.mpf:
            gain = successes * mpmath.log(mpmath.cos(t) ** 2 / p0) if successes else mpmath.mpf(0)
            return gain + (failures * mpmath.log(mpmath.sin(t) ** 2 / (1 - p0)) if failures else 0)

        peak = min(end, mpmath.acos(mpmath.sqrt(mpmath.mpf(successes) / n)))
        width = 1 / (2 * mpmath.sqrt(n + 1))
        if peak == end:
            width = min(width, 1 / (1 + abs(2 * failures / mpmath.tan(end) - 2 * successes * mpmath.tan(end))))
        near = {peak + sign * k * width for k in (1, 3, 6, 12, 30) for sign in (-1, 1)}
        top = log_ratio(peak)
        points = sorted({mpmath.mpf(0), end, peak, *(t for t in near if 0 < t < end)})
        return top + mpmath.log(mpmath.quad(lambda t: mpmath.exp(log_ratio(t) - top), points) / end)


def exact_p0(ratio: float) -> mpmath.mpf:
    with mpmath.workdps(40):
        return mpmath.ncdf(ratio)


def fates(
    p: float, looks: Sequence[int], certify: Callable[[int], int], give_up: Callable[[int], int]
) -> tuple[float, float]:
    """(chance to certify, expected samples), by dynamic programming over all counts; apart from the package's own."""
    chances, before, certified, samples = np.ones(1), 0, 0.0, 0.0
    for n in looks:
        samples += (n - before) * chances.sum()
        chances = np.convolve(chances, stats.binom.pmf(np.arange(n - before + 1), n - before, p))
        certified += chances[certify(n) :].sum()
        chances[certify(n) :] = 0
        chances[: give_up(n) + 1] = 0
        before = n
    return float(certified), float(samples)


def two_class_error(rule: SequentialRule, p: float, p0: float) -> float:
    """Chance that any of two classes, with p and 1 - p, is certified though not above p0. Exact."""
    (test,) = rule.tests
    chances, before, wrong = np.ones(1), 0, 0.0
    for n in rule.looks():
        chances = np.convolve(chances, stats.binom.pmf(np.arange(n - before + 1), n - before, p))
        first = np.arange(n + 1)
        for count, rate in ((first, p), (n - first, 1 - p)):
            certifies = count >= certify_at(test, n)
            wrong += chances[certifies].sum() * (rate <= p0)
            chances[certifies] = 0
        chances[np.maximum(first, n - first) <= give_up_at(test, n)] = 0
        before = n
    return float(wrong)


@pytest.mark.parametrize(("successes", "n", "ratio", "value"), LOG_E)
def test_evidence_equals_the_reference_table(successes: int, n: int, ratio: float, value: str) -> None:
    digits = len(value.split(".")[1])
    assert f"{log_e(successes, n, phi(ratio)):.{digits}f}" == value


@st.composite
def evidence(draw: st.DrawFn) -> tuple[int, int, float]:
    """n up to a million; S around the mean more often than not."""
    n = draw(st.one_of(st.integers(1, 100), st.integers(1, 10_000), st.integers(1, 1_000_000)))
    p0 = draw(st.one_of(st.just(0.5), st.floats(0.5, 0.9999), st.floats(-4, -0.4).map(lambda power: 1 - 10**power)))
    away = draw(st.floats(-8, 20)) * math.sqrt(n * p0 * (1 - p0))
    near = min(n, max(0, round(n * p0 + away)))
    return draw(st.one_of(st.just(near), st.just(near), st.integers(0, n))), n, p0


@settings(deadline=None, max_examples=80, derandomize=True)
@given(evidence())
@example((117, 246, 0.9991262116501473))  # where the tail is a subnormal number
@example((126, 253, 0.9991262116501473))
def test_evidence_equals_its_integral_to_nine_digits(given: tuple[int, int, float]) -> None:
    successes, n, p0 = given
    found, exact = log_e(successes, n, p0), exact_log_e(successes, n, mpmath.mpf(p0))
    if found == -math.inf:
        assert exact < -5
    else:
        assert abs(found - exact) <= 1e-9 * abs(exact)
        assert abs(found - exact) <= 1e-10  # far within BOUND_MARGIN


@given(evidence())
def test_every_success_in_place_of_a_failure_adds_evidence(given: tuple[int, int, float]) -> None:
    successes, n, p0 = given
    assume(successes < n)
    less, more = log_e(successes, n, p0), log_e(successes + 1, n, p0)
    assert more > less or less == -math.inf


@given(evidence())
def test_a_further_success_adds_evidence(given: tuple[int, int, float]) -> None:
    """So n_max allows the most failures of all looks, and to give up when they are exceeded loses nothing."""
    successes, n, p0 = given
    less = log_e(successes, n, p0)
    assume(less > -math.inf)
    assert log_e(successes + 1, n + 1, p0) > less - 1e-9


@settings(deadline=None)
@given(st.integers(2, 100_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_p_times_the_evidence_falls_below_the_rate_of_success(n: int, share: float, one: float, other: float) -> None:
    """So that the anytime bound is the only root, and an eps certified for every class lies below it."""
    successes = round(share * n)
    top = (successes - 1.5) / (n - 1)
    lower, higher = sorted((one * top, other * top))
    assume(1e-9 < lower < higher < 1)
    found = [math.log(p) + log_e(successes, n, p) for p in (lower, higher)]
    assert found[1] <= found[0] + 1e-9 * max(1, abs(found[0]))


def test_no_evidence_before_the_first_sample() -> None:
    assert log_e(0, 0, 0.8) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("p0", [0.5, 0.69, 0.84])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.69, 0.84])
def test_mean_evidence_is_at_most_one_under_every_p_up_to_p0(p: float, p0: float) -> None:
    if p > p0:
        return
    for n in (1, 2, 17, 200):
        mean = sum(float(stats.binom.pmf(s, n, p)) * math.exp(log_e(s, n, p0)) for s in range(n + 1))
        assert mean <= 1 + 1e-10
        if p == p0:
            assert mean == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize(("successes", "n", "bound"), ANYTIME_LOWER)
def test_anytime_bound_equals_the_reference_table(successes: int, n: int, bound: float) -> None:
    assert anytime_lower(successes, n, 0.001) == pytest.approx(bound, rel=0, abs=0.51e-8)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 100_000), st.floats(0, 1), st.sampled_from([0.3, 0.05, 0.001, 1e-6]), st.booleans())
def test_anytime_bound_is_the_exact_root_or_barely_below(n: int, share: float, level: float, any_class: bool) -> None:
    successes = round(n - share**3 * n)
    bound = anytime_lower(successes, n, level, any_class)
    assume(bound > 1e-3)
    with mpmath.workdps(35):

        def excess(p: mpmath.mpf) -> mpmath.mpf:
            return exact_log_e(successes, n, p) + (mpmath.log(p) if any_class else 0) + mpmath.log(level)

        assert excess(mpmath.mpf(bound)) >= 0  # p up to the bound is rejected
        assert excess(mpmath.mpf(bound)) < 1e-8
    assert bound < successes / n


@given(st.integers(0, 500), st.integers(1, 500), st.sampled_from([0.05, 0.001]), st.booleans(), st.floats(0.01, 0.999))
def test_anytime_bound_never_sinks_below_an_earlier_one(
    successes: int, n: int, level: float, any_class: bool, before: float
) -> None:
    successes = min(successes, n)
    alone = anytime_lower(successes, n, level, any_class)
    assert anytime_lower(successes, n, level, any_class, before) == max(alone, before)


def test_bound_for_every_class_is_below_that_for_one() -> None:
    assert anytime_lower(100, 100, 0.001, any_class=True) < anytime_lower(100, 100, 0.001)
    assert [anytime_lower(s, n, 0.001, any_class=True) for s, n in ((0, 0), (0, 9), (1, 1), (1, 9))] == [0, 0, 0, 0]
    assert [anytime_radius(s, n, 0.001, 0.5) for s, n in ((0, 0), (0, 9), (1, 1), (50, 100))] == [None] * 4


@pytest.mark.parametrize(("ratio", "n"), [(ratio, n) for ratio, limits in LIMITS.items() for n in limits])
def test_thresholds_equal_the_reference_table(ratio: float, n: int) -> None:
    (test,) = grid(ratio).tests
    certify, give_up = LIMITS[ratio][n]
    assert certify_at(test, n) == (n + 1 if certify is None else certify)
    assert give_up_at(test, n) == give_up


def test_the_first_look_that_can_certify_is_that_of_the_reference_table() -> None:
    (one,), (two,) = grid(1.0).tests, grid(2.0).tests
    assert [n for n in range(32, 97, 32) if certify_at(one, n) <= n] == [64, 96]
    assert [n for n in range(32, 385, 32) if certify_at(two, n) <= n] == [384]


@pytest.mark.parametrize("ratio", UNANIMOUS)
def test_samples_needed_when_all_agree_equal_the_reference_table(ratio: float) -> None:
    fixed, one_class, every_class = UNANIMOUS[ratio]
    assert grid(ratio, look=1, reserve=0.0).needed(ratio) == one_class
    assert grid(ratio, look=1, labelled=False).needed(ratio) == every_class
    enough, short = (l2_radius(clopper_pearson_lower(n, n, 0.001), 1.0) for n in (fixed, fixed - 1))
    assert enough is not None
    assert short is not None
    assert enough >= ratio > short


def test_samples_needed_for_three_sigma_equal_the_reference_table() -> None:
    assert grid(3.0, look=1, labelled=False).needed(3.0) == 6205
    # E reaches 1000 at 5977 of 5977 (6.90873 against log 1000 = 6.90776, at 5976 6.90746)
    assert grid(3.0, look=1, reserve=0.0).needed(3.0) == 5977
    assert exact_log_e(5977, 5977, exact_p0(3.0)) > math.log(1000) > exact_log_e(5976, 5976, exact_p0(3.0))


def test_needed_is_a_look_and_none_beyond_reach() -> None:
    rule = grid(0.5, 1.0, 2.0, 4.0)
    assert [rule.needed(eps) for eps in rule.radii] == [32, 64, 384, None]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.floats(0, 3.2), st.sampled_from([0.05, 0.001, 1e-5]), st.integers(1, 3000), st.booleans(), st.booleans())
def test_thresholds_are_exact_or_one_to_the_safe_side(
    ratio: float, alpha: float, n: int, labelled: bool, last: bool
) -> None:
    """Against the integral at the exact Phi(ratio), and at n_max against the exact binomial tail as well."""
    rule = grid(ratio, alpha=alpha, labelled=labelled, n_max=n if last else 10 * n)
    test = rule.test_of(ratio)
    least = certify_at(test, n)
    with mpmath.workdps(40):
        p0 = exact_p0(ratio)
        assert mpmath.mpf(test.p0) > p0
        level = mpmath.mpf(alpha) * (1 if labelled else mpmath.mpf(test.p0))

        def claims(successes: int, slack: float) -> bool:
            by_e = exact_log_e(successes, n, p0) >= -mpmath.log((1 - RESERVE) * level) + slack
            tail = mpmath.betainc(successes, n - successes + 1, 0, p0, regularized=True) if successes else mpmath.mpf(1)
            return bool(by_e or (last and tail <= RESERVE * level * (1 - slack)))

        assert least == n + 1 or claims(least, 0.0)
        assert least == 0 or not claims(least - 1, 1e-5)


@pytest.mark.parametrize(("successes", "n", "last"), [(95, 100, False), (900, 1000, False), (88, 100, True)])
def test_evidence_that_is_barely_enough_is_not_enough(successes: int, n: int, last: bool) -> None:
    """By E with three quarters of the level, or by the tail at n_max with a quarter."""
    p0, n_max = 0.8, n if last else 10 * n
    tail = float(stats.binom.sf(successes - 1, n, p0)) / RESERVE
    level = tail if last else math.exp(-log_e(successes, n, p0)) / (1 - RESERVE)
    for excess, enough in ((1e-8, False), (1e-5, True)):
        assert EpsTest(p0, level * (1 + excess), n_max).certifies(successes, n) == enough


@settings(deadline=None)
@given(
    st.floats(0, 3.5),
    st.sampled_from([0.49, 0.05, 0.001, 1e-6]),
    st.one_of(st.integers(1, 60), st.integers(1, 20_000)),
    st.sampled_from([0.0, RESERVE, 0.9]),
    st.booleans(),
)
def test_thresholds_fulfil_the_lemma_without_its_help(
    ratio: float, alpha: float, n: int, reserve: float, last: bool
) -> None:
    """(S - 1) / (n - 1) >= p0, on which testing every class rests; and nothing below would have certified."""
    test = grid(ratio, alpha=alpha, labelled=False, reserve=reserve, n_max=n if last else n + 7).test_of(ratio)
    least = certify_at(test, n)
    assert least > n or least - 1 >= (n - 1) * test.p0
    assert least > n or least - 1.5 >= (n - 1) * test.p0
    assert least > n / 2
    below = min(n, math.floor((n - 1) * test.p0 + 0.5) + 1)
    assert not test.certifies(below, n) or below >= least
    assert give_up_at(test, n) < least


@given(st.lists(st.floats(0, 3), min_size=2, max_size=4, unique=True), st.booleans(), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_thresholds_rise_with_the_radius(ratios: list[float], labelled: bool, place: int) -> None:
    rule = grid(*sorted(ratios), labelled=labelled, alpha=0.01, n_max=1000)
    n = list(rule.looks())[min(place, 32) - 1]
    tests = [rule.test_of(eps) for eps in rule.radii]
    assert [certify_at(test, n) for test in tests] == sorted(certify_at(test, n) for test in tests)


@pytest.mark.parametrize(("ratio", "look", "n_max"), LEVEL)
def test_level_is_that_of_the_reference_table_and_at_most_alpha(ratio: float, look: int, n_max: int) -> None:
    rule = grid(ratio, look=look, n_max=n_max)
    level = rule.forecast(rule.tests[0].p0).certified[0]
    assert f"{level:.1e}" == f"{LEVEL[ratio, look, n_max]:.1e}"
    assert level <= 0.001


@pytest.mark.parametrize("ratio", RATIOS)
def test_level_and_samples_equal_an_independent_computation(ratio: float) -> None:
    rule = grid(ratio)
    (test,) = rule.tests
    for p in (phi(ratio), 0.5 + phi(ratio) / 2):
        certified, samples = fates(p, list(rule.looks()), lambda n: certify_at(test, n), lambda n: give_up_at(test, n))
        assert rule.forecast(p).samples == pytest.approx(samples, rel=1e-9)
        assert rule.forecast(p).certified == pytest.approx((certified,), rel=1e-9)
    assert certified <= 1


@pytest.mark.parametrize("look", EXPECTED_BY_LOOK)
def test_expected_samples_by_look_equal_the_reference_table(look: int) -> None:
    rule = grid(1.0, look=look)
    assert tuple(whole(rule.forecast(p).samples) for p in RATES) == EXPECTED_BY_LOOK[look]


@pytest.mark.parametrize(("ratio", "n_max"), EXPECTED)
def test_expected_samples_equal_the_reference_table(ratio: float, n_max: int) -> None:
    rule = grid(ratio, n_max=n_max)
    assert tuple(whole(rule.forecast(p).samples) for p in RATES) == EXPECTED[ratio, n_max]


def test_power_equals_the_reference_figures() -> None:
    assert grid(0.5).forecast(0.7).certified[0] == pytest.approx(0.051, abs=5e-4)
    assert grid(3.0).forecast(0.999).certified[0] == pytest.approx(0.005, abs=5e-4)
    assert grid(3.0).forecast(0.9999).certified[0] == pytest.approx(0.925, abs=5e-4)
    assert grid(3.0, n_max=100_000).forecast(0.999).certified[0] == pytest.approx(0.342, abs=5e-4)
    assert grid(1.0).forecast(phi(1.05)).certified[0] == pytest.approx(0.413, abs=5e-4)
    assert grid(1.0, reserve=0.5).forecast(phi(1.05)).certified[0] == pytest.approx(0.479, abs=5e-4)
    assert grid(1.0).forecast(phi(1.1)).certified[0] >= 0.9985


def test_giving_up_loses_no_more_certificates_than_it_may() -> None:
    for ratio in RATIOS:
        rule = grid(ratio)
        certify = {n: certify_at(rule.tests[0], n) for n in rule.looks()}
        for p in (phi(ratio), phi(ratio + 0.05), phi(ratio + 0.2)):
            to_the_end, _ = fates(p, list(certify), certify.__getitem__, lambda n: -1)
            assert to_the_end - BETA <= grid(ratio).forecast(p).certified[0] <= to_the_end + 1e-12


@pytest.mark.parametrize("labelled", [True, False])
def test_no_eps_of_a_grid_is_falsely_certified_more_often_than_alpha(labelled: bool) -> None:
    """At p = p0 of the j-th eps, it and all above are false. The chance for the j-th bounds them: exact."""
    ratios = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
    rule = grid(*ratios, alpha=0.05, n_max=2000, labelled=labelled)
    for place, ratio in enumerate(ratios):
        found = rule.forecast(phi(ratio)).certified
        limit = 0.05 * (1.0 if labelled else phi(ratio))
        assert 0.2 * limit < found[place] <= limit
        assert list(found) == sorted(found, reverse=True)
        assert rule.forecast(phi(ratio) - 0.01).certified[place] < found[place]


@pytest.mark.parametrize("p", [0.5, 0.8, 0.9, 0.97, 0.985])
def test_a_grid_is_forecast_as_it_is_decided(p: float) -> None:
    rule, images = grid(0.5, 1.0, 2.0, n_max=600, alpha=0.01), 300
    draw = np.random.default_rng(5).random((images, rule.n_max)) < p
    found = [decided(rule, labels, 1) for labels in draw.astype(int).tolist()]
    samples = np.array([decision.n for decision in found])
    forecast = rule.forecast(p)
    assert abs(samples.mean() - forecast.samples) <= 4 * samples.std() / math.sqrt(images) + 1e-9
    for eps, chance in zip(rule.radii, forecast.certified, strict=True):
        share = np.mean([decision.radius is not None and decision.radius >= eps for decision in found])
        assert abs(share - chance) <= 4 * math.sqrt(max(0.0, chance * (1 - chance)) / images) + 1e-9


def test_cost_of_a_grid_is_set_by_the_eps_nearest_to_the_true_radius() -> None:
    rule = grid(1.0, 2.0, 3.0, n_max=100_000)
    assert [round(rule.forecast(p).samples) for p in (0.5, 0.9, 0.95, 0.99, 0.9999)] == [38, 650, 668, 1963, 7937]


# A split of the votes over classes, and the largest p0 that is asked about
SPLITS = [
    (0.0, 0.5),
    (0.5, phi(0.5)),
    (0.5, 0.5),
    (1.0, phi(1.0)),
    (1.0, 0.6),
]


@pytest.mark.parametrize(("ratio", "p"), SPLITS)
@pytest.mark.parametrize("look", [1, 32])
def test_any_of_two_classes_is_falsely_certified_no_more_often_than_alpha(ratio: float, p: float, look: int) -> None:
    rule = grid(ratio, alpha=0.05, n_max=1000, labelled=False, look=look)
    error = two_class_error(rule, p, rule.test_of(ratio).p0)
    assert error <= 0.05
    if (ratio, look) == (0.0, 1):
        assert error > 0.04  # little is given away
    charged = grid(ratio, alpha=0.05, n_max=1000, labelled=False, look=look, charge=0.02)
    assert two_class_error(charged, p, rule.test_of(ratio).p0) <= 0.03


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.3, 0.2), (0.6, 0.4), (0.69, 0.2, 0.1, 0.01)])
def test_deciders_without_labels_err_no_more_often_than_alpha(rates: tuple[float, ...]) -> None:
    """Any class, any eps of the grid, or the bound when stopped at a look of one's choice: one alpha for all."""
    alpha, images = 0.1, 400
    rule = grid(0.0, 0.25, 0.5, 1.0, alpha=alpha, n_max=120, labelled=False, look=20)
    any_radius, radii = radius_rule(120, alpha, labelled=False, look=20), [l2_radius(p, 1.0) or -1.0 for p in rates]
    wrong = np.zeros(3)
    for votes in np.random.default_rng(6).choice(len(rates), (images, rule.n_max), p=rates).tolist():
        decider, claims = rule.start(), []
        for label in votes:
            decider.add(label)
            if decider.n % 20 == 0:
                claims.append(decider.so_far())
        for kind, found in enumerate(([decider.so_far()], claims, [decided(any_radius, votes)])):
            wrong[kind] += any(
                claim.predict is not None
                and claim.radius is not None
                and claim.radius >= max(0.0, radii[claim.predict] + 1e-9)
                and rates[claim.predict] <= rule.test_of(claim.radius).p0
                for claim in found
            )
    assert (wrong / images <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / images)).all()


def test_every_sequence_of_eight_votes_is_decided_as_the_thresholds_say() -> None:
    """All 3^8 sequences of two classes and samples that were not finite; the error over them is exact."""
    rule, rates = grid(0.0, alpha=0.3, n_max=8, look=3, labelled=False), {0: 0.5, 1: 0.4, NOT_FINITE: 0.1}
    (test,) = rule.tests
    wrong = 0.0
    for votes in itertools.product(rates, repeat=8):
        found = decided(rule, votes)
        for n in rule.looks():
            lead = max(votes[:n].count(0), votes[:n].count(1))
            if lead >= certify_at(test, n) or lead <= give_up_at(test, n):
                assert found.n == n
                assert found.n_a == lead
                assert (found.predict is not None) == (lead >= certify_at(test, n))
                assert found.predict is None or votes[:n].count(found.predict) == lead
                break
        else:
            pytest.fail("n_max decides")
        wrong += (found.predict is not None) * math.prod(rates[label] for label in votes)
    assert 0.01 < wrong <= 0.3


def test_prediction_takes_thirteen_that_agree() -> None:
    for alpha, needed in ((0.001, 13), (1e-4, 17)):
        rule = prediction_rule(10_000, alpha)
        assert rule.needed(0.0) == needed
        assert rule.tests[0].level == pytest.approx(alpha / 2, rel=1e-9)
        found = decided(rule, [7] * 100)
        assert (found.predict, found.radius, found.n, found.n_a) == (7, 0.0, needed, needed)


def test_expected_samples_of_a_prediction() -> None:
    """The reference table took a quarter of the level for the last look; a prediction takes none and needs fewer."""
    rates = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6)
    quarter = grid(0.0, labelled=False, look=8)
    assert [round(quarter.forecast(p).samples) for p in rates] == [17, 22, 28, 53, 123, 511]
    whole = prediction_rule(10_000, 0.001, look=8)
    assert [round(whole.forecast(p).samples) for p in rates] == [17, 22, 28, 51, 117, 495]


def test_a_prediction_is_wrong_no_more_often_than_alpha() -> None:
    for p in (0.5, 0.51, 0.6):
        assert two_class_error(prediction_rule(1000, 0.05), p, 0.5) <= 0.05
    assert two_class_error(prediction_rule(1000, 0.05), 0.5, 0.5) > 0.035


@pytest.mark.parametrize("p", [0.5, 0.49, 0.48])
def test_a_wrong_answer_with_a_bound_of_b_comes_with_probability_b_at_most(p: float) -> None:
    """Of two classes with p <= 1/2 and 1 - p, exactly, for every b at once."""
    rule, rates = prediction_rule(600, 0.05, look=8), (p, 1 - p)
    (test,) = rule.tests
    wrong, chances, before = dict[float, float](), np.ones(1), 0
    for n in rule.looks():
        chances = np.convolve(chances, stats.binom.pmf(np.arange(n - before + 1), n - before, rates[0]))
        for successes in range(n + 1):
            for count, rate in zip((successes, n - successes), rates, strict=True):
                if chances[successes] and test.certifies(count, n):
                    bound = error_at_most(count, n)
                    wrong[bound] = wrong.get(bound, 0.0) + chances[successes] * (rate <= 0.5)
                    chances[successes] = 0
        before = n
    assert len(wrong) > 20
    for b in wrong:
        assert 0 < sum(chance for bound, chance in wrong.items() if bound <= b) <= b


def test_of_the_answers_to_a_tie_all_are_wrong_whatever_their_bound() -> None:
    """Why the bound is no probability that the label is wrong: each of these labels is."""
    rule = prediction_rule(600, 0.05, look=8)
    found = decided(rule, [1] * 24)
    assert found.predict == 1
    assert error_at_most(found.n_a, found.n) <= 0.05
    assert two_class_error(rule, 0.5, 0.5) > 0.02


# What must not be done, shown to break the level, and shown not to happen


def test_keeping_the_best_of_several_n_under_one_key_costs_more_than_one_alpha_and_no_more_than_one_each() -> None:
    p0, several = phi(1.0), (1000, 2000, 5000, 10_000)

    def enough(n: int) -> int:
        return int(stats.binom.isf(0.001, n, p0)) + 1

    kept, _ = fates(p0, several, enough, lambda n: -1)
    assert kept == pytest.approx(0.0032, abs=5e-5)
    assert 0.001 < kept <= len(several) * 0.001


def test_peeking_at_clopper_pearson_breaks_the_level_twelvefold() -> None:
    p0 = phi(1.0)

    def peek(n: int) -> int:
        """The fewest successes whose exact tail is at most alpha."""
        return int(stats.binom.isf(0.001, n, p0)) + 1

    looks = range(100, 10_001, 100)
    level, _ = fates(p0, looks, peek, lambda n: -1)
    once, _ = fates(p0, [10_000], peek, lambda n: -1)
    assert level == pytest.approx(0.0122, abs=5e-5)
    assert once == pytest.approx(9.87e-4, abs=5e-7)
    assert grid(1.0, look=100).forecast(p0).certified[0] <= 0.001
    (test,) = grid(1.0, look=100).tests
    assert all(certify_at(test, n) > peek(n) for n in looks[:-1])


def false_rate(rule: SequentialRule, images: Iterable[Sequence[int]]) -> float:
    wrong = []
    for labels in images:
        decider = rule.start(1)
        wrong.append(any(decider.add(label) for label in labels) and decider.so_far().radius is not None)
    return float(np.mean(wrong))


def test_committing_samples_as_they_complete_breaks_the_level() -> None:
    """Of 64 samples in flight those whose votes agree finish first, and those are for the class. p is p0."""
    rule, images = grid(0.5, alpha=0.05, n_max=640), 1000
    votes = (np.random.default_rng(7).random((images, rule.n_max)) < phi(0.5)).astype(int)
    by_index = false_rate(rule, votes.tolist())
    completed = -np.sort(-votes.reshape(images, -1, 64), axis=2).reshape(votes.shape)
    assert (completed.sum(axis=1) == votes.sum(axis=1)).all()
    assert by_index <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / images)
    assert false_rate(rule, completed.tolist()) > 0.9


def test_dropping_samples_that_were_not_finite_breaks_the_level() -> None:
    """p = p0 = 0.69; half of the votes for others are lost."""
    rule, images = grid(0.5, alpha=0.05, n_max=640), 500
    rest = (1 - phi(0.5)) / 2
    votes = np.random.default_rng(8).choice([1, 0, NOT_FINITE], (images, rule.n_max), p=[1 - 2 * rest, rest, rest])
    kept = false_rate(rule, votes.tolist())
    dropped = false_rate(rule, [[label for label in labels if label != NOT_FINITE] for labels in votes.tolist()])
    assert kept <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / images)
    assert dropped > 0.9


LABELS = st.lists(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, NOT_FINITE]), min_size=200, max_size=200)
RULES = st.sampled_from(
    [
        grid(0.0, 0.5, 1.0, n_max=200, alpha=0.05, look=7),
        grid(0.0, 0.5, 1.0, n_max=200, alpha=0.05, look=32, labelled=False),
        prediction_rule(200, 0.05),
        radius_rule(200, 0.05),
        radius_rule(200, 0.05, labelled=False, look=7),
    ]
)


@settings(deadline=None, max_examples=60)
@given(RULES, LABELS, st.lists(st.integers(-1, 3), max_size=50), st.lists(st.integers(1, 40)))
def test_decision_depends_on_nothing_but_the_labels_up_to_it(
    rule: SequentialRule | RadiusRule, labels: list[int], others: list[int], batches: list[int]
) -> None:
    """Not on what follows, nor on how many come at a time, nor on being asked in between."""
    label = 0 if rule.labelled else None
    whole = decided(rule, labels, label)
    assert decided(rule, labels[: whole.n] + others, label) == whole
    decider, fed = rule.start(label), 0
    for batch in itertools.chain(batches, itertools.repeat(64)):
        for voted in labels[fed : fed + batch]:
            needed = decider.needed
            assert decider.add(voted) == (decider.n == whole.n)
            assert (decider.needed == 0) == (decider.decision is not None)
            assert decider.needed == needed - 1 or needed <= 1
        decider.so_far()
        fed += batch
        if fed >= len(labels):
            break
    assert decider.decision == decider.so_far() == whole
    assert decider.n == whole.n
    early = rule.start(label)
    assert not any(early.add(voted) for voted in labels[: whole.n - 1])


@settings(deadline=None)
@given(RULES, LABELS, st.data())
def test_a_sample_that_was_not_finite_weighs_as_a_vote_for_another_class(
    rule: SequentialRule | RadiusRule, labels: list[int], data: st.DataObject
) -> None:
    label = 0 if rule.labelled else None
    before = decided(rule, labels, label)
    if rule.labelled:
        assert decided(rule, [NOT_FINITE if voted == 1 else voted for voted in labels], label) == before
    assume(before.predict is not None)
    won = [place for place in range(before.n) if labels[place] == before.predict]
    lost = data.draw(st.sets(st.sampled_from(won), max_size=5))
    weaker = decided(rule, [NOT_FINITE if place in lost else voted for place, voted in enumerate(labels)], label)
    if weaker.predict == before.predict and isinstance(rule, SequentialRule):
        assert (weaker.radius or 0.0) <= (before.radius or 0.0)


@settings(deadline=None)
@given(st.sampled_from([1, 7, 32]), LABELS, st.sets(st.integers(0, 199), max_size=20))
def test_more_successes_never_lose_a_certificate(look: int, labels: list[int], won: set[int]) -> None:
    rule = grid(0.0, 0.5, 1.0, n_max=200, alpha=0.05, look=look)
    more = [0 if place in won else voted for place, voted in enumerate(labels)]
    less, found = decided(rule, labels, 0), decided(rule, more, 0)
    assert (found.radius is not None) >= (less.radius is not None)
    assert (found.radius or 0.0) >= (less.radius or 0.0)


def test_outcomes_are_told_apart() -> None:
    rule = grid(0.0, 1.0, 2.0, 5.0, n_max=640)
    assert rule.reachable() == (0.0, 1.0, 2.0)
    found = decided(rule, [1] * 640, 1)
    assert [(outcome.result, outcome.n, outcome.n_a) for outcome in found.outcomes] == [
        ("certified", 32, 32),
        ("certified", 64, 64),
        ("certified", 384, 384),
        ("skipped", None, None),
    ]
    assert (found.predict, found.radius, found.n, found.n_a) == (1, 2.0, 384, 384)
    assert found.p_lower == pytest.approx(phi(2.0), rel=1e-11)
    assert found.p_lower > phi(2.0)

    found = decided(rule, ([1] * 8 + [0]) * 67 + [1] * 5 + [0] * 4 + [1] * 28, 1)  # one short of the 570 of n_max
    assert [outcome.result for outcome in found.outcomes] == ["certified", "abstained", "gave up", "skipped"]
    assert (found.predict, found.radius, found.n, found.n_a) == (1, 0.0, 640, 569)
    assert found.outcomes[1].n == 640
    assert (found.outcomes[2].n, found.outcomes[2].n_a) == (32, 29)

    found = decided(rule, [2, 3] * 320, 1)
    assert [outcome.result for outcome in found.outcomes] == ["gave up", "not reached", "not reached", "skipped"]
    assert (found.predict, found.radius, found.n, found.n_a, found.p_lower) == (None, None, 32, 0, 0.0)


def test_no_other_class_goes_on_where_one_has_a_certificate() -> None:
    """Class 2 would certify the larger eps in the end, but the smaller one is certified for class 1."""
    rule = grid(0.0, 0.1, n_max=4000, labelled=False)
    least, enough_for_both = rule.limits(32)[0]
    assert least < enough_for_both
    found = decided(rule, [1] * least + [2] * (4000 - least))
    assert (found.predict, found.radius, found.n_a) == (1, 0.0, least)
    assert [outcome.result for outcome in found.outcomes] == ["certified", "gave up"]
    assert found.outcomes[0].n == 32
    assert decided(rule, [2] * 4000)[:2] == (2, 0.1)


def test_nothing_within_reach_is_decided_before_the_first_sample() -> None:
    rule = grid(4.0, n_max=100)
    assert (rule.reachable(), rule.forecast(0.99)) == ((), (0.0, (0.0,)))
    decider = rule.start(3)
    assert decider.decision is not None
    assert decider.add(3)
    assert (decider.n, decider.decision.predict, decider.needed) == (0, None, 0)
    assert decider.decision.outcomes == (EpsOutcome(4.0, "skipped", None, None),)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20_000), st.sampled_from([0.3, 0.01, 0.001, 1e-6]), st.booleans(), st.floats(0.1, 1))
def test_reach_is_the_largest_radius_that_agreeing_samples_certify(
    n_max: int, alpha: float, labelled: bool, sigma: float
) -> None:
    reach = grid(0.0, n_max=n_max, alpha=alpha, labelled=labelled, sigma=sigma).reach()
    if reach is None:
        assert not grid(1e-6, n_max=n_max, alpha=alpha, labelled=labelled, sigma=sigma).reachable()
        return
    assume(reach > 1e-6)
    rule = grid(reach, reach * (1 + 1e-6) + 1e-9, n_max=n_max, alpha=alpha, labelled=labelled, sigma=sigma)
    assert rule.reachable() == (reach,)
    assert decided(rule, [1] * n_max, 1 if labelled else None).radius == reach


def test_reach_is_that_of_the_last_look() -> None:
    for labelled, power in ((True, 10_000), (False, 9999)):
        reach = grid(0.0, labelled=labelled).reach()
        assert reach == pytest.approx(float(stats.norm.ppf(2.5e-4 ** (1 / power))), rel=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_radius_is_sound_and_within_the_loss_of_that_of_all_samples(labelled: bool) -> None:
    rule = radius_rule(labelled=labelled)
    for p in (0.7, 0.9, 0.99, 0.9999):
        votes = np.where(np.random.default_rng(9).random((4, rule.n_max)) < p, 4, 5)
        for labels in votes.tolist():
            found = decided(rule, labels, 4 if labelled else None)
            assert found.radius is not None
            assert found.predict == 4
            assert found.n_a == labels[: found.n].count(4)
            (outcome,) = found.outcomes
            assert outcome.result == "certified"
            assert outcome.n is not None
            assert outcome.n_a is not None
            bound = anytime_lower(outcome.n_a, outcome.n, 0.001, any_class=not labelled)
            assert found.p_lower == bound
            assert found.radius == l2_radius(bound, 1.0)
            fixed = rule.fixed_radius(found.n_a, found.n)
            assert fixed is not None
            assert found.radius >= 0.95 * fixed or found.n == rule.n_max
    assert decided(rule, [4] * 10_000, 4 if labelled else None).n == 6816
    reach = rule.reach()
    assert reach is not None
    assert decided(radius_rule(labelled=labelled, loss=0.0), [4] * 10_000, 4 if labelled else None).radius == reach


@pytest.mark.parametrize("labelled", [True, False])
def test_radius_mode_gives_up_where_there_is_none(labelled: bool) -> None:
    rule = radius_rule(labelled=labelled)
    found = decided(rule, [1, 2, 3, 4] * 2500, 1 if labelled else None)
    assert found[:2] == (None, None)
    assert found.n < 200
    assert found.outcomes[0].result == "gave up"
    assert found.outcomes[0].n == found.n
    tie = decided(rule, [1, 2] * 5000, 1 if labelled else None)
    assert tie.outcomes[0].result == "gave up"
    short = decided(radius_rule(32, labelled=labelled), ([1] * 5 + [2] * 3) * 4, 1 if labelled else None)
    assert (short.predict, short.n, short.outcomes[0].result) == (None, 32, "abstained")


@pytest.mark.parametrize("p", [0.6, 0.8, 0.95])
def test_radius_overstates_no_more_often_than_alpha(p: float) -> None:
    """Even when the best of all looks is taken: the chance that any bound passes p, exactly."""
    (test,) = grid(0.0, alpha=0.05, n_max=640, reserve=0.0).tests
    exact = EpsTest(p, 0.05, 640, 0.0)
    level, _ = fates(p, range(1, 641), lambda n: certify_at(exact, n), lambda n: -1)
    assert 0.02 < level <= 0.05
    assert test.level == 0.05
    for n in (32, 320, 640):  # passing p and certifying p are one
        least = certify_at(exact, n)
        assert least > n or anytime_lower(least, n, 0.05) >= p > anytime_lower(least - 1, n, 0.05)


def test_stopped_from_outside_it_claims_what_the_evidence_bears_out() -> None:
    decider = grid(0.0, 1.0, 2.0, labelled=False).start()
    assert decider.so_far()[:4] == (None, None, 0, 0)
    for _ in range(100):
        decider.add(6)
    assert decider.decision is None
    found = decider.so_far()
    expected = anytime_radius(100, 100, (1 - RESERVE) * 0.001, 1.0, any_class=True)
    assert (found.predict, found.radius, found.n, found.n_a) == (6, expected, 100, 100)
    assert [outcome.result for outcome in found.outcomes] == ["certified", "certified", "undecided"]
    for _ in range(9):
        decider.add(5)  # an earlier bound stays
    later = decider.so_far()
    at_look = anytime_radius(96, 96, (1 - RESERVE) * 0.001, 1.0, any_class=True)
    assert (later.predict, later.radius, later.n, later.n_a) == (6, at_look, 109, 100)

    radius = radius_rule(labelled=True).start(6)
    for _ in range(50):
        radius.add(6)
    assert radius.so_far().radius == anytime_radius(50, 50, 0.001, 1.0)
    assert radius_rule().start(6).so_far().outcomes == (EpsOutcome(0.0, "undecided", 0, 0),)


@settings(deadline=None, max_examples=30)
@given(LABELS, st.booleans(), st.sampled_from([7, 32]))
def test_the_anytime_radius_is_never_below_what_the_grid_has_certified(
    labels: list[int], labelled: bool, look: int
) -> None:
    """They are one event, so that claiming the larger costs no further alpha."""
    rule = grid(0.0, 0.5, 1.0, n_max=1000, alpha=0.05, look=look, labelled=labelled)
    decider = rule.start(0 if labelled else None)
    for label in labels:
        if decider.add(label):
            break
        found = decider.so_far()
        certified = [outcome for outcome in found.outcomes if outcome.result == "certified"]
        if certified:
            assert found.radius is not None
            assert found.radius > certified[-1].eps
            assert found.p_lower > rule.test_of(certified[-1].eps).p0


def test_charge_is_taken_off_alpha() -> None:
    rule = grid(1.0, alpha=0.01, charge=0.004)
    assert rule.test_level == pytest.approx(0.006, rel=1e-12)
    assert rule.tests[0].level == rule.test_level
    assert rule.forecast(phi(1.0)).certified[0] <= 0.006
    assert rule.tests[0] == grid(1.0, alpha=0.006).tests[0] or rule.tests[0].level == pytest.approx(0.006)


@pytest.mark.parametrize("share", [0.5, 0.51, 1.0, 3.0, math.nan])
def test_charge_of_half_of_alpha_or_more_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="smaller n or a larger alpha"):
        grid(1.0, alpha=0.01, charge=share * 0.01)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 1.0, math.nan, math.inf])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        grid(1.0, alpha=alpha)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_sigma_outside_its_range_is_refused(sigma: float) -> None:
    with pytest.raises(UsageError, match="sigma"):
        grid(1.0, sigma=sigma)


@pytest.mark.parametrize(("n_max", "look"), [(0, 32), (-5, 32), (10, 0)])
def test_counts_of_samples_below_one_are_refused(n_max: int, look: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        grid(1.0, n_max=n_max, look=look)


@pytest.mark.parametrize("radii", [(), (1.0, 0.5), (0.5, 0.5), (-0.1, 0.5), (0.5, math.inf), (math.nan,)])
def test_radii_that_do_not_ascend_from_zero_up_are_refused(radii: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="radii"):
        grid(*radii)


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(UsageError, match="reserve"):
        grid(1.0, reserve=1.0)
    with pytest.raises(UsageError, match="loss"):
        radius_rule(loss=1.0)


def test_a_label_is_taken_exactly_when_the_rule_is_for_labels() -> None:
    for rule in (grid(1.0), radius_rule()):
        with pytest.raises(UsageError, match="labelled=False"):
            rule.start()
    for other in (grid(1.0, labelled=False), radius_rule(labelled=False), prediction_rule(10, 0.01)):
        with pytest.raises(UsageError, match="labelled=True"):
            other.start(0)
    assert isinstance(radius_rule().start(0), RadiusDecider)


def test_n_max_is_always_a_look() -> None:
    rule = grid(1.0, n_max=100)
    assert list(rule.looks()) == [32, 64, 96, 100]
    assert [rule.next_look(n) for n in (0, 31, 32, 96, 99, 100)] == [32, 32, 64, 100, 100, 100]
    assert list(grid(1.0, n_max=64).looks()) == [32, 64]
    assert list(grid(1.0, n_max=10).looks()) == [10]


def test_p0_is_rounded_up() -> None:
    for ratio in (0.0, 0.1, 1.0, 3.0, 6.0):
        for sigma in (0.25, 0.1, 1.0):
            p0 = grid(ratio * sigma, sigma=sigma).test_of(ratio * sigma).p0
            with mpmath.workdps(40):
                assert exact_p0(ratio) < p0 <= exact_p0(ratio) * (1 + 2 * MARGIN)
    assert grid(9.0).reachable() == ()
