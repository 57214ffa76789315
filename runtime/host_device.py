"""The device whose slots are numpy's: what runs the two networks is given to it, and what draws its noise may be."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import CLOSED, NOT_FINITE, Batch, Floats, forked
from densepure_rt.runtime.native_calls import STOP_SECONDS, Callers
from densepure_rt.runtime.noise import Key, RoundedNormal, first_state, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.probe import Probed, probe

RunNetwork = Callable[[Mapping[str, Floats]], Sequence[Floats]]  # a feed of one whole batch -> the outputs, in order


@dataclass(frozen=True)
class OpenImage:
    pixels: NDArray[np.uint8]
    key: Key
    law: RoundedNormal
    scale: float


class Drawn(NamedTuple):
    """The numbers that tell draws of the same images apart, int64 [n] each."""

    sample: NDArray[np.int64]
    vote: NDArray[np.int64]
    step: NDArray[np.int64]

    @classmethod
    def of(cls, sample: int, vote: int, step: int) -> Drawn:
        """A single draw."""
        return cls(*(np.array([each], np.int64) for each in (sample, vote, step)))


class Noise(Protocol):
    """Draws the noise of up to a batch of items, of an image each: the same bits, whatever draws them."""

    def smooth(self, images: Sequence[OpenImage], drawn: Drawn) -> Floats:
        """First states of noise copies, [n, C, H, W]; vote and step are nothing to them."""

    def votes(self, images: Sequence[OpenImage], drawn: Drawn) -> Floats:
        """Unit normals, [n, C, H, W]. Steps are from 1 on."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


class NumpyNoise:
    """See `Noise`."""

    def smooth(self, images: Sequence[OpenImage], drawn: Drawn) -> Floats:
        found = np.empty((len(images), *images[0].pixels.shape), np.float32)
        for i, (image, sample) in enumerate(zip(images, drawn.sample.tolist(), strict=True)):
            levels = image.pixels + smoothing_noise(image.law, image.key, sample, image.pixels.shape)
            found[i] = first_state(levels, image.scale)
        return found

    def votes(self, images: Sequence[OpenImage], drawn: Drawn) -> Floats:
        found = np.empty((len(images), *images[0].pixels.shape), np.float32)
        counters = zip(*(column.tolist() for column in drawn), strict=True)
        for i, (image, (sample, vote, step)) in enumerate(zip(images, counters, strict=True)):
            found[i] = vote_noise(image.key, sample, vote, step, image.pixels.shape)
        return found

    def close(self) -> None:
        pass


class Calls:
    """Run the calls of a device's two networks, and end them where they can be: plain functions run to their end."""

    def stop(self) -> None:
        """End the calls that are running, and those that begin, soon. From any thread, and more than once."""

    def resume(self) -> None:
        """Let calls run again. Only while none is running."""


@dataclass(frozen=True)
class Networks:
    """The two networks of a bundle, ready to be called.

    any_batch: whether they take other batches than the device's. calls: what ends a call that runs.
    """

    step: RunNetwork
    classify: RunNetwork
    any_batch: bool = False
    calls: Calls = field(default_factory=Calls)


