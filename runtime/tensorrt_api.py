"""The flavours of TensorRT behind one name: `tensorrt` (10.3 to 11), its lean runtime, and `tensorrt-rtx` (1.x).

Their Python bindings differ in a few names, which stand in `GUARDED`. A plan of tensorrt-rtx runs on that alone. One of
tensorrt runs on the version that built it; built for later versions too, it runs on the lean library of that version,
which is loaded by its own bindings or by those of a later version.

None of them raises: failure is None or False, and what went wrong goes to the logger alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from densepure_rt import files
from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault
from densepure_rt.runtime import gpu
from densepure_rt.runtime.bundle import (
    Flavour,
    Plan,
    Sidecar,
    rebuild_command,
    refuse_damaged_plan,
    release,
    same_release,
    verified_engine,
)
from densepure_rt.runtime.machine import installed_versions

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LEAN, LEAN_MODULE = "tensorrt-lean", "tensorrt_lean"
LEAN_PACKAGES = ("tensorrt_lean_cu13", "tensorrt_lean_cu12", "tensorrt_lean")
CACHE_SUFFIX = ".cache"
LEAN_LIBRARIES, LEAN_FILE = "tensorrt_lean_libs", "libnvinfer_lean.so"
VERSION_PARTS = ("Major", "Minor", "Patch", "Build")  # getInferLibMajorVersion ..., which every library exports

# Names that not every flavour and version has, and which have them. All other names that are used here exist in
# tensorrt 10.3.0 (JetPack 6), the newest 10.x, 11.x and tensorrt-rtx 1.7: a test reads them off the libraries.
GUARDED = {
    "ComputeCapability": "tensorrt-rtx",
    "num_compute_capabilities": "tensorrt-rtx",
    "set_compute_capability": "tensorrt-rtx",
    "create_runtime_config": "tensorrt-rtx, and tensorrt from 10.9",
    "CudaGraphStrategy": "tensorrt-rtx",
    "cuda_graph_strategy": "tensorrt-rtx",
    "WHOLE_GRAPH_CAPTURE": "tensorrt-rtx",
    "DynamicShapesKernelSpecializationStrategy": "tensorrt-rtx",
    "dynamic_shapes_kernel_specialization_strategy": "tensorrt-rtx",
    "EAGER": "tensorrt-rtx",
    "create_runtime_cache": "tensorrt-rtx",
    "set_runtime_cache": "tensorrt-rtx",
    "SAME_COMPUTE_CAPABILITY": "tensorrt-rtx, and tensorrt later than 10.3",
    "DISTRIBUTIVE_INDEPENDENCE": "tensorrt-rtx, and tensorrt later than 10.3",
    "TilingOptimizationLevel": "tensorrt-rtx, and tensorrt later than 10.3",
    "tiling_optimization_level": "tensorrt-rtx, and tensorrt later than 10.3",
    "FAST": "tensorrt-rtx, and tensorrt later than 10.3",
    "MODERATE": "tensorrt-rtx, and tensorrt later than 10.3",
    "FULL": "tensorrt-rtx, and tensorrt later than 10.3",
}


@dataclass(frozen=True)
class Library:
    """A library that runs a plan.

    Attributes:
        name: As a record names it: a flavour, or tensorrt-lean.
        version: Of the library that runs the plan, which is older than its bindings where `lean` is set.
        bindings: The Python module.
        lean: The lean library that the bindings load, or None.
    """

    name: str
    version: str
    bindings: Any
    lean: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def import_flavour(flavour: Flavour) -> Any:
    """The Python module of that flavour. Raises EnvironmentFault with the repair when it cannot be imported."""
    try:
        return importlib.import_module(MODULES[flavour])
    except Exception as error:  # missing, or the bindings are here and the libraries are not
        extra = "on a Jetson it comes with JetPack: make the virtual environment with --system-site-packages"
        raise EnvironmentFault(
            f"{flavour} cannot be imported ({first_line(error)}): run \"pip install 'densepure-rt[{flavour}]'\""
            + (f"; {extra}" if flavour == "tensorrt" else "")
        ) from error


def import_lean(package: str) -> Any:
    """The Python module of the lean runtime. Raises EnvironmentFault with the repair when it cannot be imported."""
    try:
        return importlib.import_module(LEAN_MODULE)
    except Exception as error:
        raise EnvironmentFault(
            f"{LEAN} is installed and cannot be imported ({first_line(error)}): run {package}"
        ) from error


def library_for(plan: Plan, name: str, rebuild: str) -> Library:
    """Find the library that runs a plan. Raises EnvironmentFault when none that is installed does.

    name: of the plan's file. rebuild: the command that builds it on this machine.
    """
    of_any_version = plan.version_compatible and plan.flavour == "tensorrt"
    return compatible_library(plan, name, rebuild) if of_any_version else full_library(plan, name, rebuild)


def full_library(plan: Plan, name: str, rebuild: str) -> Library:
    """Import the library that built a plan. Raises EnvironmentFault where it is another version, or missing."""
    bindings = import_flavour(plan.flavour)
    if not same_release(plan.version, bindings.__version__):
        raise EnvironmentFault(
            f'{name} was built by {plan.flavour} {plan.version}, here is {bindings.__version__}: run "{rebuild}"'
        )
    return Library(plan.flavour, bindings.__version__, bindings)


def compatible_library(plan: Plan, name: str, rebuild: str) -> Library:
    """Find the lean library of the version that built a plan, or that version of tensorrt itself.

    A later version's bindings load it (`load_runtime`), no earlier one's do.
    """
    package = f'"pip install tensorrt-lean-cu12=={plan.version}" (-cu13 where the driver runs CUDA 13)'
    if any(same_release(plan.version, found) for found in installed_versions(*LEAN_PACKAGES).values()):
        bindings = import_lean(package)
        return Library(LEAN, bindings.__version__, bindings)
    here = [import_flavour("tensorrt")] if find_spec(MODULES["tensorrt"]) else []
    here += [import_lean(package)] if find_spec(LEAN_MODULE) else []
    if not here:
        raise EnvironmentFault(f"{name} runs on the lean library of tensorrt {plan.version}: run {package}")
    bindings = max(
        here, key=lambda module: (same_release(plan.version, module.__version__), release(module.__version__))
    )
    if same_release(plan.version, bindings.__version__):
        return Library(plan.flavour, bindings.__version__, bindings)
    if release(plan.version) > release(bindings.__version__):
        raise EnvironmentFault(
            f"{name} was built by tensorrt {plan.version}, here is {bindings.__version__}, and no plan runs on an "
            f'earlier version: run {package}, or "{rebuild}"'
        )
    if (lean := lean_library(plan.version)) is None:
        raise EnvironmentFault(
            f"{name} was built by tensorrt {plan.version} and runs on the lean library of that version; here is "
            f'{bindings.__version__}: run {package}, or "{rebuild}"'
        )
    return Library(LEAN, plan.version, bindings, lean)


def lean_library(version: str) -> str | None:
    """Find the lean library of that version, in its own package or where the system keeps libraries.

    Never beside a plan: it is code.
    """
    package = find_spec(LEAN_LIBRARIES)
    places = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    packaged = [str(path) for place in places for path in sorted(place.glob(f"{LEAN_FILE}.*"))]
    numbers = release(version)
    installed = [f"{LEAN_FILE}.{'.'.join(map(str, numbers[:count]))}" for count in (3, 1)]
    for path in (*packaged, *installed):
        if (found := library_version(path)) is not None and same_release(found, version):
            return path
    return None


def library_version(path: str) -> str | None:
    """Ask a library of TensorRT for its version; None where it cannot be loaded."""
    try:
        library = ctypes.CDLL(path)
        return ".".join(str(getattr(library, f"getInferLib{part}Version")()) for part in VERSION_PARTS)
    except (OSError, AttributeError):
        return None


def new_runtimes(library: Library, logger: Any) -> list[Any]:
    """Make the runtime that opens plans, the last of these; it lives on those before it.

    Where CUDA cannot start, the bindings give an object around a null pointer, and any use of it ends the process, as
    does freeing it: so nothing is asked of it before the logger is, and it is kept for ever.

    Raises:
        EnvironmentFault: CUDA does not start here, or the lean library does not load.
    """
    runtimes = [library.bindings.Runtime(logger)]
    if library.lean is not None and not logger.errors:
        runtimes.append(runtimes[0].load_runtime(library.lean))
    if logger.errors or runtimes[-1] is None:
        for kept in (logger, *runtimes):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        raise EnvironmentFault(
            f'{library} cannot start here ({logger.summary() or "it gives no reason"}): run "densepure-rt doctor"'
        )
    return runtimes


class KernelCache:
    """The kernels that tensorrt-rtx compiles when a plan runs first, in a file beside the plan.

    What is there is taken if it is this user's own; the library refuses what another GPU, driver or version made.
    """

    def __init__(self, config: Any, plan: Path) -> None:
        self.path = plan.with_name(plan.name + CACHE_SUFFIX)
        self.known, self.cache = b"", config.create_runtime_cache()
        with contextlib.suppress(OSError, DensePureError):  # it is compiled again
            if self.path.stat().st_uid == getattr(os, "getuid", int)():
                self.known = files.content(self.path, "model")
                self.cache.deserialize(self.known)
        config.set_runtime_cache(self.cache)

    def keep(self) -> None:
        """Write what was compiled since; without room or leave to do so, the next process compiles it again."""
        found = bytes(self.cache.serialize() or b"")
        if found in (b"", self.known):
            return
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.write_bytes(found)
            os.replace(temporary, self.path)
            self.known = found
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def layers_of(path: Path, sidecar: Sidecar) -> list[dict[str, Any]]:
    """Return what TensorRT's inspector says of each layer of a plan; a plan opens on its own GPU only.

    Raises:
        EnvironmentFault: There is no GPU or no full library, or it refuses the plan.
    """
    plan = sidecar.plan
    assert plan is not None
    content, rebuild = verified_engine(path, sidecar), rebuild_command(path, sidecar)
    refuse_damaged_plan(path.name, plan, content)
    gpu.find()
    library = full_library(plan, path.name, rebuild)  # the lean one has no inspector
    logger = new_logger(library.bindings)
    *_, runtime = runtimes = new_runtimes(library, logger)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EnvironmentFault(f'{library} refuses {path.name} ({logger.summary()}): run "{rebuild}"')
    said = engine.create_engine_inspector().get_engine_information(library.bindings.LayerInformationFormat.JSON)
    del engine, runtimes
    try:
        layers = json.loads(said)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckFailed(f"{library} describes the layers of {path.name} in words that are not known here") from error
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]  # a plan may hold names alone


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def new_logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors in `messages` instead of printing them.

    TensorRT holds no reference to it: keep it for as long as anything that was made with it.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 insists on its own base, not on super()
            self.messages: list[str] = []
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            if severity != trt.ILogger.VERBOSE:
                self.messages.append(message)

        def summary(self, lines: int = 4) -> str:
            """The last errors, or else the last messages: TensorRT says the cause before it says that it failed."""
            return "; ".join(dict.fromkeys(message.strip() for message in (self.errors or self.messages)[-lines:]))

        def warned(self) -> Iterator[str]:
            """Yield each warning once, and forget them."""
            yield from dict.fromkeys(message.strip() for message in self.warnings)
            self.warnings.clear()

    return Messages()


def new_profiler(trt: Any) -> Any:
    """A profiler that adds up, by layer, the milliseconds that a context reports after each call."""

    class Times(trt.IProfiler):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.found: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.found[layer_name] = self.found.get(layer_name, 0.0) + ms

    return Times()
