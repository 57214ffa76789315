from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pydoc
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

import densepure_rt
from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import commitment, new_secret, seeded_secret
from densepure_rt.runtime.bundle import shipped_engine
from densepure_rt.runtime.noise import Key, Purpose, image_key, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.smoothing.bounds import anytime_radius
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.decider import LOOK
from densepure_rt.smoothing.sequential import SequentialRule
from densepure_rt.smoothing.settings import PAPER, Budget, Settings
from tests.support.timing import at_most

ROOT = Path(__file__).resolve().parent.parent.parent.parent
SHAPE = (1, 28, 28)
NAMES = [str(label) for label in range(10)]
SECRET = bytes(range(32))
WIDE = Settings(
    sigma=1.0, steps=2, votes=3, n0=5, n=12, alpha=0.3, method="fixed"
)  # so much noise that samples disagree
CHEAP = Settings(sigma=0.25, steps=0, votes=1, n0=20, n=80, alpha=0.05, method="fixed")  # the classifier alone

Votes = list[list[int]]


@pytest.fixture(scope="module")
def images() -> list[LabelledImage]:
    return list(open_images(None, SHAPE, NAMES).select(37, 12))


@pytest.fixture(scope="module")
def shipped() -> Iterator[SmoothedClassifier]:
    with load(secret=SECRET, batch=8, threads=2) as classifier:
        yield classifier


def certificates(classifier: SmoothedClassifier, images: Sequence[LabelledImage], settings: Settings) -> list[Any]:
    return [(found.image.idx, found.certificate) for found in classifier.certify_each(images, settings)]


def votes_of(classifier: SmoothedClassifier, images: Sequence[LabelledImage], settings: Settings) -> Votes:
    return [found.votes.tolist() for found in classifier.predict_each(images, settings)]


@pytest.fixture(scope="module")
def baseline(images: list[LabelledImage]) -> tuple[list[Any], Votes]:
    with load(secret=SECRET, batch=5, threads=1) as classifier:
        return certificates(classifier, images[:3], WIDE), votes_of(classifier, images[:3], WIDE)


