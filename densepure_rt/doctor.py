"""What this machine has, what is missing for what, and the next command."""

from __future__ import annotations

import ctypes.util
import platform
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from densepure_rt import __version__
from densepure_rt.errors import DensePureError, EnvironmentFault
from densepure_rt.runtime.bundle import open_bundle, sha256_of
from densepure_rt.runtime.device import (
    available_cores,
    installed_versions,
    onnxruntime_conflict,
    onnxruntime_version,
)
from densepure_rt.smoothing import shipped_engine

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
    findings = (
        Finding("densepure-rt", "ok", f"{__version__} on Python {platform.python_version()}, {sys.platform}"),
        Finding("processor", "ok", f"{platform.machine()}, {available_cores()} cores to use"),
        runtime,
        gpu_finding(),
        export_finding(),
        engines,
    )
    if onnxruntime_conflict():
        command = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'densepure-rt[cpu]'"
    elif runtime.state != "ok":
        command = "pip install 'densepure-rt[cpu]'"
    elif engines.state != "ok":
        command = "pip install --force-reinstall --no-deps densepure-rt"
    else:
        command = "densepure-rt certify"
    return Diagnosis(findings, command)


def onnxruntime_finding() -> Finding:
    try:
        version = onnxruntime_version()
    except EnvironmentFault as fault:
        return Finding("ONNX Runtime", "broken" if onnxruntime_conflict() else "missing", str(fault), True)
    return Finding("ONNX Runtime", "ok", f"{version}, runs .onnx engines on the CPU", True)


def gpu_finding() -> Finding:
    driver = ctypes.util.find_library("cuda")
    if driver is None:
        return Finding("NVIDIA GPU", "missing", "no driver (libcuda not found); the CPU serves")
    return Finding("NVIDIA GPU", "ok", f"driver library {driver}; this version runs on the CPU only")


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
