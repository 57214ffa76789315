from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mpmath
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.export.compare.agreement import (
    Agreement,
    Share,
    StepGap,
    Transfer,
    _Gap,
    agree,
    as_picture,
    draw,
    engine_chain,
    failures,
    torch_chain,
    torch_labels,
    transfer,
)
from densepure_rt.export.convert.parity import SECRET
from densepure_rt.export.convert.to_onnx import export_bundle
from densepure_rt.export.models.check_images import made_up
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.bundle import Bundle, open_bundle
from densepure_rt.runtime.device import NOT_FINITE, STEP_INPUTS
from densepure_rt.runtime.noise import Key, first_state, image_key, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.onnx_device import OnnxDevice
from densepure_rt.runtime.schedule import Schedule, make_chain
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import Settings

GREY, COLOUR = (1, 6, 6), (3, 5, 8)
Shape = tuple[int, int, int]
Labels = NDArray[np.int64]
BUDGET = Settings(sigma=0.5, steps=3, votes=5, n=8)
EPS_ERROR = 1e-3  # of the engine that is made wrong on purpose
LABELS = ("a", "b", "c")


class ToyUnet(nn.Module):
    """One convolution for eps and one for v, each off by a known amount."""

    def __init__(self, channels: int, eps_error: float = 0.0, v_error: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.eps, self.v = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.eps_error, self.v_error = eps_error, v_error

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        eps = torch.tanh(self.eps(x) + t[:, None, None, None] / 1000) + self.eps_error
        return torch.cat([eps, torch.tanh(self.v(x)) / 2 + self.v_error], 1)


class ToyClassifier(nn.Module):
    def __init__(self, values: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(values, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


class SwappedClassifier(ToyClassifier):
    """Takes the first class for the second, and the other way round, where the first pixel is bright."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.where(x.flatten(1)[:, :1] > 0, logits[:, [1, 0, 2]], logits)


class BrokenClassifier(ToyClassifier):
    """NaN where the mean of all pixels is very bright: in no picture of this test but a white one."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.7, math.nan, logits)


def toy_unet(image: Shape = GREY, eps_error: float = 0.0, v_error: float = 0.0) -> DiffusionModel:
    """Without a clip, so that an error of eps is an error of the next mean, times a number."""
    network = ToyUnet(image[0], eps_error, v_error).eval()
    return DiffusionModel(network, image, Schedule("linear", 1000), "learned_range", "epsilon", None, "a" * 64)


def toy_classifier(image: Shape = GREY, kind: type[ToyClassifier] = ToyClassifier) -> ClassifierModel:
    return ClassifierModel(kind(math.prod(image)).eval(), image, LABELS, "b" * 64)


def white_keeper() -> DiffusionModel:
    """Gives back x: a white picture stays white, but for the noise."""

    class Same(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.clip(-1, 1)

    return DiffusionModel(Same(), GREY, Schedule("linear", 1000), "fixed_small", "x0", (-1.0, 1.0), "a" * 64)


Exporter = Callable[[DiffusionModel, ClassifierModel], Bundle]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    def export(unet: DiffusionModel, classifier: ClassifierModel) -> Bundle:
        folder = tmp_path_factory.mktemp("engines")
        return open_bundle(export_bundle(Models(unet, classifier), folder, made_up(unet.image, 2)).unet)

    return export


@pytest.fixture(scope="module")
def sound(exported: Exporter) -> Bundle:
    return exported(toy_unet(), toy_classifier())


@pytest.fixture(scope="module")
def off_by_a_little(exported: Exporter) -> Bundle:
    return exported(toy_unet(eps_error=EPS_ERROR), toy_classifier())


@pytest.fixture(scope="module")
def swapped(exported: Exporter) -> Bundle:
    return exported(toy_unet(), toy_classifier(kind=SwappedClassifier))


@contextmanager
def at_work(bundle: Bundle, batch: int = 8, threads: int = 2) -> Iterator[SmoothedClassifier]:
    with SmoothedClassifier(bundle, OnDevice(OnnxDevice(bundle, batch, threads))) as smoothed:
        yield smoothed


def pictures(image: Shape = GREY, count: int = 3) -> list[LabelledImage]:
    return [LabelledImage(10 * i, pixels, i % 2) for i, pixels in enumerate(made_up(image, count))]


def compared(bundle: Bundle, budget: Settings = BUDGET, count: int = 3) -> Agreement:
    with at_work(bundle) as smoothed:
        return agree(smoothed, Models(toy_unet(), toy_classifier()), pictures(count=count), budget)


@pytest.fixture(scope="module")
def found(sound: Bundle) -> Agreement:
    return compared(sound)


@pytest.fixture(scope="module")
def found_swapped(swapped: Bundle) -> Agreement:
    return compared(swapped)


def alone(bundle: Bundle, pixels: NDArray[np.uint8], budget: Settings) -> Labels:
    """What ONNX Runtime labels each (sample, vote), taken one by one through its own files: int64 [n, votes]."""
    step, classify = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for path in (bundle.unet_path, bundle.classifier_path)
    )
    unet = bundle.unet
    chain = make_chain(unet.schedule, unet.variance, budget.sigma, budget.steps, unet.timestep_rule)
    key = image_key(SECRET, "calibrate", budget.sigma, pixels)
    labels = np.empty((budget.n, budget.votes), np.int64)
    for sample, vote in np.ndindex(labels.shape):
        levels = pixels + smoothing_noise(smoothing_law(budget.sigma), key, sample, pixels.shape)
        mean = first_state(levels, chain.scale)[None]
        std = np.zeros_like(mean)
        for i in range(budget.steps):
            noise = vote_noise(key, sample, vote, i, pixels.shape)[None] if i else np.zeros_like(mean)
            feed = (mean, std, noise, chain.t[i : i + 1], chain.coef[i : i + 1])
            mean, std, _ = step.run(None, dict(zip(STEP_INPUTS, feed, strict=True)))
        labels[sample, vote] = classify.run(None, {"mean": mean})[0].argmax()
    return labels


def majority(labels: Labels) -> list[int]:
    """Of all votes in each row; of equals the one that was seen first."""
    rows = labels.tolist()
    return [max(row, key=lambda label: (row.count(label), -row.index(label))) for row in rows]


# the states


@pytest.mark.parametrize("image", [GREY, COLOUR])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_both_walk_the_same_chain_from_the_same_bits(sound: Bundle, colour: Bundle, image: Shape, steps: int) -> None:
    unet, bundle = toy_unet(image), sound if image == GREY else colour
    chain = make_chain(unet.schedule, unet.variance, 0.5, steps)
    (picture,) = pictures(image, 1)
    key: Key = (12, 34)
    sample, vote = np.array([0, 0, 5, 5, 70_000]), np.array([0, 3, 0, 1, 2])
    with at_work(bundle) as smoothed:
        handle = smoothed.device.open_image(picture.pixels, key, 0.5, chain.scale)
        theirs, labels = engine_chain(smoothed.device, handle, chain, sample, vote)
    ours = torch_chain(unet, picture.pixels, key, chain, sample, vote)
    assert len(theirs) == len(ours) == steps + 1
    assert np.array_equal(theirs[0][0], ours[0][0])
    assert not theirs[0][1].any()
    assert not ours[0][1].any()
    for state, expected in zip(theirs[1:], ours[1:], strict=True):
        for part, wanted in zip(state, expected, strict=True):
            np.testing.assert_allclose(part, wanted, rtol=2e-5, atol=2e-6)
    assert labels.tolist() == torch_labels(toy_classifier(image), ours[-1][0]).tolist()
    if steps > 1:  # votes of one sample part after the first step, and only then
        assert np.array_equal(theirs[1][0][0], theirs[1][0][1])
        assert not np.array_equal(theirs[2][0][0], theirs[2][0][1])
        assert not np.array_equal(ours[2][0][0], ours[2][0][1])


@pytest.fixture(scope="module")
def colour(exported: Exporter) -> Bundle:
    return exported(toy_unet(COLOUR), toy_classifier(COLOUR))


def test_a_sound_engine_agrees_on_every_level(found: Agreement) -> None:
    assert [gap.step for gap in found.steps] == [0, 1, 2]
    assert found.steps[0].noise == pytest.approx(1.0, abs=0.02)  # twice sigma, in pixels of [-1, 1]
    assert [gap.noise for gap in found.steps] == sorted((gap.noise for gap in found.steps), reverse=True)
    assert found.steps[0].timestep is not None
    assert all(0 < gap.relative_l2 < 1e-6 and 0 < gap.max_abs < 1e-5 for gap in found.steps)
    assert 0 < found.chain_relative_l2 < 1e-6
    assert (found.labels.differ, found.labels.total) == (0, 3 * 8)  # one label a sample
    assert (found.votes.differ, found.votes.total) == (0, 3 * 8)
    assert [row.idx for row in found.certificates] == [0, 10, 20]
    assert [row.label for row in found.certificates] == [0, 1, 0]
    assert len({row.predict for row in found.certificates}) > 1  # or labels would say nothing
    assert failures(found) == []
    assert len(found.shown) == 3


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2), (64, 1)])
def test_what_is_found_does_not_depend_on_batch_and_threads(
    sound: Bundle, found: Agreement, batch: int, threads: int
) -> None:
    with at_work(sound, batch, threads) as smoothed:
        again = agree(smoothed, Models(toy_unet(), toy_classifier()), pictures(), BUDGET)
    assert (again.labels, again.votes, again.certificates) == (found.labels, found.votes, found.certificates)
    for one, other in zip(again.steps, found.steps, strict=True):
        assert one.relative_l2 == pytest.approx(other.relative_l2, rel=0.5)  # PyTorch rounds by batch