GREY = np.zeros(SHAPE, np.uint8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (GREY.tolist(), ["type list", "np.array(image, dtype=np.uint8)"]),
        (None, ["type NoneType"]),
        (GREY[0], ["uint8 [28, 28]", "image[None]"]),
        (GREY.transpose(1, 2, 0), ["uint8 [28, 28, 1]", "image.transpose(2, 0, 1)"]),
        (GREY[None], ["uint8 [1, 1, 28, 28]", "image[0]"]),
        (GREY / 255, ["float64", "from 0 to 255", "np.rint(255 * image)"]),
        (GREY.astype(np.int64), ["int64", "image.astype(np.uint8)"]),
        (np.zeros((3, 32, 32), np.uint8), ["[3, 32, 32]", "nothing is resized"]),
        (np.array(7, np.uint8), ["uint8 []", "[1, 28, 28]"]),
    ],
)
def test_what_is_no_image_is_refused_with_what_it_is_and_how_it_becomes_one(
    shipped: SmoothedClassifier, given: Any, words: list[str]
) -> None:
    for ask in (lambda: shipped.certify(given, sigma=0.25), lambda: shipped.predict([given], sigma=0.25)):
        with pytest.raises(UsageError) as refused:
            ask()
        assert all(word in str(refused.value) for word in ["uint8 [1, 28, 28] (channels, height, width)", *words])
    assert not shipped.busy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (GREY, "give [image]"),
        ("a.png", "a.png: no such file"),
        (Image.new("L", (28, 28)), "give [image]"),
        (5, "type int"),
        (np.array(5), "[]"),
    ],
)
def test_one_image_in_place_of_several_is_refused(shipped: SmoothedClassifier, given: Any, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        shipped.predict(given, sigma=0.25)
    assert words in str(refused.value)


def test_what_the_refusal_of_another_form_says_to_give_is_taken(shipped: SmoothedClassifier) -> None:
    picture = Image.fromarray(next(iter(open_images(None, SHAPE, NAMES))).pixels[0])
    asked: list[Any] = [np.asarray(picture)[None], np.array([np.asarray(picture).tolist()], dtype=np.uint8), picture]
    first, *others = (shipped.certify(image, sigma=0.25, steps=0, n=20, alpha=0.3) for image in asked)
    assert others == [first, first]


def test_a_batch_is_certified_as_its_images_are_one_by_one(
    shipped: SmoothedClassifier, images: list[LabelledImage], tmp_path: Path
) -> None:
    settings = Settings(sigma=0.25, steps=0, n=20, alpha=0.3, radii=(0.0, 0.1))
    expected = [found.certificate for found in shipped.certify_each(images[:4], settings)]
    pixels = np.stack([image.pixels for image in images[:4]])
    labels = [image.label for image in images[:4]]
    watched: list[Any] = []

    def watch(work: Any, /, *, total: int | None) -> Iterator[Any]:
        for item in work:
            watched.append((item.image.idx, total))
            yield item

    found = shipped.certify_batch(pixels, labels, settings, watch=watch)
    assert [each.certificate for each in found] == expected
    assert [each.image.label for each in found] == labels
    assert watched == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for i, image in enumerate(images[:4]):
        Image.fromarray(image.pixels[0]).save(tmp_path / f"{i}.png")
    turned = shipped.certify_iter(pixels.transpose(0, 2, 3, 1), labels, settings, layout="HWC")
    assert [each.certificate for each in turned] == expected
    assert [each.certificate for each in shipped.certify_iter(tmp_path, labels, settings)] == expected
    assert shipped.predict(tmp_path, sigma=0.25, steps=0) == shipped.predict(pixels, sigma=0.25, steps=0)
    assert shipped.certify_batch([], [], settings) == []


def test_a_seed_and_a_key_say_what_keys_the_noise(tmp_path: Path) -> None:
    key = tmp_path / "secret.key"
    with load(seed=18, batch=1, threads=1) as seeded, load(key=key, batch=1, threads=1) as first:
        assert seeded.secret == seeded_secret(18)
        assert first.secret.hex() == key.read_text().strip()
        with load(key=str(key), batch=1, threads=1) as second:
            assert second.secret == first.secret
        assert repr(seeded) == "SmoothedClassifier(unet.onnx, images 1x28x28, 10 classes)"
    with pytest.raises(UsageError, match="give one"):
        load(seed=1, key=key)


class PlainPipeline:
    """DensePure written once more, as the paper tells it: one image, every vote on its own, nothing shared."""

    def __init__(self) -> None:
        engine = shipped_engine()
        self.about = json.loads(engine.with_name("unet.onnx.json").read_text())
        classifier = engine.with_name(self.about["classifier"]["name"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.unet, self.classifier = (
            onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            for path in (engine, classifier)
        )

    def counts(self, pixels: NDArray[np.uint8], purpose: Purpose, settings: Settings, samples: int) -> list[int]:
        key = image_key(SECRET, purpose, settings.sigma, pixels)
        found = Counter(self.label(pixels, key, settings, sample) for sample in range(samples))
        return [found[label] for label in range(len(NAMES))]

    def label(self, pixels: NDArray[np.uint8], key: Key, settings: Settings, sample: int) -> int:
        noise = smoothing_noise(smoothing_law(settings.sigma), key, sample, pixels.shape)
        noisy = (pixels.astype(np.float64) + noise) / 255 * 2 - 1
        votes = settings.votes if settings.steps > 1 else 1
        labels = [self.vote(noisy, key, settings, sample, vote) for vote in range(votes)]
        most = max(labels.count(label) for label in labels)
        return next(label for label in labels if labels.count(label) == most)  # the one seen first

    def vote(self, noisy: NDArray[np.float64], key: Key, settings: Settings, sample: int, vote: int) -> int:
        mean, std = noisy[None].astype(np.float32), np.zeros((1, *noisy.shape), np.float32)
        if settings.steps:
            about = self.about["schedule"]
            assert about["name"] == "linear"
            betas = np.linspace(about["beta_start"], about["beta_end"], about["steps"], dtype=np.float64)
            bars = np.multiply.accumulate(1 - betas)
            bar = 1 / (1 + 4 * settings.sigma**2)
            first = int(np.argmin(np.abs(bars - bar)))
            visited = [int(round(first * (1 - i / settings.steps))) for i in range(settings.steps)]
            mean = (math.sqrt(bar) * noisy[None]).astype(np.float32)
            for step, t in enumerate(visited):
                noise = vote_noise(key, sample, vote, step, noisy.shape)[None] if step else np.zeros_like(mean)
                if step + 1 < settings.steps:
                    after = float(bars[visited[step + 1]])
                    alpha = bar / after
                    from_x0 = math.sqrt(after) * (1 - alpha) / (1 - bar)
                    from_xt = math.sqrt(alpha) * (1 - after) / (1 - bar)
                    variance = (1 - alpha) * (1 - after) / (1 - bar)
                    row = [math.sqrt(1 - bar), math.sqrt(bar), from_x0, from_xt, *[math.log(variance)] * 2]
                else:
                    after, row = 1.0, [math.sqrt(1 - bar), math.sqrt(bar), 1.0, 0.0, -1000.0, -1000.0]
                feed = {"mean": mean, "std": std, "noise": noise, "t": np.array([t], np.float32)}
                mean, std, finite = self.unet.run(None, feed | {"coef": np.array([row], np.float32)})
                assert finite[0] == 1
                bar = after
        (logits,) = self.classifier.run(None, {"mean": mean})
        return int(logits[0].argmax())


@pytest.fixture(scope="module")
def plain() -> PlainPipeline:
    return PlainPipeline()


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (7, 2), (64, 1), (64, 2), (5, 2)])
def test_result_ignores_batch_size_and_threads(
    images: list[LabelledImage], baseline: tuple[list[Any], Votes], batch: int, threads: int
) -> None:
    with load(secret=SECRET, batch=batch, threads=threads) as classifier:
        assert certificates(classifier, images[:3], WIDE) == baseline[0]
        assert votes_of(classifier, images[:3], WIDE) == baseline[1]


def test_the_baseline_is_one_where_samples_disagree(baseline: tuple[list[Any], Votes]) -> None:
    """Or equal results would say little."""
    assert any(max(votes) < sum(votes) for votes in baseline[1])


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_result_ignores_the_order_of_images(
    shipped: SmoothedClassifier, images: list[LabelledImage], baseline: tuple[list[Any], Votes], order: tuple[int, ...]
) -> None:
    shuffled = [images[i] for i in order]
    assert certificates(shipped, shuffled, WIDE) == [baseline[0][i] for i in order]
    assert votes_of(shipped, shuffled, WIDE) == [baseline[1][i] for i in order]


def test_result_of_an_image_alone_is_that_among_others(
    shipped: SmoothedClassifier, images: list[LabelledImage], baseline: tuple[list[Any], Votes]
) -> None:
    for i in range(3):
        assert certificates(shipped, [images[i]], WIDE) == [baseline[0][i]]


def test_certify_of_one_image_equals_certify_each(
    shipped: SmoothedClassifier, images: list[LabelledImage], baseline: tuple[list[Any], Votes]
) -> None:
    for image, (_, expected) in zip(images, baseline[0], strict=False):
        found = shipped.certify(image.pixels, sigma=1.0, steps=2, votes=3, n0=5, n=12, alpha=0.3, method="fixed")
        assert isinstance(found, densepure_rt.Certificate)
        assert found == expected


def test_identical_images_get_identical_certificates(shipped: SmoothedClassifier, images: list[LabelledImage]) -> None:
    twins = [images[0], LabelledImage(7, images[0].pixels.copy(), None)]
    (_, first), (idx, second) = certificates(shipped, twins, WIDE)
    assert idx == 7
    assert first == second


def test_another_secret_draws_other_noise(images: list[LabelledImage]) -> None:
    found = []
    for secret in (SECRET, SECRET[::-1], SECRET):
        with load(secret=secret) as classifier:
            found.append(votes_of(classifier, images[:6], CHEAP))
    assert found[0] == found[2]
    assert found[0] != found[1]


def test_without_a_secret_each_classifier_draws_its_own(images: list[LabelledImage]) -> None:
    found = []
    for _ in range(2):
        with load() as classifier:
            assert len(classifier.secret) == 32
            found.append(votes_of(classifier, images[:6], CHEAP))
    assert found[0] != found[1]


def test_secrets_are_new_or_follow_from_the_seed() -> None:
    assert new_secret() != new_secret()
    assert seeded_secret(1) == seeded_secret(1)
    assert len({seeded_secret(seed) for seed in range(100)}) == 100
    assert len(commitment(SECRET)) == 64
    assert commitment(SECRET) == "630dcd2966c4336691125448bbb25b4ff412a49c732db2c8abc1b8581bd710dd"  # sha256sum


def test_counts_equal_those_of_a_plain_loop_without_a_network(
    shipped: SmoothedClassifier, images: list[LabelledImage], plain: PlainPipeline
) -> None:
    """Many samples are cheap here, so that this also tells the noise of select, certify and predict apart."""
    told_apart = 0
    for found in list(shipped.certify_each(images[:4], CHEAP)):
        pixels = found.image.pixels
        selection = plain.counts(pixels, "select", CHEAP, CHEAP.n0)
        estimation = plain.counts(pixels, "certify", CHEAP, CHEAP.n)
        candidate = selection.index(max(selection))
        assert found.certificate.n_a == estimation[candidate]
        assert found.certificate.predict in (candidate, None)
        told_apart += plain.counts(pixels, "select", CHEAP, CHEAP.n)[candidate] != estimation[candidate]
        (predicted,) = shipped.predict_each([found.image], CHEAP)
        assert predicted.votes.tolist() == plain.counts(pixels, "predict", CHEAP, predicted.n)
    assert told_apart


@pytest.mark.parametrize(("steps", "votes"), [(1, 1), (2, 4), (3, 3)])
def test_counts_equal_those_of_a_plain_loop_in_which_nothing_is_shared(
    shipped: SmoothedClassifier, images: list[LabelledImage], plain: PlainPipeline, steps: int, votes: int
) -> None:
    settings = Settings(sigma=1.0, steps=steps, votes=votes, n0=2, n=5, alpha=0.3, method="fixed")
    for image in images[:2]:
        (predicted,) = shipped.predict_each([image], settings)
        assert predicted.votes.tolist() == plain.counts(image.pixels, "predict", settings, predicted.n)
        ((_, found),) = certificates(shipped, [image], settings)
        selection = plain.counts(image.pixels, "select", settings, settings.n0)
        candidate = selection.index(max(selection))
        assert found.n_a == plain.counts(image.pixels, "certify", settings, settings.n)[candidate]
        assert found.predict in (candidate, None)


@pytest.mark.parametrize("steps", [0, 1])
def test_fewer_than_two_steps_take_one_vote(
    shipped: SmoothedClassifier, images: list[LabelledImage], steps: int
) -> None:
    one, seven = (
        Settings(sigma=0.5, steps=steps, votes=votes, n0=3, n=9, alpha=0.3, method="fixed") for votes in (1, 7)
    )
    (found,) = shipped.certify_each(images[:1], seven)
    assert found.cost.classifier_calls == 12
    assert found.cost.unet_calls == 12 * steps
    assert [found.certificate] == [other.certificate for other in shipped.certify_each(images[:1], one)]
    assert (seven.effective.votes, Settings(steps=2, votes=7).effective.votes) == (1, 7)


@pytest.mark.parametrize(("steps", "votes"), [(2, 5), (3, 4)])
def test_cost_lies_between_unanimous_and_every_vote(
    shipped: SmoothedClassifier, images: list[LabelledImage], steps: int, votes: int
) -> None:
    settings = Settings(sigma=1.0, steps=steps, votes=votes, n0=3, n=6, method="fixed")
    for found in shipped.certify_each(images[:2], settings):
        cost = found.cost
        assert 9 * math.ceil(votes / 2) <= cost.classifier_calls <= 9 * votes
        assert cost.unet_calls == 9 + cost.classifier_calls * (steps - 1)  # the first step is shared by all votes
        assert cost.not_finite == 0
        assert cost.seconds > 0


def test_predictions_of_easy_images_are_their_labels(shipped: SmoothedClassifier) -> None:
    easy = list(open_images(None, SHAPE, NAMES).select(25, 20))
    found = shipped.predict([image.pixels for image in easy], sigma=0.1, steps=1, n=16)
    assert len(found) == 20
    assert set(found) <= {None, *range(10)}
    right = sum(label == image.label for label, image in zip(found, easy, strict=True))
    assert right >= 14
    assert sum(label is not None for label in found) - right <= 4


def test_certificates_of_easy_images_are_their_labels(shipped: SmoothedClassifier) -> None:
    easy = open_images(None, SHAPE, NAMES).select(50, 10)
    found = list(shipped.certify_each(easy, Settings(sigma=0.1, steps=1, n0=4, n=24, method="fixed")))
    assert sum(each.certificate.covers(each.image.label, 0.0) for each in found) >= 6
    reach = 0.1 * 0.6745  # Phi^-1(0.001^(1/24)) = Phi^-1(0.7499)
    assert max(each.certificate.radius or 0.0 for each in found) == pytest.approx(reach, rel=0.01)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros(SHAPE, np.float32),
        np.zeros(SHAPE, np.int64),
        np.zeros((28, 28), np.uint8),
        np.zeros((3, 28, 28), np.uint8),
        np.zeros((1, 1, 28, 28), np.uint8),
        np.zeros((28, 28, 1), np.uint8),
    ],
    ids=lambda image: f"{image.dtype}{list(image.shape)}",
)
def test_image_of_another_type_or_shape_is_refused(shipped: SmoothedClassifier, image: NDArray[Any]) -> None:
    for attempt in (lambda: shipped.certify(image, n0=1, n=1), lambda: shipped.predict([image], n=1)):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert str(image.dtype) in str(caught.value)
        assert str(list(image.shape)) in str(caught.value)
        assert "[1, 28, 28]" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"votes": 0}, "votes"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": 90.0}, "schedule"),
        ({"sigma": math.nan}, "sigma"),
        ({"sigma": 0.25, "steps": 500}, "steps"),
        ({"steps": -1}, "steps"),
        ({"sigma": 0.001, "steps": 0}, "sigma"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    shipped: SmoothedClassifier, images: list[LabelledImage], settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        shipped.certify(images[0].pixels, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.7, "n": 10**7}, {"n0": 0, "n": 10**7}, {"n": 10**14, "alpha": 0.001}],
    ids=["alpha", "n0", "charge"],
)
def test_settings_that_no_rule_takes_are_refused_before_the_first_sample(
    shipped: SmoothedClassifier, images: list[LabelledImage], settings: dict[str, Any]
) -> None:
    with at_most(1.0), pytest.raises(UsageError):
        shipped.certify(images[0].pixels, steps=0, **settings)


