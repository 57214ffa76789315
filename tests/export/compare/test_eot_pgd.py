from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from densepure_rt.export.compare.eot_pgd import Effort, disagreement, eot_pgd, on_ball, reverse_step
from densepure_rt.export.models.classifiers import ClassifierModel, zoo_classifier
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import no_unet, zoo_unet
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.runs import falsifier
from densepure_rt.runtime.schedule import Coefficients, make_chain
from densepure_rt.smoothing.certificate import Certificate
from densepure_rt.smoothing.classifier import SmoothedClassifier, load
from densepure_rt.smoothing.settings import Settings

SHAPE = (1, 28, 28)
ONE_STEP = Settings(sigma=0.25, steps=1, votes=1)
CHEAP = Effort(ascents=4, draws=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's own threads wait for each other where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def image() -> LabelledImage:
    """A sandal that the shipped model is sure of."""
    return list(open_images(None, SHAPE, [str(label) for label in range(10)]).select(37, 3))[2]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(zoo_unet(), zoo_classifier())


@pytest.fixture(scope="module")
def shipped() -> Iterator[SmoothedClassifier]:
    with load(secret=seeded_secret(0), batch=16, threads=1) as classifier:
        yield classifier


def test_proposals_lie_in_the_ball_and_cost_the_engine_more_votes_than_random_ones(
    image: LabelledImage, models: Models, shipped: SmoothedClassifier
) -> None:
    radius, rng = 1.5, np.random.default_rng(0)
    found = list(itertools.islice(eot_pgd(*models, image.pixels, 5, radius, ONE_STEP, 1, CHEAP), 2))
    for proposal in found:
        moved = [int(a) - int(b) for a, b in zip(proposal.flat, image.pixels.flat, strict=True)]
        assert 0 < sum(step * step for step in moved) < (255 * Fraction(radius)) ** 2
    assert (found[0] != found[1]).any()  # another start
    others = (falsifier.within(image.pixels, rng.standard_normal(SHAPE), radius) for _ in range(2))
    both = [*found, *(other for other in others if other is not None)]
    labels = falsifier.labels_of(shipped, both, ONE_STEP, "predict", range(16))
    ours, random = (labels == 5).mean(axis=1)[:2], (labels == 5).mean(axis=1)[2:]
    assert ours.max() < random.min() - 0.3


def test_a_proposal_breaks_a_forged_certificate_of_the_shipped_engine(
    image: LabelledImage, models: Models, shipped: SmoothedClassifier
) -> None:
    forged = Certificate(5, 3.0, n0=0, n=1000, n_a=1000, alpha=0.001, p_lower=0.999)
    proposals = eot_pgd(*models, image.pixels, 5, 3.0, ONE_STEP, 1, CHEAP)
    found, _ = falsifier.falsify(shipped, image, forged, ONE_STEP, 200, proposals)
    assert (found.broken, found.attack) == (True, "proposals")
    assert found.label not in (5, None)


def test_a_chain_with_draws_between_its_steps_has_a_gradient(image: LabelledImage, models: Models) -> None:
    two = Settings(sigma=0.5, steps=2, votes=3)
    (proposal,) = itertools.islice(eot_pgd(*models, image.pixels, 5, 0.5, two, 2, Effort(1, 2)), 1)
    assert falsifier.inside(image.pixels, proposal, 0.5)


class Linear(nn.Module):
    """Two classes, apart by `slope` times the sum of the pixels in [-1, 1]."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.slope * x.flatten(1).sum(1)
        return torch.stack([total, -total], dim=1)


def linear(slope: float) -> Models:
    shape = (1, 6, 6)
    return Models(no_unet(shape), ClassifierModel(Linear(slope), shape, ("up", "down"), "0" * 64))


def test_on_a_plane_it_goes_straight_to_it() -> None:
    """The gradient of a linear classifier is known: all pixels down alike, without a UNet."""
    pixels = np.full((1, 6, 6), 130, np.uint8)
    plain = Settings(sigma=0.25, steps=0, votes=1)
    (proposal,) = itertools.islice(eot_pgd(*linear(0.02), pixels, 0, 0.3, plain, seed=0), 1)
    moved = proposal.astype(np.float64) - pixels
    assert -moved.sum() / np.linalg.norm(moved) / 6 > 0.98
    assert falsifier.distance_of(pixels, proposal) > 0.95 * 0.3


def test_the_loss_is_minus_the_log_of_the_mean_probability() -> None:
    unet, classifier = linear(0.01)
    chain = make_chain(unet.schedule, unet.variance, 0.25, 0)
    levels = torch.full((1, 6, 6), 140.0)
    found = disagreement(unet, classifier, chain, levels, 0, 3, torch.Generator().manual_seed(3))
    noise = torch.randn((3, 1, 6, 6), generator=torch.Generator().manual_seed(3)).double()
    total = 0.01 * (2 * (140 + 255 * 0.25 * noise) / 255 - 1).sum((1, 2, 3))
    assert float(found) == pytest.approx(-float(torch.sigmoid(2 * total).mean().log()), rel=1e-4)


def test_the_step_is_that_of_the_reference_but_for_its_gradient(models: Models) -> None:
    unet, _ = models
    chain = make_chain(unet.schedule, unet.variance, 0.5, 1)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mean, _ = reverse_step(unet, x, torch.full((2,), float(chain.t[0])), Coefficients(*chain.coef[0].tolist()))
    (gradient,) = torch.autograd.grad(mean.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_displacements_end_in_the_range_and_in_the_ball() -> None:
    image, moved = torch.tensor([0.0, 255.0, 100.0]), torch.tensor([-5.0, 5.0, 40.0])
    torch.testing.assert_close(on_ball(image, moved, 30.0), torch.tensor([0.0, 0.0, 30.0]))
    torch.testing.assert_close(on_ball(image, moved, 50.0), torch.tensor([0.0, 0.0, 40.0]))


def test_a_ball_without_another_image_has_no_proposal() -> None:
    pixels = np.full((1, 6, 6), 130, np.uint8)
    assert list(eot_pgd(*linear(0.02), pixels, 0, 0.003, Settings(steps=0, votes=1), 1, CHEAP)) == []
