"""What draws the samples of images: the reverse loop on a device of this process. `fleet` has many of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from densepure_rt.runtime import reverse
from densepure_rt.runtime.device import Batch, Device, Kind
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.runtime.schedule import Chain
from densepure_rt.smoothing.scheduling import LostSample
from densepure_rt.smoothing.voting import Ballot

ROUNDS = 2  # timed batches for each caller, after one round that is not


class Sampler(Protocol):
    """Draws samples of the images that are open with it. One `decide` at a time."""

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        """A handle to an image; see `densepure_rt.runtime.device.Device.open_image`."""

    def close_image(self, handle: int) -> None:
        """Forget an image. Safe to call twice, and after `close`."""

    def decide(
        self, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
    ) -> Generator[Outcome | LostSample | None, None, None]:
        """The outcome of each (handle, sample) of `work`, in any order; None when none has come for a moment.

        Of `work` see `reverse.decide`.
        """

    def seconds_per_item(self, chain: Chain, kind: Kind) -> float:
        """Wall seconds that an item takes when there is work for all."""

    def describe(self) -> Mapping[str, str | int | bool]:
        """Describe what runs the engines, by name, as a record must say it."""

    def status(self) -> str:
        """Say how the work goes; nothing, of a device that works or raises."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


class OnDevice:
    """The samples of one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.open_image, self.close_image = device.open_image, device.close_image
        self.describe, self.close = device.describe, device.close

    def status(self) -> str:
        return ""

    def decide(
        self, chain: Chain, work: Iterable[tuple[int, int] | None], new_ballot: Callable[[], Ballot]
    ) -> Generator[Outcome, None, None]:
        return reverse.decide(self.device, chain, work, new_ballot)

    def seconds_per_item(self, chain: Chain, kind: Kind) -> float:
        """Measure the seconds per item of full batches, all callers busy."""
        device, n = self.device, self.device.batch
        slots = n * device.in_flight
        device.reserve(slots)
        channels_height_width = device.read([0])[0].shape[1:]
        handle = device.open_image(np.zeros(channels_height_width, np.uint8), (0, 0), chain.sigma, chain.scale)

        def run(rounds: int) -> float:
            started = time.perf_counter()
            for _ in range(rounds):
                for caller in range(device.in_flight):
                    own = np.arange(n) + caller * n
                    last = len(chain) - 1  # it draws its noise
                    device.submit(Batch.of(chain, kind, own, image=handle, sample=own, step=last))
                for _ in range(device.in_flight):
                    device.collect()
            return time.perf_counter() - started

        run(1)
        seconds = run(ROUNDS)
        device.close_image(handle)
        return seconds / (ROUNDS * slots)