@pytest.mark.parametrize("settings", [{"n": 0}, {"n": -3}, {"n": 3, "alpha": 1.5}, {"n": 3, "alpha": 0.0}])
def test_prediction_that_can_mean_nothing_is_refused(
    shipped: SmoothedClassifier, images: list[LabelledImage], settings: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        shipped.predict([images[0].pixels], steps=0, **settings)


@pytest.mark.parametrize(("batch", "threads"), [(0, 1), (-1, 1), (8, 0)])
def test_batch_and_threads_below_one_are_refused(batch: int, threads: int) -> None:
    with pytest.raises(UsageError, match="^`(batch|threads)` is a count from 1 up"):
        load(batch=batch, threads=threads)


def test_alpha_is_charged_for_every_pixel_of_every_sample() -> None:
    """The noise has 2^64 equally likely words: a law of m cells is within m 2^-65 of the normal, at least."""
    settings = Settings(sigma=0.5, n0=10, n=10**6, alpha=0.001)
    cells = len(smoothing_law(0.5).thresholds) + 1
    charge = settings.rule(784, labelled=True).charge
    assert 10**6 * 784 * cells * 2.0**-65 <= charge <= 10**6 * 784 * cells * 2.0**-62
    assert settings.rule(2 * 784, labelled=True).charge == 2 * charge
    with pytest.raises(UsageError, match="finite precision"):
        Settings(sigma=0.5, n=10**14, alpha=0.001).rule(784, labelled=True)


def test_paper_settings_are_those_of_the_paper() -> None:
    assert (PAPER.steps, PAPER.votes, PAPER.n0, PAPER.n) == (10, 40, 100, 100_000)


def test_images_are_read_as_they_are_needed_and_answered_as_they_are_done(
    shipped: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    drawn = 0

    def forever() -> Iterator[LabelledImage]:
        nonlocal drawn
        for image in itertools.cycle(images):
            drawn += 1
            yield image

    settings = Settings(sigma=0.25, steps=0, votes=1, n0=100, n=400, method="fixed")
    found = list(itertools.islice(shipped.certify_each(forever(), settings), 3))
    assert [each.image.idx for each in found] == [image.idx for image in images[:3]]
    assert drawn <= 4


def test_no_images_give_no_certificates(shipped: SmoothedClassifier) -> None:
    assert list(shipped.certify_each([], WIDE)) == []
    assert shipped.predict([]) == []


def test_the_classifier_certifies_again_after_a_run_was_left(
    shipped: SmoothedClassifier, images: list[LabelledImage], baseline: tuple[list[Any], Votes]
) -> None:
    next(iter(shipped.certify_each(images, WIDE)))
    assert certificates(shipped, images[:1], WIDE) == baseline[0][:1]


def test_two_runs_at_once_do_not_disturb_each_other(images: list[LabelledImage]) -> None:
    """Either both are right, or the second is refused."""
    with load(secret=SECRET, batch=8, threads=1) as classifier:
        alone = certificates(classifier, images[:6], WIDE)
        first, second = (classifier.certify_each(part, WIDE) for part in (images[:3], images[3:6]))
        try:
            pairs = list(zip(first, second, strict=True))
        except UsageError:
            return
        found = [*(a for a, _ in pairs), *(b for _, b in pairs)]
        assert [(each.image.idx, each.certificate) for each in found] == alone


def peak_memory(classifier: SmoothedClassifier, image: LabelledImage, n: int) -> int:
    """The most bytes that Python and numpy held at once."""
    settings = Settings(sigma=0.25, steps=0, votes=1, n0=5, n=n, method="fixed")
    tracemalloc.start()
    try:
        list(classifier.certify_each([image], settings))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_n(shipped: SmoothedClassifier, images: list[LabelledImage]) -> None:
    peak_memory(shipped, images[0], 200)  # tables and buffers that stay
    small = peak_memory(shipped, images[0], 200)
    # Not even two pointers a sample, in one of three runs: on a loaded machine more batches wait to be collected.
    assert any(peak_memory(shipped, images[0], 2000) - small < 1800 * 16 for _ in range(3))


def test_certifies_with_torch_absent(shipped: SmoothedClassifier, images: list[LabelledImage]) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "diffusers", "safetensors", "polygraphy")))
import numpy, densepure_rt
with densepure_rt.load(secret=bytes(range(32)), batch=2, threads=1) as classifier:
    image = numpy.frombuffer(sys.stdin.buffer.read(), numpy.uint8).reshape(1, 28, 28)
    print(classifier.certify(image, sigma=0.25, steps=2, votes=3, n0=2, n=12))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=images[0].pixels.tobytes(), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    found = shipped.certify(images[0].pixels, sigma=0.25, steps=2, votes=3, n0=2, n=12)
    assert done.stdout.decode().strip() == repr(found)


