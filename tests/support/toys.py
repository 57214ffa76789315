"""Two networks of a few weights, and their bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from densepure_rt.export.convert.to_onnx import export_bundle
from densepure_rt.export.models.check_images import made_up
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.bundle import Bundle, open_bundle
from densepure_rt.runtime.schedule import Schedule

IMAGE = (1, 6, 6)


class ToyUnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + t[:, None, None, None] / 1000)


class ToyClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


def toy_unet() -> DiffusionModel:
    schedule = Schedule("linear", 1000)
    return DiffusionModel(ToyUnet(), IMAGE, schedule, "learned_range", "epsilon", (-1.0, 1.0), "a" * 64)


def toy_classifier() -> ClassifierModel:
    return ClassifierModel(ToyClassifier(), IMAGE, ("a", "b", "c"), "b" * 64)


def toy_models() -> Models:
    return Models(toy_unet(), toy_classifier())


def toy_bundle(folder: Path) -> Bundle:
    return open_bundle(export_bundle(toy_models(), folder, made_up(IMAGE, 2)).unet)
