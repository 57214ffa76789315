"""The plain PyTorch pipeline: the same mathematics with the network's own module, one step at a time, nothing shared.

Written from the papers and not from the step graph, so that an engine has something independent to agree with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.device import Floats
from densepure_rt.runtime.schedule import Coefficients


@dataclass(frozen=True)
class TorchReference:
    """The network of `model` as an engine is compared with it; see `parity.Reference`."""

    model: DiffusionModel

    def step(self, x: Floats, t: np.float32, step: Coefficients) -> tuple[Floats, Floats]:
        mean, std = reverse_step(self.model, torch.from_numpy(x), torch.full((len(x),), float(t)), step)
        return mean.numpy(), std.numpy()

    @torch.inference_mode()
    def eps(self, x: Floats, t: np.float32) -> Floats:
        output: Floats = self.model.network(torch.from_numpy(x), torch.full((len(x),), float(t))).numpy()
        return output[:, : x.shape[1]]


@torch.inference_mode()
def reverse_step(model: DiffusionModel, x: Tensor, t: Tensor, step: Coefficients) -> tuple[Tensor, Tensor]:
    """Mean and std of the next state (Ho et al. 2020, eq. 6, with x0 from eq. 15; Nichol & Dhariwal 2021, eq. 15).

    x: float32 [B, C, H, W]. t: float32 [B], what the network is told, unless it is a denoiser, which is told sigma.
    """
    if model.prediction == "denoiser":
        output = model.network(x / step.signal, torch.full_like(t, step.sigma / step.signal))
    else:
        output = model.network(x, t)
    channels = x.shape[1]
    predicted, v = output[:, :channels], output[:, channels:]
    if model.variance == "learned_range":
        logvar = (1 - (v + 1) / 2) * step.logvar_min + (v + 1) / 2 * step.logvar_max
    elif model.variance == "learned":
        logvar = v if step.xt else torch.full_like(predicted, step.logvar_min)  # the last step lands: no noise
    else:
        logvar = torch.full_like(predicted, step.logvar_min)
    if model.prediction == "epsilon":
        x0 = (x - step.sigma * predicted) / step.signal
    elif model.prediction == "v":  # v = signal * noise - sigma * x0, and x = signal * x0 + sigma * noise
        x0 = (step.signal * x - step.sigma * predicted) / (step.signal**2 + step.sigma**2)
    else:
        x0 = predicted
    if model.clip is not None:
        x0 = x0.clip(*model.clip)
    return step.x0 * x0 + step.xt * x, (logvar / 2).exp()
