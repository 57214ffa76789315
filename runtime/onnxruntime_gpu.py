"""What ONNX Runtime's GPU providers need: their libraries, their options, and why one of them cannot be used.

A certificate is about one function: a provider that times its kernels picks others in every process. CUDA's is told to
choose by heuristics, and TensorRT's engines are kept in files, whose hash is part of a run's identity.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import onnxruntime

from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime import gpu
from densepure_rt.runtime.bundle import sha256_of
from densepure_rt.runtime.device import Provider
from densepure_rt.runtime.machine import cache_folder, installed_versions
from densepure_rt.runtime.onnxruntime_api import gpu_wheels
from densepure_rt.runtime.tensorrt_api import import_flavour

# Any other value, or none, lets NVIDIA's libraries round float32 to TensorFloat-32 where they are not told otherwise,
# and the TensorRT provider has no option for it. Source: "TF32" in NVIDIA's TensorRT documentation.
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
CUDNN = "libcudnn.so.9"  # the CUDA provider opens it with the first convolution, and says nothing before
TENSORRT_WHEELS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
ENGINE_FILES = "*.engine"
# CUDA kernels came late to ReduceMax-20 and Resize-19: 1.26, the last ONNX Runtime for CUDA 12, leaves the first to the
# CPU, and 1.23, the last for Python 3.10, both. From 18 to 20 operators gained types and attributes, and nothing else.
NEWEST_OPSET, OLD_OPSET = 20, 18
OPSET_IMPORT, DOMAIN, VERSION = 8, 1, 2  # field numbers of ModelProto and OperatorSetIdProto, onnx.proto
LENGTH_DELIMITED = 2  # a wire type; protobuf.dev/programming-guides/encoding
T = TypeVar("T")


def prepare(provider: Provider) -> gpu.Gpu:
    """Load the libraries of a GPU provider from the wheels that are installed, and return the GPU.

    Raises EnvironmentFault where there is none. What cannot be loaded is told by `fault`, once the provider failed.
    """
    try:
        here = gpu.find()
    except EnvironmentFault as error:
        raise EnvironmentFault(f"`provider` {provider}: {error}") from error
    os.environ.update(NO_TF32)
    if hasattr(onnxruntime, "preload_dlls"):  # since ONNX Runtime 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()
    if provider == "tensorrt":
        with contextlib.suppress(EnvironmentFault):
            import_flavour("tensorrt")  # its wheel loads libnvinfer, which the provider is linked to
    return here


def provider_options(provider: Provider, engines: Path | None) -> dict[str, str]:
    """Return the options by which a provider computes the same in every process, in float32 where the graph has it.

    The TensorRT provider takes the graph's own types only while its switches for fp16 and int8 are off: its network is
    then strongly typed (`kSTRONGLY_TYPED` in its source), and either of them would let it choose.
    """
    if provider == "cuda":
        return {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    typed = {"trt_fp16_enable": "0", "trt_int8_enable": "0"}
    kept = {} if engines is None else {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engines)}
    return typed | kept


def engine_folder(content: bytes, batch: int | None) -> Path:
    """Return the folder of a graph's TensorRT engines: there is one for each batch, GPU, driver and version."""
    key = [hashlib.sha256(content).hexdigest(), batch, onnxruntime.__version__]
    key += [prepare("tensorrt").facts, installed_versions(*TENSORRT_WHEELS)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "onnxruntime-tensorrt" / name


def with_engines(folder: Path, open_with: Callable[[Path], T]) -> T:
    """Return `open_with(folder)`, once the engines are there: the first process runs what later ones load.

    Where several build at a time, the first that is done is kept. Raises EnvironmentFault when none is left behind.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as new:
            open_with(Path(new))
            if not any(Path(new).glob(ENGINE_FILES)):
                raise EnvironmentFault(
                    f"`provider` tensorrt: ONNX Runtime {onnxruntime.__version__} has left no engine in its cache, and "
                    "would build another one in each process: use `provider` cuda, or a plan"
                )
            with contextlib.suppress(OSError):  # another process has put its own there
                Path(new).rename(folder)
    return open_with(folder)


def engines_sha256(*folders: Path) -> str:
    """Return one hash of the engines in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob(ENGINE_FILES)):
            digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def left_to_the_cpu(error: Exception | str) -> bool:
    """Say whether ONNX Runtime refused a session because nodes of it would run on the CPU, or seems to have."""
    return "assigned to the default CPU EP" in str(error)


def fault(provider: Provider, name: str, here: gpu.Gpu, reason: str) -> str:
    """Say why a provider cannot be used for a graph, and the next move.

    ONNX Runtime says that nodes are left to the CPU also when the provider's libraries were not found, or it did not
    start: whatever can be looked at is looked at first.
    """
    start = f"`provider` {provider}: ONNX Runtime {onnxruntime.__version__} "
    built_for = str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]
    install = f'run "pip install {gpu_wheels(provider)}"'
    if built_for and int(built_for) > here.cuda_major:
        return f"{start}is built for CUDA {built_for}, the driver runs CUDA {here.driver}: {install}, or a newer driver"
    if absent := library_fault(provider):
        return f'{start}cannot load its libraries ({absent}): {install}, and see "densepure-rt doctor"'
    if left_to_the_cpu(reason):
        return (
            f"{start}would run nodes of {name} on the CPU: export the bundle again, build a plan with "
            f'"densepure-rt export --target tensorrt", or leave `provider` out to run on the CPU'
        )
    lines = [line for line in reason.splitlines() if line.strip()]
    return (
        f'{start}cannot use it here ({lines[0] if lines else "no reason given"}): see "densepure-rt doctor", or leave '
        "`provider` out to run on the CPU"
    )


def library_fault(provider: Provider) -> str | None:
    """Return what the loader says of a provider's libraries, or None where they load."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    shared, own = (folder / f"libonnxruntime_providers_{part}.so" for part in ("shared", provider))
    if not own.exists():  # linked into ONNX Runtime itself, or of another system
        return None
    try:
        ctypes.CDLL(str(shared), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(own))
        ctypes.CDLL(CUDNN)
    except OSError as error:
        return str(error)
    return None


def at_opset(model: bytes, opset: int = OLD_OPSET) -> bytes:
    """Return an ONNX file of opset 19 or 20 as one of an older opset; another one, or what cannot be read, as it is."""
    changed = bytearray(model)
    with contextlib.suppress(IndexError, ValueError):
        for number, start, end in fields_of(model, 0, len(model)):
            if number != OPSET_IMPORT:
                continue
            inner = {field: (first, last) for field, first, last in fields_of(model, start, end)}
            domain = model[slice(*inner[DOMAIN])] if DOMAIN in inner else b""
            place = inner.get(VERSION, (0, 0))[0]
            if domain in (b"", b"ai.onnx") and opset < model[place] <= NEWEST_OPSET:
                changed[place] = opset  # below 128: one byte, as before
    return bytes(changed)


def fields_of(message: bytes, start: int, end: int) -> list[tuple[int, int, int]]:
    """Return number, first and last byte of the content of each field of a protobuf message. Raises ValueError."""
    found = []
    while start < end:
        tag, start = varint(message, start)
        first = start
        if tag & 7 == LENGTH_DELIMITED:
            length, first = varint(message, start)
            start = first + length
        elif tag & 7 == 0:
            _, start = varint(message, start)
        else:
            raise ValueError(f"wire type {tag & 7}")
        found.append((tag >> 3, first, start))
    return found


def varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number that begins there, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value, place, shift = value | (byte & 0x7F) << shift, place + 1, shift + 7
        if byte < 0x80:
            return value, place
