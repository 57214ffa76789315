"""The chain against diffusers' scheduler, Bayes' rule and the published timesteps."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.runtime.schedule import (
    Coefficients,
    Schedule,
    TimestepRule,
    Variance,
    make_chain,
    nearest_timestep,
    posterior,
    respaced,
)

LINEAR, COSINE = Schedule("linear", 1000), Schedule("cosine", 4000)
CONTINUOUS = Schedule("continuous", 1)
VARIANCES: tuple[Variance, ...] = ("fixed_small", "fixed_large", "learned_range")
QUICK = settings(deadline=None, max_examples=50)
MAKE: dict[str, Schedule] = {"linear": LINEAR, "cosine": COSINE}
SIGNAL, SIGMA = Coefficients._fields.index("signal"), Coefficients._fields.index("sigma")


def diffusers_alpha_bar(name: str, steps: int) -> NDArray[np.float64]:
    beta_schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[name]
    scheduler: Any = DDPMScheduler(num_train_timesteps=steps, beta_schedule=beta_schedule)
    return np.asarray(scheduler.alphas_cumprod.double().numpy())


def level_of(row: NDArray[np.float32]) -> float:
    """alpha-bar at which a step of the chain starts."""
    return float(row[SIGNAL]) ** 2


@pytest.mark.parametrize(
    ("schedule", "sigma", "expected"),
    [
        (LINEAR, 0.25, 144),
        (LINEAR, 0.5, 258),
        (LINEAR, 1.0, 396),
        (COSINE, 0.25, 1158),
        (COSINE, 0.5, 1983),
        (COSINE, 1.0, 2809),
    ],
)
def test_nearest_timesteps_of_the_papers_noise_levels(schedule: Schedule, sigma: float, expected: int) -> None:
    assert nearest_timestep(schedule.alpha_bar(), sigma) == expected
    assert make_chain(schedule, "fixed_small", sigma, 1).timesteps == (expected,)


@QUICK
@given(st.floats(0.01, 40.0))
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_no_timestep_is_nearer_than_the_nearest(name: str, sigma: float) -> None:
    alpha_bar = MAKE[name].alpha_bar()
    target = 1 / (1 + 4 * sigma**2)
    found = nearest_timestep(alpha_bar, sigma)
    assert all(abs(float(alpha_bar[found]) - target) <= abs(float(other) - target) for other in alpha_bar)


@pytest.mark.parametrize("steps", [50, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alpha_bar_is_that_of_diffusers(name: str, steps: int) -> None:
    expected = diffusers_alpha_bar(name, steps)  # products of float32: the cosine's last betas keep 4 digits
    np.testing.assert_allclose(Schedule(name, steps).alpha_bar(), expected, rtol=3e-4)  # type: ignore[arg-type]


def test_cosine_alpha_bar_is_the_squared_cosine_until_beta_is_capped() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = COSINE.alpha_bar()
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    uncapped = 1 + int(np.argmax(betas > 0.9989))
    assert 3900 < uncapped <= 3999
    expected = [f((i + 1) / 4000) / f(0) for i in range(uncapped)]
    np.testing.assert_allclose(alpha_bar[:uncapped], expected, rtol=1e-9)
    assert betas.max() == pytest.approx(0.999, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 144])
def test_chain_descends_in_equal_strides_and_never_reaches_zero_strides(steps: int) -> None:
    timesteps = respaced(144, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == 144
    assert all(abs(t - 144 * (1 - i / steps)) <= 0.5 for i, t in enumerate(timesteps))
    assert list(timesteps) == sorted(set(timesteps), reverse=True)
    assert timesteps[-1] >= 1


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_first_step_starts_at_the_images_own_noise_level(schedule: Schedule, sigma: float) -> None:
    chain = make_chain(schedule, "fixed_small", sigma, 3)
    assert chain.scale == pytest.approx(1 / math.sqrt(1 + 4 * sigma**2), rel=1e-15)
    # x = scale * (image + 2 sigma * normal): what multiplies the image is `signal`, what multiplies the normal `sigma`
    assert float(chain.coef[0, SIGNAL]) == pytest.approx(chain.scale, rel=1e-7)
    assert float(chain.coef[0, SIGMA]) == pytest.approx(chain.scale * 2 * sigma, rel=1e-7)
    alpha_bar = schedule.alpha_bar()
    for row, timestep in zip(chain.coef[1:], chain.timesteps[1:], strict=True):
        assert level_of(row) == pytest.approx(float(alpha_bar[timestep]), rel=1e-6)


@QUICK
@given(st.floats(1e-4, 0.999), st.floats(1e-3, 0.999))
def test_fixed_small_step_is_the_posterior_of_bayes_rule(ab_next: float, ratio: float) -> None:
    """x_next | x0 ~ N(sqrt(ab_next) x0, 1 - ab_next) times x | x_next ~ N(sqrt(ratio) x_next, 1 - ratio)."""
    precision = 1 / (1 - ab_next) + ratio / (1 - ratio)
    step = posterior(ab_next * ratio, ab_next, "fixed_small")
    assert step.x0 == pytest.approx(math.sqrt(ab_next) / (1 - ab_next) / precision, rel=1e-9)
    assert step.xt == pytest.approx(math.sqrt(ratio) / (1 - ratio) / precision, rel=1e-9)
    assert math.exp(step.logvar_min) == pytest.approx(1 / precision, rel=1e-9)
    assert step.logvar_min == step.logvar_max


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_with_the_true_x0_every_step_lands_on_the_forward_process(schedule: Schedule) -> None:
    """The moments of x_next | x0 after one step from x | x0 are those of noising x0 directly to the next level."""
    chain = make_chain(schedule, "fixed_small", 0.5, 10)
    rows = chain.coef.astype(np.float64)
    for row, after in zip(rows, rows[1:], strict=False):
        step, target = Coefficients(*row), Coefficients(*after)
        assert step.x0 + step.xt * step.signal == pytest.approx(target.signal, rel=1e-6)
        variance = (step.xt * step.sigma) ** 2 + math.exp(step.logvar_min)
        assert variance == pytest.approx(target.sigma**2, rel=1e-5)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 7])
def test_each_step_is_a_step_of_diffusers_ddpm(schedule: Schedule, variance: Variance, steps: int) -> None:
    """diffusers is given the chain's levels as a short training schedule of its own, and the same eps, v and noise."""
    chain = make_chain(schedule, variance, 0.5, steps)
    levels = np.array([1.0, *(level_of(row) for row in chain.coef[::-1])])
    ddpm: Any = DDPMScheduler(
        num_train_timesteps=steps, trained_betas=1 - levels[1:] / levels[:-1], variance_type=variance, clip_sample=True
    )
    draw = torch.Generator().manual_seed(0)
    x, eps, v = torch.randn((3, 1, 2, 4, 4), generator=draw) * 0.7
    v = v.clamp(-1, 1)
    for i, row in enumerate(chain.coef.astype(np.float64)):
        step = Coefficients(*row)
        x0 = ((x - step.sigma * eps) / step.signal).clamp(-1, 1)
        logvar = step.logvar_min + (v + 1) / 2 * (step.logvar_max - step.logvar_min)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        ours = step.x0 * x0 + step.xt * x + (logvar / 2).exp() * noise
        output = torch.cat([eps, v], dim=1) if variance == "learned_range" else eps
        theirs = ddpm.step(output, steps - 1 - i, x, generator=torch.Generator().manual_seed(i)).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_learned_range_spans_the_two_fixed_variances() -> None:
    small, large, learned = (make_chain(COSINE, variance, 0.5, 5).coef[:-1] for variance in VARIANCES)
    low, high = Coefficients._fields.index("logvar_min"), Coefficients._fields.index("logvar_max")
    assert (learned[:, low] == small[:, low]).all()
    assert (learned[:, high] == large[:, high]).all()
    assert (learned[:, low] < learned[:, high]).all()
    assert (small[:, low] == small[:, high]).all()
    assert (large[:, low] == large[:, high]).all()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_last_step_is_exactly_x0_without_noise(variance: Variance, steps: int) -> None:
    last = Coefficients(*make_chain(LINEAR, variance, 0.25, steps).coef[-1])
    assert (last.x0, last.xt, last.logvar_min, last.logvar_max) == (1.0, 0.0, -1000.0, -1000.0)
    assert last.sigma**2 + last.signal**2 == pytest.approx(1, rel=1e-6)
    std = np.exp(np.float32(last.logvar_min) / np.float32(2))
    assert std.dtype == np.float32
    assert std == 0
    assert std * np.float32(3.4e38) == 0  # and not NaN, as exp(-inf) times inf would be


