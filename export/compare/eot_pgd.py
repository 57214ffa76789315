"""Projected gradient ascent through the PyTorch pipeline and its noise: proposes images that may break a certificate.

A proposal proves nothing: `densepure_rt.runs.falsifier` puts it to the test on the engine that was certified.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densepure_rt.export.models import reference
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runs.falsifier import within
from densepure_rt.runtime.noise import PIXEL_LEVELS
from densepure_rt.runtime.schedule import Chain, Coefficients
from densepure_rt.smoothing.settings import Settings

STRIDE = 0.25  # of the radius, to an ascent (Madry et al. 2018: 2.5 eps / steps, of 10 ascents)

# The reference without its inference mode, in which nothing has a gradient.
reverse_step = inspect.unwrap(reference.reverse_step)


@dataclass(frozen=True)
class Effort:
    """The cost that a proposal may have. ascents: gradients per proposal; draws: noisy copies per gradient."""

    ascents: int = 10
    draws: int = 16


def eot_pgd(
    unet: DiffusionModel,
    classifier: ClassifierModel,
    pixels: NDArray[np.uint8],
    label: int,
    radius: float,
    settings: Settings,
    seed: int,
    effort: Effort = Effort(),
) -> Iterator[NDArray[np.uint8]]:
    """Endless proposals, uint8 [C, H, W] inside the open l2 ball of `radius` ([0, 1] pixel units) around `pixels`.

    Each is where the ascents lead from a new random start that raise -log E p(label), the expectation over the
    smoothing and one vote's noise (EOT, Athalye et al. 2018; the loss of SmoothAdv, Salman et al. 2019). The
    classifier and its network are taken to be on the CPU, in float32. A chain of b steps is held once for each draw.
    """
    chain = unet.chain(settings.sigma, settings.steps, settings.timestep_rule)
    noise, reach = torch.Generator().manual_seed(seed), PIXEL_LEVELS * radius
    image = torch.from_numpy(pixels.astype(np.float32))
    while True:
        moved = on_ball(image, torch.randn(image.shape, generator=noise) * reach, reach)
        for _ in range(effort.ascents):
            moved.requires_grad_()
            loss = disagreement(unet, classifier, chain, image + moved, label, effort.draws, noise)
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = on_ball(image, moved.detach() + STRIDE * reach * gradient / (gradient.norm() + 1e-30), reach)
        proposal = within(pixels, moved.numpy().astype(np.float64), radius)
        if proposal is None:
            return
        yield proposal


def on_ball(image: Tensor, moved: Tensor, reach: float) -> Tensor:
    """The displacement cut to 0 ... 255 and then to length `reach`, all in grey levels."""
    moved = (image + moved).clip(0, PIXEL_LEVELS) - image
    return moved * min(1.0, reach / max(float(moved.norm()), 1e-30))


def disagreement(
    unet: DiffusionModel,
    classifier: ClassifierModel,
    chain: Chain,
    levels: Tensor,
    label: int,
    draws: int,
    noise: torch.Generator,
) -> Tensor:
    """-log of the mean probability of `label` over noisy, purified copies of an image [C, H, W] in grey levels."""

    def normal() -> Tensor:
        return torch.randn((draws, *levels.shape), generator=noise)

    noisy = levels + PIXEL_LEVELS * chain.sigma * normal()
    mean, std = chain.scale * (2 * noisy / PIXEL_LEVELS - 1), torch.zeros(())
    for t, coef in zip(chain.t.tolist(), chain.coef.tolist(), strict=True):
        mean, std = reverse_step(unet, mean + std * normal(), torch.full((draws,), t), Coefficients(*coef))
    log_p: Tensor = classifier.network(mean).log_softmax(1)[:, label]
    return float(np.log(draws)) - log_p.logsumexp(0)
