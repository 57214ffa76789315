from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.runtime.noise import image_key, smoothing_law, smoothing_noise
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.replay import replay
from densepure_rt.smoothing.settings import Settings
from densepure_rt.smoothing.voting import Ballot
from tests.support.journals import Notebook

SECRET = bytes(range(32))


@pytest.fixture(scope="module")
def classifier() -> Iterator[SmoothedClassifier]:
    with load(secret=SECRET, batch=3, threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def image() -> LabelledImage:
    (found,) = open_images(None, (1, 28, 28), [str(i) for i in range(10)]).select(1, 3).select(2, 1)
    return found


@pytest.mark.parametrize(("steps", "votes"), [(0, 1), (1, 1), (2, 5), (3, 4)])
def test_a_sample_drawn_again_has_the_label_that_a_run_gave_it(
    classifier: SmoothedClassifier, image: LabelledImage, steps: int, votes: int
) -> None:
    settings = Settings(sigma=1.0, steps=steps, votes=votes, n=12, alpha=0.3, method="fixed", n0=1)
    notebook = Notebook()
    list(classifier.certify_each([image], settings, journal=notebook))
    drawn = [replay(classifier, image, settings, sample) for sample in range(12)]
    assert [found.label for found in drawn] == notebook.labels[1:]
    assert len({found.label for found in drawn}) > 1 or steps == 0
    for found in drawn:
        ballot = Ballot(votes)
        for label in found.labels[: found.cast]:
            assert ballot.needed > 0
            ballot.cast(label)
        assert ballot.needed == 0
        assert ballot.winner == found.label
        assert len(found.purified) == len(found.labels) == votes


def test_the_noisy_picture_is_the_image_and_its_noise(classifier: SmoothedClassifier, image: LabelledImage) -> None:
    settings = Settings(sigma=0.25, steps=1)
    found = replay(classifier, image, settings, 83_217)
    key = image_key(SECRET, "certify", 0.25, image.pixels)
    levels = image.pixels + smoothing_noise(smoothing_law(0.25), key, 83_217, image.pixels.shape)
    assert (found.noisy == np.clip(levels, 0, 255)).all()
    away = [np.abs(picture.astype(float) - image.pixels).mean() for picture in (found.noisy, found.purified[0])]
    assert away[1] < away[0] / 2  # purification brings it back towards the image


def test_select_and_certify_are_noised_apart(classifier: SmoothedClassifier, image: LabelledImage) -> None:
    settings = Settings(sigma=0.25, steps=0)
    one, other = (replay(classifier, image, settings, 0, purpose) for purpose in ("select", "certify"))
    assert (one.noisy != other.noisy).any()


def test_samples_are_counted_from_zero(classifier: SmoothedClassifier, image: LabelledImage) -> None:
    with pytest.raises(UsageError, match="counted from 0"):
        replay(classifier, image, dataclasses.replace(Settings(), steps=0), -1)
