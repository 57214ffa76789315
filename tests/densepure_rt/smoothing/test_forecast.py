from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import ImageSet, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.smoothing.certificate import Method
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.forecast import TYPICAL_P, calls_a_sample, forecast, samples_left, typical_samples
from densepure_rt.smoothing.settings import PAPER, Settings

LABELS = (0, 1, 2)


@pytest.fixture(scope="module")
def classifier() -> Iterator[SmoothedClassifier]:
    with load(batch=4, threads=1, secret=seeded_secret(1)) as smoothed:
        yield smoothed


@pytest.fixture(scope="module")
def images(classifier: SmoothedClassifier) -> ImageSet:
    return open_images(None, classifier.bundle.unet.image, classifier.class_names).select(limit=2)


def plurality(votes: Sequence[int]) -> int:
    """The label with most votes, the one seen first among equals."""
    return max(votes, key=lambda label: (votes.count(label), -votes.index(label)))


def fewest_deciding(votes: int) -> int:
    """The shortest run of votes after which every way to cast the rest has the same winner; by trying them all."""
    for seen in range(1, votes + 1):
        for start in itertools.product(LABELS, repeat=seen):
            rest = itertools.product(LABELS, repeat=votes - seen)
            if len({plurality([*start, *end]) for end in rest}) == 1:
                return seen
    raise AssertionError


@pytest.mark.parametrize("votes", range(1, 7))
def test_the_least_calls_are_those_of_unanimous_ballots_and_the_most_of_full_ones(votes: int) -> None:
    least, most = fewest_deciding(votes), votes
    for steps in (2, 3, 10):
        unet, labels = calls_a_sample(Settings(steps=steps, votes=votes))
        assert unet == (1 + least * (steps - 1), 1 + most * (steps - 1))
        assert labels == (least, most)


@pytest.mark.parametrize("votes", [1, 5, 40])
def test_with_fewer_than_two_steps_one_vote_is_paid_for(votes: int) -> None:
    assert calls_a_sample(Settings(steps=1, votes=votes)) == ((1, 1), (1, 1))
    assert calls_a_sample(Settings(steps=0, votes=votes)) == ((0, 0), (1, 1))


def test_the_preset_of_the_paper_costs_what_the_paper_says_at_most() -> None:
    """K = 40, b = 10: 400 calls a sample without sharing the first step, 361 with it."""
    unet, labels = calls_a_sample(PAPER)
    assert (unet[1], labels[1]) == (361, 40)


@given(st.integers(2, 12), st.integers(1, 60))
def test_the_least_is_never_above_the_most(steps: int, votes: int) -> None:
    for least, most in calls_a_sample(Settings(steps=steps, votes=votes)):
        assert 0 < least <= most


@pytest.mark.parametrize(("steps", "votes"), [(0, 5), (1, 5), (2, 1), (2, 4), (3, 3)])
def test_real_images_cost_between_the_least_and_the_most(
    classifier: SmoothedClassifier, images: ImageSet, steps: int, votes: int
) -> None:
    settings = Settings(sigma=1.0, steps=steps, votes=votes, n0=2, n=10, method="fixed")
    unet, labels = ((12 * least, 12 * most) for least, most in calls_a_sample(settings))
    costs = [result.cost for result in classifier.certify_each(images, settings)]
    assert len(costs) == len(images)
    for cost in costs:
        assert unet[0] <= cost.unet_calls <= unet[1]
        assert labels[0] <= cost.classifier_calls <= labels[1]


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize(("n", "alpha"), [(10, 0.001), (1000, 0.001), (200, 0.05)])
def test_the_reach_is_the_radius_of_a_unanimous_image(
    classifier: SmoothedClassifier, sigma: float, n: int, alpha: float
) -> None:
    settings = Settings(sigma=sigma, steps=1, n0=2, n=n, alpha=alpha, method="fixed")
    expected = sigma * stats.norm.ppf(stats.beta.ppf(alpha, n, 1))
    assert forecast(classifier, settings, 1).reach == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001, 1e-6])
def test_the_n_that_is_named_as_enough_is_the_smallest_that_is(classifier: SmoothedClassifier, alpha: float) -> None:
    with pytest.raises(UsageError) as refused:
        forecast(classifier, Settings(steps=1, n=2, alpha=alpha, method="fixed"), 1)
    assert "`n` 2 cannot" in str(refused.value)
    match = re.search(r"ask for ([0-9]+) at least", str(refused.value))
    assert match
    enough = int(match[1])
    assert stats.beta.ppf(alpha, enough, 1) > 0.5
    assert stats.beta.ppf(alpha, enough - 1, 1) <= 0.5
    assert forecast(classifier, Settings(steps=1, n0=2, n=enough, alpha=alpha, method="fixed"), 1).reach > 0
    with pytest.raises(UsageError):
        forecast(classifier, Settings(steps=1, n0=2, n=enough - 1, alpha=alpha, method="fixed"), 1)


