"""How far an exported bundle is from PyTorch, at real images and real timesteps, at batch 1 and N."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed
from densepure_rt.export import reference
from densepure_rt.export.classifiers import ClassifierModel
from densepure_rt.export.unets import DiffusionModel
from densepure_rt.runtime.noise import first_state, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.onnx_device import (
    CLASSIFY_INPUTS,
    CLASSIFY_OUTPUTS,
    STEP_INPUTS,
    STEP_OUTPUTS,
    Floats,
    open_session,
)
from densepure_rt.runtime.schedule import Coefficients, make_chain

RELATIVE_L2 = {"fp32": 1e-5}  # measured 4.3e-7 at worst on the default model: `densepure-rt export` prints it
SIGMAS, STEPS = (0.25, 0.5, 1.0), (1, 2, 10)  # the noise levels of the paper; one-shot, the default and the paper's b
KEY = (0, 0)


@dataclass(frozen=True)
class Difference:
    """One comparison: what, at which batch, the largest absolute difference and the relative L2 distance."""

    what: str
    batch: int
    max_abs: float
    relative_l2: float


def difference(what: str, batch: int, found: Floats, expected: Floats) -> Difference:
    gap = found.astype(np.float64) - expected
    return Difference(what, batch, float(np.abs(gap).max()), float(np.linalg.norm(gap) / np.linalg.norm(expected)))


def noisy_states(pixels: NDArray[np.uint8], sigma: float, scale: float) -> Floats:
    """The first states of real images [n, C, H, W] under smoothing noise."""
    law = smoothing_law(sigma)
    levels = [image + smoothing_noise(law, KEY, i, image.shape) for i, image in enumerate(pixels)]
    return first_state(np.stack(levels), scale)


def step_differences(engine: Path, model: DiffusionModel, pixels: NDArray[np.uint8]) -> Iterator[Difference]:
    """Walk whole chains with the engine, comparing every step with PyTorch from the same state and the same noise."""
    session = open_session(engine.read_bytes(), engine.name, STEP_INPUTS, STEP_OUTPUTS)
    for sigma in SIGMAS:
        for steps in STEPS:
            chain = make_chain(model.schedule, model.variance, sigma, steps)
            mean = noisy_states(pixels, sigma, chain.scale)
            std = np.zeros_like(mean)
            for step, (timestep, t, coef) in enumerate(zip(chain.timesteps, chain.t, chain.coef, strict=True)):
                noise = np.stack([vote_noise(KEY, i, 0, step, image.shape) for i, image in enumerate(pixels)])
                noise *= step > 0
                x = torch.from_numpy(mean + std * noise)
                wanted = reference.reverse_step(model, x, torch.full((len(x),), float(t)), Coefficients(*coef.tolist()))
                feed = {"mean": mean, "std": std, "noise": noise}
                feed |= {"t": np.repeat(t, len(x)), "coef": np.repeat(coef[None], len(x), axis=0)}
                mean, std, finite = session.run(STEP_OUTPUTS, feed)
                if not (finite > 0).all():
                    raise CheckFailed(f"{engine.name} gives NaN or Inf at timestep {timestep}: the weights are damaged")
                where = f"step at t = {timestep} (sigma {sigma:g}, {steps} steps)"
                yield difference(f"mean, {where}", len(x), mean, wanted[0].numpy())
                if step + 1 < steps:
                    yield difference(f"std, {where}", len(x), std, wanted[1].numpy())
                (alone, *_) = session.run(STEP_OUTPUTS, {name: value[:1] for name, value in feed.items()})
                yield difference(f"mean, {where}", 1, alone, wanted[0][:1].numpy())


def classifier_differences(engine: Path, model: ClassifierModel, pixels: NDArray[np.uint8]) -> Iterator[Difference]:
    session = open_session(engine.read_bytes(), engine.name, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    x = first_state(pixels.astype(np.int32), 1.0)
    with torch.inference_mode():
        expected = model.network(torch.from_numpy(x)).numpy()
    for batch in (len(x), 1):
        (logits,) = session.run(CLASSIFY_OUTPUTS, {"mean": x[:batch]})
        yield difference("logits", batch, logits, expected[:batch])


def check(differences: list[Difference], precision: str) -> Difference:
    """The worst of them. Raises CheckFailed when it is beyond what this precision may lose."""
    worst = max(differences, key=lambda d: math.inf if math.isnan(d.relative_l2) else d.relative_l2)
    limit = RELATIVE_L2[precision]
    if not worst.relative_l2 <= limit:
        raise CheckFailed(
            f"the engine is not what PyTorch computes: {worst.what} at batch {worst.batch} differs by "
            f"{worst.relative_l2:.2g} relative L2 ({worst.max_abs:.2g} at most); {precision} allows {limit:g}. "
            f"Nothing was published; {onnxruntime.__name__} {onnxruntime.__version__}, torch {torch.__version__}"
        )
    return worst