def test_a_known_error_of_eps_is_found_at_its_size(off_by_a_little: Bundle, found: Agreement) -> None:
    """x0 = (x - sigma eps) / signal goes into the next mean with weight coef.x0: that times the error of eps."""
    wrong = compared(off_by_a_little)
    chain = make_chain(toy_unet().schedule, "learned_range", BUDGET.sigma, BUDGET.steps)
    for gap, right, coef in zip(wrong.steps, found.steps, chain.coef, strict=True):
        sigma, signal, x0 = coef[:3].tolist()
        assert gap.max_abs == pytest.approx(EPS_ERROR * sigma / signal * x0, rel=0.01)
        assert 1e-5 < gap.relative_l2 < 1e-1
        assert gap.relative_l2 > 100 * right.relative_l2
    assert wrong.chain_relative_l2 > 1e-4
    said = failures(wrong)
    assert [line.partition(":")[0] for line in said[:4]] == ["step 1", "step 2", "step 3", "the chain"]


def test_a_wrong_spread_is_found_by_its_step(exported: Exporter) -> None:
    """Of the steps that have one: at the last the variance is 0 whatever the network says."""
    wrong = compared(exported(toy_unet(v_error=0.05), toy_classifier()), dataclasses.replace(BUDGET, n=2), count=1)
    assert [line.partition(":")[0] for line in failures(wrong)][:2] == ["step 1", "step 2"]
    assert wrong.steps[-1].relative_l2 < 1e-6


