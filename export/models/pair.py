"""What the two models say of themselves, in PyTorch or as a bundle of engines: all that a check asks of them."""

from __future__ import annotations

from typing import Protocol

from densepure_rt.runtime.bundle import Prediction
from densepure_rt.runtime.schedule import Chain


class Trained(Protocol):
    """A diffusion network: a `DiffusionModel`, or the sidecar of its engine. image: [C, H, W]."""

    @property
    def image(self) -> tuple[int, int, int]: ...
    @property
    def prediction(self) -> Prediction: ...
    @property
    def clip(self) -> tuple[float, float] | None: ...
    def chain(self, sigma: float, steps: int) -> Chain: ...


class Named(Protocol):
    """A classifier: a `ClassifierModel`, or the sidecar of its engine."""

    @property
    def class_names(self) -> tuple[str, ...]: ...


class Pair(Protocol):
    """Both together: `Models`, or a `Bundle`."""

    @property
    def unet(self) -> Trained: ...
    @property
    def classifier(self) -> Named: ...
