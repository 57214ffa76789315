"""The seam between the reverse loop and what runs it: the `Device` protocol, and `open_device`.

A device owns numbered slots. A slot holds a state, the mean and std of a Gaussian over images; every batch of work
reads source slots and writes target slots, or reads slots and returns labels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densepure_rt.errors import EnvironmentFault, UsageError, raise_interrupt
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.schedule import Chain

NOT_FINITE = -1  # in place of a label: the network gave NaN or Inf somewhere on the way
Kind = Literal["smooth", "step", "classify"]
Provider = Literal["cpu", "cuda", "tensorrt"]  # of ONNX Runtime
DEFAULT_BATCH = 32  # of ONNX Runtime; fastest on a CPU between 8 and 32
DEFAULT_VALUES = DEFAULT_BATCH * 3 * 64 * 64  # a default batch holds no more: a network's tensors are far larger
CLOSED = "this classifier is closed: load it again"
MAX_BATCH = 65_535  # items; CUDA takes no more in the y of a grid
MAX_THREADS = 1024
ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu")
# Precisions that ONNX Runtime 1.32 loads and computes wrongly (fp8: its optimiser moves the quantization, and the
# default classifier is off by twice its norm) or, on a CPU, has no kernels for.
UNRUNNABLE: dict[Provider, tuple[str, ...]] = {"cpu": ("fp8", "bf16"), "cuda": ("fp8",), "tensorrt": ("fp8",)}
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
    """What the reverse loop asks of a device.

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
        """What a record must say about the device, by name."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


def installed_versions(*distributions: str) -> dict[str, str]:
    """The versions of those distributions that are installed here."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def onnxruntime_conflict() -> str | None:
    """The repair, when both ONNX Runtime wheels are here: they overwrite each other's files, and pip cannot say so."""
    found = installed_versions(*ONNXRUNTIME_WHEELS)
    if len(found) < 2:
        return None
    both = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{both} are both installed and have overwritten each other's files: run "
        f'"pip uninstall -y onnxruntime onnxruntime-gpu", then "pip install densepure-rt[cpu]" or "[gpu]", not both'
    )


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def onnxruntime_version() -> str:
    """The version of the ONNX Runtime that can be imported here. Raises EnvironmentFault with the repair."""
    if conflict := onnxruntime_conflict():
        raise EnvironmentFault(conflict)
    try:
        import onnxruntime

        return str(onnxruntime.__version__)
    except Exception as error:  # missing, a half-removed wheel without a version, a NumPy that it was not built for
        raise_interrupt(error)
        raise EnvironmentFault(
            f"ONNX Runtime, which runs .onnx engines, cannot be imported ({error}): "
            "run \"pip install 'densepure-rt[cpu]'\""
        ) from error


def onnxruntime_providers() -> list[str]:
    """The providers that this ONNX Runtime was built with; whether one works here shows only when it is asked for.

    Raises EnvironmentFault as `onnxruntime_version` does.
    """
    onnxruntime_version()
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def refuse_unrunnable(name: str, precision: str, provider: Provider) -> None:
    """Raise UsageError for an engine in a precision that this provider does not compute rightly."""
    if precision in UNRUNNABLE[provider]:
        raise UsageError(
            f"{name} is {precision}, which ONNX Runtime does not run rightly with --provider {provider}: build a plan "
            f'from it with "densepure-rt export --target tensorrt --precision {precision}", or use an fp32 engine'
        )


def open_device(bundle: Bundle, batch: int | None, threads: int, provider: Provider = "cpu") -> Device:
    """Open the device that runs this bundle's engines; its results are probed, see `runtime.probe`.

    batch: None for what suits the device: `default_batch`, or the largest that a plan was built for. threads, provider:
    of ONNX Runtime; a plan needs neither. Nothing falls back to the CPU: what was asked for and cannot be had raises
    EnvironmentFault. CheckFailed when an engine is not what it should be, UsageError for options that do not fit it.
    """
    if bundle.unet.plan is not None:
        if provider != "cpu":
            raise UsageError(
                f"{bundle.unet_path.name} is a plan, which --provider {provider} does not run: leave it out"
            )
        from densepure_rt.runtime.tensorrt_device import TensorRTDevice

        return TensorRTDevice(bundle, batch)
    onnxruntime_version()
    from densepure_rt.runtime.onnx_device import OnnxDevice

    return OnnxDevice(bundle, default_batch(bundle.unet.image) if batch is None else batch, threads, provider)


def forked(why: str) -> EnvironmentFault:
    """Return the error of a classifier that a forked child cannot use. why: the reason, such as "and is on a GPU"."""
    return EnvironmentFault(
        f"this process was forked after the classifier was loaded, {why}: load it in the child process, or start the "
        f'child with multiprocessing.get_context("spawn")'
    )


def default_batch(image: tuple[int, int, int]) -> int:
    """32 colour images up to 64 x 64, fewer of larger ones, 2 of 256 x 256."""
    return max(1, min(DEFAULT_BATCH, DEFAULT_VALUES // math.prod(image)))