def test_single_step_goes_straight_from_the_images_level() -> None:
    chain = make_chain(LINEAR, "fixed_large", 1.0, 1)
    assert len(chain) == 1
    assert chain.coef.tolist() == [pytest.approx([math.sqrt(0.8), math.sqrt(0.2), 1, 0, -1000, -1000], rel=1e-7)]


def test_no_steps_leave_the_image_unscaled() -> None:
    chain = make_chain(LINEAR, "fixed_small", 0.5, 0)
    assert (len(chain), chain.scale, chain.timesteps) == (0, 1.0, ())
    assert chain.t.shape == (0,)
    assert chain.coef.shape == (0, 6)


def test_no_steps_take_noise_that_no_schedule_reaches() -> None:
    assert make_chain(LINEAR, "fixed_small", 1000.0, 0).sigma == 1000.0


def test_network_is_told_the_scaled_timestep() -> None:
    chain = make_chain(Schedule("cosine", 4000, timestep_scale=0.25), "learned_range", 0.25, 2)
    assert chain.timesteps == (1158, 579)
    assert chain.t.tolist() == [289.5, 144.75]


def test_arrays_are_float32_of_the_chains_length() -> None:
    chain = make_chain(LINEAR, "fixed_small", 0.5, 4)
    assert chain.t.dtype == chain.coef.dtype == np.float32
    assert chain.t.shape == (4,)
    assert chain.coef.shape == (4, 6)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("sigma", [0.0, -0.0, -0.25, math.nan, math.inf, -math.inf])
