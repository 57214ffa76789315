"""What is found of a bundle's engines when they are opened, with networks that are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import pytest

from densepure_rt.errors import CheckFailed
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import Floats
from densepure_rt.runtime.host_device import HostDevice, Networks
from densepure_rt.runtime.probe import AGAIN, ITEMS, Probed
from tests.support.plain_networks import by_sign, shrink, small_images

Network = Callable[[Mapping[str, Floats]], Sequence[Floats]]


@pytest.fixture
def bundle() -> Bundle:
    return small_images()


def probed(of: Bundle, step: Network = shrink, batch: int = 4, callers: int = 1, any_batch: bool = True) -> Probed:
    classify = partial(by_sign, len(of.classifier.class_names))
    with closing(HostDevice(of, Networks(step, classify, any_batch), batch, callers, {})) as device:
        return device.probed


def nudged(first_pixel: float, feed: Mapping[str, Floats]) -> Sequence[Floats]:
    """`shrink`, with the last bit of one pixel changed of the item whose first pixel this is."""
    mean, std, finite = shrink(feed)
    of_item = feed["mean"][:, 0, 0, 0] == first_pixel
    mean[of_item, 0, 0, 0] = np.nextafter(mean[of_item, 0, 0, 0], np.float32(9))
    return mean, std, finite


def first_pixels(bundle: Bundle) -> list[float]:
    """What tells the fixed items apart: the first pixel of each, as an engine sees them one by one."""
    seen: list[float] = []

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        seen.extend(feed["mean"][:, 0, 0, 0].tolist())
        return shrink(feed)

    probed(bundle, step, batch=1, any_batch=False)
    return seen[:ITEMS]


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16, 17, 32])
@pytest.mark.parametrize("callers", [1, 3])
def test_a_fingerprint_does_not_depend_on_batch_or_threads_where_results_do_not(
    bundle: Bundle, batch: int, callers: int
) -> None:
    assert probed(bundle, batch=batch, callers=callers) == probed(bundle)


def test_the_last_bit_of_one_pixel_of_any_fixed_item_changes_the_fingerprint(bundle: Bundle) -> None:
    found = {probed(bundle, partial(nudged, pixel)).fingerprint for pixel in first_pixels(bundle)}
    assert len(found | {probed(bundle).fingerprint}) == ITEMS + 1


def test_zero_and_minus_zero_are_two_fingerprints(bundle: Bundle) -> None:
    def step(sign: float, feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        return mean * np.float32(0) + np.float32(sign) * np.float32(0), std, finite

    assert probed(bundle, partial(step, 1.0)).fingerprint != probed(bundle, partial(step, -1.0)).fingerprint


@pytest.mark.parametrize(("batch", "other"), [(1, 2), (2, 1), (32, 1)])
def test_an_engine_that_rounds_otherwise_at_another_batch_is_said_to_depend_on_it(
    bundle: Bundle, batch: int, other: int
) -> None:
    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        return (np.nextafter(mean, np.float32(9)) if len(mean) == other else mean), std, finite

    found = probed(bundle, step, batch)
    assert not found.independent_of_batch
    assert found.fingerprint == probed(bundle, batch=batch).fingerprint
    assert probed(bundle, batch=batch).independent_of_batch


def test_of_an_engine_that_takes_one_batch_alone_nothing_shows_that_it_does_not_depend_on_it(bundle: Bundle) -> None:
    sizes: list[int] = []

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        sizes.append(len(feed["mean"]))
        return shrink(feed)

    assert not probed(bundle, step, batch=5, any_batch=False).independent_of_batch
    assert set(sizes) == {5}
    sizes.clear()
    assert probed(bundle, step, batch=5).independent_of_batch
    assert sizes.count(1) == AGAIN


@pytest.mark.parametrize("batch", [2, 5, 16, 40])
def test_an_engine_whose_items_see_their_neighbour_is_refused(bundle: Bundle, batch: int) -> None:
    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        return mean + np.roll(mean, 1, axis=0) * np.float32(1e-6), std, finite

    with pytest.raises(CheckFailed, match=f"depends on the others in its batch of {batch}"):
        probed(bundle, step, batch)


def test_an_engine_that_sees_where_an_item_stands_is_refused(bundle: Bundle) -> None:
    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        mean[0] += np.float32(1e-3)
        return mean, std, finite

    with pytest.raises(CheckFailed, match="depends on the others"):
        probed(bundle, step, 4)


def test_an_engine_that_is_not_the_same_twice_is_refused_at_batch_1_too(bundle: Bundle) -> None:
    calls = iter(range(1000))

    def step(feed: Mapping[str, Floats]) -> Sequence[Floats]:
        mean, std, finite = shrink(feed)
        return mean + np.float32(next(calls)) * np.float32(1e-3), std, finite

    with pytest.raises(CheckFailed, match="depends on the others"):
        probed(bundle, step, 1)


def test_a_batch_that_comes_back_short_is_refused(bundle: Bundle) -> None:
    with pytest.raises(CheckFailed, match="logits of"):
        closing(HostDevice(bundle, Networks(shrink, lambda feed: [np.zeros((1, 10), np.float32)]), 4, 1, {}))
