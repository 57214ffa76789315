"""The plain PyTorch pipeline: the same mathematics with the network's own module, one step at a time, nothing shared.

Written from the papers and not from the step graph, so that an engine has something independent to agree with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densepure_rt.export.unets import DiffusionModel
from densepure_rt.runtime.schedule import Coefficients


@torch.inference_mode()
def reverse_step(model: DiffusionModel, x: Tensor, t: Tensor, step: Coefficients) -> tuple[Tensor, Tensor]:
    """Mean and std of the next state (Ho et al. 2020, eq. 6, with x0 from eq. 15; Nichol & Dhariwal 2021, eq. 15).

    x: float32 [B, C, H, W]. t: float32 [B], what the network is told.
    """
    output = model.network(x, t)
    if model.variance == "learned_range":
        eps, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
        logvar = (1 - (v + 1) / 2) * step.logvar_min + (v + 1) / 2 * step.logvar_max
    else:
        eps, logvar = output, torch.full_like(output, step.logvar_min)
    x0 = (x - step.sigma * eps) / step.signal
    if model.clip is not None:
        x0 = x0.clip(*model.clip)
    return step.x0 * x0 + step.xt * x, (logvar / 2).exp()
