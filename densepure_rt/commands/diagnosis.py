"""What this machine has, what is missing for what, and the next command."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from densepure_rt._version import __version__
from densepure_rt.commands.console import in_options
from densepure_rt.errors import DensePureError, EnvironmentFault
from densepure_rt.runtime.bundle import Flavour, open_bundle, sha256_of, shipped_engine
from densepure_rt.runtime.gpu import Gpu
from densepure_rt.runtime.gpu import find as find_gpu
from densepure_rt.runtime.machine import available_cores, installed_versions, tensorrt_extra
from densepure_rt.runtime.onnxruntime_api import (
    gpu_wheels,
    onnxruntime_conflict,
    onnxruntime_providers,
    onnxruntime_version,
)
from densepure_rt.runtime.tensorrt_api import MODULES, import_flavour

CUDA_PACKAGES = ("cuda-core", "cuda-bindings")
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "safetensors", "diffusers")
# What each of them is used for, imported as it is used: diffusers alone imports late, and fails late.
STATEMENTS = {"diffusers": "from diffusers import UNet2DModel"}
CUDA_STATEMENTS = {"cuda-core": "import cuda.core", "cuda-bindings": "from cuda.bindings import runtime"}
# What the other extras bring, and how it is imported.
EXTRAS = {
    "classifiers": {"timm": "import timm", "transformers": "from transformers import AutoModelForImageClassification"},
    "report": {"matplotlib": "from matplotlib.figure import Figure"},
    "cluster": {"ray": "import ray"},
    "serve": {
        "starlette": "import starlette.applications",
        "uvicorn": "import uvicorn",
        "prometheus-client": "import prometheus_client",
    },
}
OLDEST_CUDA = 12  # that there is a TensorRT for
LEAN = "tensorrt_lean"
# What TensorRT-RTX 1.7 builds for: no Hopper, and no Orin.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# Made in another Python: without a driver, or with one that is too old, libraries end in errors or in a crash.
MAKE = """
import {module} as trt
from densepure_rt.runtime.tensorrt_api import new_logger
logger = new_logger(trt)
made = trt.{kind}(logger)
if logger.errors:
    raise RuntimeError(logger.summary())
"""
CUDA_LIBRARIES = """
from densepure_rt.runtime.onnxruntime_gpu import library_fault, prepare
prepare("cuda")
if fault := library_fault("cuda"):
    raise RuntimeError(fault)
"""
IMPORT_SECONDS = 120.0  # torch and diffusers take ten on a slow disk
IMPORT_CODE = """
import sys
from densepure_rt.optional import import_cause, torchvision_at_fault, torchvision_cure
try:
    exec(sys.argv[1], {})
except BaseException as error:
    cause = torchvision_at_fault(error)
    sys.stdout.write("densepure-rt: " + (import_cause(error) if cause is None else torchvision_cure(cause)))
    sys.stdout.flush()
    sys.exit(1)
