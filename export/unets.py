"""Any supported diffusion network in PyTorch -> a `DiffusionModel`, all that the step graph and its sidecar need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from densepure_rt.export.zoo.models import ZOO, load_weights, new_unet
from densepure_rt.runtime.bundle import sha256_of
from densepure_rt.runtime.schedule import Schedule, Variance


@dataclass(frozen=True)
class DiffusionModel:
    """network: (x [B, C, H, W] in [-1, 1] and beyond, t [B]) -> what it predicts. image: [C, H, W]."""

    network: nn.Module
    image: tuple[int, int, int]
    schedule: Schedule
    variance: Variance
    prediction: str
    clip: tuple[float, float] | None
    weights_sha256: str


class DiffusersNetwork(nn.Module):
    """A diffusers UNet as a plain function of (x, t)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.unet(x, t, return_dict=False)[0]
        return output


def zoo_unet(weights: Path = ZOO / "unet.safetensors") -> DiffusionModel:
    """The default UNet, with the weights that ship with it or others that were trained by the same script."""
    return DiffusionModel(
        network=DiffusersNetwork(load_weights(new_unet(), weights)),
        image=(1, 28, 28),
        schedule=Schedule("linear", 1000),
        variance="fixed_small",
        prediction="epsilon",
        clip=(-1.0, 1.0),
        weights_sha256=sha256_of(weights),
    )
