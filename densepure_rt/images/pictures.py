"""Pictures of arrays: pixels and states of a chain as what a person can look at."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densepure_rt.images.formats import Pixels


def as_picture(pixels: Pixels) -> Image.Image:
    """Turn uint8 [C, H, W] of one or three channels into Pillow's image; PNG keeps every level."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def data_address(pixels: Pixels) -> str:
    """Write uint8 [C, H, W] of one or more channels as a data: address of a PNG; of four and more the first three."""
    file = io.BytesIO()
    as_picture(pixels[:3]).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def pixels_of(state: NDArray[np.float32]) -> Pixels:
    """Round a state of values in [-1, 1] to the nearest of 256 levels; clip what is beyond."""
    levels: NDArray[np.float32] = np.rint((state + 1) * np.float32(127.5))
    return levels.clip(0, 255).astype(np.uint8)
