"""What a run will cost and how far it can reach, before its first sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from densepure_rt.errors import UsageError
from densepure_rt.rounding import exact
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.decider import Rule
from densepure_rt.smoothing.settings import Settings

# What an image is expected to be like before its first sample: 20 quantiles of the share of samples that voted for the
# label, of the 500 shipped images at sigma 0.25 and 0.5 (`make table`); 1.0 is taken for 0.9999.
TYPICAL_P = (0.0, 0.125, 0.49, 0.81, 0.946, 0.984, 0.996, *(0.9999,) * 13)


PRIOR = 5.0  # images that the typical ones count for beside those of a run


class Range(NamedTuple):
    """least, most: whatever the images are like. expected: of images like TYPICAL_P whose votes agree."""

    least: float
    expected: float
    most: float


class RadiusCost(NamedTuple):
    """agreeing: the samples that certify `radius` when all agree; None when n do not, so that it is skipped."""

    radius: float
    agreeing: int | None


@dataclass(frozen=True)
class Forecast:
    """For one image: samples and calls; for the run: seconds.

    reach: the largest radius, in [0, 1] pixel units, that n samples can certify. radii: those decided one by one.
    """

    images: int
    reach: float
    radii: tuple[RadiusCost, ...]
    samples: Range
    unet_calls: Range
    classifier_calls: Range
    seconds: Range


def calls_a_sample(settings: Settings) -> tuple[tuple[int, int], tuple[int, int]]:
    """(least, most) UNet calls and (least, most) classifier calls, as its ballot ends early or late.

    The first step is shared: a sample of v votes takes 1 + v (b - 1) UNet calls.
    """
    votes = (settings.ballot().needed, settings.effective.votes)
    shared, branched = min(1, settings.steps), max(0, settings.steps - 1)
    least, most = (shared + v * branched for v in votes)
    return (least, most), votes


def reach_of(settings: Settings, pixels: int) -> float | None:
    """Return the largest radius of a labelled image, when all its samples agree; None when that certifies nothing."""
    return settings.rule(pixels, labelled=True).reach()


def require_reach(settings: Settings, pixels: int) -> float:
    """Return what `reach_of` does. Raises UsageError when n samples certify nothing even when all agree."""
    if (found := reach_of(settings, pixels)) is not None:
        return found
    enough = next(n for n in itertools.count(settings.n) if reach_of(replace(settings, n=n), pixels) is not None)
    raise UsageError(
        f"`n` {settings.n} cannot certify any radius at alpha = {exact(settings.alpha)}, even when all samples agree: "
        f"ask for {enough} at least"
    )


@lru_cache(4)
def typical_samples(rule: Rule) -> tuple[float, ...]:
    """Return the expected samples of images like TYPICAL_P."""
    return tuple(rule.expected_samples(p) for p in TYPICAL_P) if rule.anytime else (float(rule.samples[1]),)


def samples_of(rule: Rule) -> Range:
    """Return the samples of one image."""
    (least, most), typical = rule.samples, typical_samples(rule)
    return Range(least, sum(typical) / len(typical), most)


def samples_left(rule: Rule, seen: Sequence[int], taken: Sequence[int], untouched: int) -> Range:
    """Samples that a run still takes, judged by what its images took so far: `seen`, besides PRIOR typical ones.

    The range is of two standard deviations: images differ, and `seen` is a sample of them. It is within what is
    possible, and narrows as images finish.

    Args:
        rule: How images are judged.
        seen: Samples of each image that is done.
        taken: Samples so far of each that is under way.
        untouched: Images that nothing was drawn of.
    """
    fewest, most = rule.samples
    typical = typical_samples(rule)
    costs = np.array([*typical, *seen])
    weights = np.array([PRIOR / len(typical)] * len(typical) + [1.0] * len(seen))
    mean = float(np.average(costs, weights=weights))
    variance = float(np.average((costs - mean) ** 2, weights=weights))
    low, expected, high = untouched * fewest, untouched * mean, untouched * most
    spread = variance * (untouched + untouched**2 / weights.sum())
    for samples in taken:
        longer = costs > samples
        rest = np.average(costs[longer], weights=weights[longer]) if longer.any() else most  # of those that took more
        low, expected, high = low + max(0, fewest - samples), expected + rest - samples, high + most - samples
        spread += variance
    margin = 2 * math.sqrt(spread)
    return Range(max(low, expected - margin), expected, min(high, expected + margin))


def forecast(classifier: SmoothedClassifier, settings: Settings, images: int, labelled: bool = True) -> Forecast:
    """Time a few batches and add up. labelled: whether the images have labels, which are then asked about.

    Raises UsageError when n is too small to certify any radius at all, or any of those that were asked for.
    """
    chain = classifier.chain(settings)  # first: it refuses a sigma that no table should be made for
    pixels = math.prod(classifier.bundle.unet.image)
    reach, rule = require_reach(settings, pixels), settings.rule(pixels, labelled=True)
    settings.check_reach(pixels, labelled)
    samples = samples_of(rule)
    (unet_least, unet_most), (label_least, label_most) = calls_a_sample(settings)
    unet_calls = Range(samples.least * unet_least, samples.expected * unet_least, samples.most * unet_most)
    labels = Range(samples.least * label_least, samples.expected * label_least, samples.most * label_most)
    per_step = classifier.sampler.seconds_per_item(chain, "step") if len(chain) else 0.0
    per_label = classifier.sampler.seconds_per_item(chain, "classify")
    return Forecast(
        images=images,
        reach=reach,
        radii=tuple(RadiusCost(*cost) for cost in rule.agreeing().items()),
        samples=samples,
        unet_calls=unet_calls,
        classifier_calls=labels,
        seconds=Range(*(images * (u * per_step + c * per_label) for u, c in zip(unet_calls, labels, strict=True))),
    )
