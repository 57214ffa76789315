from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import special, stats

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.runs import falsifier
from densepure_rt.runs.falsifier import LEVEL, Falsification, falsify
from densepure_rt.runtime.device import Batch
from densepure_rt.runtime.noise import Purpose, image_key, smoothing_law, smoothing_noise
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.replay import replay
from densepure_rt.smoothing.sequential import prediction_rule
from densepure_rt.smoothing.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (1, 28, 28)
SIGMA = 0.25
DISTANCE = 0.2 * SIGMA  # of the image from the plane, in [0, 1] pixel units: p_A = Phi(0.2) = 0.579
PLAIN = Settings(sigma=SIGMA, steps=0, votes=1)


class Plane(NamedTuple):
    """A classifier of two classes: 0 where normal . levels > offset, with levels in 0 ... 255 and |normal| = 1."""

    path: Path
    normal: NDArray[np.float64]
    image: LabelledImage

    def beyond(self, candidate: NDArray[np.uint8]) -> float:
        """How far a candidate lies on the other side, in [0, 1] pixel units. By symmetry g changes at the plane."""
        moved = candidate.astype(np.float64) - self.image.pixels
        return -float((self.normal * moved).sum()) / 255 - DISTANCE


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Plane:
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    pixels = rng.integers(100, 156, SHAPE, dtype=np.uint8)
    normal = rng.standard_normal(SHAPE)
    normal /= np.linalg.norm(normal)
    offset = float((normal * pixels).sum()) - 255 * DISTANCE
    # levels = 255 (y + 1) / 2 with the network's y, and the logits are (normal . levels - offset) / 127.5
    weights = np.stack([normal.ravel(), -normal.ravel()], axis=1).astype(np.float32)
    bias = float(normal.sum()) - 2 * offset / 255
    path = tmp_path_factory.mktemp("plane") / "plane.onnx"
    float32 = onnx.TensorProto.FLOAT
    sidecar = json.loads((ROOT / "engines" / "classifier.onnx.json").read_text())
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Flatten", ["mean"], ["flat"]),
            onnx.helper.make_node("MatMul", ["flat", "w"], ["sloped"]),
            onnx.helper.make_node("Add", ["sloped", "b"], ["logits"]),
        ],
        "plane",
        [onnx.helper.make_tensor_value_info("mean", float32, ["batch", *SHAPE])],
        [onnx.helper.make_tensor_value_info("logits", float32, ["batch", 2])],
        [
            onnx.numpy_helper.from_array(weights, "w"),
            onnx.numpy_helper.from_array(np.array([bias, -bias], np.float32), "b"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", sidecar["opset"])]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    sidecar["file"] = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    sidecar["class_names"] = ["near", "far"]
    Path(f"{path}.json").write_text(json.dumps(sidecar))
    return Plane(path, normal, LabelledImage(0, pixels, None))


@pytest.fixture(scope="module")
def opened(plane: Plane) -> Callable[..., Any]:
    @contextmanager
    def new(seed: int, batch: int = 32, threads: int = 1) -> Iterator[SmoothedClassifier]:
        secret = seeded_secret(seed)
        with load(classifier=plane.path, secret=secret, batch=batch, threads=threads) as classifier:
            yield classifier

    return new


def claim(radius: float | None, predict: int | None = 0) -> Certificate:
    return Certificate(predict, radius, n0=0, n=1000, n_a=990, alpha=0.001, p_lower=0.9)


def shares(found: Falsification, candidate: NDArray[np.uint8] | None) -> tuple[Any, ...]:
    """All of it, as what can be compared."""
    return (*astuple(found), None if candidate is None else candidate.tobytes())


pixel_arrays = arrays.arrays(
    np.uint8, (1, 3, 4), elements=st.one_of(st.sampled_from([0, 1, 254, 255]), st.integers(0, 255))
)
pushes = arrays.arrays(
    np.float64, (1, 3, 4), elements=st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1e6, 1e6, allow_nan=False))
)
radii = st.one_of(
    st.sampled_from([0.0, 5e-324, 1 / 255, math.nextafter(1 / 255, 0), math.nextafter(1 / 255, 1), 1.0, 1e6]),
    st.integers(1, 4000).map(lambda total: math.sqrt(total) / 255),
    st.floats(0, 4),
)


