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
from densepure_rt.rounding import floored

ScheduleName = Literal["linear", "scaled_linear", "cosine", "continuous"]
Variance = Literal["fixed_small", "fixed_large", "learned_range", "learned", "renoised"]
TimestepRule = Literal["nearest", "densepure", "carlini"]

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17
COSINE_MAX_BETA = 0.999  # the same, section 3.2
RHO, SIGMA_MIN = 7.0, 0.002  # Karras et al. 2022, table 1: how their noise levels are spaced, and the least of them
LOG_OF_ZERO = -1000.0  # exp(LOG_OF_ZERO / 2) underflows to exactly 0; -inf would make 0 * inf = NaN in the graph


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a network's training.

    name: "linear" (Ho et al. 2020, section 4), "scaled_linear" (linear in the square root of beta),
    "cosine" (Nichol & Dhariwal 2021, eq. 17), or "continuous" for a denoiser that is told sigma itself (Karras et al.
    2022) and knows no timesteps; the other fields then mean nothing.
    steps: T, the number of timesteps. timestep_scale: what the network is conditioned on is index * timestep_scale.
    """

    name: ScheduleName
    steps: int
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep_scale: float = 1.0

    def alpha_bar(self) -> NDArray[np.float64]:
        """Cumulative products of 1 - beta, float64 [steps], falling from near 1 to near 0."""
        if self.name == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.steps)
        elif self.name == "scaled_linear":
            betas = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.steps) ** 2
        elif self.name == "cosine":
            continuous = np.array([cosine_alpha_bar(step / self.steps) for step in range(self.steps + 1)])
            betas = np.minimum(1 - continuous[1:] / continuous[:-1], COSINE_MAX_BETA)
        else:
            raise UsageError("a continuous schedule has no timesteps: its network is told sigma itself")
        return np.asarray(np.cumprod(1 - betas))

    @property
    def continuous(self) -> bool:
        return self.name == "continuous"


def cosine_alpha_bar(u: float) -> float:
    """alpha-bar at the share u of the whole time, 1 at u = 0 (Nichol & Dhariwal 2021, eq. 17)."""
    angle, start = ((share + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2 for share in (u, 0.0))
    return (math.cos(angle) / math.cos(start)) ** 2


class Coefficients(NamedTuple):
    """The coefficients of a reverse step, in the column order of the step graph's `coef` input."""

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
    timesteps: indices into the schedule, none of a continuous one. t: what the network is told, float32 [b]. coef:
    float32 [b, 6]. With no steps at all (plain randomized smoothing) scale is 1 and the rest is empty.
    """

    sigma: float
    scale: float
    timesteps: tuple[int, ...]
    t: NDArray[np.float32]
    coef: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.t)


def signal_variance(sigma: float) -> float:
    """alpha-bar of an image noised at `sigma`: 1 / (1 + (2 sigma)^2), since the network's pixels span 2."""
    return 1 / (1 + 4 * sigma * sigma)


def nearest_timestep(alpha_bar: NDArray[np.float64], sigma: float) -> int:
    """The 0-based timestep whose alpha-bar is nearest to that of noise `sigma`.

    Raises UsageError when sigma is beyond the schedule.
    """
    target = signal_variance(sigma)
    if not target >= alpha_bar[-1]:
        largest = math.sqrt(1 / alpha_bar[-1] - 1) / 2
        raise UsageError(
            f"`sigma` {sigma:g} is beyond this network's schedule, which reaches sigma {floored(largest)}: "
            f"ask for a smaller sigma"
        )
    return int(np.abs(alpha_bar - target).argmin())


def respaced(timestep: float, steps: int) -> tuple[int, ...]:
    """`steps` timesteps from `timestep` down in equal strides, round(t - i t / b) (Xiao et al. 2023, official code)."""
    if steps > max(1, timestep):
        raise UsageError(
            f"{steps} steps do not fit below timestep {timestep:g}: ask for at most {max(1, math.floor(timestep))} "
            f"steps or a larger sigma"
        )
    return tuple(round(timestep - i * timestep / steps) for i in range(steps))


def densepure_timestep(schedule: Schedule, sigma: float) -> float:
    """The timestep of DensePure's official code (Xiao et al. 2023): of a linear schedule, the nearest.

    Of a cosine schedule the inverse of the continuous alpha-bar, not rounded yet; rounded, it is one beyond the nearest
    at the paper's sigmas.
    """
    nearest = nearest_timestep(schedule.alpha_bar(), sigma)
    if schedule.name != "cosine":
        return nearest
    start = math.cos(COSINE_OFFSET / (1 + COSINE_OFFSET) * math.pi / 2)
    angle = math.acos(math.sqrt(signal_variance(sigma)) * start)
    share = angle / (math.pi / 2) * (1 + COSINE_OFFSET) - COSINE_OFFSET
    return min(share * schedule.steps, schedule.steps - 1)


def carlini_timestep(alpha_bar: NDArray[np.float64], sigma: float) -> int:
    """The first timestep after 0 that is at least as noisy as `sigma` (Carlini et al. 2023, official code)."""
    nearest_timestep(alpha_bar, sigma)  # refuses a sigma beyond the schedule
    return max(1, int((alpha_bar <= signal_variance(sigma)).argmax()))


def karras_levels(sigma: float, steps: int) -> list[float]:
    """`steps` noise levels from `sigma` down, spaced as in Karras et al. 2022, eq. 5; the next would be SIGMA_MIN."""
    top, bottom = sigma ** (1 / RHO), min(SIGMA_MIN, sigma) ** (1 / RHO)
    return [(top + i / steps * (bottom - top)) ** RHO for i in range(steps)]


