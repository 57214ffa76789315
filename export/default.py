"""Export the default model: the shipped weights, or others that were trained by the same script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from densepure_rt.datasets import open_images
from densepure_rt.errors import UsageError
from densepure_rt.export.classifiers import zoo_classifier
from densepure_rt.export.to_onnx import Exported, export_bundle
from densepure_rt.export.unets import zoo_unet
from densepure_rt.export.zoo.models import ZOO

PARITY_IMAGES = 16


def export_default(out: Path, weights: Path | None, force: bool, say: Callable[[str], None]) -> Exported:
    """Write the bundle of the default model into `out`; see `export_bundle`. weights: a folder of safetensors files."""
    folder = weights or ZOO
    files = {name: folder / f"{name}.safetensors" for name in ("unet", "classifier")}
    for path in files.values():
        if not path.is_file():
            raise UsageError(f"no weights at {path}: give --weights a folder that training wrote, or leave it out")
    unet, classifier = zoo_unet(files["unet"]), zoo_classifier(files["classifier"])
    images = open_images(None, unet.image, classifier.class_names).select(limit=PARITY_IMAGES)
    return export_bundle(unet, classifier, out, np.stack([image.pixels for image in images]), force, say)
