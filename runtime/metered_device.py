"""What a device was given to do, and how long it took."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepure_rt.runtime.device import Batch, Device


class MeteredDevice:
    """A device that counts its batches and the items in them, by kind, and the seconds in which it had work."""

    def __init__(self, device: Device) -> None:
        self._device, self._outstanding, self._since = device, 0, 0.0
        self.batches, self.items = Counter[str](), Counter[str]()
        self.seconds = 0.0

    def submit(self, batch: Batch) -> int:
        ticket = self._device.submit(batch)
        self.batches[batch.kind] += 1
        self.items[batch.kind] += len(batch.source)
        if not self._outstanding:
            self._since = time.monotonic()
        self._outstanding += 1
        return ticket

    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        collected = self._device.collect()
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        self._outstanding -= 1
        return collected

    def drain(self) -> None:
        self._device.drain()
        self._outstanding = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)
