"""What is installed of ONNX Runtime, and which graphs it cannot run."""

from __future__ import annotations

from densepure_rt.errors import EnvironmentFault, UsageError, raise_interrupt
from densepure_rt.runtime.device import Provider
from densepure_rt.runtime.machine import installed_versions

ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu")
# Precisions that ONNX Runtime 1.32 loads and computes wrongly (fp8: its optimiser moves the quantization, and the
# default classifier is off by twice its norm) or, on a CPU, has no kernels for.
UNRUNNABLE: dict[Provider, tuple[str, ...]] = {"cpu": ("fp8", "bf16"), "cuda": ("fp8",), "tensorrt": ("fp8",)}


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
            f"{name} is {precision}, which ONNX Runtime does not run rightly with `provider` {provider}: build a plan "
            f'from it with "densepure-rt export --target tensorrt --precision {precision}", or use an fp32 engine'
        )
