"""The two graphs that are exported: `step` maps one Gaussian to the next, `classify` maps its mean to logits.

The step graph is the one contract between any network and the runtime (Ho et al. 2020, eq. 6-7 and 15 for an epsilon
network). Noise is an input: the graph holds no random op.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densepure_rt.runtime.bundle import Prediction


class StepGraph(nn.Module):
    """A reverse step as a graph, float32 at the boundary.

    network: (x [B, C, H, W], t [B]) -> what it predicts [B, C, H, W]; where it learns its variance, [B, 2C, H, W], the
    second half being v of Nichol & Dhariwal 2021, eq. 15, in [-1, 1], or the log-variance itself. A "denoiser" is told
    (x / signal, sigma / signal) in place of (x, t). clip: the range of x0, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        clip: tuple[float, float] | None,
        learned_variance: bool,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__()
        self.network = network
        self.clip = clip
        self.learned_variance = learned_variance
        self.prediction = prediction

    def forward(
        self, mean: Tensor, std: Tensor, noise: Tensor, t: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean, std, noise [B, C, H, W], t [B], coef [B, 6] -> mean_next, std_next [B, C, H, W], finite [B]."""
        sigma, signal, from_x0, from_xt, logvar_min, logvar_max = coef[:, :, None, None, None].unbind(1)
        x = mean + std * noise
        if self.prediction == "denoiser":
            output = self.network(x / signal, (sigma / signal).flatten())
        else:
            output = self.network(x, t)
        finite = 1 - (output.isnan() | output.isinf()).float().amax(dim=(1, 2, 3))  # the clip below would hide them
        predicted, v = output.chunk(2, dim=1) if self.learned_variance else (output, torch.zeros_like(output))
        x0 = self.clean(x, predicted, sigma, signal)
        if self.clip is not None:
            x0 = x0.clamp(*self.clip)
        mean_next = from_x0 * x0 + from_xt * x
        logvar = logvar_min + (v + 1) / 2 * (logvar_max - logvar_min)
        return mean_next, torch.exp(logvar / 2), finite

    def clean(self, x: Tensor, predicted: Tensor, sigma: Tensor, signal: Tensor) -> Tensor:
        """x0, by what the network predicts: the noise (Ho et al. 2020, eq. 15), v (Salimans & Ho 2022, app. D), x0."""
        if self.prediction == "epsilon":
            return (x - sigma * predicted) / signal
        if self.prediction == "v":
            return signal * x - sigma * predicted
        return predicted


class ClassifyGraph(nn.Module):
    """Pixels in [-1, 1] [B, C, H, W] -> logits [B, K]; whatever the classifier wants done to pixels is inside."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, mean: Tensor) -> Tensor:
        logits: Tensor = self.classifier(mean)
        return logits
