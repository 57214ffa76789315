"""What this machine has, what is missing for what, and the next command."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from densepure_rt import __version__
from densepure_rt.errors import DensePureError, EnvironmentFault
from densepure_rt.runtime.bundle import Flavour, open_bundle, sha256_of
from densepure_rt.runtime.device import (
    available_cores,
    installed_versions,
    onnxruntime_conflict,
    onnxruntime_providers,
    onnxruntime_version,
)
from densepure_rt.runtime.gpu import Gpu
from densepure_rt.runtime.gpu import find as find_gpu
from densepure_rt.runtime.tensorrt_api import MODULES, import_flavour
from densepure_rt.smoothing import shipped_engine

CUDA_PACKAGES = ("cuda-core", "cuda-bindings")
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "safetensors", "diffusers")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is well, what was found, and whether nothing works without it."""

    what: str
    state: Literal["ok", "missing", "broken"]
    found: str
    needed: bool = False


@dataclass(frozen=True)
class Diagnosis:
    findings: tuple[Finding, ...]
    next_command: str

    @property
    def healthy(self) -> bool:
        """Whether this machine can certify."""
        return all(finding.state == "ok" for finding in self.findings if finding.needed)


def diagnose() -> Diagnosis:
    runtime = onnxruntime_finding()
    engines = engines_finding()
    here = gpu_here()
    plans = {flavour: tensorrt_finding(flavour, here) for flavour in MODULES}
    if isinstance(here, Gpu) and any(finding.state == "ok" for finding in plans.values()):
        runtime = replace(runtime, needed=False)
    findings = (
        Finding("densepure-rt", "ok", f"{__version__} on Python {platform.python_version()}, {sys.platform}"),
        Finding("processor", "ok", f"{platform.machine()}, {available_cores()} cores to use"),
        runtime,
        providers_finding(),
        gpu_finding(here),
        cuda_finding(),
        *plans.values(),
        export_finding(),
        engines,
    )
    return Diagnosis(findings, next_command(runtime, engines, plans, here))


def next_command(
    runtime: Finding, engines: Finding, plans: Mapping[Flavour, Finding], here: Gpu | EnvironmentFault
) -> str:
    """The one command that brings this machine a step further."""
    if onnxruntime_conflict():
        return "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'densepure-rt[cpu]'"
    if engines.state != "ok":
        return "pip install --force-reinstall --no-deps densepure-rt"
    if isinstance(here, Gpu):
        if plans["tensorrt"].state == "ok":
            return "densepure-rt export --target tensorrt && densepure-rt certify --engine engines/unet.plan"
        if plans["tensorrt-rtx"].state == "ok":
            return (
                f"densepure-rt export --target tensorrt-rtx --compute-capability {here.compute_capability} && "
                f"densepure-rt certify --engine engines/unet.rtx.plan"
            )
        return f"pip install 'densepure-rt[{'tensorrt-jetson' if platform.machine() == 'aarch64' else 'tensorrt'}]'"
    return "densepure-rt certify" if runtime.state == "ok" else "pip install 'densepure-rt[cpu]'"


def onnxruntime_finding() -> Finding:
    try:
        version = onnxruntime_version()
    except EnvironmentFault as fault:
        return Finding("ONNX Runtime", "broken" if onnxruntime_conflict() else "missing", str(fault), True)
    return Finding("ONNX Runtime", "ok", f"{version}, runs .onnx engines on the CPU", True)


def providers_finding() -> Finding:
    try:
        built_in = onnxruntime_providers()
    except EnvironmentFault:
        return Finding("providers", "missing", "no ONNX Runtime")
    if "CUDAExecutionProvider" in built_in:
        return Finding("providers", "ok", f"built with {', '.join(built_in)}; try certify --provider cuda")
    return Finding("providers", "missing", f"{', '.join(built_in)}; --provider cuda needs densepure-rt[gpu]")


def gpu_here() -> Gpu | EnvironmentFault:
    try:
        return find_gpu()
    except EnvironmentFault as fault:
        return fault


def gpu_finding(here: Gpu | EnvironmentFault) -> Finding:
    if isinstance(here, EnvironmentFault):
        return Finding("NVIDIA GPU", "missing", str(here))
    found = f"{here.name}, compute capability {here.compute_capability}, driver for CUDA {here.driver}"
    return Finding("NVIDIA GPU", "ok", found)


def cuda_finding() -> Finding:
    found = installed_versions(*CUDA_PACKAGES)
    if missing := [name for name in CUDA_PACKAGES if name not in found]:
        return Finding(
            "CUDA packages", "missing", f"no {', '.join(missing)}; needed to run plans: densepure-rt[tensorrt]"
        )
    return Finding("CUDA packages", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


def tensorrt_finding(flavour: Flavour, here: Gpu | EnvironmentFault) -> Finding:
    try:
        version = import_flavour(flavour).__version__
    except EnvironmentFault as fault:
        return Finding(flavour, "missing", str(fault))
    if isinstance(here, Gpu):
        return Finding(flavour, "ok", f"{version}, builds and runs plans")
    if flavour == "tensorrt-rtx":
        return Finding(flavour, "ok", f"{version}, builds plans for GPUs elsewhere: export --target tensorrt-rtx")
    return Finding(flavour, "missing", f"{version} is installed, but builds and runs plans on a GPU only")


def export_finding() -> Finding:
    missing = [name for name in EXPORT_PACKAGES if find_spec(name) is None]
    if missing:
        return Finding("export", "missing", f"no {', '.join(missing)}; needed by `export` alone: densepure-rt[export]")
    found = installed_versions(*EXPORT_PACKAGES)
    return Finding("export", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


def engines_finding() -> Finding:
    try:
        bundle = open_bundle(shipped_engine())
        for path, expected in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier)):
            if sha256_of(path) != expected.file.sha256:
                return Finding("shipped engines", "broken", f"{path} does not match its sidecar", True)
    except (DensePureError, OSError) as error:
        return Finding("shipped engines", "broken", str(error), True)
    return Finding("shipped engines", "ok", f"{bundle.unet_path}, {bundle.unet.precision}, hashes match", True)
