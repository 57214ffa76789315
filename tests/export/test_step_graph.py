from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.export.step_graph import ClassifyGraph, StepGraph
from densepure_rt.runtime.schedule import Schedule, Variance, landing, make_chain, posterior

Doubles = NDArray[np.float64]
CLIPS = [(-1.0, 1.0), (-0.5, 0.75), None]
VARIANCES: list[Variance] = ["fixed_small", "fixed_large", "learned_range"]
POISON_TIME = 13.0


class Toy(nn.Module):
    """eps = 0.7 x + 0.1 x^2 + t / 500 - 1, and v = sin(3 x), for a network that learns its variance."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        eps = 0.7 * x + 0.1 * x**2 + t[:, None, None, None] / 500 - 1
        return torch.cat([eps, torch.sin(3 * x)], 1) if self.learned else eps


class Poisoned(nn.Module):
    """A sound network that puts `value` at one place of its output, for items told POISON_TIME."""

    def __init__(self, learned: bool, value: float, channel: int) -> None:
        super().__init__()
        self.toy, self.value, self.channel = Toy(learned), value, channel

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.toy(x, t)
        place = torch.zeros_like(output, dtype=torch.bool)
        place[:, self.channel, 1, 2] = t == POISON_TIME
        return torch.where(place, torch.tensor(self.value), output)


def by_the_equations(
    clip: tuple[float, float] | None,
    learned: bool,
    mean: Doubles,
    std: Doubles,
    noise: Doubles,
    t: Doubles,
    coef: Doubles,
) -> tuple[Doubles, Doubles]:
    """The step on `Toy`, item by item, in float64 (design of the step graph; DDPM eq. 6-7 and 15)."""
    means, stds = [], []
    for m, s, z, time, row in zip(mean, std, noise, t, coef, strict=True):
        x = m + s * z
        eps = 0.7 * x + 0.1 * x**2 + time / 500 - 1
        x0 = (x - row[0] * eps) / row[1]
        if clip is not None:
            x0 = np.minimum(np.maximum(x0, clip[0]), clip[1])
        means.append(row[2] * x0 + row[3] * x)
        share = (np.sin(3 * x) + 1) / 2 if learned else np.full_like(x, 0.5)
        stds.append(np.sqrt(np.exp(share * row[5] + (1 - share) * row[4])))
    return np.stack(means), np.stack(stds)


def inputs(variance: Variance, items: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Items of one batch at different steps of different chains, the last one at its landing."""
    draw = np.random.default_rng(seed)
    mean, noise = draw.normal(0, 1, (2, items, 2, 4, 5))
    std = np.abs(draw.normal(0, 0.3, mean.shape))
    chains = [make_chain(Schedule("linear", 1000), variance, sigma, 4) for sigma in (0.25, 0.5, 1.0)]
    steps = [(chains[i % 3], i % 3) for i in range(items - 1)] + [(chains[0], 3)]
    t = np.array([chain.t[step] for chain, step in steps])
    coef = np.array([chain.coef[step] for chain, step in steps])
    first, second, third = (torch.from_numpy(a.astype(np.float32)) for a in (mean, std, noise))
    return first, second, third, torch.from_numpy(t), torch.from_numpy(coef)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_step_is_the_equation(variance: Variance, clip: tuple[float, float] | None) -> None:
    learned = variance == "learned_range"
    batch = inputs(variance)
    mean, std, finite = StepGraph(Toy(learned), clip, learned)(*batch)
    expected_mean, expected_std = by_the_equations(clip, learned, *(a.double().numpy() for a in batch))
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(std.numpy(), expected_std, rtol=2e-5, atol=0)
    assert finite.tolist() == [1.0] * 6
    assert mean.dtype == std.dtype == finite.dtype == torch.float32


@pytest.mark.parametrize("variance", VARIANCES)
def test_last_step_adds_no_noise_at_all(variance: Variance) -> None:
    learned = variance == "learned_range"
    mean, std, noise, t, coef = inputs(variance)
    _, std_next, _ = StepGraph(Toy(learned), None, learned)(mean, std, noise, t, coef)
    assert (std_next[-1] == 0).all()
    assert (std_next[:-1] > 0).all()