@given(pixel_arrays, pushes, radii)
@settings(deadline=None, max_examples=400)
def test_no_candidate_ever_leaves_the_open_ball_or_the_range(
    pixels: NDArray[np.uint8], push: NDArray[np.float64], radius: float
) -> None:
    """In exact arithmetic of Python's own integers and fractions."""
    found = falsifier.within(pixels, push, radius)
    if found is None:
        movable = any(
            (p < 0 and x > 0) or (p > 0 and x < 255)
            for p, x in zip(push.ravel().tolist(), pixels.ravel().tolist(), strict=True)
        )
        assert not movable or (255 * Fraction(radius)) ** 2 <= 1
        return
    assert (found.dtype, found.shape) == (pixels.dtype, pixels.shape)
    steps = [int(a) - int(b) for a, b in zip(found.ravel(), pixels.ravel(), strict=True)]
    assert 0 < sum(step * step for step in steps) < (255 * Fraction(radius)) ** 2
    assert all(step * p >= 0 for step, p in zip(steps, push.ravel().tolist(), strict=True))
    assert falsifier.inside(pixels, found, radius)
    distance = falsifier.distance_of(pixels, found)
    total = sum(step * step for step in steps)
    assert (255 * Fraction(distance)) ** 2 >= total > (255 * Fraction(math.nextafter(distance, 0))) ** 2
    assert distance <= radius


@given(pixel_arrays, st.integers(1, 400), st.booleans())
@settings(deadline=None)
def test_an_image_on_the_sphere_is_outside_the_open_ball(pixels: NDArray[np.uint8], step: int, up: bool) -> None:
    """At the distance 5/255 and the float above it; 5/255 as a float is above or below the fraction."""
    moved = pixels.copy()
    moved.flat[:2] = 100
    other = moved.copy()
    other.flat[:2] = (103, 104)
    radius = step * math.nextafter(5 / 255, 1 if up else 0)
    assert falsifier.inside(moved, other, radius) == ((255 * Fraction(radius)) ** 2 > 25)
    assert not falsifier.inside(moved, moved, radius)


def test_candidates_use_nearly_all_of_the_ball_and_keep_the_direction() -> None:
    rng = np.random.default_rng(1)
    pixels, push = np.full((3, 32, 32), 128, np.uint8), rng.standard_normal((3, 32, 32))
    for radius in (0.1, 0.25, 0.5, 1.0):
        found = falsifier.within(pixels, push, radius)
        assert found is not None
        moved = found.astype(np.float64) - 128
        assert falsifier.distance_of(pixels, found) > 0.99 * radius
        cosine = (moved * push).sum() / np.linalg.norm(moved) / np.linalg.norm(push)
        assert cosine > {0.1: 0.75, 0.25: 0.9, 0.5: 0.97, 1.0: 0.99}[radius]


@pytest.mark.parametrize("seed", range(4))
def test_a_radius_of_six_times_the_truth_is_broken(plane: Plane, opened: Callable[..., Any], seed: int) -> None:
    radius = 6 * DISTANCE
    with opened(seed) as classifier:
        found, candidate = falsify(classifier, plane.image, claim(radius), PLAIN, 2000)
    assert found.broken
    assert candidate is not None
    assert (found.label, found.attack) == (1, "evolution of the noise")
    assert plane.beyond(candidate) > 0
    moved = [int(a) - int(b) for a, b in zip(candidate.flat, plane.image.pixels.flat, strict=True)]
    assert sum(step * step for step in moved) < (255 * Fraction(radius)) ** 2
    assert found.distance == pytest.approx(math.sqrt(sum(step * step for step in moved)) / 255)
    assert found.samples <= 2000
    assert found.n is not None
    assert found.votes is not None
    assert stats.binom.sf(found.votes - 1, found.n, 0.5) < LEVEL / 2
    assert found.level == pytest.approx(LEVEL / (found.tested * (found.tested + 1)))


