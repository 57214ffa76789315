"""The denoising check: whether a diffusion network denoises better as it is declared than otherwise.

What a network predicts, its schedule and how its attention is split leave no trace in its weights, and parity compares
an engine with PyTorch under the same declaration. So images are noised, denoised in one step under the declared
combination and under its alternatives, and compared with the clean ones and with linear shrinkage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.errors import UsageError
from densepure_rt.export.convert.parity import LARGE_NETWORK, noisy_states
from densepure_rt.export.convert.precision import SIGMAS
from densepure_rt.export.convert.to_onnx import weight_bytes
from densepure_rt.export.models import reference
from densepure_rt.export.models.check_images import LARGE_IMAGE
from densepure_rt.export.models.openai_unet import AttentionOrder, Heads, OpenAIUNet, openai_schedule, resplit
from densepure_rt.export.models.unets import BELOW_ONE, DiffusionModel
from densepure_rt.runtime.bundle import Denoising, Prediction, Verdict
from densepure_rt.runtime.noise import first_state
from densepure_rt.runtime.schedule import Coefficients, Schedule, ScheduleName

IMAGES, FEW = 8, 2  # images, and of a network whose calls take long
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "x0")
# First and last beta of 1000 steps: Ho et al. 2020, section 4; Rombach et al. 2022, the scheduler of Stable Diffusion.
BETAS: dict[ScheduleName, tuple[float, float]] = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "cosine": (1e-4, 0.02),
}
SPLITS = (
    *(Heads(number=n) for n in (1, 2, 4, 8)),
    *(Heads(channels=c) for c in (32, 64)),
)  # as published networks have
# By how much an alternative must be better, or the best must beat shrinkage: less makes no difference to certificates.
# Of made-up images, which a network was not trained on, only a factor of two is evidence.
MARGIN, MADE_UP_MARGIN = 0.05, 1.0
LEAST_REACH = 0.02  # of a schedule's sigma, below which noise of a quarter of it vanishes in rounding
FLOOR = 1e-12  # of an error, whose logarithm is taken
PERFECT = 0.01  # of shrinkage's error: what is better than that is not told apart

Pixels = NDArray[np.uint8]
Errors = Mapping[float, float]  # mean squared errors by sigma


class Change(NamedTuple):
    """A declaration that is another: the options that say so, and what they replace."""

    options: str
    instead_of: str


@dataclass(frozen=True)
class Trial:
    """A declared combination, with the changes that lead to it from the declared one, and its errors."""

    changes: tuple[Change, ...]
    errors: Errors


class Remembered(nn.Module):
    """A network that is called once; what it gave is given again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.output: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.output is None:
            self.output = self.network(x, t)
        return self.output


def shrinkage_error(variance: float, noise: float) -> float:
    """Return the mean squared error of the best affine estimate of x from x + n, by their variances.

    The estimate is E x + w (x + n - E x) with w = Var x / (Var x + Var n), the scalar Wiener filter; its error is
    w Var n (Kay 1993, Fundamentals of Statistical Signal Processing: Estimation Theory, section 12.3).
    """
    return variance * noise / (variance + noise)


def relative(errors: Errors, base: Errors) -> float:
    """Return the geometric mean of errors / base over the sigmas of both; infinite where there are none."""
    ratios = [math.log(max(errors[s], FLOOR) / max(base[s], FLOOR)) for s in errors if s in base]
    return math.exp(sum(ratios) / len(ratios)) if ratios else math.inf


def verdict(
    declared: Errors, others: Sequence[Errors], shrinkage: Errors, margin: float = MARGIN
) -> tuple[Verdict, int | None]:
    """Judge whether the declared combination is the best one, and find the place of the best of the others.

    Of others that are as good but for the margin, the first is taken: give those with fewer changes first.
    "doubted": one of the others is better than the declared and than shrinkage, each by more than the margin. "not
    judged": none is, nor does the declared beat shrinkage so. Of an error tried at some sigmas, these are compared.
    """
    clear = 1 / (1 + margin)
    declared, *others = ({s: max(e, PERFECT * shrinkage[s]) for s, e in one.items()} for one in (declared, *others))
    order = sorted(range(len(others)), key=lambda i: relative(others[i], declared))
    able = [i for i in order if relative(others[i], shrinkage) < clear]
    best = next(iter(able or order), None)
    if best is not None:
        best = min(i for i in (able or order) if relative(others[i], others[best]) < 1 + MARGIN)
    if able and relative(others[able[0]], declared) < clear:
        return "doubted", best
    return ("as declared" if relative(declared, shrinkage) < 1 / (1 + MARGIN) else "not judged"), best


