"""What a classifier wants done to pixels, declared as data and done inside its exported graph.

The runtime feeds float pixels in [-1, 1]. Resizing at fixed sizes is linear and separable: two constant matrices, whose
products every engine computes alike (TensorRT has no antialiased Resize). Nothing is rounded and nothing is clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepure_rt.errors import UsageError
from densepure_rt.runtime.bundle import PIXEL_RANGE

Interpolation = Literal["bicubic", "bilinear", "nearest"]
ChannelOrder = Literal["RGB", "BGR", "grey"]
Weights = NDArray[np.float64]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's convert("L") computes
CUBIC_ANTIALIASED = -0.5  # Catmull-Rom: Pillow's BICUBIC (src/libImaging/Resample.c) and torch's with antialias=True
CUBIC_PLAIN = -0.75  # torch's interpolate(mode="bicubic") without it (aten/src/ATen/native/UpSample.h)
SUPPORT: dict[Interpolation, float] = {"bicubic": 2.0, "bilinear": 1.0, "nearest": 0.5}  # pixels on either side
CHANNELS: dict[ChannelOrder, int] = {"RGB": 3, "BGR": 3, "grey": 1}


@dataclass(frozen=True)
class Preprocessing:
    """The steps on pixels, in order: channels, resize, centre crop, scale, normalise. A sidecar declares them.

    scale: what the darkest and the brightest pixel are before normalisation, such as (0, 1) or (0, 255). mean, std:
    in that scale, one for each channel or one for all, in the classifier's own order. channels: what it takes; a grey
    image is repeated for RGB and BGR, an RGB image becomes its luma for grey. resize, crop: [height, width], or None.
    antialias: widen the filter where the image shrinks, as Pillow always does; without it bicubic is torch's.
    """

    scale: tuple[float, float]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: ChannelOrder = "RGB"
    resize: tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    crop: tuple[int, int] | None = None


def described(preprocessing: Preprocessing) -> str:
    """Describe the steps in one line for people."""
    p = preprocessing
    sharp = p.interpolation + (", antialiased" if p.antialias and p.interpolation != "nearest" else "")
    steps: list[str] = [p.channels]
    steps += [f"resized to {p.resize[0]}x{p.resize[1]} ({sharp})"] if p.resize else []
    steps += [f"centre-cropped to {p.crop[0]}x{p.crop[1]}"] if p.crop else []
    steps += [f"pixels in [{p.scale[0]:g}, {p.scale[1]:g}]"]
    if any(p.mean) or set(p.std) != {1.0}:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
        steps += [f"minus ({mean}), over ({std})"]
    return ", ".join(steps)


def output_shape(preprocessing: Preprocessing, image: tuple[int, int, int]) -> tuple[int, int, int]:
    """[C, H, W] of what the classifier is fed, for images [C, H, W].

    Raises UsageError where the preprocessing is impossible, or does not go with the images.
    """
    p, (channels, *size) = preprocessing, image
    if p.channels not in CHANNELS or p.interpolation not in SUPPORT:
        raise UsageError(
            f"preprocessing asks for {p.channels} and {p.interpolation}: channels are {', '.join(CHANNELS)}, "
            f"interpolations {', '.join(SUPPORT)}"
        )
    if channels not in (1, 3):
        raise UsageError(f"the classifier takes {p.channels}, the images have {channels} channels: 1 or 3 are possible")
    shape = CHANNELS[p.channels], *(p.resize or size)
    for what, asked in (("resize", p.resize), ("crop", p.crop)):
        if asked is not None and min(asked) < 1:
            raise UsageError(f"{what} to {asked[0]}x{asked[1]}: height and width are 1 or more")
    if p.crop is not None:
        if p.crop[0] > shape[1] or p.crop[1] > shape[2]:
            raise UsageError(
                f"a crop of {p.crop[0]}x{p.crop[1]} does not fit in {shape[1]}x{shape[2]} pixels: resize to more, or "
                f"crop less"
            )
        shape = shape[0], *p.crop
    for what, values in (("mean", p.mean), ("std", p.std)):
        if len(values) not in (1, shape[0]):
            raise UsageError(
                f"the {what} has {len(values)} numbers, the classifier takes {p.channels}: give one, or {shape[0]}"
            )
        if not all(map(math.isfinite, values)) or (what == "std" and min(values) <= 0):
            raise UsageError(f"the {what} is {', '.join(map(str, values))}: numbers, and above 0 for a std")
    low, high = p.scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"pixels from {low:g} to {high:g}: the first must be the smaller, both finite")
    if not all(low <= value <= high for value in p.mean):
        raise UsageError(
            f"the mean {', '.join(f'{value:g}' for value in p.mean)} lies outside the pixels' range, {low:g} to "
            f"{high:g}: both are of pixels before normalisation; declare the range that the mean was taken in"
        )
    return shape


def affine(preprocessing: Preprocessing) -> tuple[list[float], list[float]]:
    """gain and bias of each channel: gain * x + bias is ((x in [-1, 1] brought to `scale`) - mean) / std."""
    (low, high), (first, last) = preprocessing.scale, PIXEL_RANGE
    count = CHANNELS[preprocessing.channels]
    mean, std = (np.broadcast_to(np.array(v, np.float64), count) for v in (preprocessing.mean, preprocessing.std))
    slope = (high - low) / (last - first)
    return (slope / std).tolist(), ((low - slope * first - mean) / std).tolist()


def kernel(distance: Weights, interpolation: Interpolation, a: float) -> Weights:
    """The filter's weight at a distance in pixels: a triangle, or the cubic of Keys 1981 with parameter a."""
    d = np.abs(distance)
    if interpolation == "bilinear":
        return np.asarray(np.maximum(1 - d, 0), np.float64)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = ((d - 5) * d + 8) * a * d - 4 * a
    return np.asarray(np.where(d < 1, near, np.where(d < 2, far, 0)), np.float64)


