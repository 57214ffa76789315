"""Certified-robust classification by diffusion purification and voting (DensePure), on ONNX and TensorRT engines.

import densepure_rt

with densepure_rt.load() as classifier:  # the engines that ship; or load("engines/unet.onnx")
    certificate = classifier.certify(image, sigma=0.5)  # uint8 [C, H, W], a Pillow image or a path
    labels = classifier.predict(images)
    found = classifier.certify_batch(images, labels)  # certify_iter yields each as it is decided

densepure_rt.to_dataframe(found)  # or of a run's folder
densepure_rt.plot_certified_accuracy(found)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from densepure_rt._version import __version__

# ONNX Runtime's wheels for Linux, from 1.29 on, report models and sessions to their maker unless this is set first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from densepure_rt.errors import CheckFailed as CheckFailed
    from densepure_rt.errors import DensePureError as DensePureError
    from densepure_rt.errors import EnvironmentFault as EnvironmentFault
    from densepure_rt.errors import UsageError as UsageError
    from densepure_rt.images.datasets import ImageSet as ImageSet
    from densepure_rt.images.datasets import LabelledImage as LabelledImage
    from densepure_rt.images.datasets import open_images as open_images
    from densepure_rt.report.notebook import plot_certified_accuracy as plot_certified_accuracy
    from densepure_rt.report.notebook import to_dataframe as to_dataframe
    from densepure_rt.smoothing.answers import Certified as Certified
    from densepure_rt.smoothing.answers import Predicted as Predicted
    from densepure_rt.smoothing.certificate import Certificate as Certificate
    from densepure_rt.smoothing.classifier import SmoothedClassifier as SmoothedClassifier
    from densepure_rt.smoothing.classifier import load as load
    from densepure_rt.smoothing.settings import Budget as Budget
    from densepure_rt.smoothing.settings import Settings as Settings

__all__ = [
    "Budget",
    "Certificate",
    "Certified",
    "CheckFailed",
    "DensePureError",
    "EnvironmentFault",
    "ImageSet",
    "LabelledImage",
    "Predicted",
    "Settings",
    "SmoothedClassifier",
    "UsageError",
    "__version__",
    "load",
    "open_images",
    "plot_certified_accuracy",
    "to_dataframe",
]

_HOMES = {
    "Budget": "smoothing.settings",
    "Certificate": "smoothing.certificate",
    "Certified": "smoothing.answers",
    "CheckFailed": "errors",
    "DensePureError": "errors",
    "EnvironmentFault": "errors",
    "ImageSet": "images.datasets",
    "LabelledImage": "images.datasets",
    "Predicted": "smoothing.answers",
    "Settings": "smoothing.settings",
    "SmoothedClassifier": "smoothing.classifier",
    "UsageError": "errors",
    "load": "smoothing.classifier",
    "open_images": "images.datasets",
    "plot_certified_accuracy": "report.notebook",
    "to_dataframe": "report.notebook",
}


def __getattr__(name: str) -> Any:
    """Import on first use: scipy alone takes longer than everything else together."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List what is imported on first use too, for `help` and completion."""
    return sorted({*globals(), *__all__})