def test_impossible_sigma_is_a_usage_error(sigma: float, steps: int) -> None:
    with pytest.raises(UsageError, match="sigma"):
        make_chain(LINEAR, "fixed_small", sigma, steps)


@pytest.mark.parametrize(
    "sigma",
    [
        79.0,
        1e6,
        1e150,
        1e200,
        1e308,
    ],
)
def test_sigma_beyond_the_schedule_is_a_usage_error(sigma: float) -> None:
    with pytest.raises(UsageError, match="beyond this network's schedule"):
        make_chain(LINEAR, "fixed_small", sigma, 1)


@pytest.mark.parametrize(
    "schedule",
    [
        LINEAR,
        COSINE,
        Schedule("linear", 400),
        Schedule("cosine", 1000),
    ],
)
def test_sigma_that_the_error_asks_for_is_taken(schedule: Schedule) -> None:
    with pytest.raises(UsageError, match="beyond") as caught:
        make_chain(schedule, "fixed_small", 1e6, 1)
    named = re.search(r"reaches sigma (\S+):", str(caught.value))
    assert named is not None
    limit = math.sqrt(1 / float(diffusers_alpha_bar(schedule.name, schedule.steps)[-1]) - 1) / 2
    assert float(named[1]) == pytest.approx(limit, rel=1e-3)
    assert make_chain(schedule, "fixed_small", float(named[1]), 1).timesteps == (schedule.steps - 1,)


@pytest.mark.parametrize(("sigma", "steps"), [(0.25, 145), (0.25, 1000), (0.005, 3), (1e-9, 2)])
def test_more_steps_than_timesteps_is_a_usage_error(sigma: float, steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} steps do not fit"):
        make_chain(LINEAR, "fixed_small", sigma, steps)


def test_negative_steps_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="-1"):
        make_chain(LINEAR, "fixed_small", 0.5, -1)


@QUICK
@given(st.floats(1e-6, 78.0), st.integers(1, 60), st.sampled_from(VARIANCES), st.sampled_from([LINEAR, COSINE]))
@example(1e-6, 1, "fixed_small", LINEAR)
@example(0.0085, 2, "learned_range", LINEAR)
def test_every_chain_that_is_made_is_finite_and_descends(
    sigma: float, steps: int, variance: Variance, schedule: Schedule
) -> None:
    if steps > nearest_timestep(schedule.alpha_bar(), sigma):
        steps = 1
    chain = make_chain(schedule, variance, sigma, steps)
    assert np.isfinite(chain.coef).all()
    levels = [level_of(row) for row in chain.coef]
    assert levels == sorted(levels)
    assert (chain.coef[:, SIGNAL] > 0).all()
    assert (np.diff(chain.t) < 0).all()


