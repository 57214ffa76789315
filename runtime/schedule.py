"""Beta schedules, the timestep that belongs to a sigma, and the chain of reverse steps with its coefficients.

Everything is float64 and computed once, before the loop. sigma is in [0, 1] pixel units; the network works in [-1, 1],
where the same noise has standard deviation 2 sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import UsageError

Variance = Literal["fixed_small", "fixed_large", "learned_range"]

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17
COSINE_MAX_BETA = 0.999  # the same, section 3.2
LOG_OF_ZERO = -1000.0  # exp(LOG_OF_ZERO / 2) underflows to exactly 0; -inf would make 0 * inf = NaN in the graph


@dataclass(frozen=True)
class Schedule:
    """How a network was noised in training.

    name: "linear" (Ho et al. 2020, section 4) or "cosine" (Nichol & Dhariwal 2021, eq. 17).
    steps: T, the number of timesteps. timestep_scale: what the network is conditioned on is index * timestep_scale.
    """

    name: Literal["linear", "cosine"]
    steps: int
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep_scale: float = 1.0

    def alpha_bar(self) -> NDArray[np.float64]:
        """Cumulative products of 1 - beta, float64 [steps], falling from near 1 to near 0."""
        if self.name == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.steps)
        else:
            angles = (np.arange(self.steps + 1) / self.steps + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2
            continuous = np.cos(angles) ** 2
            betas = np.minimum(1 - continuous[1:] / continuous[:-1], COSINE_MAX_BETA)
        return np.asarray(np.cumprod(1 - betas))


class Coefficients(NamedTuple):
    """One reverse step, in the column order of the step graph's `coef` input."""

    sigma: float
    signal: float
    x0: float
    xt: float
    logvar_min: float
    logvar_max: float


@dataclass(frozen=True)
class Chain:
    """The reverse steps that take an image noised at `sigma` back to a clean one, noisiest first.

    scale: what the noisy image in [-1, 1] is multiplied by to be a state of the chain, 1 / sqrt(1 + (2 sigma)^2).
    timesteps: indices into the schedule. t: what the network is told, float32 [b]. coef: float32 [b, 6].
    With no steps at all (plain randomized smoothing) scale is 1 and the rest is empty.
    """

    sigma: float
    scale: float
    timesteps: tuple[int, ...]
    t: NDArray[np.float32]
    coef: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.timesteps)


def signal_variance(sigma: float) -> float:
    """alpha-bar of an image noised at `sigma`: 1 / (1 + (2 sigma)^2), since the network's pixels span 2."""
    return 1 / (1 + 4 * sigma * sigma)


def nearest_timestep(alpha_bar: NDArray[np.float64], sigma: float) -> int:
    """The 0-based timestep whose alpha-bar is nearest to that of noise `sigma`.

    Raises UsageError when sigma is beyond the schedule.
    """
    target = signal_variance(sigma)
    if not target >= alpha_bar[-1]:
        largest = math.floor(500 * math.sqrt(1 / alpha_bar[-1] - 1)) / 1000
        raise UsageError(
            f"sigma {sigma:g} is beyond this network's schedule, which reaches sigma {largest:.3f}: "
            f"ask for a smaller sigma"
        )
    return int(np.abs(alpha_bar - target).argmin())


def respaced(timestep: int, steps: int) -> tuple[int, ...]:
    """`steps` timesteps from `timestep` down in equal strides, round(t - i t / b) (Xiao et al. 2023, official code)."""
    if steps > max(1, timestep):
        raise UsageError(
            f"{steps} steps do not fit below timestep {timestep}: ask for at most {max(1, timestep)} steps "
            f"or a larger sigma"
        )
    return tuple(round(timestep - i * timestep / steps) for i in range(steps))


def posterior(ab: float, ab_next: float, variance: Variance) -> Coefficients:
    """One step from alpha-bar `ab` to the larger `ab_next` (Ho et al. 2020, eq. 6-7, with beta = 1 - ab / ab_next).

    Fixed variance has logvar_min = logvar_max: the posterior variance ("fixed_small") or beta ("fixed_large").
    A learned range lies between the two (Nichol & Dhariwal 2021, eq. 15).
    """
    beta = 1 - ab / ab_next
    log_small, log_large = math.log(beta * (1 - ab_next) / (1 - ab)), math.log(beta)
    return Coefficients(
        sigma=math.sqrt(1 - ab),
        signal=math.sqrt(ab),
        x0=math.sqrt(ab_next) * beta / (1 - ab),
        xt=math.sqrt(1 - beta) * (1 - ab_next) / (1 - ab),
        logvar_min=log_large if variance == "fixed_large" else log_small,
        logvar_max=log_small if variance == "fixed_small" else log_large,
    )


def landing(ab: float) -> Coefficients:
    """The last step: it lands on x0 itself and adds no noise."""
    return Coefficients(math.sqrt(1 - ab), math.sqrt(ab), 1.0, 0.0, LOG_OF_ZERO, LOG_OF_ZERO)


def make_chain(schedule: Schedule, variance: Variance, sigma: float, steps: int) -> Chain:
    """The chain of `steps` reverse steps for noise `sigma`.

    The first step starts at the image's own alpha-bar, 1 / (1 + 4 sigma^2), not at that of the nearest timestep: the
    state's law is then exact, and only the network's conditioning is rounded.

    Raises UsageError when sigma is not positive or beyond the schedule, or when the steps do not fit.
    """
    if not 0 < sigma < math.inf:
        raise UsageError(f"sigma is the standard deviation of the noise in [0, 1] pixel units, got {sigma:g}")
    if steps < 0:
        raise UsageError(f"steps is a count of reverse steps, got {steps}")
    if steps == 0:
        return Chain(sigma, 1.0, (), np.empty(0, np.float32), np.empty((0, 6), np.float32))
    alpha_bar = schedule.alpha_bar()
    timesteps = respaced(nearest_timestep(alpha_bar, sigma), steps)
    levels = [signal_variance(sigma), *(float(alpha_bar[t]) for t in timesteps[1:])]
    coefficients = [posterior(ab, ab_next, variance) for ab, ab_next in zip(levels, levels[1:], strict=False)]
    return Chain(
        sigma=sigma,
        scale=math.sqrt(levels[0]),
        timesteps=timesteps,
        t=np.array(timesteps, np.float32) * np.float32(schedule.timestep_scale),
        coef=np.array([*coefficients, landing(levels[-1])], np.float32),
    )
