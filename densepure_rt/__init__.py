"""Certified-robust classification by diffusion purification and voting (DensePure), on ONNX and TensorRT engines.

import densepure_rt

with densepure_rt.load() as classifier:  # the engines that ship; or load("engines/unet.onnx")
    certificate = classifier.certify(image, sigma=0.5)  # uint8 [C, H, W]
    labels = classifier.predict(images)
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
    from densepure_rt.smoothing.certificate import Certificate as Certificate
    from densepure_rt.smoothing.classifier import Certified as Certified
    from densepure_rt.smoothing.classifier import Predicted as Predicted
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
    "Predicted",
    "Settings",
    "SmoothedClassifier",
    "UsageError",
    "__version__",
    "load",
]

_HOMES = {
    "Budget": "smoothing.settings",
    "Certificate": "smoothing.certificate",
    "Certified": "smoothing.classifier",
    "CheckFailed": "errors",
    "DensePureError": "errors",
    "EnvironmentFault": "errors",
    "Predicted": "smoothing.classifier",
    "Settings": "smoothing.settings",
    "SmoothedClassifier": "smoothing.classifier",
    "UsageError": "errors",
    "load": "smoothing.classifier",
}


def __getattr__(name: str) -> Any:
    """Import on first use: scipy alone takes longer than everything else together."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
