from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.export.convert.step_graph import ClassifyGraph, StepGraph
from densepure_rt.runtime.bundle import Prediction
from densepure_rt.runtime.schedule import LOG_OF_ZERO, Chain, Schedule, Variance, landing, make_chain, posterior

Doubles = NDArray[np.float64]
CLIPS = [(-1.0, 1.0), (-0.5, 0.75), None]
VARIANCES: list[Variance] = ["fixed_small", "fixed_large", "learned_range"]
PREDICTIONS: list[Prediction] = ["epsilon", "v", "x0", "denoiser"]
CONTINUOUS = Schedule("continuous", 1)
MU, S = 0.3, 0.4  # of the data of the Gaussian model
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


def clean_by_the_papers(prediction: Prediction, x: Doubles, told: float, sigma: float, signal: float) -> Doubles:
    """x0 of `Toy`, each prediction by its definition."""
    if prediction == "denoiser":  # Karras et al. 2022, section 2: D(x; sigma), of x = x0 + sigma noise
        x, told = x / signal, sigma / signal
    given_ = 0.7 * x + 0.1 * x**2 + told / 500 - 1
    if prediction == "epsilon":  # Ho et al. 2020, eq. 4: x = signal x0 + sigma eps
        return np.asarray((x - sigma * given_) / signal)
    if prediction == "v":  # Salimans & Ho 2022, section 4: v = signal eps - sigma x0, and the same x
        system = np.array([[signal, sigma], [-sigma, signal]])
        solved = np.linalg.solve(system, np.stack([x.ravel(), given_.ravel()]))
        return np.asarray(solved[0]).reshape(x.shape)
    return given_


