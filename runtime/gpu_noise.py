"""Noise by the kernels of a GPU, for a device whose slots are the host's: bit for bit numpy's, many times as fast.

Not run on a GPU yet: the tests run it on what stands for one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from densepure_rt import logs
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime import gpu
from densepure_rt.runtime.control import ITEM, PADDING, layout
from densepure_rt.runtime.device import CLOSED, Floats, forked
from densepure_rt.runtime.host_device import Drawn, Noise, NumpyNoise, OpenImage
from densepure_rt.runtime.noise import RoundedNormal, smoothing_law, vote_law
from densepure_rt.runtime.tensorrt_device import (
    IMAGE,
    THREADS_PER_BLOCK,
    as_array,
    compile_kernels,
    import_cuda,
    translating_cuda_errors,
)

SIGMA = 0.5  # of the noise that is compared with numpy's
REGIONS = ("items", "table", "pixels", "mean", "std", "noise", "finite")


def best_noise(batch: int, image_shape: tuple[int, int, int]) -> Noise:
    """The kernels where this machine has a GPU, cuda-core and NVRTC, else numpy, of which the log says why.

    No record tells them apart, for the bits are the same. Raises CheckFailed when they are not.
    """
    try:
        return KernelNoise(batch, image_shape)
    except EnvironmentFault as error:
        logs.say(f"noise is drawn by numpy: {error}", logging.INFO)
        return NumpyNoise()


class KernelNoise:
    """See `densepure_rt.runtime.host_device.Noise`. Its kernels are those of the TensorRT device.

    What they read lies in one buffer that is copied to the GPU with each draw: items, their images' rows and pixels. A
    step's noise is drawn by `gather` from a slot of each item's own, whose state nobody looks at.
    """

    @translating_cuda_errors()
    def __init__(self, batch: int, image_shape: tuple[int, int, int]) -> None:
        self._cuda = import_cuda(gpu.find())
        self._device = self._cuda.Device(0)
        self._device.set_current()
        self._kernels = compile_kernels(self._cuda, self._device.arch)
        self.batch, self.image_shape, self.size = batch, image_shape, int(np.prod(image_shape))
        self._lock, self._process = threading.Lock(), os.getpid()
        self._stream = self._device.create_stream()
        self._pinned = self._cuda.LegacyPinnedMemoryResource()
        states = 4 * batch * self.size
        sizes = ITEM.itemsize * batch, IMAGE.itemsize * batch, batch * self.size, states, states, states, batch
        starts, total = layout(*sizes)
        self._buffer = self._device.allocate(total, stream=self._stream)
        self._at = {name: self._window(*at) for name, *at in zip(REGIONS, starts, sizes, strict=True)}
        self._told = self._pinned.allocate(starts[3], stream=self._stream)  # items, table, pixels
        self._told_at = self._window(0, starts[3])
        self._drawn = self._pinned.allocate(states, stream=self._stream)
        self._starts = starts
        self._laws: dict[Fraction, Any] = {}
        try:
            self._compare()
        except BaseException:
            self.close()
            raise

    def _compare(self) -> None:
        """Raise CheckFailed unless one smoothed image and one draw are numpy's."""
        pixels = np.arange(self.size).astype(np.uint8).reshape(self.image_shape)
        images = [OpenImage(pixels, (2**63 + 1, 2), smoothing_law(SIGMA), 0.7)]
        drawn, host = Drawn.of(3, 5, 2), NumpyNoise()
        for kind in ("smooth", "votes"):
            if getattr(self, kind)(images, drawn).tobytes() != getattr(host, kind)(images, drawn).tobytes():
                raise CheckFailed(f"the GPU draws other noise than numpy ({kind}): certify on the CPU, and report this")

    def smooth(self, images: Sequence[OpenImage], drawn: Drawn) -> Floats:
        def launch() -> Any:
            slots = (self._at["mean"], self._at["std"], self._at["finite"])
            self._launch("smooth", self._at["items"], self._at["table"], *slots)
            return self._at["mean"]

        return self._draw(images, drawn, launch)

    def votes(self, images: Sequence[OpenImage], drawn: Drawn) -> Floats:
        def launch() -> Any:
            law, slots = vote_law(), (self._at["mean"], self._at["std"])
            table = (self._law(law), np.int32(len(law.thresholds)), np.int32(law.lowest))
            self._launch("gather", self._at["items"], self._at["table"], *slots, *table, *slots, self._at["noise"])
            return self._at["noise"]

        return self._draw(images, drawn, launch)

    @translating_cuda_errors()
    def _draw(self, images: Sequence[OpenImage], drawn: Drawn, launch: Any) -> Floats:
        """Launch one kernel for up to a batch of items; one thread at a time."""
        with self._lock:
            if self._process != os.getpid():
                raise forked("and its noise is drawn on a GPU")
            if self._stream is None:
                raise UsageError(CLOSED)
            self._device.set_current()  # the thread may be another than the last
            self._tell(images, drawn)
            self._told_at.copy_from(self._told, stream=self._stream)
            launch().copy_to(self._drawn, stream=self._stream)
            self._stream.sync()
            drawn_here = as_array(self._drawn, np.float32).reshape(self.batch, *self.image_shape)
            found: Floats = drawn_here[: len(images)].copy()  # the memory is used again
            return found

    def _tell(self, images: Sequence[OpenImage], drawn: Drawn) -> None:
        """Write the items, and each of their images once."""
        content, n = as_array(self._told, np.uint8), len(images)
        items, table, pixels = (content[start:] for start in self._starts[:3])
        items = items[: ITEM.itemsize * self.batch].view(ITEM)
        table = table[: IMAGE.itemsize * self.batch].view(IMAGE)
        pixels = pixels[: self.batch * self.size].reshape(self.batch, *self.image_shape)
        rows: dict[int, int] = {}
        for image in images:
            if id(image) in rows:
                continue
            row = rows[id(image)] = len(rows)
            pixels[row] = image.pixels
            address = int(self._at["pixels"].handle) + row * self.size, int(self._law(image.law).handle)
            table[row] = (*address, image.key, len(image.law.thresholds), image.law.lowest, image.scale, 0)
        items["image"][:n] = [rows[id(image)] for image in images]
        items["sample"][:n], items["vote"][:n], items["step"][:n] = drawn
        items["source"] = items["target"] = np.arange(self.batch)
        items["image"][n:], items["target"][n:] = 0, PADDING

    def _launch(self, kernel: str, *arguments: Any) -> None:
        grid = (-(-self.size // THREADS_PER_BLOCK), self.batch, 1)
        config = self._cuda.LaunchConfig(grid=grid, block=THREADS_PER_BLOCK)
        self._cuda.launch(self._stream, config, self._kernels[kernel], *arguments, np.int32(self.size))

    def _law(self, law: RoundedNormal) -> Any:
        """The thresholds of a law on the GPU."""
        if law.std not in self._laws:
            staging = self._pinned.allocate(law.thresholds.nbytes, stream=self._stream)
            as_array(staging, np.uint64)[:] = law.thresholds
            self._laws[law.std] = self._device.allocate(law.thresholds.nbytes, stream=self._stream)
            self._laws[law.std].copy_from(staging, stream=self._stream)
            self._stream.sync()
            staging.close(self._stream)
        return self._laws[law.std]

    def _window(self, start: int, size: int) -> Any:
        return self._cuda.Buffer.from_handle(int(self._buffer.handle) + start, size, owner=self._buffer)

    def close(self) -> None:
        """Free the GPU's memory. Safe to call twice."""
        with self._lock:
            self._laws, self._at = {}, {}
            self._told_at = self._buffer = self._told = self._drawn = self._stream = None