@pytest.mark.parametrize(
    ("rule", "schedule", "expected"),
    [
        ("densepure", COSINE, (1159, 1984, 2810)),
        ("densepure", LINEAR, (144, 258, 396)),
        ("carlini", COSINE, (1158, 1984, 2809)),
        ("carlini", LINEAR, (145, 259, 396)),
    ],
)
def test_published_timesteps_are_reproduced(rule: TimestepRule, schedule: Schedule, expected: tuple[int, ...]) -> None:
    found = [make_chain(schedule, "learned_range", sigma, 1, rule).timesteps[0] for sigma in (0.25, 0.5, 1.0)]
    assert tuple(found) == expected


def test_densepures_published_chains_are_reproduced() -> None:
    cifar = make_chain(COSINE, "learned_range", 0.25, 10, "densepure")
    assert cifar.timesteps == (1159, 1043, 927, 811, 695, 579, 463, 348, 232, 116)
    imagenet = make_chain(LINEAR, "learned_range", 0.5, 10, "densepure")
    assert imagenet.timesteps == (258, 232, 206, 181, 155, 129, 103, 77, 52, 26)


def test_a_densepure_chain_is_one_timestep_off_the_table_that_its_network_knows() -> None:
    """The published chain's top alpha-bars at sigma 0.25, read off the official code's tables."""
    cifar, imagenet = (make_chain(schedule, "learned_range", 0.25, 10, "densepure") for schedule in (COSINE, LINEAR))
    assert level_of(cifar.coef[0]) == pytest.approx(0.79985, abs=5e-6)
    assert level_of(cifar.coef[0]) == pytest.approx(COSINE.alpha_bar()[1158], rel=1e-6)
    assert cifar.t[0] == 1159
    assert level_of(imagenet.coef[0]) == pytest.approx(0.8004467, abs=5e-7)
    assert cifar.scale == imagenet.scale == math.sqrt(0.8)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR])
def test_carlinis_rule_scales_the_image_to_a_timestep_that_is_noisy_enough(schedule: Schedule) -> None:
    chain, alpha_bar = make_chain(schedule, "learned_range", 0.25, 1, "carlini"), schedule.alpha_bar()
    (timestep,) = chain.timesteps
    assert math.sqrt(1 / alpha_bar[timestep] - 1) >= 0.5 > math.sqrt(1 / alpha_bar[timestep - 1] - 1)
    assert chain.scale == pytest.approx(math.sqrt(alpha_bar[timestep]))
    assert level_of(chain.coef[0]) == pytest.approx(alpha_bar[timestep], rel=1e-6)


def test_a_scaled_linear_schedule_is_diffusers_own() -> None:
    scheduler: Any = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    found = Schedule("scaled_linear", 1000, 0.00085, 0.012).alpha_bar()
    np.testing.assert_allclose(found, scheduler.alphas_cumprod.double().numpy(), rtol=2e-5)


def test_a_continuous_chain_falls_along_karras_levels_and_tells_no_timestep() -> None:
    chain = make_chain(CONTINUOUS, "fixed_small", 0.5, 3)
    assert chain.timesteps == ()
    assert chain.t.tolist() == [0.0, 0.0, 0.0]
    noise = chain.coef[:, SIGMA] / chain.coef[:, SIGNAL]  # of pixels in [-1, 1]: 2 sigma at first
    expected = [(1 + i / 3 * (0.002 ** (1 / 7) - 1)) ** 7 for i in range(3)]  # Karras et al. 2022, eq. 5, rho = 7
    np.testing.assert_allclose(noise, expected, rtol=1e-6)
    with pytest.raises(UsageError, match="no timesteps"):
        CONTINUOUS.alpha_bar()
    with pytest.raises(UsageError, match="timestep rule carlini"):
        make_chain(CONTINUOUS, "fixed_small", 0.5, 1, "carlini")


def test_a_renoised_step_has_the_law_of_noising_x0_anew() -> None:
    """Song et al. 2023, algorithm 1: x = x0 + tau z, here times the signal of alpha-bar."""
    step = posterior(0.5, 0.9, "renoised")
    assert step.x0 == pytest.approx(math.sqrt(0.9))
    assert step.xt == 0
    assert math.exp(step.logvar_min) == math.exp(step.logvar_max) == pytest.approx(1 - 0.9)


def test_a_head_that_learns_its_log_variance_keeps_it() -> None:
    step = posterior(0.5, 0.9, "learned")
    for v in (-7.0, 0.0, 0.3):  # the step graph's interpolation
        assert step.logvar_min + (v + 1) / 2 * (step.logvar_max - step.logvar_min) == pytest.approx(v)
    assert (step.x0, step.xt) == posterior(0.5, 0.9, "fixed_small")[2:4]
