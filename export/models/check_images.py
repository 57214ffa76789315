"""The images that an export is checked on and calibrated on. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import UsageError
from densepure_rt.export.models.pair import Pair
from densepure_rt.export.zoo.make_data import CLASS_NAMES
from densepure_rt.images.datasets import SHIPPED_SHAPE, ImageSet, LabelledImage, open_images

LARGE_IMAGE = 3 * 128 * 128  # values from which a UNet call takes many seconds on a CPU
PARITY_IMAGES = 16  # for numbers
LABEL_IMAGES = 20  # for labels: seconds; --parity-images and --parity-samples ask for more
LABEL_SAMPLES = 20  # noisy copies of each
CALIBRATION = "fashion_mnist_calibration.npz"  # training images


def check_images(
    models: Pair,
    images: Path | None = None,
    calibration: Path | None = None,
    label_images: int | None = None,
    label_samples: int = LABEL_SAMPLES,
    say: Callable[[str], None] = lambda line: None,
) -> Images:
    """Collect the images that an export of these models is checked on, and calibrated on.

    images, label_images: see `comparison_images`. calibration: None for the shipped training images if they are the
    model's. label_samples: noisy copies of each image that labels are compared on.
    """
    if label_samples < 2:
        raise UsageError(f"`label_samples` {label_samples}: two samples of each image are the least")
    labelled = comparison_images(models, images, label_images, say)
    parity = np.stack([image.pixels for image in labelled[:PARITY_IMAGES]])
    real = images is not None or models.unet.image == SHIPPED_SHAPE
    return Images(
        parity=parity,
        labelled=labelled if math.prod(models.unet.image) <= LARGE_IMAGE else (),
        samples=label_samples,
        calibration=calibration_pixels(models, calibration),
        denoising=parity if images is not None or not real else pixels_of(shipped_images(parity.shape[0])),
        made_up=not real,
    )


def shipped_images(count: int) -> ImageSet:
    """Take `count` of the shipped images, evenly spread: a denoiser needs no classes."""
    found = open_images(None, SHIPPED_SHAPE, CLASS_NAMES)
    return dataclasses.replace(found, positions=[i * len(found) // count for i in range(count)])


def comparison_images(
    models: Pair,
    images: Path | None,
    count: int | None,
    say: Callable[[str], None] = lambda line: None,
    usual: int = LABEL_IMAGES,
) -> list[LabelledImage]:
    """`count` images for these models, evenly spread over those at `images`; None for `usual`, or what there is.

    images: None for the shipped ones if they are the model's, else for pictures that are made up.
    """
    if count is not None and count < 1:
        raise UsageError(f"{count} images are too few to compare on: ask for one or more")
    if images is None and not is_shipped(models):
        say("no `images`: comparing on pictures that are made up")
        pictures = made_up(models.unet.image, count or usual)
        return [LabelledImage(i, picture, None) for i, picture in enumerate(pictures)]
    found = open_images(images, models.unet.image, models.classifier.class_names)
    wanted = count or min(usual, len(found))
    if wanted > len(found):
        raise UsageError(f"{wanted} images are asked for, and {found.name} holds {len(found)}")
    spread = [found.positions[i * len(found) // wanted] for i in range(wanted)]
    return list(dataclasses.replace(found, positions=spread))


def is_shipped(models: Pair) -> bool:
    """Return whether the shipped images are of these models' size and classes."""
    return models.unet.image == SHIPPED_SHAPE and models.classifier.class_names == CLASS_NAMES


def calibration_pixels(models: Pair, path: Path | None) -> NDArray[np.uint8] | None:
    """Images [n, C, H, W] that no certificate is about; None where none were given."""
    if path is not None:
        return pixels_of(open_images(path, models.unet.image, models.classifier.class_names))
    if not is_shipped(models):
        return None
    with resources.as_file(resources.files("densepure_rt") / "data" / CALIBRATION) as shipped:
        return pixels_of(open_images(shipped, models.unet.image, models.classifier.class_names))


def pixels_of(images: ImageSet) -> NDArray[np.uint8]:
    return np.stack([image.pixels for image in images])


def made_up(image: tuple[int, int, int], count: int) -> NDArray[np.uint8]:
    """Smooth pictures, uint8 [count, C, H, W]: a few waves across each channel, the same ones every time."""
    draw = np.random.Generator(np.random.Philox(0))
    channels, height, width = image
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    pictures = np.zeros((count, *image))
    for picture in pictures.reshape(count * channels, height, width):
        for _ in range(4):
            down, across, phase = draw.uniform(-3, 3), draw.uniform(-3, 3), draw.uniform(0, 1)
            picture += np.cos(2 * np.pi * (down * y + across * x + phase))
    levels: NDArray[np.uint8] = ((pictures + 4) / 8 * 255).round().astype(np.uint8)
    return levels


@dataclass(frozen=True)
class Images:
    """The images that an export is checked on, and that a quantized one is calibrated on.

    parity: uint8 [n, C, H, W]. labelled: for the comparison of labels, `samples` noisy copies of each. calibration:
    uint8 [n, C, H, W], images that no certificate is about. denoising: of the denoising check, uint8 [n, C, H, W]; None
    for those of parity. made_up: whether these are no real images.
    """

    parity: NDArray[np.uint8]
    labelled: Sequence[LabelledImage] = ()
    samples: int = 0
    calibration: NDArray[np.uint8] | None = None
    denoising: NDArray[np.uint8] | None = None
    made_up: bool = False