def test_last_step_lands_on_the_clipped_x0() -> None:
    x = torch.linspace(-3, 3, 20).reshape(1, 1, 4, 5)
    row = torch.tensor([landing(0.5)])
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    mean, *_ = StepGraph(Toy(False), (-1.0, 1.0), False)(x - 1, one, one, torch.tensor([100.0]), row)  # drawn: x itself
    eps = 0.7 * x + 0.1 * x**2 + 0.2 - 1
    torch.testing.assert_close(mean, ((x - math.sqrt(0.5) * eps) / math.sqrt(0.5)).clip(-1, 1))
    assert {float(mean.min()), float(mean.max())} <= {-1.0, 1.0}
    again, *_ = StepGraph(Toy(False), (-1.0, 1.0), False)(x, zero, one * 9, torch.tensor([100.0]), row)
    assert torch.equal(mean, again)  # a state without spread draws nothing


@pytest.mark.parametrize("channel", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_marks_its_item_and_no_other(value: float, channel: int) -> None:
    """Channels 2 and 3 are variance logits. The clip would make a number of an infinite eps."""
    mean, std, noise, t, coef = inputs("learned_range")
    sound = StepGraph(Toy(True), (-1.0, 1.0), True)(mean, std, noise, t, coef)
    graph = StepGraph(Poisoned(True, value, channel), (-1.0, 1.0), True)
    told = t.clone()
    told[[1, 4]] = POISON_TIME
    mean_next, std_next, finite = graph(mean, std, noise, told, coef)
    assert finite.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    others = [0, 2, 3, 5]
    assert torch.equal(mean_next[others], sound[0][others])
    assert torch.equal(std_next[others], sound[1][others])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_fixed_variance_networks_are_watched_too(value: float) -> None:
    batch = inputs("fixed_small")
    told = torch.full_like(batch[3], POISON_TIME)
    *_, finite = StepGraph(Poisoned(False, value, 1), None, False)(*batch[:3], told, batch[4])
    assert finite.tolist() == [0.0] * 6


def test_item_does_not_depend_on_its_neighbours() -> None:
    graph = StepGraph(Toy(True), (-1.0, 1.0), True)
    batch = inputs("learned_range", items=6)
    together = graph(*batch)
    for i in range(6):
        alone = graph(*(a[i : i + 1] for a in batch))
        for found, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(found[0], expected[i], rtol=1e-6, atol=1e-7)


def drawn_by_diffusers(
    variance: Variance, clip: bool, stride: int, t: int, x: Tensor, output: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """x_{t - stride} of diffusers' scheduler, and the noise that it drew."""
    scheduler: Any = DDPMScheduler(1000, variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(1000 // stride)
    generator = torch.Generator().manual_seed(seed)
    sample = scheduler.step(output, t, x, generator=generator).prev_sample
    return sample, torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stride", [1, 50])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
def test_step_and_draw_are_those_of_diffusers(variance: Variance, clip: bool, stride: int) -> None:
    learned = variance == "learned_range"
    graph = StepGraph(Toy(learned), (-1.0, 1.0) if clip else None, learned)
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t in (100, 400, 900):
        x = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(t))
        told = torch.tensor([float(t)])
        expected, noise = drawn_by_diffusers(variance, clip, stride, t, x, Toy(learned)(x, told), seed=t)
        row = torch.tensor([posterior(bars[t], bars[t - stride], variance)], dtype=torch.float32)
        mean, std, _ = graph(x, torch.zeros_like(x), torch.zeros_like(x), told, row)
        torch.testing.assert_close(mean + std * noise, expected, rtol=2e-5, atol=2e-5)


def test_last_step_is_that_of_diffusers() -> None:
    x = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    output = Toy(False)(x, torch.tensor([0.0]))
    expected, _ = drawn_by_diffusers("fixed_small", True, 1, 0, x, output, seed=0)
    zero = torch.zeros_like(x)
    mean, std, _ = StepGraph(Toy(False), (-1.0, 1.0), False)(
        x, zero, zero, torch.zeros(1), torch.tensor([landing(1 - 1e-4)])
    )
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
    assert (std == 0).all()


def test_classify_graph_passes_pixels_and_logits_through() -> None:
    classify: Callable[[Tensor], Tensor] = ClassifyGraph(nn.Flatten())
    x = torch.arange(12.0).reshape(2, 1, 2, 3)
    assert torch.equal(classify(x), x.reshape(2, 6))
