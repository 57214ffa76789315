"""What this machine computes with: processor, instruction sets, free memory, and the GPU libraries that are loaded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

TEGRA = Path("/etc/nv_tegra_release")  # there on every Jetson
CPUINFO, MAPS, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/self/maps"), Path("/proc/meminfo")
MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")  # of a container: "max" or bytes, docs.kernel.org/admin-guide/cgroup-v2
# The flags by which ONNX Runtime chooses its kernels, as Linux names them: "flags" of an x86, "Features" of an Arm.
SETS = re.compile(r"avx|fma|f16c|amx|sse4|asimd|sve|sme(?!p)|i8mm|bf16|fphp", re.ASCII)
ARM_MODEL = ("CPU implementer", "CPU part", "CPU variant")


def _fields() -> Iterator[tuple[str, str]]:
    """Yield the (name, value) lines of /proc/cpuinfo; nothing where there is none."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            yield name.strip(), value.strip()


def processor() -> str:
    """Name this machine's CPU, as far as the system tells: a model name, on an Arm its implementer and part."""
    fields: dict[str, str] = {}
    for name, value in _fields():
        fields.setdefault(name, value)
    if model := fields.get("model name"):
        return model
    arm = [fields[name] for name in ARM_MODEL if name in fields]
    return " ".join([platform.machine(), *arm]) if arm else platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Name the vector instruction sets that every core has, sorted; empty where the system does not tell."""
    cores = [set(value.split()) for name, value in _fields() if name in ("flags", "Features")]
    return tuple(sorted(flag for flag in set.intersection(*cores) if SETS.match(flag))) if cores else ()


def available_memory() -> int | None:
    """Return the bytes that new work can have, by Linux and the limit of a container; None where none is told."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):
        found.append(int(MEMORY_MAX.read_text(encoding="ascii")))
    return min(found, default=None)


def loaded_version(library: str, ask: Callable[[ctypes.CDLL], int | None]) -> int | None:
    """Return the version that a library of this process reports, or None where it is not loaded or does not say.

    Args:
        library: How the file is called, such as "libcudnn.so".
        ask: Reads the version from the loaded library.
    """
    with contextlib.suppress(OSError, AttributeError):
        paths = (line.split(maxsplit=5)[-1] for line in MAPS.read_text(errors="replace").splitlines())
        for path in dict.fromkeys(path for path in paths if Path(path).name.startswith(library)):
            return ask(ctypes.CDLL(path))
    return None


def cudart_version(library: ctypes.CDLL) -> int | None:
    """Ask libcudart for its version, such as 12080. Source: cudaRuntimeGetVersion of the CUDA Runtime API."""
    version = ctypes.c_int()
    return None if library.cudaRuntimeGetVersion(ctypes.byref(version)) else version.value


def cudnn_version(library: ctypes.CDLL) -> int | None:
    """Ask libcudnn for its version, such as 91002. Source: cudnnGetVersion of the cuDNN API."""
    library.cudnnGetVersion.restype = ctypes.c_size_t
    return int(library.cudnnGetVersion())


def tensorrt_version(library: ctypes.CDLL) -> int | None:
    """Ask libnvinfer, or libtensorrt_rtx, for its version, such as 101601. Source: NvInferRuntime.h."""
    return int(library.getInferLibVersion())


GPU_LIBRARIES: Mapping[str, tuple[str, Callable[[ctypes.CDLL], int | None]]] = {
    "cuda": ("libcudart.so", cudart_version),
    "cudnn": ("libcudnn.so", cudnn_version),
    "tensorrt": ("libnvinfer.so", tensorrt_version),
}


def gpu_libraries() -> dict[str, str]:
    """Return the versions of the CUDA runtime, cuDNN and TensorRT that this process has loaded."""
    found = {name: loaded_version(*asked) for name, asked in GPU_LIBRARIES.items()}
    return {name: str(version) for name, version in found.items() if version is not None}


def tensorrt_extra(cuda_major: int) -> str:
    """Return the extra whose TensorRT a driver runs. cuda_major: of the newest CUDA that the driver runs."""
    newest = 13 if cuda_major >= 13 else 12
    if TEGRA.exists():
        return f"tensorrt-jetpack{newest - 6}"
    return f"tensorrt-cu{newest}"


def installed_versions(*distributions: str) -> dict[str, str]:
    """The versions of those distributions that are installed here."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Return the folder for what may be lost: `densepure-rt` in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "densepure-rt"