def test_package_offers_what_it_names() -> None:
    assert densepure_rt.load is load
    assert densepure_rt.SmoothedClassifier is SmoothedClassifier
    assert densepure_rt.Settings is Settings
    assert densepure_rt.Certificate is Certificate
    assert set(densepure_rt.__all__) <= set(dir(densepure_rt))
    said = pydoc.plain(pydoc.render_doc(densepure_rt))
    assert [name for name in densepure_rt.__all__ if not re.search(rf"\b{name}\b *[=(]", said)] == ["__version__"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        getattr(densepure_rt, "no_such_thing")  # noqa: B009


def test_a_caller_may_use_its_array_again(images: list[LabelledImage]) -> None:
    """A camera that fills one buffer over and over gets what separate arrays get."""
    frames = [image.pixels for image in images[:4]]
    with load(secret=SECRET, batch=4, threads=2) as classifier:
        expected = [c.n_a for c in (classifier.certify(frame, steps=0, n0=4, n=40) for frame in frames)]
        buffer = np.empty_like(frames[0])

        def camera() -> Iterator[LabelledImage]:
            for i, frame in enumerate(frames):
                buffer[...] = frame
                yield LabelledImage(i, buffer, None)

        found = [found.certificate.n_a for found in classifier.certify_each(camera(), Settings(steps=0, n0=4, n=40))]
    assert found == expected


@pytest.mark.parametrize("secret", [b"", b"short", bytes(31)])
def test_a_short_secret_is_refused(secret: bytes) -> None:
    with pytest.raises(UsageError, match="32 bytes"):
        load(secret=secret, batch=1, threads=1)


# anytime methods


ANYTIME = Settings(sigma=0.5, steps=1, n=160, alpha=0.05, method="sequential", radii=(0.0, 0.25, 0.5))
WIDE_ANYTIME = Settings(sigma=1.0, steps=2, votes=3, n=64, alpha=0.3, method="sequential")


@pytest.mark.parametrize(
    "settings", [ANYTIME, dataclasses.replace(ANYTIME, method="radius", radii=None, n=96), WIDE_ANYTIME]
)
def test_anytime_certificates_do_not_depend_on_batch_or_threads(
    images: list[LabelledImage], settings: Settings
) -> None:
    found = []
    for batch, threads in ((7, 1), (32, 2), (64, 1)):
        with load(secret=SECRET, batch=batch, threads=threads) as classifier:
            found.append(certificates(classifier, images[2:5], settings))
    assert [idx for idx, _ in found[0]] == [image.idx for image in images[2:5]]
    assert found[0] == found[1] == found[2]


def test_a_sequential_certificate_is_what_the_rule_says_of_the_samples_in_order(
    shipped: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    plain = PlainPipeline()
    for labelled in (True, False):
        chosen = [image if labelled else dataclasses.replace(image, label=None) for image in images[2:5]]
        rule = ANYTIME.rule(28 * 28, labelled)
        assert isinstance(rule, SequentialRule)
        for image, (_, certificate) in zip(chosen, certificates(shipped, chosen, ANYTIME), strict=True):
            key = image_key(SECRET, "certify", ANYTIME.sigma, image.pixels)
            decider, sample = rule.start(image.label), 0
            while not decider.add(plain.label(image.pixels, key, ANYTIME, sample)):
                sample += 1
            assert certificate.n == sample + 1 <= ANYTIME.n
            assert decider.decision is not None
            assert (certificate.predict, certificate.radius) == decider.decision[:2]
            assert certificate.outcomes == decider.decision.outcomes
            assert [outcome.eps for outcome in certificate.outcomes] == list(ANYTIME.grid)


def test_a_sequential_run_takes_far_fewer_samples_than_it_may(
    shipped: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    settings = Settings(sigma=0.25, steps=1, n=10_000, method="sequential")
    found = list(shipped.certify_each(images[:5], settings))
    clear = [each for each in found if each.certificate.radius == settings.sigma]
    assert len(clear) >= 3
    assert all(each.cost.samples == each.certificate.n < 1000 for each in clear)
    assert min(each.certificate.n for each in clear) == 64  # all agree


@pytest.mark.parametrize("labelled", [True, False])
def test_an_image_whose_time_is_up_has_the_anytime_radius_of_its_samples(
    shipped: SmoothedClassifier, images: list[LabelledImage], labelled: bool
) -> None:
    """Stopped as soon as anything has come back, before the first look."""
    chosen = [image if labelled else dataclasses.replace(image, label=None) for image in images[:4]]
    settings = Settings(sigma=0.25, steps=1, n=10_000, radii=(0.7,))
    rule = settings.rule(784, labelled)
    assert isinstance(rule, SequentialRule)
    level = (1 - rule.reserve) * rule.test_level
    found = list(shipped.certify_each(chosen, settings, Budget(image=1e-6)))
    for (image, certificate, _), plain in zip(found, images[:4], strict=True):
        assert certificate.stopped
        assert certificate.n < LOOK
        assert certificate.radius == anytime_radius(certificate.n_a, certificate.n, level, 0.25, not labelled)
        if labelled:
            assert certificate.predict in (plain.label, None)
        assert image.idx == plain.idx


def test_a_fixed_n_that_time_cuts_short_abstains(shipped: SmoothedClassifier, images: list[LabelledImage]) -> None:
    settings = dataclasses.replace(CHEAP, n=100_000)
    found = list(shipped.certify_each(images[:2], settings, Budget(image=0.1)))
    assert [each.certificate.stopped for each in found] == [True, True]
    assert {(each.certificate.predict, each.certificate.radius) for each in found} == {(None, None)}
    assert all(each.certificate.n + each.certificate.n0 == each.cost.samples < 100_020 for each in found)


def test_a_run_whose_time_is_up_ends_and_leaves_the_device_clean(
    shipped: SmoothedClassifier, images: list[LabelledImage], baseline: tuple[list[Any], Votes]
) -> None:
    endless = itertools.cycle(images)
    started = time.monotonic()
    found = list(shipped.certify_each(endless, Settings(sigma=0.25, steps=1), Budget(run=1.0)))
    assert time.monotonic() - started < 30
    assert found
    assert found[-1].certificate.stopped
    assert certificates(shipped, images[:3], WIDE) == baseline[0]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_a_budget_of_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match="budget"):
        Budget(image=seconds)


def test_what_an_image_cost_counts_what_was_drawn_in_vain(
    shipped: SmoothedClassifier, images: list[LabelledImage]
) -> None:
    """One image alone: batches are filled with samples that it turns out not to need."""
    ((image, certificate, cost),) = shipped.certify_each(images[:1], Settings(sigma=0.1, steps=1, radii=(0.05,)))
    assert cost.samples == certificate.n
    assert certificate.n < cost.unet_calls == cost.classifier_calls


def test_radii_and_methods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="`method` often is not known: fixed, sequential, radius"):
        Settings(method="often")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`radii` are what the method sequential decides"):
        Settings(method="fixed", radii=(0.0, 0.25))
    with pytest.raises(UsageError, match="radius loss is what the method radius accepts"):
        Settings(radius_loss=0.1)
    with pytest.raises(UsageError, match="from 0 up and ascending"):
        Settings(method="sequential", radii=(0.25, 0.0)).rule(784, True)


@pytest.mark.parametrize("labelled", [False, True])
def test_radii_that_are_all_beyond_reach_are_refused_with_the_n_that_the_smallest_takes(labelled: bool) -> None:
    asked = Settings(sigma=0.25, radii=(0.8, 5.0))
    with pytest.raises(UsageError, match=r"no radius beyond 0\.78[67] is certified") as refused:
        asked.check_reach(784, labelled)
    enough = int(re.findall(r"0\.8 takes n = ([0-9,]+) at least", str(refused.value))[0].replace(",", ""))
    dataclasses.replace(asked, n=enough).check_reach(784, labelled)
    with pytest.raises(UsageError):
        dataclasses.replace(asked, n=enough - 1).check_reach(784, labelled)


def test_a_radius_that_no_n_reaches_is_said_to_be_one() -> None:
    with pytest.raises(UsageError, match=r"no n up to 10,000,000 is enough"):
        Settings(sigma=0.25, radii=(5.0,)).check_reach(784, True)


def test_where_radius_0_is_asked_too_there_is_something_to_certify() -> None:
    Settings(sigma=0.25, radii=(0.0, 5.0)).check_reach(784, True)
    Settings(sigma=0.25, method="fixed").check_reach(784, True)


def test_python_is_told_of_sigma_and_of_radii_and_not_of_grid_steps_or_options(shipped: SmoothedClassifier) -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    wrong: list[dict[str, Any]] = [{"sigma": -1.0}, {"sigma": 300.0, "steps": 0}, {"radii": (5.0,)}, {"votes": 0}]
    for arguments in wrong:
        with pytest.raises(UsageError, match=f"^`{next(iter(arguments))}` ") as refused:
            shipped.certify(image, **arguments)
        assert "grid steps" not in str(refused.value)
        assert "--" not in str(refused.value)
        assert refused.value.parameters[0] == next(iter(arguments))


def test_an_image_that_is_decided_before_its_first_sample_opens_nothing(
    shipped: SmoothedClassifier, images: list[LabelledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> int:
        raise AssertionError("opened on the device, and never closed")

    monkeypatch.setattr(shipped.device, "open_image", never)
    # every class is asked about, at a level that is less than that of one class, and so the reach is less
    most, least = (ANYTIME.rule(784, labelled).reach() or 0.0 for labelled in (True, False))
    settings = dataclasses.replace(ANYTIME, radii=((most + least) / 2,))
    found = certificates(shipped, [dataclasses.replace(image, label=None) for image in images[:3]], settings)
    assert [(certificate.predict, certificate.n) for _, certificate in found] == [(None, 0)] * 3