@pytest.mark.parametrize("share", [0.5, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_a_radius_that_holds_is_never_broken(plane: Plane, opened: Callable[..., Any], seed: int, share: float) -> None:
    """Also by a candidate that lies against the plane, where half of all samples are of another label."""
    radius = share * DISTANCE
    nearest = falsifier.within(plane.image.pixels, -plane.normal, radius)
    assert nearest is not None
    assert -0.8 * DISTANCE < plane.beyond(nearest) < 0
    with opened(seed) as classifier:
        found, candidate = falsify(classifier, plane.image, claim(radius), PLAIN, 1500, [nearest])
        labels = falsifier.labels_of(classifier, [nearest], PLAIN, "falsify", range(64))
    assert not found.broken
    assert 0 < found.samples <= 1500
    assert found.tried > 10
    assert (candidate, found.distance, found.label, found.votes, found.n, found.level) == (None,) * 6
    assert (labels == 1).sum() > 8  # a different label is no success


def test_the_level_is_kept_where_the_votes_are_all_but_even(
    plane: Plane, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a level at which errors can be counted: on average no more attacks succeed than their tests' levels allow.

    All candidates that are tested were chosen for their rival's majority: were that noise used again, 17 would succeed.
    """
    monkeypatch.setattr(falsifier, "LEVEL", 0.2)
    rng, even = np.random.default_rng(2), list[NDArray[np.uint8]]()
    while len(even) < 4:
        push = 0.1 * rng.standard_normal(SHAPE) / 28 - plane.normal
        candidate = falsifier.within(plane.image.pixels, push, rng.uniform(1.2, 1.6) * DISTANCE)
        if candidate is not None and -0.02 * DISTANCE < plane.beyond(candidate) < 0:
            even.append(candidate)
    broken, allowed = 0, 0.0
    with opened(5) as classifier:
        for seed in range(100):
            classifier.secret = seeded_secret(100 + seed)
            found, candidate = falsify(classifier, plane.image, claim(1.6 * DISTANCE), PLAIN, 200, even)
            assert candidate is None or plane.beyond(candidate) < 0
            broken += found.broken
            allowed += 0.2 * (1 - 1 / (found.tested + 1))  # the sum of the levels of so many tests
    assert 5 < allowed < 10
    assert broken <= stats.poisson.ppf(0.95, allowed)


def test_a_test_is_fresh_and_the_levels_of_all_tests_sum_to_no_more_than_the_level(
    plane: Plane, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[tuple[str, bytes], list[int]] = {}
    levels: list[float] = []
    labels_of = falsifier.labels_of

    def labels(classifier: Any, images: Any, settings: Settings, purpose: Any, samples: range) -> NDArray[np.int64]:
        for image in images:
            drawn.setdefault((purpose, image.tobytes()), []).extend(samples)
        return labels_of(classifier, images, settings, purpose, samples)

    def rule(n_max: int, alpha: float, charge: float) -> Any:
        levels.append(alpha)
        return prediction_rule(n_max, alpha, charge)

    monkeypatch.setattr(falsifier, "labels_of", labels)
    monkeypatch.setattr(falsifier, "prediction_rule", rule)
    with opened(8) as classifier:
        found, _ = falsify(classifier, plane.image, claim(1.5 * DISTANCE), PLAIN, 1500)
    tests = [image for purpose, image in drawn if purpose == "falsify"]
    assert len(tests) == found.tested > 2
    assert plane.image.pixels.tobytes() not in tests
    assert all(samples == list(range(len(samples))) for samples in drawn.values())
    assert {purpose for purpose, _ in drawn} == {"select", "falsify"}
    assert sum(map(len, drawn.values())) == found.samples
    spent = sorted(set(levels), reverse=True)  # the last is that of a test that was not made
    assert spent[:-1] == pytest.approx([LEVEL / (k * (k + 1)) for k in range(1, found.tested + 1)])
    assert sum(map(Fraction, spent)) <= Fraction(LEVEL)


def test_a_proposal_is_checked_and_not_trusted(plane: Plane, opened: Callable[..., Any]) -> None:
    far = falsifier.within(plane.image.pixels, -plane.normal, 1.0)
    assert far is not None
    with opened(1) as classifier:
        sound, _ = falsify(classifier, plane.image, claim(0.5 * DISTANCE), PLAIN, 300, [far, plane.image.pixels])
        assert not sound.broken
        forged, broken = falsify(classifier, plane.image, claim(8 * DISTANCE), PLAIN, 300, [far])
        assert forged.attack == "proposals"
        assert broken is not None
        assert falsifier.inside(plane.image.pixels, broken, 8 * DISTANCE)
        assert (forged.tried, forged.tested, forged.label) == (1, 1, 1)
        wrongs: list[Any] = [far[:, 1:], far.astype(np.int64)]
        for wrong in wrongs:
            with pytest.raises(UsageError, match="a proposal must be uint8"):
                falsify(classifier, plane.image, claim(0.4), PLAIN, 300, [wrong])


def test_proposals_are_read_as_they_are_needed(plane: Plane, opened: Callable[..., Any]) -> None:
    far = falsifier.within(plane.image.pixels, -plane.normal, 1.0)
    assert far is not None

    def endless() -> Iterator[NDArray[np.uint8]]:
        yield far
        raise AssertionError("a second proposal was asked for")

    with opened(1) as classifier:
        assert falsify(classifier, plane.image, claim(8 * DISTANCE), PLAIN, 300, endless())[0].broken


@pytest.mark.parametrize("budget", [60, 333, 1000])
def test_no_more_samples_are_drawn_than_were_given(
    plane: Plane, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    drawn = 0
    with opened(2) as classifier:
        submit = classifier.device.submit

        def counted(batch: Batch) -> int:
            nonlocal drawn
            drawn += len(batch.sample) * (batch.kind == "smooth")
            ticket: int = submit(batch)
            return ticket

        monkeypatch.setattr(classifier.device, "submit", counted)
        found, _ = falsify(classifier, plane.image, claim(DISTANCE), PLAIN, budget)
    assert drawn == found.samples <= budget
    assert found.samples > budget - falsifier.PILOT - 64


def test_what_comes_of_an_attack_depends_on_the_secret_alone(plane: Plane, opened: Callable[..., Any]) -> None:
    found = []
    for seed, batch, threads in ((3, 32, 1), (3, 5, 2), (4, 32, 1)):
        with opened(seed, batch, threads) as classifier:
            found.append(shares(*falsify(classifier, plane.image, claim(6 * DISTANCE), PLAIN, 1200)))
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("certificate", "samples"),
    [
        (claim(None, None), 1000),
        (claim(0.0), 1000),
        (claim(math.nextafter(1 / 255, 0)), 1000),
        (claim(0.4), 0),
        (claim(0.4), 30),
    ],
    ids=["abstained", "no radius", "no other image", "no samples", "too few samples"],
)
def test_where_nothing_can_be_tried_nothing_is(
    plane: Plane, opened: Callable[..., Any], certificate: Certificate, samples: int
) -> None:
    with opened(0) as classifier:
        found, candidate = falsify(classifier, plane.image, certificate, PLAIN, samples)
    nothing = Falsification(0, certificate.radius or 0.0, False, "nothing tried", 0, 0, 0, *[None] * 5)
    assert (found, candidate) == (nothing, None)
    assert not found.broken


def test_a_ball_of_few_images_is_tried_and_left(plane: Plane, opened: Callable[..., Any]) -> None:
    """One level of one pixel: 255 R is just above 1. Every candidate is looked at once at most."""
    with opened(0) as classifier:
        found, _ = falsify(classifier, plane.image, claim(1.0001 / 255), PLAIN, 400)
    assert not found.broken
    assert 0 < found.tried <= 400 // falsifier.PILOT


def test_a_classifier_at_work_is_not_disturbed(plane: Plane, opened: Callable[..., Any]) -> None:
    with opened(0) as classifier:
        under_way = classifier.certify_each([plane.image] * 2, Settings(sigma=SIGMA, steps=0, n=64))
        next(under_way)
        with pytest.raises(UsageError, match="already at work"):
            falsify(classifier, plane.image, claim(0.4), PLAIN, 300)
        under_way.close()


@pytest.mark.parametrize("radius", [math.inf, math.nan, -1.0])
def test_a_radius_that_is_none_is_refused(plane: Plane, opened: Callable[..., Any], radius: float) -> None:
    with opened(0) as classifier, pytest.raises(UsageError, match="a radius is a distance"):
        falsify(classifier, plane.image, claim(radius), PLAIN, 300)


def test_a_negative_number_of_samples_is_refused(plane: Plane, opened: Callable[..., Any]) -> None:
    with opened(0) as classifier, pytest.raises(UsageError, match="samples is how many"):
        falsify(classifier, plane.image, claim(0.4), PLAIN, -1)


def test_labels_are_those_of_the_noise_written_out(plane: Plane, opened: Callable[..., Any]) -> None:
    with opened(6) as classifier:
        found = falsifier.labels_of(classifier, [plane.image.pixels], PLAIN, "select", range(5, 45))
        key = image_key(classifier.secret, "select", SIGMA, plane.image.pixels)
    law = smoothing_law(SIGMA)
    moved = [-float((plane.normal * smoothing_noise(law, key, i, SHAPE)).sum()) / 255 for i in range(5, 45)]
    assert found.tolist() == [[int(step > DISTANCE) for step in moved]]


def test_labels_of_several_votes_are_those_of_the_samples_replayed_alone() -> None:
    voted = Settings(sigma=1.0, steps=2, votes=3)
    image = next(iter(open_images(None, SHAPE, [str(label) for label in range(10)])))
    with load(secret=seeded_secret(9), batch=8, threads=1) as classifier:
        found = falsifier.labels_of(classifier, [image.pixels], voted, "select", range(2, 6))
        replayed = [replay(classifier, image, voted, sample, "select").label for sample in range(2, 6)]
    assert found.tolist() == [replayed]


def test_endless_proposals_of_one_image_end(plane: Plane, opened: Callable[..., Any]) -> None:
    with opened(0) as classifier:
        found, _ = falsify(classifier, plane.image, claim(0.5 * DISTANCE), PLAIN, 64, repeat(plane.image.pixels))
    assert (found.broken, found.attack) == (False, "random directions")


@pytest.mark.parametrize("method", ["fixed", "sequential"])
def test_a_certificates_own_samples_point_across_the_plane(
    plane: Plane, opened: Callable[..., Any], method: Any
) -> None:
    """As the noise that changed the label does: its mean along the normal is sigma phi(z) / Phi(-z), and the rest of
    it is a sum of independent draws, so that the cosine is a / sqrt(a^2 + d / m).
    """
    sampling = Settings(sigma=SIGMA, steps=0, votes=1, n0=100, n=1900, method=method)
    with opened(7) as classifier:
        every: dict[str, list[tuple[Purpose, range]]] = {
            "fixed": [("select", range(100)), ("certify", range(1900))],
            "sequential": [("certify", range(2000))],
        }
        parts = every[method]
        labels = np.concatenate(
            [
                falsifier.labels_of(classifier, [plane.image.pixels], sampling, purpose, samples)[0]
                for purpose, samples in parts
            ]
        )
        n0 = 100 if method == "fixed" else 0
        made = Certificate(0, 1.0, n0=n0, n=2000 - n0, n_a=1000, alpha=0.001, p_lower=0.9)
        proposal = falsifier.proposal_of_samples(classifier, plane.image, made, sampling, labels)
    assert proposal is not None
    z, wrong = DISTANCE / SIGMA, int((labels != 0).sum())
    assert wrong == pytest.approx(2000 * special.ndtr(-z), abs=4 * math.sqrt(500))
    along = stats.norm.pdf(z) / special.ndtr(-z)
    expected = along / math.sqrt(along**2 + plane.normal.size / wrong)
    moved = proposal.astype(np.float64) - plane.image.pixels
    assert -(moved * plane.normal).sum() / np.linalg.norm(moved) == pytest.approx(expected, abs=0.1)
    assert plane.beyond(proposal) > 0


def test_samples_that_agree_point_nowhere(plane: Plane, opened: Callable[..., Any]) -> None:
    with opened(0) as classifier:
        agreed = np.zeros(50, np.int32)
        assert falsifier.proposal_of_samples(classifier, plane.image, claim(0.4), PLAIN, agreed) is None
        assert falsifier.proposal_of_samples(classifier, plane.image, claim(0.0), PLAIN, agreed) is None


@pytest.mark.parametrize(
    ("labels", "expected"), [([1, 1, 0], 1), ([1, 0], None), ([-1, -1, -1, 2], None), ([3], 3), ([0, 1, 2, 2], None)]
)
def test_a_majority_is_more_than_half(labels: list[int], expected: int | None) -> None:
    assert falsifier.majority(np.array(labels)) == expected
