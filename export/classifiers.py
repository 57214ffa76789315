"""Any supported classifier in PyTorch -> a `ClassifierModel` on pixels in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from densepure_rt.export.zoo.models import CLASS_NAMES, ZOO, Classifier, load_weights
from densepure_rt.runtime.bundle import sha256_of


@dataclass(frozen=True)
class ClassifierModel:
    """network: pixels [B, C, H, W] in [-1, 1] -> logits [B, K]. image: [C, H, W]."""

    network: nn.Module
    image: tuple[int, int, int]
    class_names: tuple[str, ...]
    weights_sha256: str


def zoo_classifier(weights: Path = ZOO / "classifier.safetensors") -> ClassifierModel:
    """The default classifier, with the weights that ship with it or others that were trained by the same script."""
    return ClassifierModel(load_weights(Classifier(), weights), (1, 28, 28), CLASS_NAMES, sha256_of(weights))