def resize_matrix(size: int, target: int, interpolation: Interpolation, antialias: bool) -> Weights:
    """float64 [target, size] whose rows sum to 1: what each new pixel takes of the old ones, centres aligned.

    antialias: as Pillow, and torch's interpolate(antialias=True): the filter is as wide as a new pixel, and cut off at
    the border. Without: torch's interpolate(align_corners=False), the border repeated. nearest: torch's nearest-exact.
    """
    ratio = size / target
    centres = (np.arange(target) + 0.5) * ratio - 0.5
    if interpolation == "nearest":
        return np.asarray(np.eye(size)[np.floor(centres + 0.5).astype(int)], np.float64)
    stretch = max(ratio, 1.0) if antialias else 1.0
    if antialias:
        pixels = np.arange(size)
        distance = (pixels - centres[:, None]) / stretch
        weights = kernel(distance, interpolation, CUBIC_ANTIALIASED)
        return np.asarray(weights / weights.sum(1, keepdims=True), np.float64)
    weights = np.zeros((target, size))
    for tap in range(-1, 3):
        pixel = np.floor(centres).astype(int) + tap
        held = pixel.clip(0, size - 1)
        np.add.at(weights, (np.arange(target), held), kernel(centres - pixel, interpolation, CUBIC_PLAIN))
    return weights


class Preprocess(nn.Module):
    """Pixels [B, C, H, W] in [-1, 1] -> what the classifier takes [B, C', H', W'], float32.

    Raises UsageError where `preprocessing` does not go with images [C, H, W].
    """

    rows: Tensor | None  # [H', H]
    columns: Tensor | None  # [W, W']
    luma: Tensor  # [3, 1, 1]
    gain: Tensor  # [C', 1, 1]
    bias: Tensor

    def __init__(self, preprocessing: Preprocessing, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = output_shape(preprocessing, image)
        self.preprocessing, self.image = preprocessing, image
        resized = preprocessing.resize or image[1:]
        rows, columns = (
            resize_matrix(old, new, preprocessing.interpolation, preprocessing.antialias) if old != new else None
            for old, new in zip(image[1:], resized, strict=True)
        )
        self._constant("rows", rows)
        self._constant("columns", None if columns is None else columns.T)
        self.top, self.left = ((have - keep) // 2 for have, keep in zip(resized, self.shape[1:], strict=True))
        self.cropped = resized != self.shape[1:]
        gain, bias = affine(preprocessing)
        self._constant("gain", np.reshape(gain, (-1, 1, 1)))
        self._constant("bias", np.reshape(bias, (-1, 1, 1)))
        self._constant("luma", np.reshape(LUMA, (-1, 1, 1)))

    def _constant(self, name: str, values: Weights | None) -> None:
        tensor = None if values is None else torch.from_numpy(np.ascontiguousarray(values, np.float32))
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.image[0] == 3 and self.preprocessing.channels == "grey":
            x = (x * self.luma).sum(1, keepdim=True)
        if self.rows is not None:
            x = self.rows @ x  # [B, C, H', W]
        if self.columns is not None:
            x = x @ self.columns  # [B, C, H', W']
        if self.cropped:
            x = x[:, :, self.top : self.top + self.shape[1], self.left : self.left + self.shape[2]]
        if self.image[0] == 3 and self.preprocessing.channels == "BGR":
            x = torch.cat((x[:, 2:3], x[:, 1:2], x[:, 0:1]), 1)
        return x * self.gain + self.bias  # a grey image is repeated here where the classifier takes three channels
