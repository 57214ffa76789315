from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from densepure_rt.export import reference
from densepure_rt.export.unets import DiffusionModel
from densepure_rt.runtime.schedule import LOG_OF_ZERO, Coefficients, Schedule, Variance, landing, posterior

VARIANCES: list[Variance] = ["fixed_small", "fixed_large", "learned_range"]


class Toy(nn.Module):
    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        eps = 0.8 * x + 0.2 * torch.cos(x + t[:, None, None, None])
        return torch.cat([eps, torch.tanh(x)], 1) if self.learned else eps


def model(variance: Variance, clip: tuple[float, float] | None) -> DiffusionModel:
    return DiffusionModel(
        Toy(variance == "learned_range"), (3, 4, 5), Schedule("linear", 1000), variance, "epsilon", clip, "0" * 64
    )


def state(items: int = 3) -> Tensor:
    return torch.randn(items, 3, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [1, 100])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
def test_step_and_draw_are_those_of_diffusers(variance: Variance, clip: bool, stride: int) -> None:
    toy, x = model(variance, (-1.0, 1.0) if clip else None), state()
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    scheduler: Any = DDPMScheduler(1000, variance_type=variance, clip_sample=clip)
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
