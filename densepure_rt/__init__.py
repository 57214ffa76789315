"""Certified-robust classification by diffusion purification and voting (DensePure), on ONNX and TensorRT engines.

import densepure_rt

with densepure_rt.load() as classifier:  # the engines that ship; or load("engines/unet.onnx")
    certificate = classifier.certify(image, sigma=0.5)  # uint8 [C, H, W]
    labels = classifier.predict(images)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime's wheels for Linux, from 1.29 on, report models and sessions to their maker unless this is set first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from densepure_rt.certification import Certificate as Certificate
    from densepure_rt.smoothing import Settings as Settings
    from densepure_rt.smoothing import SmoothedClassifier as SmoothedClassifier
    from densepure_rt.smoothing import load as load

__version__ = "0.1.0"
__all__ = ["Certificate", "Settings", "SmoothedClassifier", "__version__", "load"]

_HOMES = {
    "Certificate": "certification",
    "Settings": "smoothing",
    "SmoothedClassifier": "smoothing",
    "load": "smoothing",
}


def __getattr__(name: str) -> Any:
    """Import on first use: scipy alone takes longer than everything else together."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