def posterior(ab: float, ab_next: float, variance: Variance) -> Coefficients:
    """Take a step from alpha-bar `ab` to the larger `ab_next` (Ho et al. 2020, eq. 6-7, with beta = 1 - ab / ab_next).

    Fixed variance has logvar_min = logvar_max: the posterior variance ("fixed_small") or beta ("fixed_large"). A
    learned range lies between the two (Nichol & Dhariwal 2021, eq. 15); a head that gives the log-variance itself
    ("learned") has the range [-1, 1], in which the step graph leaves it as it is. "renoised": x0 is noised anew to
    `ab_next`, as in the multistep sampling of consistency models (Song et al. 2023, algorithm 1).
    """
    if variance == "renoised":
        log = math.log(1 - ab_next)
        return Coefficients(math.sqrt(1 - ab), math.sqrt(ab), math.sqrt(ab_next), 0.0, log, log)
    beta = 1 - ab / ab_next
    log_small, log_large = math.log(beta * (1 - ab_next) / (1 - ab)), math.log(beta)
    logvar_min, logvar_max = {
        "fixed_small": (log_small, log_small),
        "fixed_large": (log_large, log_large),
        "learned_range": (log_small, log_large),
        "learned": (-1.0, 1.0),
    }[variance]
    return Coefficients(
        sigma=math.sqrt(1 - ab),
        signal=math.sqrt(ab),
        x0=math.sqrt(ab_next) * beta / (1 - ab),
        xt=math.sqrt(1 - beta) * (1 - ab_next) / (1 - ab),
        logvar_min=logvar_min,
        logvar_max=logvar_max,
    )


def landing(ab: float) -> Coefficients:
    """The last step: it lands on x0 itself and adds no noise."""
    return Coefficients(math.sqrt(1 - ab), math.sqrt(ab), 1.0, 0.0, LOG_OF_ZERO, LOG_OF_ZERO)


def make_chain(
    schedule: Schedule, variance: Variance, sigma: float, steps: int, rule: TimestepRule = "nearest"
) -> Chain:
    """The chain of `steps` reverse steps for noise `sigma`.

    rule: which timestep belongs to sigma, and which alpha-bars the steps lie at.
    "nearest": the first step starts at the image's own alpha-bar, 1 / (1 + 4 sigma^2), not at that of the nearest
    timestep: the state's law is then exact, and only the network's conditioning is rounded.
    "densepure": as the official code of Xiao et al. 2023. A chain lies at the continuous alpha-bar at t / T (cosine),
    or at the table's divided by its first entry (linear): one timestep less noisy than the table that the network was
    trained with. A single step lies at the table's own.
    "carlini": as the official code of Carlini et al. 2023: the first timestep that is noisy enough, at the table's own
    alpha-bar, the image scaled to it; the noise stays that of sigma, where their code draws a little more.

    Raises UsageError when sigma is not positive or beyond the schedule, or when the steps do not fit.
    """
    if not 0 < sigma < math.inf:
        raise UsageError(f"`sigma` is the standard deviation of the noise in [0, 1] pixel units, above 0, got {sigma}")
    if steps < 0:
        raise UsageError(f"`steps` is a count of reverse steps, got {steps}")
    if steps == 0:
        return Chain(sigma, 1.0, (), np.empty(0, np.float32), np.empty((0, 6), np.float32))
    scale, timesteps, levels = (_karras_chain if schedule.continuous else _chain)(schedule, sigma, steps, rule)
    coefficients = [posterior(ab, ab_next, variance) for ab, ab_next in zip(levels, levels[1:], strict=False)]
    return Chain(
        sigma=sigma,
        scale=scale,
        timesteps=timesteps,
        t=np.array(timesteps or [0] * steps, np.float32) * np.float32(schedule.timestep_scale),
        coef=np.array([*coefficients, landing(levels[-1])], np.float32),
    )


Start = tuple[float, tuple[int, ...], list[float]]  # the image's scale; the timesteps and the alpha-bars of the steps


def _karras_chain(schedule: Schedule, sigma: float, steps: int, rule: TimestepRule) -> Start:
    if rule != "nearest":
        raise UsageError(f"the timestep rule {rule} is for networks with timesteps, and this one is told sigma itself")
    levels = [1 / (1 + level * level) for level in karras_levels(2 * sigma, steps)]
    return math.sqrt(levels[0]), (), levels


def _chain(schedule: Schedule, sigma: float, steps: int, rule: TimestepRule) -> Start:
    alpha_bar, exact = schedule.alpha_bar(), signal_variance(sigma)
    if rule == "nearest":
        timesteps = respaced(nearest_timestep(alpha_bar, sigma), steps)
        return math.sqrt(exact), timesteps, [exact, *(float(alpha_bar[t]) for t in timesteps[1:])]
    if rule == "carlini":
        timesteps = respaced(carlini_timestep(alpha_bar, sigma), steps)
        levels = [float(alpha_bar[t]) for t in timesteps]
        return math.sqrt(levels[0]), timesteps, levels
    timesteps = respaced(densepure_timestep(schedule, sigma), steps)
    if steps == 1:
        levels = [float(alpha_bar[t]) for t in timesteps]
    elif schedule.name == "cosine":
        levels = [cosine_alpha_bar(t / schedule.steps) for t in timesteps]
    else:
        levels = [float(alpha_bar[t] / alpha_bar[0]) for t in timesteps]
    return math.sqrt(exact), timesteps, levels
