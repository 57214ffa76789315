from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from densepure_rt.export.models import reference
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.bundle import Prediction
from densepure_rt.runtime.schedule import LOG_OF_ZERO, Coefficients, Schedule, Variance, landing, make_chain, posterior

VARIANCES: list[Variance] = ["fixed_small", "fixed_large", "learned_range"]
PREDICTIONS: list[Prediction] = ["epsilon", "v", "x0", "denoiser"]


class Toy(nn.Module):
    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        eps = 0.8 * x + 0.2 * torch.cos(x + t[:, None, None, None])
        return torch.cat([eps, torch.tanh(x)], 1) if self.learned else eps


def model(variance: Variance, clip: tuple[float, float] | None, prediction: Prediction = "epsilon") -> DiffusionModel:
    toy = Toy(variance in ("learned_range", "learned"))
    return DiffusionModel(toy, (3, 4, 5), Schedule("linear", 1000), variance, prediction, clip, "0" * 64)


def state(items: int = 3) -> Tensor:
    return torch.randn(items, 3, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [1, 100])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_step_and_draw_are_those_of_diffusers(
    prediction: Prediction, theirs: str, variance: Variance, clip: bool, stride: int
) -> None:
    toy, x = model(variance, (-1.0, 1.0) if clip else None, prediction), state()
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    scheduler: Any = DDPMScheduler(1000, variance_type=variance, clip_sample=clip, prediction_type=theirs)
    scheduler.set_timesteps(1000 // stride)
    for t in (100, 300, 800):
        told = torch.full((3,), float(t))
        drawn = scheduler.step(toy.network(x, told), t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        mean, std = reference.reverse_step(toy, x, told, posterior(bars[t], bars[t - stride], variance))
        torch.testing.assert_close(mean + std * noise, drawn, rtol=2e-5, atol=2e-5)
        assert (std > 0).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_last_step_gives_the_clipped_estimate_and_no_spread(variance: Variance) -> None:
    toy, x, bar = model(variance, (-0.25, 0.5)), state() * 2, 0.8
    told = torch.full((3,), 7.0)
    mean, std = reference.reverse_step(toy, x, told, landing(bar))
    eps = toy.network(x, told)[:, :3].double()
    expected = ((x.double() - (1 - bar) ** 0.5 * eps) / bar**0.5).clip(-0.25, 0.5)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert (std == 0).all()


@pytest.mark.parametrize(("v", "expected"), [(-1.0, 0.2), (0.0, 0.4), (1.0, 0.8)])
def test_variance_logits_interpolate_between_the_bounds_geometrically(v: float, expected: float) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.cat([x, torch.full_like(x, v)], 1)

    toy = DiffusionModel(Constant(), (3, 4, 5), Schedule("linear", 1000), "learned_range", "epsilon", None, "0" * 64)
    low, high = 2 * np.log(0.2), 2 * np.log(0.8)
    _, std = reference.reverse_step(toy, state(), torch.zeros(3), Coefficients(0.6, 0.8, 1.0, 0.0, low, high))
    torch.testing.assert_close(std, torch.full_like(std, expected), rtol=1e-5, atol=0)


def test_the_log_of_zero_is_a_spread_of_exactly_zero() -> None:
    row = Coefficients(0.6, 0.8, 0.5, 0.5, LOG_OF_ZERO, LOG_OF_ZERO)
    _, std = reference.reverse_step(model("fixed_small", None), state(), torch.zeros(3), row)
    assert not std.any()


@pytest.mark.parametrize("clip", [(-0.4, 0.6), None])
@pytest.mark.parametrize("variance", [*VARIANCES, "learned", "renoised"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_and_variance_is_its_equation(
    prediction: Prediction, variance: Variance, clip: tuple[float, float] | None
) -> None:
    """In float64, from the levels of the chain; the coefficients are not looked at but for their levels."""
    toy, x = model(variance, clip, prediction), state()
    chain = make_chain(toy.schedule, variance, 0.5, 3)
    bars = [float(row[1]) ** 2 for row in chain.coef.astype(np.float64)]
    for i, (t, ab) in enumerate(zip(chain.t.tolist(), bars, strict=True)):
        mean, std = reference.reverse_step(toy, x, torch.full((3,), t), Coefficients(*chain.coef[i].tolist()))
        xs = x.double().numpy()
        told = math.sqrt((1 - ab) / ab) if prediction == "denoiser" else t
        fed = xs / math.sqrt(ab) if prediction == "denoiser" else xs
        given, v = 0.8 * fed + 0.2 * np.cos(fed + told), np.tanh(fed)
        x0 = {
            "epsilon": (xs - math.sqrt(1 - ab) * given) / math.sqrt(ab),  # Ho et al. 2020, eq. 4
            "v": math.sqrt(ab) * xs - math.sqrt(1 - ab) * given,  # Salimans & Ho 2022, appendix D
            "x0": given,
            "denoiser": given,  # Karras et al. 2022, eq. 2-3: D(x; sigma) itself
        }[prediction]
        x0 = x0 if clip is None else np.clip(x0, *clip)
        if i + 1 == len(bars):
            expected, variances = x0, np.zeros_like(x0)
        elif variance == "renoised":  # Song et al. 2023, algorithm 1, times the signal
            expected, variances = math.sqrt(bars[i + 1]) * x0, np.full_like(x0, 1 - bars[i + 1])
        else:  # Ho et al. 2020, eq. 6-7, as the product of the two Gaussians that meet in the next state
            ratio = ab / bars[i + 1]
            precision = 1 / (1 - bars[i + 1]) + ratio / (1 - ratio)
            pull = math.sqrt(bars[i + 1]) / (1 - bars[i + 1]) * x0 + math.sqrt(ratio) / (1 - ratio) * xs
            expected = pull / precision
            variances = {
                "fixed_small": np.full_like(x0, 1 / precision),
                "fixed_large": np.full_like(x0, 1 - ratio),
                "learned_range": (1 - ratio) ** ((v + 1) / 2) * (1 / precision) ** ((1 - v) / 2),
                "learned": np.exp(v),
            }[variance]
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(std.numpy(), np.sqrt(variances), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [0.0, 500.0])
def test_a_denoiser_is_told_its_noise_level_and_no_timestep(t: float) -> None:
    told = []

    class Listening(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            told.append((x, sigma))
            return x

    network = DiffusionModel(
        Listening(), (3, 4, 5), Schedule("continuous", 1), "fixed_small", "denoiser", None, "0" * 64
    )
    reference.reverse_step(network, state(), torch.full((3,), t), landing(0.2))
    ((x, sigma),) = told
    assert sigma.tolist() == pytest.approx([2.0] * 3)
    torch.testing.assert_close(x, state() / math.sqrt(0.2))
