from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from densepure_rt.datasets import ImageSet, open_images
from densepure_rt.errors import UsageError
from densepure_rt.forecast import calls_per_image, forecast
from densepure_rt.smoothing import PAPER, Settings, SmoothedClassifier, load, seeded_secret

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
        unet, labels = calls_per_image(Settings(steps=steps, votes=votes), 7)
        assert unet == (7 * (1 + least * (steps - 1)), 7 * (1 + most * (steps - 1)))
        assert labels == (7 * least, 7 * most)


@pytest.mark.parametrize("votes", [1, 5, 40])
def test_with_fewer_than_two_steps_one_vote_is_paid_for(votes: int) -> None:
    assert calls_per_image(Settings(steps=1, votes=votes), 9) == ((9, 9), (9, 9))
    assert calls_per_image(Settings(steps=0, votes=votes), 9) == ((0, 0), (9, 9))


def test_the_preset_of_the_paper_costs_what_the_paper_says_at_most() -> None:
    """K = 40, b = 10: 400 calls a sample without sharing the first step, 361 with it."""
    unet, labels = calls_per_image(PAPER, PAPER.n0 + PAPER.n)
    assert unet[1] == 100_100 * 361
    assert labels[1] == 100_100 * 40


@given(st.integers(2, 12), st.integers(1, 60), st.integers(1, 1000))
def test_the_least_is_never_above_the_most(steps: int, votes: int, samples: int) -> None:
    for least, most in calls_per_image(Settings(steps=steps, votes=votes), samples):
        assert 0 < least <= most


@pytest.mark.parametrize(("steps", "votes"), [(0, 5), (1, 5), (2, 1), (2, 4), (3, 3)])
def test_real_images_cost_between_the_least_and_the_most(
    classifier: SmoothedClassifier, images: ImageSet, steps: int, votes: int
) -> None:
    settings = Settings(sigma=1.0, steps=steps, votes=votes, n0=2, n=10)
    unet, labels = calls_per_image(settings, settings.n0 + settings.n)
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
    settings = Settings(sigma=sigma, steps=1, n0=2, n=n, alpha=alpha)
    expected = sigma * stats.norm.ppf(stats.beta.ppf(alpha, n, 1))
    assert forecast(classifier, settings, 1).reach == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.01, 0.001, 1e-6])
def test_the_n_that_is_named_as_enough_is_the_smallest_that_is(classifier: SmoothedClassifier, alpha: float) -> None:
    with pytest.raises(UsageError) as refused:
        forecast(classifier, Settings(steps=1, n=2, alpha=alpha), 1)
    assert "n = 2 samples" in str(refused.value)
    match = re.search(r"--n ([0-9]+) at least", str(refused.value))
    assert match
    enough = int(match[1])
    assert stats.beta.ppf(alpha, enough, 1) > 0.5
    assert stats.beta.ppf(alpha, enough - 1, 1) <= 0.5
    assert forecast(classifier, Settings(steps=1, n0=2, n=enough, alpha=alpha), 1).reach > 0
    with pytest.raises(UsageError):
        forecast(classifier, Settings(steps=1, n0=2, n=enough - 1, alpha=alpha), 1)


def test_the_forecast_adds_up_over_images(classifier: SmoothedClassifier) -> None:
    settings = Settings(steps=2, votes=5, n0=2, n=12)
    expected = forecast(classifier, settings, 1000)
    assert expected.images == 1000
    assert (expected.unet_calls, expected.classifier_calls) == calls_per_image(settings, 14)
    low, high = expected.seconds
    assert 0 < low < high


def test_smoothing_without_the_unet_still_takes_time(classifier: SmoothedClassifier) -> None:
    """--steps 0 calls the classifier alone, once a sample."""
    expected = forecast(classifier, Settings(steps=0, n=1000), 1000)
    assert expected.unet_calls == (0, 0)
    assert expected.classifier_calls == (1100, 1100)
    assert min(expected.seconds) > 0


def test_a_forecast_leaves_the_device_as_it_found_it(classifier: SmoothedClassifier, images: ImageSet) -> None:
    settings = Settings(steps=2, votes=3, n0=2, n=10)
    before = [result.certificate for result in classifier.certify_each(images, settings)]
    forecast(classifier, replace(settings, steps=3, sigma=0.25), 5)
    assert [result.certificate for result in classifier.certify_each(images, settings)] == before