def test_the_forecast_adds_up_over_images(classifier: SmoothedClassifier) -> None:
    settings = Settings(steps=2, votes=5, n0=2, n=12, method="fixed")
    expected = forecast(classifier, settings, 1000)
    assert expected.images == 1000
    assert expected.samples == (14, 14, 14)
    assert expected.unet_calls == (14 * 4, 14 * 4, 14 * 6)
    assert expected.classifier_calls == (14 * 3, 14 * 3, 14 * 5)
    least, expected_seconds, most = expected.seconds
    assert 0 < least == expected_seconds < most


def test_each_radius_has_its_price_and_one_beyond_reach_has_none(classifier: SmoothedClassifier) -> None:
    """Samples that agree: the reference table of the rule at its looks of 32 (0.75 x alpha, eps = 1 and 2 sigma)."""
    settings = Settings(sigma=0.25, steps=1, radii=(0.0, 0.25, 0.5, 1.0))
    assert forecast(classifier, settings, 1).radii == ((0.0, 32), (0.25, 64), (0.5, 384), (1.0, None))


@pytest.mark.parametrize("method", ["sequential", "radius"])
def test_what_is_expected_of_an_anytime_run_is_what_runs_like_it_take(
    classifier: SmoothedClassifier, method: Method
) -> None:
    settings = Settings(sigma=0.25, steps=1, n=2000, method=method)
    rule, draw = settings.rule(784, labelled=True), random.Random(3)
    for p, tolerance in ((0.02, 1e-4), (0.9, 0.25), (0.9999, 0.1)):
        taken = []
        for _ in range(60):
            decider = rule.start(0)
            while not decider.add(int(draw.random() > p)):
                pass
            taken.append(decider.n)
        assert rule.expected_samples(p) == pytest.approx(sum(taken) / 60, rel=tolerance)
    expected = forecast(classifier, settings, 1).samples
    assert expected.least < expected.expected < expected.most == 2000
    assert expected.expected == pytest.approx(sum(rule.expected_samples(p) for p in TYPICAL_P) / len(TYPICAL_P))


def test_smoothing_without_the_unet_still_takes_time(classifier: SmoothedClassifier) -> None:
    """--steps 0 calls the classifier alone, once a sample."""
    expected = forecast(classifier, Settings(steps=0, n=1000, method="fixed"), 1000)
    assert expected.unet_calls == (0, 0, 0)
    assert expected.classifier_calls == (1100, 1100, 1100)
    assert min(expected.seconds) > 0


def test_a_forecast_leaves_the_device_as_it_found_it(classifier: SmoothedClassifier, images: ImageSet) -> None:
    settings = Settings(steps=2, votes=3, n0=2, n=10, method="fixed")
    before = [result.certificate for result in classifier.certify_each(images, settings)]
    forecast(classifier, replace(settings, steps=3, sigma=0.25), 5)
    assert [result.certificate for result in classifier.certify_each(images, settings)] == before


def test_what_is_left_narrows_as_images_finish_and_holds_what_they_take() -> None:
    """Images like the typical ones, and others that take three times as many samples."""
    rule = Settings(radii=(0.0, 0.25)).rule(784, labelled=True)
    typical = typical_samples(rule)
    draw, held, widths = random.Random(0), 0, list[list[float]]()
    for trial in range(40):
        factor = 3 if trial % 2 else 1
        costs = [int(min(rule.samples[1], factor * draw.choice(typical))) for _ in range(100)]
        found = [samples_left(rule, costs[:done], (), 100 - done) for done in (0, 30, 60, 90, 100)]
        widths.append([each.most - each.least for each in found])
        assert all(each.least <= each.expected <= each.most for each in found)
        held += sum(
            each.least <= sum(costs[done:]) <= each.most for done, each in zip((30, 60, 90), found[1:4], strict=True)
        )
    assert held >= 0.85 * 120  # two standard deviations, of costs with a heavy tail
    before, *later = (sum(width) for width in zip(*widths, strict=True))  # one run may narrow less than others
    assert before > 1.5 * later[0] > 1.5 * later[1] > 3 * later[2]
    assert later[-1] == 0


def test_an_image_that_took_long_is_expected_to_go_on() -> None:
    rule = Settings(radii=(0.0, 0.25)).rule(784, labelled=True)
    fewest, most = rule.samples
    beyond = max(typical_samples(rule)) + 1
    if beyond < most:
        assert samples_left(rule, (), [int(beyond)], 0).expected == most - int(
            beyond
        )  # nothing that is known took more
    at_start, later = (samples_left(rule, [64] * 50, [taken], 0) for taken in (0, 500))
    assert later.expected > at_start.expected
    assert at_start.least >= fewest
    assert samples_left(rule, [64], [], 0) == (0, 0, 0)


def test_a_rule_of_fixed_samples_leaves_nothing_open() -> None:
    rule = Settings(method="fixed", n0=10, n=90).rule(784, labelled=True)
    assert samples_left(rule, [100, 100], [40], 3) == (360, 360, 360)