def denoised_errors(model: DiffusionModel, pixels: Pixels, sigmas: Iterable[float]) -> dict[Prediction, Errors]:
    """Measure one step by what the network is taken to predict; one call of it a sigma serves all.

    pixels: uint8 [n, C, H, W]. Sigmas beyond the schedule are left out.
    """
    clean = first_state(pixels.astype(np.int32), 1.0)
    found: dict[Prediction, dict[float, float]] = {prediction: {} for prediction in predictions(model)}
    for sigma in sigmas:
        try:
            chain = model.chain(sigma, 1)
        except UsageError:
            continue
        x, t = torch.from_numpy(noisy_states(pixels, sigma, chain.scale)), torch.full((len(pixels),), float(chain.t[0]))
        network, step = Remembered(model.network), Coefficients(*chain.coef[0].tolist())
        for prediction, errors in found.items():
            read = dataclasses.replace(model, network=network, prediction=prediction)
            x0, _ = reference.reverse_step(read, x, t, step)
            errors[sigma] = float(np.square(x0.numpy() - clean, dtype=np.float64).mean())
    return dict(found)


def predictions(model: DiffusionModel) -> tuple[Prediction, ...]:
    """List what the output may be taken for, the declared first."""
    if model.prediction not in PREDICTIONS:
        return (model.prediction,)
    return (model.prediction, *(prediction for prediction in PREDICTIONS if prediction != model.prediction))


def other_schedules(model: DiffusionModel) -> Iterator[tuple[Change, Schedule]]:
    """List the other usual schedules of as many steps, and the other way to tell timesteps.

    A checkpoint in OpenAI's layout has one of two; others may have any, with the betas that are usual.
    """
    declared = model.schedule
    if declared.continuous:
        return
    shrunk = 1000 / declared.steps
    for name, betas in BETAS.items():
        if name == declared.name:
            continue
        options = f"--schedule {name}"
        if isinstance(model.network, OpenAIUNet):
            if name == "scaled_linear":
                continue
            schedule = openai_schedule(name, declared.steps)
        elif name == "cosine":
            schedule = Schedule(name, declared.steps)
        else:
            start, end = (min(beta * shrunk, BELOW_ONE) for beta in betas)
            schedule = Schedule(name, declared.steps, start, end)
            if (start, end) != (Schedule.beta_start, Schedule.beta_end):
                options += f" --beta-start {start:g} --beta-end {end:g}"
        schedule = dataclasses.replace(schedule, timestep_scale=declared.timestep_scale)
        yield Change(options, f"{declared.name} schedule"), schedule
    for scale in {1.0, shrunk} - {declared.timestep_scale}:
        change = Change(f"--timestep-scale {scale:g}", f"timestep scale {declared.timestep_scale:g}")
        yield change, dataclasses.replace(declared, timestep_scale=scale)


def other_splits(network: nn.Module, orders_alone: bool) -> Iterator[tuple[Change, nn.Module]]:
    """Split a network in OpenAI's layout otherwise: in the other order, and into other usual numbers of heads."""
    if not isinstance(network, OpenAIUNet):
        return
    declared, widths = network.heads, network.architecture.attended_widths
    if any(declared.at(width) > 1 for width in widths):  # with one head the orders are the same
        order: AttentionOrder = "new" if declared.order == "legacy" else "legacy"
        change = Change(f"--attention-order {order}", f"{declared.order} order")
        yield change, resplit(network, dataclasses.replace(declared, order=order))
    seen = [{width: declared.at(width) for width in widths}]
    for heads in () if orders_alone else SPLITS:
        try:
            numbers = {width: heads.at(width) for width in widths}
        except UsageError:  # it does not come out even
            continue
        if numbers not in seen:
            seen.append(numbers)
            option = "--num-heads" if heads.number is not None else "--num-head-channels"
            change = Change(f"{option} {heads.number or heads.channels}", f"heads ({declared})")
            yield change, resplit(network, dataclasses.replace(heads, order=declared.order))


