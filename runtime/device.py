"""The seam between the reverse loop and what runs it: the `Device` protocol, and `open_device`.

A device owns numbered slots. A slot holds a state, the mean and std of a Gaussian over images; every batch of work
reads source slots and writes target slots, or reads slots and returns labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.schedule import Chain

NOT_FINITE = -1  # in place of a label: the network gave NaN or Inf somewhere on the way
Kind = Literal["smooth", "step", "classify"]
Provider = Literal["cpu", "cuda", "tensorrt"]  # of ONNX Runtime
CLOSED = "this classifier is closed: load it again"
MAX_BATCH = 65_535  # items; CUDA takes no more in the y of a grid
MAX_THREADS = 1024
STEP_INPUTS = ("mean", "std", "noise", "t", "coef")
STEP_OUTPUTS = ("mean_next", "std_next", "finite")
CLASSIFY_INPUTS = ("mean",)
CLASSIFY_OUTPUTS = ("logits",)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Up to `Device.batch` items of one kind; the device pads.

    smooth: noise copy `sample` of `image` into slot `target`.
    step: draw from slot `source` with the noise of (sample, vote, step), denoise by `t` and `coef` into slot `target`.
        At step 0 the state has no spread, and nothing is drawn.
    classify: slot `source` -> label.

    All int64 [n] but t, float32 [n], and coef, float32 [n, 6].
    """

    kind: Kind
    image: NDArray[np.int64]
    sample: NDArray[np.int64]
    vote: NDArray[np.int64]
    step: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    t: NDArray[np.float32]
    coef: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        chain: Chain,
        kind: Kind,
        source: ArrayLike,
        target: ArrayLike | None = None,
        *,
        image: ArrayLike = 0,
        sample: ArrayLike = 0,
        vote: ArrayLike = 0,
        step: ArrayLike = 0,
    ) -> Batch:
        """Make a batch of as many items as `source`, steps with their t and coef. One number stands for all items.

        target: None for the slots of `source`.
        """
        slots = np.array(source, np.int64)
        given = (image, sample, vote, step, slots if target is None else target)
        images, samples, votes, steps, targets = (np.full(slots.shape, column, np.int64) for column in given)
        taken = steps if kind == "step" else steps[:0]
        return cls(kind, images, samples, votes, steps, slots, targets, chain.t[taken], chain.coef[taken])


class Device(Protocol):
    """The operations that the reverse loop needs of a device.

    Batches may finish in any order, but none is kept waiting for ever: of those that are finished, `collect` hands out
    the oldest. One reverse loop at a time.
    """

    batch: int  # items in one batch
    in_flight: int  # batches that may be outstanding

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        """A handle to an image [C, H, W] whose noise has standard deviation `sigma`; `scale` is the chain's.

        The pixels are copied: the caller may use its array again.
        """

    def close_image(self, handle: int) -> None:
        """Forget an image. Safe to call twice, and after `close`."""

    def reserve(self, slots: int) -> None:
        """Have at least `slots` slots; what fewer held is lost. Only while nothing is outstanding."""

    def submit(self, batch: Batch) -> int:
        """Start a batch, return its ticket. At most `in_flight` may be outstanding."""

    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        """Wait for a batch: its ticket, and for a classify batch the labels, int64 [n], or NOT_FINITE."""

    def drain(self) -> None:
        """Wait for whatever is outstanding and forget it. Never raises."""

    def read(self, slots: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies of mean and std, float32 [n, C, H, W] each: for replay, pictures and parity."""

    def describe(self) -> Mapping[str, str | int | bool]:
        """Describe the device, by name, as a record must say it."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


def forked(why: str) -> EnvironmentFault:
    """Return the error of a classifier that a forked child cannot use. why: the reason, such as "and is on a GPU"."""
    return EnvironmentFault(
        f"this process was forked after the classifier was loaded, {why}: load it in the child process, or start the "
        f'child with multiprocessing.get_context("spawn")'
    )