def test_a_gap_is_of_all_that_was_added_and_hides_nothing() -> None:
    gap = _Gap()
    gap.add(np.array([3.0, 4.5], np.float32), np.array([3.0, 4.0], np.float32))
    gap.add(np.array([-1.2], np.float32), np.array([0.0], np.float32))
    assert gap.max_abs == pytest.approx(1.2)
    assert gap.relative_l2 == pytest.approx(math.hypot(0.5, 1.2) / 5)
    gap.add(np.array([math.nan], np.float32), np.array([1.0], np.float32))
    gap.add(np.array([1.0], np.float32), np.array([1.0], np.float32))
    assert math.isnan(gap.max_abs)
    assert math.isnan(gap.relative_l2)
    nothing, zeros = _Gap(), np.zeros(3, np.float32)
    nothing.add(zeros, zeros)
    assert (nothing.max_abs, nothing.relative_l2) == (0, 0)
    nothing.add(zeros + 1, zeros)
    assert (nothing.max_abs, nothing.relative_l2) == (1, math.inf)


# labels and votes


def test_swapped_classes_are_found_in_labels_and_votes_alone(swapped: Bundle, found_swapped: Agreement) -> None:
    theirs = [alone(swapped, picture.pixels, BUDGET) for picture in pictures()]
    ours = [reference_labels(picture.pixels) for picture in pictures()]
    labels_differ = sum(int((a != b)[:, 0].sum()) for a, b in zip(ours, theirs, strict=True))  # of the first votes
    votes_differ = [
        sum(x != y for x, y in zip(majority(a), majority(b), strict=True)) for a, b in zip(ours, theirs, strict=True)
    ]
    assert 0 < labels_differ == found_swapped.labels.differ
    assert 0 < sum(votes_differ) == found_swapped.votes.differ
    assert [row.votes_differ for row in found_swapped.certificates] == votes_differ
    assert all(gap.relative_l2 < 1e-6 for gap in found_swapped.steps)
    assert found_swapped.chain_relative_l2 < 1e-6
    assert {line.partition(":")[0] for line in failures(found_swapped)} == {"labels", "votes"}


