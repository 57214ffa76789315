"""Architectures of the default model: a small DDPM UNet and a small residual classifier for 28x28 grey images."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from densepure_rt.errors import UsageError
from densepure_rt.export.zoo.make_data import CLASS_NAMES

ZOO = Path(__file__).resolve().parent
M = TypeVar("M", bound=nn.Module)


def new_unet() -> nn.Module:
    """1.6 M parameters, 0.38 GFLOP an image. Widths are multiples of 16, the channel block of AVX-512 convolutions."""
    unet: nn.Module = UNet2DModel(  # type: ignore[assignment]  # diffusers' types lose the base class
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 48, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=16,
    )
    return unet


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity, or around a 1x1 projection where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Classifier(nn.Module):
    """Pixels [batch, 1, 28, 28] in [-1, 1] -> logits [batch, 10]. 0.6 M parameters, 0.10 GFLOP an image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            ResidualBlock(32, 32),
            nn.MaxPool2d(2),
            ResidualBlock(32, 64),
            nn.MaxPool2d(2),
            ResidualBlock(64, 128),
            ResidualBlock(128, 128),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(128, len(CLASS_NAMES)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


def load_weights(model: M, path: Path) -> M:
    """`model` with the weights of a safetensors file, in evaluation mode. Raises UsageError when they do not fit."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} does not hold the weights of a {type(model).__name__}: {reason}") from error
    except OSError as error:
        raise UsageError(f"cannot read the weights {path} ({error.strerror})") from error
    return model.eval()
