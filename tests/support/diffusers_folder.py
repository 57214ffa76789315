"""A small network as diffusers saves it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel


def small_unet(size: int | None, channels: int, widths: tuple[int, int], groups: int = 4) -> Any:
    """Make a network of two levels with random weights, always the same. Its type is lost in diffusers' own."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=groups,
    )
