"""What a run will cost and how far it can reach, before its first sample."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from densepure_rt.certification import clopper_pearson_lower
from densepure_rt.errors import UsageError
from densepure_rt.runtime.device import Batch, Device, Kind
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing import Settings, SmoothedClassifier

ROUNDS = 2  # timed batches for each caller, after one round that is not


@dataclass(frozen=True)
class Forecast:
    """For one image: least and most calls, as ballots end early or late; for the run: seconds, least and most.

    reach: the largest radius, in [0, 1] pixel units, that n samples can certify.
    """

    images: int
    reach: float
    unet_calls: tuple[int, int]
    classifier_calls: tuple[int, int]
    seconds: tuple[float, float]


def calls_per_image(settings: Settings, samples: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(least, most) UNet calls and (least, most) classifier calls for so many samples.

    The first step is shared: a sample of v votes takes 1 + v (b - 1) UNet calls.
    """
    votes = (settings.ballot().needed, settings.effective.votes)
    shared, branched = min(1, settings.steps), max(0, settings.steps - 1)
    least, most = (samples * (shared + v * branched) for v in votes)
    return (least, most), (samples * votes[0], samples * votes[1])


def seconds_per_item(device: Device, chain: Chain, kind: Kind) -> float:
    """Wall seconds an item of full batches takes, all callers busy."""
    n = device.batch
    slots = n * device.in_flight
    device.reserve(slots)
    channels_height_width = device.read([0])[0].shape[1:]
    handle = device.open_image(np.zeros(channels_height_width, np.uint8), (0, 0), chain.sigma, chain.scale)

    def run(rounds: int) -> float:
        started = time.perf_counter()
        for _ in range(rounds):
            for caller in range(device.in_flight):
                own = np.arange(n) + caller * n
                step = np.full(n if kind == "step" else 0, len(chain) - 1)  # the last: it draws its noise
                columns = {"image": np.full(n, handle), "sample": own, "vote": own * 0, "source": own, "target": own}
                device.submit(Batch(kind=kind, step=step, t=chain.t[step], coef=chain.coef[step], **columns))
            for _ in range(device.in_flight):
                device.collect()
        return time.perf_counter() - started

    run(1)
    seconds = run(ROUNDS)
    device.close_image(handle)
    return seconds / (ROUNDS * slots)


def forecast(classifier: SmoothedClassifier, settings: Settings, images: int) -> Forecast:
    """Time a few batches and add up. Raises UsageError when n is too small to certify any radius at all."""
    chain = classifier.chain(settings)  # first: it refuses a sigma that no table should be made for
    pixels = math.prod(classifier.bundle.unet.image)
    if settings.method == "fixed":
        reach = settings.rule(pixels).largest_radius(settings.sigma)
    else:
        reach = settings.anytime_rule(pixels, labelled=True).reach()
    if reach is None:
        enough = next(n for n in range(1, 100_000) if clopper_pearson_lower(n, n, settings.alpha) > 0.5)
        raise UsageError(
            f"n = {settings.n} samples cannot certify any radius at alpha = {settings.alpha:g}, even when all agree: "
            f"ask for --n {enough} at least"
        )
    few, many = (calls_per_image(settings, samples) for samples in settings.samples)
    unet_calls, classifier_calls = ((least, most) for (least, _), (_, most) in zip(few, many, strict=True))
    per_step = seconds_per_item(classifier.device, chain, "step") if len(chain) else 0.0
    per_label = seconds_per_item(classifier.device, chain, "classify")
    least, most = (
        images * (unets * per_step + labels * per_label)
        for unets, labels in zip(unet_calls, classifier_calls, strict=True)
    )
    return Forecast(images, reach, unet_calls, classifier_calls, (least, most))