def alternatives(model: DiffusionModel, orders_alone: bool) -> Iterator[tuple[Change, DiffusionModel]]:
    """Change one declaration that takes other calls of the network; see `predictions` for the rest."""
    for change, schedule in other_schedules(model):
        yield change, dataclasses.replace(model, schedule=schedule)
    for change, network in other_splits(model.network, orders_alone):
        yield change, dataclasses.replace(model, network=network)


def trials(
    model: DiffusionModel, pixels: Pixels, sigmas: Iterable[float], changes: tuple[Change, ...] = ()
) -> list[Trial]:
    """Read a model as it is declared, and as predicting otherwise."""
    return [
        Trial(changes if prediction == model.prediction else (reread(model, prediction), *changes), errors)
        for prediction, errors in denoised_errors(model, pixels, sigmas).items()
    ]


def reread(model: DiffusionModel, prediction: Prediction) -> Change:
    return Change(f"--prediction {prediction}", model.prediction)


def judge(model: DiffusionModel, pixels: Pixels, made_up: bool) -> Denoising | None:
    """Denoise some of the images as the model is declared and otherwise; None where there is no network.

    pixels: uint8 [n, C, H, W]. made_up: whether they are no real images. A large network has fewer images, and one of
    large images has its alternatives tried at the middle sigma alone, without other heads.
    """
    if model.prediction == "none":
        return None
    quick = pixels[0].size > LARGE_IMAGE
    pixels = spread(pixels, 1 if quick else FEW if weight_bytes(model.network) > LARGE_NETWORK else IMAGES)
    sigmas = within_reach(model.schedule)
    variance = float(first_state(pixels.astype(np.int32), 1.0).var(dtype=np.float64))
    shrinkage = {sigma: shrinkage_error(variance, 4 * sigma * sigma) for sigma in sigmas}
    declared, *others = trials(model, pixels, sigmas)
    for change, other in alternatives(model, quick):
        others += trials(other, pixels, sigmas[1:2] if quick else sigmas, (change,))
    others = [other for other in others if other.errors and all(map(math.isfinite, other.errors.values()))]
    others.sort(key=lambda other: len(other.changes))
    margin = MADE_UP_MARGIN if made_up else MARGIN
    said, place = verdict(declared.errors, [other.errors for other in others], shrinkage, margin)
    best = Trial((), {}) if place is None else others[place]
    return Denoising(
        verdict=said,
        images=len(pixels),
        made_up=made_up,
        error=named(declared.errors),
        shrinkage=named(shrinkage),
        other=" ".join(change.options for change in best.changes),
        instead_of=", ".join(change.instead_of for change in best.changes),
        other_error=named(best.errors),
    )


def spread(pixels: Pixels, count: int) -> Pixels:
    """Take `count` of the images, evenly spread, or all where there are fewer."""
    count = min(count, len(pixels))
    return pixels[[i * len(pixels) // count for i in range(count)]]


def within_reach(schedule: Schedule) -> tuple[float, ...]:
    """Return the paper's sigmas, scaled down where the noise of a schedule ends before the largest of them.

    Empty where it reaches hardly any noise at all.
    """
    if schedule.continuous:
        return SIGMAS
    reach = math.sqrt(1 / schedule.alpha_bar()[-1] - 1) / 2
    scale = min(1.0, math.floor(100 * reach / SIGMAS[-1]) / 100)
    return tuple(scale * sigma for sigma in SIGMAS) if scale >= LEAST_REACH else ()


def named(errors: Errors) -> dict[str, float]:
    """Key errors by sigma as text, as a sidecar holds them."""
    return {f"{sigma:g}": error for sigma, error in errors.items()}