def reference_labels(pixels: NDArray[np.uint8], budget: Settings = BUDGET) -> Labels:
    unet = toy_unet()
    chain = make_chain(unet.schedule, unet.variance, budget.sigma, budget.steps)
    sample, vote = np.divmod(np.arange(budget.n * budget.votes), budget.votes)
    key = image_key(SECRET, "calibrate", budget.sigma, pixels)
    return torch_labels(toy_classifier(), torch_chain(unet, pixels, key, chain, sample, vote)[-1][0]).reshape(
        budget.n, budget.votes
    )


def test_votes_that_stop_early_are_those_of_all_votes(sound: Bundle, found: Agreement) -> None:
    """The engine stops when its vote is decided; PyTorch casts all five. Split votes must be among them."""
    split = 0
    for picture, certificate in zip(pictures(), found.certificates, strict=True):
        labels = alone(sound, picture.pixels, BUDGET)
        split += sum(len(set(row)) > 1 for row in labels.tolist())
        votes = majority(labels)
        assert certificate.votes_differ == 0
        assert certificate.predict == votes[0]  # a tenth of 8 samples, one, selects
        agreeing = votes[1:].count(votes[0])
        lower = stats.beta.ppf(BUDGET.alpha, agreeing, 7 - agreeing + 1) if agreeing else 0
        assert certificate.engine == certificate.torch == (None if lower <= 0.5 else pytest.approx(lower))
    assert split > 0


def test_labels_that_are_not_finite_differ_from_every_label(exported: Exporter) -> None:
    unet, budget = white_keeper(), Settings(sigma=0.05, steps=2, votes=3, n=4)
    bundle = exported(unet, toy_classifier(kind=BrokenClassifier))
    white = LabelledImage(0, np.full(GREY, 255, np.uint8), None)
    grey = LabelledImage(1, np.full(GREY, 128, np.uint8), None)
    with at_work(bundle) as smoothed:
        wrong = agree(smoothed, Models(unet, toy_classifier()), [white, grey], budget)
    assert (wrong.labels.differ, wrong.labels.total) == (4, 2 * 4)
    assert (wrong.votes.differ, wrong.votes.total) == (4, 8)
    assert [row.votes_differ for row in wrong.certificates] == [4, 0]
    assert [row.differ for row in wrong.certificates] == [3, 0]
    assert len(failures(wrong)) == 2


