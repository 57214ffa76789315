"""The device with networks that are plain functions: what it does itself is compared with the formulas."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed
from densepure_rt.runtime import host_device
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import NOT_FINITE, Floats
from densepure_rt.runtime.host_device import HostDevice, Networks
from densepure_rt.runtime.noise import smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.reverse import decide
from densepure_rt.runtime.schedule import make_chain
from densepure_rt.smoothing.voting import Ballot
from tests.support.plain_networks import SHAPE, by_sign, shrink, small_images

SIGMA, KEY, BATCH = 0.5, (11, 12), 4
PIXELS = np.arange(12, dtype=np.uint8).reshape(SHAPE) * 20
STEPS, VOTES, SAMPLES = 3, 3, 6
Network = Callable[[Mapping[str, Floats]], Sequence[Floats]]


@pytest.fixture
def bundle() -> Bundle:
    return small_images()


def device_of(bundle: Bundle, step: Network = shrink, callers: int = 2, batch: int = BATCH) -> HostDevice:
    classify = partial(by_sign, len(bundle.classifier.class_names))
    return HostDevice(bundle, Networks(step, classify), batch, callers, {"provider": "numpy"})


def labels_by(bundle: Bundle, device: HostDevice) -> list[int]:
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, STEPS)
    image = device.open_image(PIXELS, KEY, SIGMA, chain.scale)
    work = ((image, sample) for sample in range(SAMPLES))
    return [outcome.label for outcome in decide(device, chain, work, lambda: Ballot(VOTES))]


def labels_by_hand(bundle: Bundle) -> Iterator[int]:
    """Each sample and vote alone, in float64, from the noise and the chain."""
    chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, STEPS)
    for sample in range(SAMPLES):
        levels = PIXELS + smoothing_noise(smoothing_law(SIGMA), KEY, sample, SHAPE)
        votes = []
        for vote in range(VOTES):
            x = chain.scale * (2 * levels / 255 - 1)
            for step, coef in enumerate(chain.coef.astype(np.float64)):
                mean, std = coef[2] * x / 2 + coef[3] * x, np.exp(coef[4] / 2)
                drawn = step + 1 < len(chain)
                x = mean + std * vote_noise(KEY, sample, vote, step + 1, SHAPE) if drawn else mean
            votes.append(int(x.sum() > 0))
        yield max(votes, key=votes.count)


@pytest.mark.parametrize(("callers", "batch"), [(1, 1), (2, 4), (3, 7)])
def test_the_loop_over_given_networks_gives_the_labels_of_each_sample_alone(
    bundle: Bundle, callers: int, batch: int
) -> None:
    expected = list(labels_by_hand(bundle))
    assert set(expected) == {0, 1}
    with closing(device_of(bundle, callers=callers, batch=batch)) as device:
        assert labels_by(bundle, device) == expected


def test_as_many_callers_as_told_are_in_the_networks_at_once(bundle: Bundle) -> None:
    together = threading.Barrier(2, timeout=30)
    armed = threading.Event()

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        if armed.is_set():
            together.wait()  # breaks, and fails the batch, unless another caller comes
        return shrink(feed)

    with closing(device_of(bundle, step, callers=2, batch=1)) as device:
        armed.set()
        chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, 1)
        image = device.open_image(PIXELS, KEY, SIGMA, chain.scale)
        work = ((image, sample) for sample in range(2))
        assert len(list(decide(device, chain, work, lambda: Ballot(1)))) == 2


def test_what_a_network_raises_ends_the_loop_and_leaves_the_device_usable(bundle: Bundle) -> None:
    failing = threading.Event()

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        if failing.is_set():
            raise CheckFailed("the engine is gone")
        return shrink(feed)

    with closing(device_of(bundle, step)) as device:
        failing.set()
        with pytest.raises(CheckFailed, match="the engine is gone"):
            labels_by(bundle, device)
        failing.clear()
        assert labels_by(bundle, device) == list(labels_by_hand(bundle))


def test_a_network_that_raises_its_alarm_makes_a_sample_not_finite(bundle: Bundle) -> None:
    alarmed = threading.Event()

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        return mean, std, np.zeros_like(finite) if alarmed.is_set() else finite

    with closing(device_of(bundle, step)) as device:
        alarmed.set()
        assert labels_by(bundle, device) == [NOT_FINITE] * SAMPLES


def test_a_batch_that_does_not_stop_is_waited_for_by_what_comes_next(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel that takes long: nothing may write to slots that are used anew."""
    monkeypatch.setattr(host_device, "STOP_SECONDS", 0.05)
    waits, go, ended = threading.Event(), threading.Event(), []

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        if waits.is_set():
            go.wait(30)
            ended.append(True)
        return shrink(feed)

    with closing(device_of(bundle, step, callers=1)) as device:
        chain = make_chain(bundle.unet.schedule, bundle.unet.variance, SIGMA, STEPS)
        image = device.open_image(PIXELS, KEY, SIGMA, chain.scale)
        waits.set()
        loop = decide(device, chain, ((image, sample) for sample in range(SAMPLES)), lambda: Ballot(VOTES))
        threading.Timer(0.3, go.set).start()
        monkeypatch.setattr(device, "collect", partial(give_up, device))
        with pytest.raises(CheckFailed, match="enough"):
            next(loop)
        monkeypatch.undo()
        assert not ended
        assert labels_by(bundle, device) == list(labels_by_hand(bundle))
        assert ended


def give_up(device: HostDevice) -> tuple[int, NDArray[np.int64] | None]:
    """Take what is smoothed, then raise, as Ctrl-C would, while a step is under way."""
    if device._mean.any():
        raise CheckFailed("enough")
    return HostDevice.collect(device)


def test_networks_that_mix_the_items_of_a_batch_are_refused(bundle: Bundle) -> None:
    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        return mean - mean.mean(axis=0), std, finite

    with pytest.raises(CheckFailed, match="depends on the others in its batch of 4"):
        device_of(bundle, step)


def test_it_describes_itself_by_the_facts_it_was_given(bundle: Bundle) -> None:
    with closing(device_of(bundle)) as device:
        assert device.describe() == {
            "provider": "numpy",
            "batch": BATCH,
            "independent_of_batch_mates": True,
            "independent_of_batch": device.probed.independent_of_batch,
            "fingerprint": device.probed.fingerprint,
        }