@pytest.mark.parametrize("clip", [(-0.5, 0.75), None])
@pytest.mark.parametrize("variance", [*VARIANCES, "learned", "renoised"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_and_variance_is_its_equation(
    prediction: Prediction, variance: Variance, clip: tuple[float, float] | None
) -> None:
    learned = variance in ("learned_range", "learned")
    batch = inputs(variance)
    found_mean, found_std, finite = StepGraph(Toy(learned), clip, learned, prediction)(*batch)
    assert finite.tolist() == [1.0] * 6
    for i, (mean, std, noise, t, row) in enumerate(zip(*(a.double().numpy() for a in batch), strict=True)):
        sigma, signal, from_x0, from_xt, logvar_min, logvar_max = row
        x = mean + std * noise
        x0 = clean_by_the_papers(prediction, x, t, sigma, signal)
        x0 = x0 if clip is None else np.minimum(np.maximum(x0, clip[0]), clip[1])
        v = np.sin(3 * (x / signal if prediction == "denoiser" else x))
        if logvar_min == LOG_OF_ZERO:
            spread = np.zeros_like(x)
        elif variance == "learned":
            spread = np.exp(v / 2)  # the network's own log-variance
        elif variance == "learned_range":  # Nichol & Dhariwal 2021, eq. 15
            spread = np.exp((v + 1) / 4 * logvar_max + (1 - v) / 4 * logvar_min)
        else:
            spread = np.full_like(x, math.exp(logvar_min / 2))
        np.testing.assert_allclose(found_mean[i].numpy(), from_x0 * x0 + from_xt * x, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(found_std[i].numpy(), spread, rtol=5e-5, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_prediction_is_watched_for_what_is_not_finite(value: float, prediction: Prediction) -> None:
    mean, std, noise, t, coef = inputs("fixed_small")
    if prediction == "denoiser":  # it is told sigma / signal, whatever t is
        coef[2:4, 0], coef[2:4, 1] = POISON_TIME, 1.0
    t[2:4] = POISON_TIME
    *_, finite = StepGraph(Poisoned(False, value, 0), (-1.0, 1.0), False, prediction)(mean, std, noise, t, coef)
    assert finite.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


class Denoiser(nn.Module):
    """E[x0 | x] of pixels N(mu, s^2) in noise sigma: the ideal denoiser of Karras et al. 2022, eq. 4, in closed form.

    logvar: (level) -> the logarithm that it gives for the variance, if it gives one. told: the levels it was called at.
    """

    def __init__(self, mu: float, s: float, logvar: Callable[[float], float] | None = None) -> None:
        super().__init__()
        self.mu, self.s, self.logvar = mu, s, logvar
        self.told: list[float] = []

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        self.told.append(level)
        found = (self.s**2 * x + level**2 * self.mu) / (self.s**2 + level**2)
        return found if self.logvar is None else torch.cat([found, torch.full_like(x, self.logvar(level))], 1)


class Consistency(nn.Module):
    """The end of the probability flow from (x, sigma) for the same pixels (Song et al. 2023, definition 1).

    dx / dsigma = (x - D(x; sigma)) / sigma keeps (x - mu) / sqrt(s^2 + sigma^2).
    """

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return MU + (x - MU) * S / torch.sqrt(S**2 + sigma**2)[:, None, None, None]


def walked(graph: StepGraph, chain: Chain, values: int) -> Doubles:
    """Where a chain ends that starts from noisy pixels of the Gaussian model."""
    draw = torch.Generator().manual_seed(len(chain))
    shape = (2, 2, values // 400, 100)
    noisy = MU + S * torch.randn(shape, generator=draw) + 2 * chain.sigma * torch.randn(shape, generator=draw)
    mean, std = chain.scale * noisy, torch.zeros(shape)
    for t, row in zip(chain.t, chain.coef, strict=True):
        noise = torch.randn(shape, generator=draw)
        mean, std, finite = graph(mean, std, noise, torch.full((2,), float(t)), torch.from_numpy(row).expand(2, 6))
        assert finite.all()
    assert not std.any()
    return mean.double().numpy()


def check_law(found: Doubles, mean: float, std: float) -> None:
    """Within five standard errors."""
    assert abs(found.mean() - mean) < 5 * std / math.sqrt(found.size)
    assert abs(found.std() / std - 1) < 5 / math.sqrt(2 * found.size)


@settings(deadline=None, max_examples=40)
@given(st.floats(-1, 1), st.floats(0.05, 2), st.floats(0.01, 3), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_one_step_of_a_denoiser_is_the_posterior_mean_at_two_sigma(
    mu: float, s: float, sigma: float, noisy: list[float]
) -> None:
    chain = make_chain(CONTINUOUS, "fixed_small", sigma, 1)
    network, zero = Denoiser(mu, s), torch.zeros(1, 1, 2, 2)
    x = torch.tensor(noisy).reshape(1, 1, 2, 2)
    graph = StepGraph(network, None, False, "denoiser")
    mean, *_ = graph(chain.scale * x, zero, zero, torch.from_numpy(chain.t), torch.from_numpy(chain.coef))
    precision = 1 / s**2 + 1 / (2 * sigma) ** 2  # Bayes' rule
    expected = (mu / s**2 + np.array(noisy) / (2 * sigma) ** 2) / precision
    np.testing.assert_allclose(mean.numpy().ravel(), expected, rtol=2e-5, atol=2e-6)
    assert network.told == [pytest.approx(2 * sigma, rel=1e-6)]


def test_a_denoiser_is_told_karras_noise_levels() -> None:
    network, chain = Denoiser(MU, S), make_chain(CONTINUOUS, "fixed_small", 0.5, 4)
    walked(StepGraph(network, None, False, "denoiser"), chain, 400)
    top, bottom = 1.0 ** (1 / 7), 0.002 ** (1 / 7)  # eq. 5, rho = 7, with one level more than there are steps
    assert network.told == pytest.approx([(top + i / 4 * (bottom - top)) ** 7 for i in range(4)], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_renoised_chain_of_a_consistency_function_ends_at_the_datas_law(sigma: float, steps: int) -> None:
    """Song et al. 2023, algorithm 1: every pass ends at the law of the data, however few there are."""
    chain = make_chain(CONTINUOUS, "renoised", sigma, steps)
    check_law(walked(StepGraph(Consistency(), None, False, "denoiser"), chain, 400_000), MU, S)


def moments_after(chain: Chain, s: float) -> tuple[float, float]:
    """Mean and variance of where a "fixed_small" chain ends with the ideal denoiser, written for unscaled states.

    y = x0 + level noise; given its own estimate d of x0, a step draws y' ~ N(d + (l'/l)^2 (y - d), l'^2 - l'^4 / l^2)
    (Ho et al. 2020, eq. 6-7, divided by the signal), and the last step gives d.
    """
    levels = (chain.coef[:, 0].astype(np.float64) / chain.coef[:, 1]).tolist()
    mean, variance = MU, s**2 + levels[0] ** 2
    for level, after in zip(levels, levels[1:], strict=False):
        share = s**2 / (s**2 + level**2)
        kept = (after / level) ** 2
        slope = kept + (1 - kept) * share
        mean = slope * mean + (1 - slope) * MU
        variance = slope**2 * variance + after**2 - after**4 / level**2
    share = s**2 / (s**2 + levels[-1] ** 2)
    return mean, share**2 * variance


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_chain_of_an_ideal_denoiser_has_the_moments_of_its_recursion(sigma: float, steps: int) -> None:
    chain = make_chain(CONTINUOUS, "fixed_small", sigma, steps)
    mean, variance = moments_after(chain, S)
    check_law(walked(StepGraph(Denoiser(MU, S), None, False, "denoiser"), chain, 400_000), mean, math.sqrt(variance))


def test_chain_of_an_ideal_denoiser_nears_the_datas_law_with_more_steps() -> None:
    chains = [make_chain(CONTINUOUS, "fixed_small", 0.5, steps) for steps in (10, 40, 160)]
    missing = [abs(math.sqrt(moments_after(chain, S)[1]) / S - 1) for chain in chains]
    assert missing[0] > 3 * missing[1] > 9 * missing[2]  # of the first order in the step
    found = walked(StepGraph(Denoiser(MU, S), None, False, "denoiser"), chains[2], 40_000)
    assert abs(found.mean() - MU) < 0.01
    assert abs(found.std() / S - 1) < missing[2] + 5 / math.sqrt(2 * found.size)


@pytest.mark.parametrize("steps", [2, 5])
def test_learned_spread_makes_up_for_what_a_long_step_misses(steps: int) -> None:
    """With the true variance of the next state the law of every state is exact, and the end is D's of the last one."""
    fixed = make_chain(CONTINUOUS, "fixed_small", 0.5, steps)
    rows = fixed.coef.astype(np.float64)
    known = {float(row[0] / row[1]): row for row in rows}

    def logvar(level: float) -> float:
        row = known[min(known, key=lambda other: abs(other - level))]
        of_x0 = 1 / (1 / S**2 + 1 / level**2)  # Var[x0 | x], which a fixed variance leaves out
        return math.log(math.exp(row[4]) + row[2] ** 2 * of_x0)

    chain = make_chain(CONTINUOUS, "learned", 0.5, steps)
    found = walked(StepGraph(Denoiser(MU, S, logvar), None, True, "denoiser"), chain, 400_000)
    last = float(rows[-1, 0] / rows[-1, 1])
    check_law(found, MU, S**2 / math.sqrt(S**2 + last**2))