# certificates


def certified(ours: list[int], theirs: list[int], alpha: float = 0.001, sigma: float = 1.0) -> Transfer:
    image = LabelledImage(7, np.zeros(GREY, np.uint8), 2)
    return transfer(image, np.array(ours), np.array(theirs), Settings(sigma=sigma, n=len(ours), alpha=alpha))


def with_selection(votes: list[int]) -> list[int]:
    """`votes` behind as many samples of class 0 as select the class: a tenth of all."""
    selecting = next(count for count in range(1, len(votes) + 1) if max(1, (count + len(votes)) // 10) == count)
    return [0] * selecting + votes


def test_without_a_disagreement_in_10000_pairs_eta_is_what_was_computed_by_hand() -> None:
    votes = with_selection([0] * 10_000)
    found = certified(votes, votes)
    assert (found.n, found.differ, found.votes_differ, found.predict) == (10_000, 0, 0, 0)
    assert found.eta == pytest.approx(1 - 0.0005 ** (1 / 10_000), rel=1e-9)
    assert found.eta == pytest.approx(7.6e-4, abs=0.05e-4)
    lower = 0.0005 ** (1 / 10_000)
    assert found.transferred == pytest.approx(stats.norm.ppf(lower - found.eta), rel=1e-9)
    assert found.torch == found.engine == pytest.approx(stats.norm.ppf(0.001 ** (1 / 10_000)), rel=1e-9)


def test_a_bound_of_0_99_loses_what_was_computed_by_hand() -> None:
    """Phi^-1(0.99) = 2.326, and 2.299 after eta = 7.6e-4; sigma 1."""
    n = 10_000
    agreeing = min(range(9900, n), key=lambda k: abs(stats.beta.ppf(0.0005, k, n - k + 1) - 0.99))
    votes = with_selection([0] * agreeing + [1] * (n - agreeing))
    found = certified(votes, votes)
    assert stats.norm.ppf(stats.beta.ppf(0.0005, agreeing, n - agreeing + 1)) == pytest.approx(2.326, abs=0.003)
    assert found.transferred == pytest.approx(2.299, abs=0.003)


def test_disagreements_and_radii_are_those_of_scipy() -> None:
    ours = with_selection([0] * 380 + [1] * 20)
    theirs = with_selection([0] * 370 + [1] * 10 + [0] * 5 + [2] * 14 + [NOT_FINITE])
    found = certified(ours, theirs, alpha=0.01, sigma=0.25)
    assert (found.idx, found.label, found.n, found.differ) == (7, 2, 400, 10 + 5 + 14 + 1)
    eta = stats.beta.ppf(1 - 0.005, 31, 400 - 30)
    assert found.eta == pytest.approx(eta, rel=1e-9)
    assert found.torch == pytest.approx(0.25 * stats.norm.ppf(stats.beta.ppf(0.01, 380, 21)), rel=1e-9)
    assert found.engine == pytest.approx(0.25 * stats.norm.ppf(stats.beta.ppf(0.01, 375, 26)), rel=1e-9)
    expected = 0.25 * stats.norm.ppf(stats.beta.ppf(0.005, 380, 21) - eta)
    assert found.transferred == pytest.approx(expected, rel=1e-9)


def test_the_samples_that_select_do_not_estimate() -> None:
    """PyTorch selects class 0 in two samples of 20, of which the engine says otherwise."""
    found = certified([0] * 20, [1, 2] + [0] * 18)
    assert (found.votes_differ, found.differ, found.n, found.predict) == (2, 0, 18, 0)
    assert certified([1, 1] + [0] * 18, [0] * 20).torch is None  # class 1 was selected, and never came again


@st.composite
def paired_votes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    n = draw(st.integers(1, 300))
    others = draw(st.integers(0, n // 2))
    lost = draw(st.integers(0, (n - others) // 4))
    won = draw(st.integers(0, others))
    ours = [0] * (n - others) + [1] * others
    theirs = [NOT_FINITE] * lost + [0] * (n - others - lost) + [0] * won + [1] * (others - won)
    return with_selection(ours), with_selection(theirs)


@settings(max_examples=60, deadline=None)
@given(votes=paired_votes(), alpha=st.floats(1e-6, 0.49), sigma=st.sampled_from([0.12, 0.25, 0.5, 1.0]))
def test_no_transferred_radius_is_beyond_the_exact_one(
    votes: tuple[list[int], list[int]], alpha: float, sigma: float
) -> None:
    """By 50 digits, and forwards: alpha / 2 covers each bound, so no bound is beyond the exact one either."""
    found = certified(*votes, alpha=alpha, sigma=sigma)
    with mpmath.workdps(50):

        def at_least(successes: int, p: mpmath.mpf) -> mpmath.mpf:
            if p >= 1 or not successes:
                return mpmath.mpf(1)
            terms = (
                mpmath.binomial(found.n, k) * p**k * (1 - p) ** (found.n - k) for k in range(successes, found.n + 1)
            )
            return mpmath.fsum(terms)

        half, eta = mpmath.mpf(alpha) / 2, mpmath.mpf(found.eta)
        assert 1 - at_least(found.differ + 1, eta) <= half  # so few disagree that often only if eta is reached
        if found.transferred is not None:
            by_torch = votes[0][-found.n :].count(0)
            p_lower = mpmath.ncdf(mpmath.mpf(found.transferred) / mpmath.mpf(sigma)) + eta
            assert at_least(by_torch, p_lower) <= half
            assert found.torch is not None
            assert found.engine is not None
            assert found.transferred <= min(found.torch, found.engine)


def test_transferred_certificates_are_wrong_no_more_often_than_alpha() -> None:
    """The engine's class has p = 0.8, and so a radius of Phi^-1(0.8); PyTorch's has 0.9, and a tenth disagree."""
    alpha, trials, wrong, given_out = 0.3, 1500, 0, 0
    random = np.random.default_rng(5)
    for _ in range(trials):
        u = random.random(89)
        ours, theirs = np.where(u < 0.9, 0, 1), np.where(u < 0.8, 0, 1)
        found = certified(with_selection(ours.tolist()), with_selection(theirs.tolist()), alpha)
        given_out += found.transferred is not None
        wrong += (found.transferred or 0) > stats.norm.ppf(0.8)
    assert given_out > 0.9 * trials
    assert wrong > 0  # the bound is a bound, and not a way out
    assert wrong <= alpha * trials


# what is said


def test_a_share_is_bounded_from_both_sides() -> None:
    share = Share(3, 200)
    assert share.lower == pytest.approx(stats.beta.ppf(0.001, 3, 198), rel=1e-9)
    assert share.upper == pytest.approx(stats.beta.ppf(0.999, 4, 197), rel=1e-9)
    assert (Share(0, 10).lower, Share(10, 10).upper) == (0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"steps": [StepGap(0, 258, 1.0, 0.1, 2e-5)]}, "step 1: relative L2 2.1e-5, fp32 allows 1e-05"),
        ({"steps": [StepGap(0, 258, 1.0, math.nan, math.nan)]}, "step 1: relative L2 nan"),
        ({"steps": [StepGap(0, 258, 1.0, 0.1, 2e-3)], "precision": "fp16"}, None),
        ({"steps": [StepGap(0, 258, 1.0, 0.1, 2.0)], "precision": "int8"}, None),
        ({"steps": [StepGap(0, 258, 1.0, math.nan, math.nan)], "precision": "int8"}, "step 1"),
        ({"chain_relative_l2": 2e-4}, "the chain: relative L2 0.00021, allowed is 0.0001"),
        ({"chain_relative_l2": 9e-5}, None),
        ({"labels": Share(2, 1000)}, None),
        ({"labels": Share(40, 1000), "precision": "fp16"}, None),
        ({"labels": Share(40, 1000)}, "labels: 40 of 1000 differ, so at least 2.34 %; 0.5 % may"),
        ({"votes": Share(400, 1000), "precision": "int8"}, "votes: 400 of 1000 differ"),
    ],
)
def test_failures_are_what_the_precision_may_not_lose(
    found: Agreement, change: dict[str, object], said: str | None
) -> None:
    lines = failures(dataclasses.replace(found, **change))  # type: ignore[arg-type]
    assert len(lines) == (said is not None)
    assert all(line.startswith(str(said)) for line in lines)


def test_engines_of_other_weights_are_refused(sound: Bundle) -> None:
    unet, classifier = toy_unet(), toy_classifier()
    with at_work(sound) as smoothed:
        with pytest.raises(UsageError, match=r"unet\.onnx was exported from weights a{16}.*c{16}.*`unet`"):
            agree(smoothed, Models(dataclasses.replace(unet, weights_sha256="c" * 64), classifier), pictures(), BUDGET)
        with pytest.raises(UsageError, match=r"classifier\.onnx was exported from weights b{16}.*`classifier`"):
            agree(smoothed, Models(unet, dataclasses.replace(classifier, weights_sha256="d" * 64)), pictures(), BUDGET)


def test_one_sample_is_refused(sound: Bundle) -> None:
    with at_work(sound) as smoothed, pytest.raises(UsageError, match=r"`n` 1: .*two are the least"):
        agree(smoothed, Models(toy_unet(), toy_classifier()), pictures(), dataclasses.replace(BUDGET, n=1))


# the picture


def readable(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels)) > 20
    return pixels


def test_the_picture_can_be_read(found: Agreement, tmp_path: Path) -> None:
    draw(found, tmp_path / "grey.png")
    pixels = readable(tmp_path / "grey.png")
    assert (np.ptp(pixels.astype(int), axis=2) > 60).any()  # the line of the steps is coloured


@pytest.mark.parametrize("steps", [0, 1])
def test_colour_images_and_chains_of_a_step_or_none_are_drawn(colour: Bundle, steps: int, tmp_path: Path) -> None:
    with at_work(colour) as smoothed:
        budget = dataclasses.replace(BUDGET, steps=steps, n=2)
        found = agree(smoothed, Models(toy_unet(COLOUR), toy_classifier(COLOUR)), pictures(COLOUR, 6), budget)
    assert len(found.steps) == steps
    assert len(found.shown) == 4
    assert found.labels.total == 6 * 2
    draw(found, tmp_path / "colour.png")
    readable(tmp_path / "colour.png")


def test_no_difference_at_all_is_drawn_too(found: Agreement, tmp_path: Path) -> None:
    steps = [dataclasses.replace(gap, max_abs=0.0, relative_l2=0.0) for gap in found.steps]
    shown = [dataclasses.replace(image, engine=image.torch) for image in found.shown]
    draw(dataclasses.replace(found, steps=steps, shown=shown), tmp_path / "equal.png")
    readable(tmp_path / "equal.png")


def test_pixels_are_drawn_as_they_are() -> None:
    levels = np.array([-2.0, -1.0, 0.0, 1.0, 1.5], np.float32).reshape(1, 1, 5)
    assert as_picture(levels).tolist() == [[0, 0, 0.5, 1, 1]]
    colours = np.stack([np.full((2, 4), value, np.float32) for value in (-1, 0, 1)])
    assert as_picture(colours).shape == (2, 4, 3)
    assert as_picture(colours)[1, 2].tolist() == [0, 0.5, 1]


def test_without_matplotlib_the_pip_command_is_named(
    found: Agreement, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'densepure-rt\[report\]'"):
        draw(found, tmp_path / "none.png")
