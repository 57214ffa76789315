"""Open the device that runs a bundle, and choose its provider and batch."""

from __future__ import annotations

import math
from typing import cast, get_args

from densepure_rt.errors import UsageError
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.device import Device, Provider
from densepure_rt.runtime.machine import available_cores
from densepure_rt.runtime.onnxruntime_api import onnxruntime_version

DEFAULT_BATCH = 32  # of ONNX Runtime; fastest on a CPU between 8 and 32
GPU_CALLERS = 2
DEFAULT_VALUES = DEFAULT_BATCH * 3 * 64 * 64  # a default batch holds no more: a network's tensors are far larger


def open_device(bundle: Bundle, batch: int | None, threads: int, provider: Provider = "cpu") -> Device:
    """Open the device that runs this bundle's engines; its results are probed, see `runtime.probe`.

    batch: None for what suits the device: `default_batch`, or the largest that a plan was built for. threads, provider:
    of ONNX Runtime; a plan needs neither. Nothing falls back to the CPU: what was asked for and cannot be had raises
    EnvironmentFault. CheckFailed when an engine is not what it should be, UsageError for options that do not fit it.
    """
    if bundle.unet.plan is not None:
        if provider != "cpu":
            raise UsageError(
                f"{bundle.unet_path.name} is a plan, which `provider` {provider} does not run: leave it out"
            )
        from densepure_rt.runtime.tensorrt_device import TensorRTDevice

        return TensorRTDevice(bundle, batch)
    onnxruntime_version()
    from densepure_rt.runtime.onnx_device import OnnxDevice

    return OnnxDevice(bundle, default_batch(bundle.unet.image) if batch is None else batch, threads, provider)


def default_batch(image: tuple[int, int, int]) -> int:
    """32 colour images up to 64 x 64, fewer of larger ones, 2 of 256 x 256."""
    return max(1, min(DEFAULT_BATCH, DEFAULT_VALUES // math.prod(image)))


def default_threads(provider: Provider) -> int:
    """Return the callers that suit a provider: one a core; two on a GPU, so that one fills while the other waits."""
    return available_cores() if provider == "cpu" else GPU_CALLERS


def provider_of(name: str) -> Provider:
    """An ONNX Runtime provider by its name."""
    if name not in get_args(Provider):
        raise UsageError(f"`provider` {name} is not known: {', '.join(get_args(Provider))}")
    return cast(Provider, name)
