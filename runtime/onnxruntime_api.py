"""What is installed of ONNX Runtime, and which graphs it cannot run."""

from __future__ import annotations

import sys

from densepure_rt.errors import EnvironmentFault, UsageError, raise_interrupt
from densepure_rt.runtime import gpu
from densepure_rt.runtime.device import Provider
from densepure_rt.runtime.machine import installed_versions

ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu")
# Precisions that ONNX Runtime 1.32 loads and computes wrongly (fp8: its optimiser moves the quantization, and the
# default classifier is off by twice its norm) or, on a CPU, has no kernels for.
# TensorRT quantizes to int8, never to the uint8 of int8-cpu.
UNRUNNABLE: dict[Provider, tuple[str, ...]] = {
    "cpu": ("fp8", "bf16"),
    "cuda": ("fp8",),
    "tensorrt": ("fp8", "int8-cpu"),
}
NEWEST_CUDA = 13  # that there is a GPU build of ONNX Runtime for; from 1.28 on, and from Python 3.11 on


def gpu_wheels(provider: Provider) -> str:
    """Return what pip is to install, so that this machine's driver and Python run that provider."""
    try:
        newest = min(NEWEST_CUDA, gpu.find().cuda_major)
    except EnvironmentFault:  # it is for another machine
        newest = NEWEST_CUDA
    cuda = 13 if newest >= 13 and sys.version_info >= (3, 11) else 12
    # The TensorRT provider is linked to libnvinfer.so.10.
    return f"'densepure-rt[gpu-cu{cuda}]'" + (f" 'tensorrt-cu{cuda}<11'" if provider == "tensorrt" else "")


def onnxruntime_conflict() -> str | None:
    """The repair, when both ONNX Runtime wheels are here: they overwrite each other's files, and pip cannot say so."""
    found = installed_versions(*ONNXRUNTIME_WHEELS)
    if len(found) < 2:
        return None
    both = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{both} are both installed and have overwritten each other's files: run "
        f'"pip uninstall -y onnxruntime onnxruntime-gpu", then "pip install \'densepure-rt[cpu]\'" or '
        f'"pip install {gpu_wheels("cuda")}", not both'
    )


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
        if precision == "int8-cpu":
            raise UsageError(f"{name} is int8-cpu, which is for CPUs alone: use an int8 engine, or `provider` cpu")
        raise UsageError(
            f"{name} is {precision}, which ONNX Runtime does not run rightly with `provider` {provider}: build a plan "
            f'from it with "densepure-rt export --target tensorrt --precision {precision}", or use an fp32 engine'
        )
