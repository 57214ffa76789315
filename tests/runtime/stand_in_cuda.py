"""Libraries of CUDA's names that compute nothing, so that the real GPU build of ONNX Runtime loads and opens a graph.

It then takes its own decisions on the graph: which kernels there are, and which nodes go to the CPU. Memory is this
machine's, every call succeeds, no kernel runs: nothing that comes of `run` means anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILT_FOR_GPUS = Path(sys.prefix) / "onnxruntime-gpu"  # `make test` puts an ONNX Runtime with the GPU providers there
PROVIDER = Path("onnxruntime/capi/libonnxruntime_providers_cuda.so")
DRIVER, CUDNN = "libcuda.so.1", "libcudnn.so.9"  # the second is opened by name, from ONNX Runtime 1.28 on
ALLOCATE = "{{ *p = calloc(1, n + 256); return 0; }}"
HANDLES = (
    "cudaStreamCreate cudaStreamCreateWithFlags cudaStreamCreateWithPriority cudaEventCreate cudaEventCreateWithFlags "
    "cublasCreate_v2 cublasLtCreate cudnnCreate curandCreateGenerator"
)
BODIES = {
    "cudaMalloc": "int {}(void **p, size_t n) " + ALLOCATE,
    "cudaMallocHost": "int {}(void **p, size_t n) " + ALLOCATE,
    "cudaHostAlloc": "int {}(void **p, size_t n, unsigned f) " + ALLOCATE,
    "cudaFree": "int {}(void *p) {{ free(p); return 0; }}",
    "cudaFreeHost": "int {}(void *p) {{ free(p); return 0; }}",
    "cudaMemcpy": "int {}(void *d, const void *s, size_t n, int k) {{ memcpy(d, s, n); return 0; }}",
    "cudaMemcpyAsync": "int {}(void *d, const void *s, size_t n, int k, void *t) {{ memcpy(d, s, n); return 0; }}",
    "cudaGetDeviceCount": "int {}(int *n) {{ *n = 1; return 0; }}",
    "cudaGetDevice": "int {}(int *n) {{ *n = 0; return 0; }}",
    "cudaMemGetInfo": "int {}(size_t *f, size_t *t) {{ *f = *t = 8ul << 30; return 0; }}",
    "cudaDeviceGetAttribute": "int {}(int *v, int a, int d) {{ *v = a == 75 ? 9 : a == 76 ? 0 : 1024; return 0; }}",
    "cudaRuntimeGetVersion": "int {}(int *v) {{ *v = CUDA * 1000; return 0; }}",
    "cudaDriverGetVersion": "int {}(int *v) {{ *v = CUDA * 1000; return 0; }}",
    "cudaGetErrorName": 'const char *{}(int e) {{ return "stand-in"; }}',
    "cudaGetErrorString": 'const char *{}(int e) {{ return "stand-in"; }}',
    # The driver, as runtime/gpu.py asks it.
    "cuInit": "int {}(unsigned f) {{ return 0; }}",
    "cuDriverGetVersion": "int {}(int *v) {{ *v = DRIVER_CUDA * 1000; return 0; }}",
    "cuDeviceGet": "int {}(int *d, int n) {{ *d = n; return 0; }}",
    "cuDeviceGetName": 'int {}(char *p, int n, int d) {{ strncpy(p, "stand-in", n); return 0; }}',
    "cuDeviceGetAttribute": "int {}(int *v, int a, int d) {{ *v = a == 75 ? 9 : 0; return 0; }}",
    "cuDeviceTotalMem_v2": "int {}(size_t *n, int d) {{ *n = 8ul << 30; return 0; }}",
} | dict.fromkeys(HANDLES.split(), "int {}(void **p) {{ *p = (void *)1; return 0; }}")
BODIES |= dict.fromkeys(
    ("cudaGetDeviceProperties", "cudaGetDeviceProperties_v2"),
    'int {}(char *p, int d) {{ memset(p, 0, 700); strcpy(p, "stand-in"); return 0; }}',
)

needs_stand_in = pytest.mark.skipif(
    not (BUILT_FOR_GPUS / PROVIDER).is_file() or not all(map(shutil.which, ("gcc", "nm", "readelf"))),
    reason="no ONNX Runtime with GPU providers here, or no gcc",
)


def said_by(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, timeout=120).stdout


def make_stand_in(folder: Path, build: Path = BUILT_FOR_GPUS, driver: int | None = None) -> int:
    """Compile the libraries that a GPU build of ONNX Runtime asks for, and return the CUDA that it was built for.

    driver: The CUDA that the driver runs; None for the one of the build.
    """
    provider = build / PROVIDER
    needed = set(re.findall(r"\[(libcu\S+)\]", said_by("readelf", "-d", provider))) | {DRIVER, CUDNN}
    functions: dict[str, set[str]] = {library: set() for library in needed}
    functions[DRIVER] |= {name for name in BODIES if re.match("cu[A-Z]", name)}
    versioned = set()
    for line in said_by("nm", "-D", "--undefined-only", provider).splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library in needed:
            versioned.add(library)
        elif found := re.match(r"(?:__)?(cuda|cudnn|cublas|cufft|curand|cu(?=[A-Z]))", name):
            start = {"cu": "libcuda.", "cuda": "libcudart."}.get(found[1], f"lib{found[1]}.")
            library = next(library for library in needed if library.startswith(start))
        else:
            continue
        functions[library].add(name)
    # Opened by name, its functions are named in the provider's text alone.
    functions[CUDNN] |= {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())}
    (cuda,) = {int(library.rpartition(".")[2]) for library in needed if library.startswith("libcudart.")}
    for library, names in functions.items():
        compile_library(folder / library, names, library in versioned, cuda, cuda if driver is None else driver)
    return cuda


def compile_library(path: Path, names: set[str], versioned: bool, cuda: int, driver: int) -> None:
    lines = ["#include <stdlib.h>", "#include <string.h>", "int stand_in_;"]
    lines += [BODIES.get(name, "long {}(void) {{ return 0; }}").format(name) for name in sorted(names)]
    source = path.with_name(path.name + ".c")
    source.write_text("\n".join([*lines, ""]))
    command = ["gcc", "-shared", "-fPIC", "-w", f"-DCUDA={cuda}", f"-DDRIVER_CUDA={driver}", f"-Wl,-soname,{path.name}"]
    if versioned:
        versions = path.with_name(path.name + ".map")
        versions.write_text(f"{path.name} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={versions}")
    said_by(*command, "-o", path, source)


def with_stand_in(code: str, folder: Path, *arguments: object) -> str:
    """Return what a new Python prints for `code`, with the GPU build of ONNX Runtime and these libraries."""
    environment = os.environ | {"PYTHONPATH": str(BUILT_FOR_GPUS), "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
