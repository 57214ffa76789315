"""Export the default model: the shipped weights, or others that were trained by the same script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from densepure_rt.datasets import ImageSet, open_images
from densepure_rt.errors import UsageError
from densepure_rt.export.classifiers import zoo_classifier
from densepure_rt.export.precision import OPSETS
from densepure_rt.export.to_onnx import Exported, Images, export_bundle
from densepure_rt.export.unets import zoo_unet
from densepure_rt.export.zoo.models import ZOO

PARITY_IMAGES = 16  # for numbers
LABEL_IMAGES, LABEL_SAMPLES = 20, 20  # for labels: seconds; --parity-images and --parity-samples ask for more
CALIBRATION = "fashion_mnist_calibration.npz"  # training images


def export_default(
    out: Path,
    weights: Path | None,
    force: bool,
    say: Callable[[str], None],
    precisions: Sequence[str] = ("fp32",),
    keep: Sequence[str] = (),
    label_images: int = LABEL_IMAGES,
    label_samples: int = LABEL_SAMPLES,
) -> Iterator[Exported]:
    """Write the default model's bundles into `out`, one of each precision; see `export_bundle`.

    weights: a folder of safetensors files. label_images, label_samples: how many shipped images, evenly spread, and
    noisy copies of each the labels are compared on.
    """
    if unknown := [kind for kind in precisions if kind not in OPSETS]:
        raise UsageError(f"--precision {','.join(unknown)} is not known: {', '.join(OPSETS)}")
    folder = weights or ZOO
    files = {name: folder / f"{name}.safetensors" for name in ("unet", "classifier")}
    for path in files.values():
        if not path.is_file():
            raise UsageError(f"no weights at {path}: give --weights a folder that training wrote, or leave it out")
    unet, classifier = zoo_unet(files["unet"]), zoo_classifier(files["classifier"])
    shipped = open_images(None, unet.image, classifier.class_names)
    if not 1 <= label_images <= len(shipped) or label_samples < 2:
        raise UsageError(
            f"--parity-images {label_images} --parity-samples {label_samples}: {len(shipped)} images are there, "
            f"and two samples of each are the least"
        )
    with resources.as_file(resources.files("densepure_rt") / "data" / CALIBRATION) as path:
        calibration = open_images(path, unet.image, classifier.class_names)
    images = Images(
        parity=pixels_of(shipped.select(limit=PARITY_IMAGES)),
        labelled=list(shipped.select(len(shipped) // label_images, label_images)),
        samples=label_samples,
        calibration=pixels_of(calibration),
    )
    for kind in dict.fromkeys(precisions):
        yield export_bundle(unet, classifier, out, images, force, say, kind, keep)


def pixels_of(images: ImageSet) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.stack([image.pixels for image in images])
