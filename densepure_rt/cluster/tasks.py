"""Describe what travels between the head and its workers: engines, open images, tasks and what was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from densepure_rt.json_files import canonical
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.schedule import Chain


@dataclass(frozen=True)
class Engines:
    """Name what a worker draws with, and where it is."""

    bundle: Bundle
    description: Mapping[str, str | int | bool]
    version: str
    batch: int
    node: str
    node_id: str
    pid: int

    @property
    def sha256(self) -> str:
        """Hash all that a label depends on but the noise and the settings: workers of equal hash are interchangeable.

        The description holds the fingerprint of the worker's arithmetic.
        """
        any_batch = self.description.get("independent_of_batch", False)
        left_out = ("threads", "batch") if any_batch else ("threads",)
        own = {name: value for name, value in self.description.items() if name not in left_out}
        files = (self.bundle.unet.file.sha256, self.bundle.classifier.file.sha256, *self.bundle.sidecars)
        return hashlib.sha256(canonical({"files": files, "device": own, "version": self.version})).hexdigest()


@dataclass(frozen=True, eq=False)
class TaskImage:
    """Hold what `Sampler.open_image` was given."""

    pixels: NDArray[np.uint8]
    key: Key
    sigma: float
    scale: float


class Strip(NamedTuple):
    """Samples first, first + 1, ... of an image; handle: the driver's."""

    handle: int
    first: int
    samples: int


class Task(NamedTuple):
    """Strips for one worker, with all that their labels depend on. engines: the hash that the worker's must have."""

    strips: tuple[Strip, ...]
    images: Mapping[int, TaskImage]
    chain: Chain
    votes: int
    engines: str


class TaskResult(NamedTuple):
    """A sample each, in the order of the task: int32 [n]."""

    labels: NDArray[np.int32]
    votes: NDArray[np.int32]
    unet_calls: NDArray[np.int32]


class Portion(NamedTuple):
    """Name the samples that one task draws.

    suspect: it was lost, and goes alone now. deaths: of workers that had this image alone. late: how many workers did
    not end it in time. done_before: tasks that were done when it was first late.
    """

    strips: tuple[Strip, ...]
    suspect: bool = False
    deaths: int = 0
    late: int = 0
    done_before: int = 0

    @property
    def handles(self) -> list[int]:
        return list(dict.fromkeys(strip.handle for strip in self.strips))

    def of(self, handle: int) -> tuple[Strip, ...]:
        return tuple(strip for strip in self.strips if strip.handle == handle)

    def without(self, handles: set[int]) -> Portion:
        return self._replace(strips=tuple(strip for strip in self.strips if strip.handle not in handles))
