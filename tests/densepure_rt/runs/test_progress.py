from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from densepure_rt.images.datasets import ImageSet, LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.runs.progress import SLOW_SECONDS, Progress
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.settings import Budget, Settings

SETTINGS = Settings(sigma=0.5, steps=0, n=400, alpha=0.05)


@pytest.fixture(scope="module")
def classifier() -> Iterator[SmoothedClassifier]:
    with load(batch=8, threads=1, secret=seeded_secret(1)) as smoothed:
        yield smoothed


@pytest.fixture
def images(classifier: SmoothedClassifier) -> ImageSet:
    return open_images(None, classifier.bundle.unet.image, classifier.class_names).select(60, 8)


def done_with(*samples: int) -> list[Any]:
    return [(None, SimpleNamespace(samples=count)) for count in samples]


def test_samples_are_counted_while_an_image_takes_many_and_the_time_ends_at_none(
    classifier: SmoothedClassifier, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    rule = SETTINGS.rule(28 * 28, labelled=True)
    progress = Progress(classifier, rule, len(images), lambda: done, clock=itertools.count().__next__)
    assert (progress.samples(), progress.left(), progress.slow()) == (0, None, "")
    between: list[int] = []
    status = classifier.sampler.decide

    def watched(*arguments: Any) -> Iterator[Any]:
        for outcome in status(*arguments):
            yield outcome
            between.append(progress.samples())
            assert (left := progress.left()) is None or 0 <= left.least <= left.expected <= left.most

    monkeypatch.setattr(classifier.sampler, "decide", watched)
    taken = 0
    for found in classifier.certify_each(images, SETTINGS):
        taken += found.cost.samples
        done.append((None, SimpleNamespace(samples=found.cost.samples)))
        assert progress.samples() >= taken
    assert progress.samples() == taken
    assert progress.left() == (0, 0, 0)
    assert len(set(between)) > 3 * len(images)  # it moves between the images too


def test_the_image_that_a_run_waits_for_is_named() -> None:
    def image(idx: int, opened: float, decided: bool) -> SimpleNamespace:
        named = LabelledImage(idx, np.zeros((1, 28, 28), np.uint8), None, "cat\x1b.png")
        return SimpleNamespace(image=named, cost=SimpleNamespace(samples=3200), decided=decided, opened=opened)

    held = (image(4, 0.0, decided=True), image(7, 1.0, decided=False), image(9, 0.5, decided=False))
    clock = [0.0]
    told = cast(SmoothedClassifier, SimpleNamespace(failed=[], scheduler=SimpleNamespace(held=held)))
    progress = Progress(told, SETTINGS.rule(784, labelled=True), 20, lambda: done_with(32), clock=lambda: clock[0])
    assert progress.slow() == ""
    clock[0] = 1.0 + SLOW_SECONDS
    assert progress.slow() == "image 7 (cat\\x1b.png) at 3,200 of 400 samples at most"


def test_what_earlier_calls_of_a_run_took_is_no_speed_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told = cast(SmoothedClassifier, SimpleNamespace(failed=[], scheduler=None))
    clock, done = [0.0], done_with(400, 400)
    rule = SETTINGS.rule(784, labelled=True)
    progress = Progress(told, rule, 4, lambda: done, clock=lambda: clock[0])
    clock[0] = 10.0
    assert progress.left() is None
    done += done_with(100)
    left = progress.left()
    assert left is not None
    assert 32 * 0.1 <= left.least <= left.expected <= left.most <= 400 * 0.1  # one image, at ten samples a second
    for budget, most in ((Budget(run=12.0), 2.0), (Budget(image=0.5), 0.5)):
        limited = Progress(told, rule, 4, lambda: done_with(400, 400), budget, lambda: 0.0)
        monkeypatch.setattr(limited, "_clock", lambda: 10.0)
        monkeypatch.setattr(limited, "_done", lambda: done_with(400, 400, 100))
        assert limited.left() == (most, most, most)