"""


@dataclass(frozen=True)
class Finding:
    """A finding of `doctor`: what was looked at, whether it is well, what was found, and whether all else needs it."""

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
        """Return whether this machine can certify."""
        return all(finding.state == "ok" for finding in self.findings if finding.needed)


def diagnose() -> Diagnosis:
    runtime = onnxruntime_finding()
    engines = engines_finding()
    here = gpu_here()
    with ThreadPoolExecutor(2) as pool:
        of_extras = [pool.submit(extra_finding, extra, statements) for extra, statements in EXTRAS.items()]
        cuda, exporter = pool.submit(cuda_finding), pool.submit(export_finding)
        plans = {flavour: tensorrt_finding(flavour, here) for flavour in MODULES}
    if isinstance(here, Gpu) and any(finding.state == "ok" for finding in plans.values()):
        runtime = replace(runtime, needed=False)
    findings = (
        Finding("densepure-rt", "ok", f"{__version__} on Python {platform.python_version()}, {sys.platform}"),
        Finding("processor", "ok", f"{platform.machine()}, {available_cores()} cores to use"),
        runtime,
        providers_finding(here),
        gpu_finding(here),
        cuda.result(),
        *plans.values(),
        lean_finding(here),
        exporter.result(),
        *(future.result() for future in of_extras),
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
            return "densepure-rt export --target tensorrt && densepure-rt certify --engine engines/unet.fp16.plan"
        if plans["tensorrt-rtx"].state == "ok":
            return (
                f"densepure-rt export --target tensorrt-rtx --compute-capability {here.compute_capability} && "
                f"densepure-rt certify --engine engines/unet.fp16.rtx.plan"
            )
        return f"pip install 'densepure-rt[{tensorrt_extra(here.cuda_major)}]'"
    return "densepure-rt certify" if runtime.state == "ok" else "pip install 'densepure-rt[cpu]'"


def onnxruntime_finding() -> Finding:
    if not onnxruntime_conflict() and find_spec("onnxruntime") and (fault := import_fault("import onnxruntime")):
        found = f"it cannot be imported ({fault}): run \"pip install --force-reinstall 'densepure-rt[cpu]'\""
        return Finding("ONNX Runtime", "broken", found, True)
    try:
        version = onnxruntime_version()
    except EnvironmentFault as fault:
        return Finding("ONNX Runtime", "broken" if onnxruntime_conflict() else "missing", in_options(str(fault)), True)
    return Finding("ONNX Runtime", "ok", f"{version}, runs .onnx engines on the CPU", True)


def providers_finding(here: Gpu | EnvironmentFault) -> Finding:
    try:
        built_in = onnxruntime_providers()
    except EnvironmentFault:
        return Finding("providers", "missing", "no ONNX Runtime")
    if "CUDAExecutionProvider" not in built_in:
        needed = f'--provider cuda needs "pip install {gpu_wheels("cuda")}"'
        return Finding("providers", "missing", f"{', '.join(built_in)}; {needed}")
    found = f"built with {', '.join(built_in)}"
    if not isinstance(here, Gpu):
        return Finding("providers", "ok", f"{found}; --provider cuda needs a GPU")
    if reason := import_fault(CUDA_LIBRARIES):
        return Finding("providers", "broken", f'{found}; {reason}: run "pip install {gpu_wheels("cuda")}"')
    return Finding("providers", "ok", f"{found}, CUDA's libraries load; try certify --provider cuda")


def gpu_here() -> Gpu | EnvironmentFault:
    try:
        return find_gpu()
    except EnvironmentFault as fault:
        return fault


def gpu_finding(here: Gpu | EnvironmentFault) -> Finding:
    if isinstance(here, EnvironmentFault):
        return Finding("NVIDIA GPU", "missing", str(here))
    found = f"{here.name}, compute capability {here.compute_capability}, driver for CUDA {here.driver}"
    if here.cuda_major < OLDEST_CUDA:
        return Finding("NVIDIA GPU", "broken", f"{found}; plans need a driver for CUDA {OLDEST_CUDA} or later")
    return Finding("NVIDIA GPU", "ok", f"{found}; plans: densepure-rt[{tensorrt_extra(here.cuda_major)}]")


def cuda_finding() -> Finding:
    found = installed_versions(*CUDA_PACKAGES)
    if missing := [name for name in CUDA_PACKAGES if name not in found]:
        return Finding(
            "CUDA packages",
            "missing",
            f"no {', '.join(missing)}; needed to run plans: densepure-rt[tensorrt-cu12] or -cu13",
        )
    return imported("CUDA packages", CUDA_STATEMENTS)


def tensorrt_finding(flavour: Flavour, here: Gpu | EnvironmentFault) -> Finding:
    """Say what a flavour is good for here: where there is a GPU, once a builder was made beside it."""
    if find_spec(MODULES[flavour]) and (reason := import_fault(f"import {MODULES[flavour]}")):
        return Finding(flavour, "broken", f"it cannot be imported ({reason})")
    try:
        version = import_flavour(flavour).__version__
    except EnvironmentFault as fault:
        return Finding(flavour, "missing", in_options(str(fault)))
    if isinstance(here, Gpu):
        if flavour == "tensorrt-rtx" and here.compute_capability not in RTX_CAPABILITIES:
            return Finding(flavour, "missing", f"{version}, which builds nothing for {here.compute_capability}")
        if reason := import_fault(MAKE.format(module=MODULES[flavour], kind="Builder")):
            return Finding(flavour, "broken", does_not_start(version, reason, here, tensorrt_extra(here.cuda_major)))
        return Finding(flavour, "ok", f"{version}, builds and runs plans: a builder was made")
    if flavour == "tensorrt-rtx":
        return Finding(flavour, "ok", f"{version}, builds plans for GPUs elsewhere: export --target tensorrt-rtx")
    return Finding(flavour, "missing", f"{version} is installed, but builds and runs plans on a GPU only")


def lean_finding(here: Gpu | EnvironmentFault) -> Finding:
    """Say whether the lean runtime starts here: it runs version-compatible plans, and builds none."""
    extra = f"tensorrt-lean-cu{13 if not isinstance(here, Gpu) or here.cuda_major >= 13 else 12}"
    if not find_spec(LEAN):
        return Finding("tensorrt-lean", "missing", f"not installed; runs plans for any version: densepure-rt[{extra}]")
    if reason := import_fault(f"import {LEAN}"):
        return Finding("tensorrt-lean", "broken", f"it cannot be imported ({reason})")
    version = str(import_module(LEAN).__version__)
    if not isinstance(here, Gpu):
        return Finding("tensorrt-lean", "missing", f"{version} is installed, but runs plans on a GPU only")
    if fault := import_fault(MAKE.format(module=LEAN, kind="Runtime")):
        return Finding("tensorrt-lean", "broken", does_not_start(version, fault, here, extra))
    return Finding("tensorrt-lean", "ok", f"{version}, runs version-compatible plans: a runtime was made")


def does_not_start(version: str, fault: str, here: Gpu, extra: str) -> str:
    return (
        f"{version} does not start ({fault}); the driver runs CUDA {here.driver}: pip install 'densepure-rt[{extra}]'"
    )


def export_finding() -> Finding:
    missing = [name for name in EXPORT_PACKAGES if find_spec(name) is None]
    if missing:
        return Finding("export", "missing", f"no {', '.join(missing)}; needed by `export` alone: densepure-rt[export]")
    return imported("export", {name: STATEMENTS.get(name, f"import {name}") for name in EXPORT_PACKAGES})


def extra_finding(extra: str, statements: Mapping[str, str]) -> Finding:
    """Report on the packages of an extra: missing, broken or ok."""
    found = installed_versions(*statements)
    if missing := [name for name in statements if name not in found]:
        return Finding(extra, "missing", f"no {', '.join(missing)}: densepure-rt[{extra}]")
    return imported(extra, statements)


def imported(what: str, statements: Mapping[str, str]) -> Finding:
    """Run import statements, by distribution, in a Python of their own and report on them."""
    faults = import_faults(statements.values())
    versions = installed_versions(*statements)
    named = {name: f"{name} {versions.get(name, '')}".rstrip() for name in statements}
    if broken := {name: faults[line] for name, line in statements.items() if faults[line] is not None}:
        reasons = dict.fromkeys(broken.values())
        names = [", ".join(named[name] for name in broken if broken[name] == reason) for reason in reasons]
        lines = [f"{who} cannot be imported: {reason}" for who, reason in zip(names, reasons, strict=True)]
        return Finding(what, "broken", "; ".join(lines))
    return Finding(what, "ok", ", ".join(named.values()))


def import_faults(statements: Iterable[str]) -> dict[str, str | None]:
    """Return why each statement fails, or None.

    All run in one Python first. Where that fails each runs in its own, so that a crash or a hang is its own.
    """
    lines = list(statements)
    if import_fault("\n".join(lines)) is None:
        return dict.fromkeys(lines)
    with ThreadPoolExecutor(available_cores()) as pool:
        return dict(zip(lines, pool.map(import_fault, lines), strict=True))


def import_fault(statement: str, seconds: float = IMPORT_SECONDS) -> str | None:
    """Run a statement in a new Python; return why it fails, in one line, or None."""
    command = [sys.executable, "-c", IMPORT_CODE, statement]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"it takes more than {seconds:g} s"
    if done.returncode == 0:
        return None
    _, said, reason = done.stdout.rpartition("densepure-rt: ")
    if said:
        return reason.strip()
    return f"Python ends with signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"


def engines_finding() -> Finding:
    try:
        bundle, on_gpu = open_bundle(shipped_engine()), open_bundle(shipped_engine(on_gpu=True))
        for found in (bundle, on_gpu):
            for path, expected in ((found.unet_path, found.unet), (found.classifier_path, found.classifier)):
                if sha256_of(path) != expected.file.sha256:
                    return Finding("shipped engines", "broken", f"{path} does not match its sidecar", True)
    except (DensePureError, OSError) as error:
        return Finding("shipped engines", "broken", in_options(str(error)), True)
    said = f"{bundle.unet_path}, {bundle.unet.precision}, on a GPU {on_gpu.unet.precision}, hashes match"
    return Finding("shipped engines", "ok", said, True)