class HostDevice:
    """See `densepure_rt.runtime.device.Device`.

    After a fork the child has the networks but none of the threads: it starts its own with its first batch.

    Args:
        networks: Those of the bundle.
        batch: Items of each call; the last of a loop is padded.
        callers: Threads that call the networks at the same time.
        facts: What `describe` says besides.
        survives_fork: Whether a child process may go on with the networks.

    Raises:
        CheckFailed: A result is not finite, or depends on who shares a batch.
    """

    def __init__(
        self,
        bundle: Bundle,
        networks: Networks,
        batch: int,
        callers: int,
        facts: Mapping[str, str | int | bool],
        survives_fork: bool = True,
    ) -> None:
        self.batch, self.in_flight, self.facts, self.survives_fork = batch, callers, facts, survives_fork
        self.image_shape = bundle.unet.image
        self.networks = networks
        self._images: dict[int, OpenImage] = {}
        self.noise: Noise = NumpyNoise()
        self._handles, self._tickets = itertools.count(), itertools.count()
        self._callers, self._process = Callers(callers, networks.calls.stop), os.getpid()
        self._closed = False
        self._outstanding: dict[Future[Any], int] = {}
        self._left: list[Future[Any]] = []  # calls that were told to end, and may not have ended
        self._mean = self._std = np.empty((0, *self.image_shape), np.float32)
        self._finite = np.empty(0, bool)
        try:
            self.probed = self._probe(bundle, networks.any_batch)
        except BaseException:
            self.close()
            raise

    def _probe(self, bundle: Bundle, any_batch: bool) -> Probed:
        """Run both networks on fixed items, and compare the bits with other mates and another batch."""
        return probe(bundle, self.batch, self._first_results, any_batch)

    def draw_by(self, source: Callable[[int, tuple[int, int, int]], Noise]) -> None:
        """Draw noise by what `source` gives for a batch and an image's shape; what it raises closes the device."""
        try:
            self.noise = source(self.batch, self.image_shape)
        except BaseException:
            self.close()
            raise

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        handle = next(self._handles)
        self._images[handle] = OpenImage(pixels.copy(), key, smoothing_law(sigma), scale)
        return handle

    def close_image(self, handle: int) -> None:
        self._images.pop(handle, None)

    def reserve(self, slots: int) -> None:
        self._own()  # a loop begins here
        if slots > len(self._mean):
            self._mean = np.zeros((slots, *self.image_shape), np.float32)
            self._std = np.zeros((slots, *self.image_shape), np.float32)
            self._finite = np.zeros(slots, bool)

    def submit(self, batch: Batch) -> int:
        self._own()
        run = {"smooth": self._run_smooth, "step": self._run_step, "classify": self._run_classify}[batch.kind]
        ticket = next(self._tickets)
        self._outstanding[self._callers.submit(run, batch)] = ticket
        return ticket

    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        self._own()
        if not self._outstanding:
            raise EnvironmentFault(
                "this process was forked in the middle of an iteration, whose batches its parent has: begin a new one"
            )
        done, _ = wait(self._outstanding, return_when=FIRST_COMPLETED)
        oldest = min(done, key=self._outstanding.__getitem__)
        return self._outstanding.pop(oldest), oldest.result()

    def drain(self) -> None:
        self._end_calls()
        self._outstanding.clear()

    def read(self, slots: Sequence[int]) -> tuple[Floats, Floats]:
        return self._mean[list(slots)], self._std[list(slots)]

    def describe(self) -> Mapping[str, str | int | bool]:
        return {
            **self.facts,
            "batch": self.batch,
            "independent_of_batch_mates": True,  # or `probe` would have raised
            "independent_of_batch": self.probed.independent_of_batch,
            "fingerprint": self.probed.fingerprint,
        }

    def close(self) -> None:
        self._closed = True
        self._end_calls()
        self._callers.close()
        self.noise.close()
        self._outstanding.clear()
        self._images.clear()

    def _end_calls(self) -> None:
        """End what is outstanding, of which nothing is wanted any more, as far as STOP_SECONDS allow."""
        running = [future for future in self._outstanding if not (future.cancel() or future.done())]
        if not running or self._process != os.getpid():
            return
        self._left += running
        self.networks.calls.stop()
        self._resume(STOP_SECONDS)

    def _resume(self, seconds: float | None) -> None:
        """Let calls run again once those that were told to end have, if that is so within `seconds`."""
        if not wait(self._left, seconds).not_done:
            self.networks.calls.resume()
            self._left.clear()

    def _first_results(self, feed: Mapping[str, Floats]) -> Sequence[Floats]:
        """Run both networks as batches are run: in a thread that can be left."""
        step, classify = self.networks.step, self.networks.classify
        call = self._callers.submit(lambda: [*step(feed), *classify({"mean": feed["mean"]})])
        self._outstanding[call] = next(self._tickets)
        wait(self._outstanding)
        self._outstanding.clear()
        return call.result()

    def _own(self) -> None:
        """Take over after a fork, which copies all but the threads.

        Raises:
            EnvironmentFault: The networks cannot be used here.
            UsageError: The device is closed.
        """
        if self._closed:
            raise UsageError(CLOSED)
        if self._process == os.getpid():
            if self._left:
                self._resume(None)
            return
        if not (self.survives_fork and all(future.done() for future in (*self._outstanding, *self._left))):
            raise forked("while its engines were at work" if self.survives_fork else "and its engines are on a GPU")
        self._callers, self._process = Callers(self.in_flight, self.networks.calls.stop), os.getpid()
        self._outstanding.clear()
        self._resume(0)

    def _run_smooth(self, batch: Batch) -> None:
        self._mean[batch.target] = self.noise.smooth(*self._drawn(batch, np.arange(len(batch.source))))
        self._std[batch.target] = 0
        self._finite[batch.target] = True

    def _run_step(self, batch: Batch) -> None:
        n = len(batch.source)
        noise = np.zeros((self.batch, *self.image_shape), np.float32)
        if len(drawing := np.flatnonzero(batch.step)):
            noise[drawing] = self.noise.votes(*self._drawn(batch, drawing))
        mean, std, finite = self.networks.step(
            {
                "mean": self._padded(self._mean[batch.source]),
                "std": self._padded(self._std[batch.source]),
                "noise": noise,
                "t": self._padded(batch.t),
                "coef": self._padded(batch.coef),
            },
        )
        self._mean[batch.target] = mean[:n]
        self._std[batch.target] = std[:n]
        self._finite[batch.target] = self._finite[batch.source] & (finite[:n] > 0)

    def _drawn(self, batch: Batch, items: NDArray[np.int64]) -> tuple[list[OpenImage], Drawn]:
        """The images of these items of a batch, and what tells their draws apart."""
        images = [self._images[handle] for handle in batch.image[items].tolist()]
        return images, Drawn(batch.sample[items], batch.vote[items], batch.step[items])

    def _run_classify(self, batch: Batch) -> NDArray[np.int64]:
        n = len(batch.source)
        (logits,) = self.networks.classify({"mean": self._padded(self._mean[batch.source])})
        finite = self._finite[batch.source] & np.isfinite(logits[:n]).all(axis=1)
        return np.where(finite, logits[:n].argmax(axis=1), NOT_FINITE)

    def _padded(self, values: Floats) -> Floats:
        """`values` filled up to a whole batch with copies of the first item: a batch always has the same shape."""
        return np.concatenate([values, np.repeat(values[:1], self.batch - len(values), axis=0)])
