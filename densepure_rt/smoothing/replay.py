"""One sample of one image, run again alone: its noise, its purified pictures and its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.images.formats import Pixels
from densepure_rt.images.pictures import pixels_of
from densepure_rt.runtime.noise import Purpose, image_key, smoothing_law, smoothing_noise
from densepure_rt.runtime.reverse import decide, walk
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.settings import Settings


@dataclass(frozen=True)
class Replayed:
    """noisy: clipped to what can be shown; the network sees the rest too. purified, labels: of all votes, in order,
    cast or not. cast: the first so many decided the ballot. label: what it decides, or NOT_FINITE.
    """

    noisy: Pixels
    purified: tuple[Pixels, ...]
    labels: tuple[int, ...]
    cast: int
    label: int


def replay(
    classifier: SmoothedClassifier,
    image: LabelledImage,
    settings: Settings,
    sample: int,
    purpose: Purpose = "certify",
) -> Replayed:
    """Sample number `sample` of an image, as any run with the classifier's secret has drawn it or will draw it."""
    if sample < 0:
        raise UsageError(f"samples are counted from 0, got {sample}")
    device, chain, votes = classifier.device, classifier.chain(settings), settings.effective.votes
    key = image_key(classifier.secret, purpose, settings.sigma, image.pixels)
    noise = smoothing_noise(smoothing_law(settings.sigma), key, sample, image.pixels.shape)
    handle = device.open_image(image.pixels, key, settings.sigma, chain.scale)
    try:
        (outcome,) = decide(device, chain, [(handle, sample)], settings.ballot)
        *_, (slots, labels) = walk(device, chain, handle, np.full(votes, sample), np.arange(votes))
        states, _ = device.read(slots.tolist())
    finally:
        device.close_image(handle)
    return Replayed(
        noisy=np.clip(image.pixels + noise, 0, 255).astype(np.uint8),
        purified=tuple(pixels_of(state) for state in states),
        labels=tuple(labels),
        cast=outcome.votes,
        label=outcome.label,
    )
