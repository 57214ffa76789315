"""One sample of one image, run again alone: its noise, its purified pictures and its label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from densepure_rt.datasets import LabelledImage
from densepure_rt.errors import UsageError
from densepure_rt.runtime.device import Batch, Device, Floats, Kind
from densepure_rt.runtime.noise import Purpose, image_key, smoothing_law, smoothing_noise
from densepure_rt.runtime.reverse import decide
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing import Settings, SmoothedClassifier

Pixels = NDArray[np.uint8]  # [C, H, W]


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
        states, labels = purified(device, chain, handle, sample, votes)
    finally:
        device.close_image(handle)
    return Replayed(
        noisy=np.clip(image.pixels + noise, 0, 255).astype(np.uint8),
        purified=tuple(shown(state) for state in states),
        labels=labels,
        cast=outcome.votes,
        label=outcome.label,
    )


def purified(device: Device, chain: Chain, handle: int, sample: int, votes: int) -> tuple[Floats, tuple[int, ...]]:
    """Where each vote's chain ends, float32 [votes, C, H, W], and its label."""
    device.reserve(1 + votes)
    cast, slots = np.zeros(1, np.int64), np.zeros(1, np.int64)  # one state until the first step is done
    run(device, chain, "smooth", handle, sample, cast, slots, slots, -1)
    for step in range(len(chain)):
        sources = slots
        if step == 1:  # the votes branch here
            cast, sources, slots = np.arange(votes), np.repeat(slots, votes), 1 + np.arange(votes)
        run(device, chain, "step", handle, sample, cast, sources, slots, step)
    labels = run(device, chain, "classify", handle, sample, cast, slots, slots, len(chain))
    return device.read(slots.tolist())[0], tuple(labels)


def run(
    device: Device,
    chain: Chain,
    kind: Kind,
    handle: int,
    sample: int,
    votes: NDArray[np.int64],
    sources: NDArray[np.int64],
    targets: NDArray[np.int64],
    step: int,
) -> list[int]:
    """One kind of work on some votes of a sample, in batches; the labels of a classify."""
    found: list[int] = []
    for vote, source, target in in_batches(device.batch, votes, sources, targets):
        steps = np.full(len(vote), step)
        device.submit(
            Batch(
                kind=kind,
                image=np.full(len(vote), handle),
                sample=np.full(len(vote), sample),
                vote=vote,
                step=steps,
                source=source,
                target=target,
                t=chain.t[steps] if kind == "step" else np.empty(0, np.float32),
                coef=chain.coef[steps] if kind == "step" else np.empty((0, 6), np.float32),
            )
        )
        _, labels = device.collect()
        found += [] if labels is None else labels.tolist()
    return found


def in_batches(size: int, *columns: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], ...]]:
    for first in range(0, len(columns[0]), size):
        yield tuple(column[first : first + size] for column in columns)


def shown(state: Floats) -> Pixels:
    """A state in [-1, 1] as a picture."""
    levels: Floats = np.rint((state + 1) * np.float32(127.5))
    return levels.clip(0, 255).astype(np.uint8)
