"""Stands for a GPU on this processor: what TensorRTDevice calls of cuda.core and of TensorRT's runtime, and no more.

Kernels are runtime/kernels.cu, compiled by g++. A plan is an ONNX file, run by ONNX Runtime on what lies at the bound
addresses. A stream is a queue that runs as late as CUDA may, when somebody waits; or else as early. Memory is poisoned
when it is allocated and freed, and fenced. What CUDA or TensorRT refuses, or leaves undefined, is refused here.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from densepure_rt.runtime import gpu, tensorrt_device
from densepure_rt.runtime.bundle import (
    HEADER,
    TAGS,
    Bundle,
    FileRef,
    Flavour,
    Plan,
    Sidecar,
    open_bundle,
    plan_path,
    release,
    sha256_of,
    sidecar_path,
    to_json,
)
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.tensorrt_api import Library
from densepure_rt.runtime.tensorrt_device import TensorRTDevice

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
HOST_SOURCE = Path(__file__).with_name("kernels_host.cpp")
COMPILE = "-std=c++17 -O2 -ffp-contract=off -shared -fPIC".split()
# Of each kernel, which parameters are pointers; the others are int.
PARAMETERS = {
    name: ["*" in parameter for parameter in parameters.split(",")]
    for name, parameters in re.findall(
        r'extern "C" __global__ void (\w+)\(([^)]*)\)', (RUNTIME / "kernels.cu").read_text()
    )
}
POISON = 0xFF  # as a float NaN, as an integer -1
ALIGNMENT = 256
FENCE = 4096  # bytes of POISON around an allocation: more than a slot of the images in the tests
MOST_ROWS = 65_535  # of a grid's y
GPU = gpu.Gpu("a processor", "8.9", "13.0")
VERSION = "10.16.1"

Work = Callable[[], None]


class HostError(Exception):
    """What would be a CUDA error, or worse, none."""


def compile_host(compiler: str, folder: Path) -> ctypes.CDLL:
    library = folder / "kernels.so"
    command = [compiler, *COMPILE, f"-I{RUNTIME}", str(HOST_SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return ctypes.CDLL(str(library))


class Memory:
    """Allocations by address. What was freed is kept, poisoned, so that a stale pointer finds NaN."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}  # address -> size
        self.whole: dict[int, NDArray[np.uint8]] = {}  # address -> fence, allocation, fence

    def allocate(self, size: int) -> int:
        content = np.full(FENCE + ALIGNMENT + size + FENCE, POISON, np.uint8)
        address = -(-(content.ctypes.data + FENCE) // ALIGNMENT) * ALIGNMENT
        self.live[address], self.whole[address] = size, content
        return address

    def free(self, address: int) -> None:
        self.at(address, self.live[address])[:] = POISON
        del self.live[address]

    def at(self, address: int, size: int) -> NDArray[np.uint8]:
        """The bytes there. Raises HostError unless all of them are allocated."""
        if not any(start <= address and address + size <= start + length for start, length in self.live.items()):
            raise HostError(f"{size} bytes at {address:#x} are not allocated")
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def fences_hold(self) -> bool:
        """Whether nothing was written beside an allocation, or to a freed one."""
        for address, content in self.whole.items():
            inside = np.zeros(content.size, bool)
            start = address - content.ctypes.data
            inside[start : start + self.live.get(address, 0)] = True
            if (content[~inside] != POISON).any():
                return False
        return True


class Buffer:
    def __init__(self, memory: Memory, address: int, size: int, stream: Stream | None, owner: Buffer | None = None):
        self.memory, self.handle, self.size, self.stream, self.owner = memory, address, size, stream, owner

    @staticmethod
    def from_handle(address: int, size: int, owner: Buffer) -> Buffer:
        return Buffer(owner.memory, address, size, None, owner)

    def copy_from(self, source: Buffer, *, stream: Stream) -> None:
        source.copy_to(self, stream=stream)

    def copy_to(self, target: Buffer, *, stream: Stream) -> None:
        if target.size != self.size:
            raise ValueError(f"buffer sizes mismatch: {self.size} bytes to {target.size}")
        memory, source, to, size = self.memory, self.handle, target.handle, self.size

        def copy() -> None:
            memory.at(to, size)[:] = memory.at(source, size)

        stream.enqueue(copy)

    def close(self, stream: Stream | None = None) -> None:
        """Freed in the order of its stream; pinned memory, which has none, after the stream's work is done."""
        if self.owner is not None or self.handle == 0:
            return
        memory, address = self.memory, self.handle
        self.handle = 0
        if self.stream is not None:
            (stream or self.stream).enqueue(lambda: memory.free(address), recordable=False)
            return
        if stream is not None:
            stream.sync()
        memory.free(address)

    __del__ = close


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.recorded = self.reached = 0

    def sync(self) -> None:
        if self.stream is not None:
            self.stream.run(until=lambda: self.reached == self.recorded)


class Stream:
    def __init__(self, handle: int, early: bool) -> None:
        self.handle, self.early = handle, early
        self.pending: deque[Work] = deque()
        self.captured: list[Work] | None = None
        self.graphs: list[Graph] = []
        self.syncs = 0

    def enqueue(self, work: Work, recordable: bool = True) -> None:
        if self.captured is not None:
            if not recordable:
                raise HostError("memory was freed inside a capture")
            self.captured.append(work)
            return
        self.pending.append(work)
        if self.early:
            self.run()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.pending and not until():
            self.pending.popleft()()

    def sync(self) -> None:
        if self.captured is not None:
            raise HostError("a stream that is being captured cannot be waited for")
        self.syncs += 1
        self.run()

    def record(self, event: Event) -> None:
        event.stream, event.recorded = self, event.recorded + 1
        count = event.recorded

        def reach() -> None:
            event.reached = count

        self.enqueue(reach)

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self)


class GraphBuilder:
    """Captures a stream: what is put on it from now on is recorded, and nothing of it runs."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.work: list[Work] = []

    def begin_building(self) -> GraphBuilder:
        self.stream.captured = []
        return self

    def end_building(self) -> GraphBuilder:
        assert self.stream.captured is not None
        self.work, self.stream.captured = self.stream.captured, None
        return self

    def complete(self) -> Graph:
        graph = Graph(self.work)
        self.stream.graphs.append(graph)
        return graph

    def close(self) -> None:
        self.stream.captured = None


class Graph:
    def __init__(self, work: list[Work]) -> None:
        self.work, self.launches = work, 0

    def launch(self, stream: Stream) -> None:
        self.launches += 1
        for work in self.work:
            stream.enqueue(work)


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    grid: tuple[int, int, int]
    block: int


@dataclasses.dataclass(frozen=True)
class EventOptions:
    blocking_sync: bool


class HostDevice:
    arch = "89"

    def __init__(self, cuda: HostCuda) -> None:
        self.cuda = cuda

    def set_current(self) -> None:
        self.cuda.threads.add(threading.get_ident())

    def create_stream(self) -> Stream:
        stream = Stream(len(self.cuda.streams) + 1, self.cuda.early)
        self.cuda.streams[stream.handle] = stream
        return stream

    def create_event(self, options: EventOptions) -> Event:
        assert options.blocking_sync
        return Event()

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        return self.cuda.allocate(size, stream, stream)


class PinnedMemory:
    def __init__(self, cuda: HostCuda) -> None:
        self.cuda = cuda

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        self.cuda.pinned += 1
        return self.cuda.allocate(size, stream, None)


class HostCuda:
    """The module cuda.core, and what ran on its one device."""

    def __init__(self, library: ctypes.CDLL, early: bool = False) -> None:
        self.Buffer, self.LaunchConfig, self.EventOptions = Buffer, LaunchConfig, EventOptions
        self.library, self.early = library, early
        self.memory = Memory()
        self.streams: dict[int, Stream] = {}
        self.threads: set[int] = set()  # in which the device is current
        self.ran: Counter[str] = Counter()  # kernels and engines, when they run and not when they are recorded
        self.pinned = 0  # allocations
        self.fed: list[bytes] = []  # what the engines were given, in the order in which they ran

    def Device(self, ordinal: int) -> HostDevice:
        assert ordinal == 0
        return HostDevice(self)

    def LegacyPinnedMemoryResource(self) -> PinnedMemory:
        return PinnedMemory(self)

    @property
    def graphs(self) -> list[Graph]:
        return [graph for stream in self.streams.values() for graph in stream.graphs]

    def allocate(self, size: int, on: Stream, owner: Stream | None) -> Buffer:
        self.refuse_other_threads()
        if on.captured is not None:
            raise HostError("memory was allocated inside a capture")
        return Buffer(self.memory, self.memory.allocate(size), size, owner)

    def refuse_other_threads(self) -> None:
        if threading.get_ident() not in self.threads:
            raise HostError("CUDA_ERROR_INVALID_CONTEXT: the device is not current in this thread")

    def launch(self, stream: Stream | GraphBuilder, config: LaunchConfig, kernel: str, *arguments: Any) -> None:
        self.refuse_other_threads()
        if [isinstance(argument, Buffer) for argument in arguments] != PARAMETERS[kernel] or not all(
            isinstance(argument, Buffer | np.int32) for argument in arguments
        ):
            raise TypeError(f"{kernel} does not take {', '.join(type(argument).__name__ for argument in arguments)}")
        x, y, z = config.grid
        if min(x, y, config.block) < 1 or y > MOST_ROWS or z != 1:
            raise HostError(f"{kernel}: no grid {config.grid} of {config.block} threads")
        pointers = [argument.handle for argument in arguments if isinstance(argument, Buffer)]
        values = [
            ctypes.c_void_p(argument.handle) if isinstance(argument, Buffer) else ctypes.c_int32(int(argument))
            for argument in arguments
        ]

        def run() -> None:
            for pointer in pointers:
                self.memory.at(pointer, 1)
            addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            self.library[f"launch_{kernel}"](x, y, config.block, addresses)
            self.ran[kernel] += 1

        (stream.stream if isinstance(stream, GraphBuilder) else stream).enqueue(run)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class DataType(Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"


class CudaGraphStrategy(Enum):
    DISABLE = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = 0
    EAGER = 1


class HostTensorRT:
    """The module `tensorrt` or `tensorrt_rtx`. `profiles`: the batches that every plan was built for."""

    __version__ = VERSION

    def __init__(self, cuda: HostCuda, flavour: Flavour, profiles: Sequence[int]) -> None:
        self.ILogger, self.DataType, self.CudaGraphStrategy = ILogger, DataType, CudaGraphStrategy
        self.IProfiler = IProfiler
        self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        self.cuda, self.flavour, self.profiles = cuda, flavour, profiles
        self.layers = {"a convolution": 0.25, "an activation": 0.5}  # milliseconds of every engine's
        self.warning = ""  # that deserialising gives
        self.streamable = 0  # bytes of weights that engines were built to stream
        self.compiled = b"kernels"  # what a runtime cache holds after a run
        self.caches: list[bytes] = []  # what runtime caches were given
        self.failing = self.failing_in_capture = False  # whether engines fail to start
        self.short = False  # whether memory is too short for an execution context

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    engine_host_code_allowed = False  # as it is in TensorRT; so no plan may bring code
    DLA_core = -1

    def __init__(self, trt: HostTensorRT, logger: ILogger) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        assert not self.engine_host_code_allowed
        if self.trt.warning:
            self.logger.log(ILogger.WARNING, self.trt.warning)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        graph = content[HEADER.size :]
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            self.logger.log(ILogger.ERROR, f"Serialization assertion failed: {error}")
            return None
        engine = Engine(self.trt, self.logger, session)
        engine.on_dla = self.DLA_core >= 0
        return engine


class RuntimeCache:
    def __init__(self, trt: HostTensorRT) -> None:
        self.trt = trt

    def deserialize(self, content: bytes) -> bool:
        self.trt.caches.append(content)
        return True

    def serialize(self) -> bytes:
        return self.trt.compiled


class RuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLE
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self, trt: HostTensorRT) -> None:
        self.trt = trt
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(self, trt: HostTensorRT, logger: ILogger, session: onnxruntime.InferenceSession) -> None:
        self.trt, self.logger, self.session = trt, logger, session
        self.inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        self.tensors = self.inputs | {tensor.name: tensor for tensor in session.get_outputs()}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(trt.profiles)
        self.streamable_weights_size = trt.streamable
        self.on_dla = False

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name in self.inputs
        return [(self.trt.profiles[profile], *self.get_tensor_shape(name)[1:])] * 3

    def create_runtime_config(self) -> RuntimeConfig:
        assert self.trt.flavour == "tensorrt-rtx"
        return RuntimeConfig(self.trt)

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context | None:
        if self.trt.short:
            self.logger.log(ILogger.ERROR, "Requested amount of GPU memory could not be allocated")
            return None
        assert (config is not None) == (self.trt.flavour == "tensorrt-rtx")
        if config is not None:
            assert config.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            eager = DynamicShapesKernelSpecializationStrategy.EAGER
            assert config.dynamic_shapes_kernel_specialization_strategy == eager, "kernels change during a run"
            assert config.cache is not None
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.batch = engine.trt.profiles[0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.warm = False  # whether it has run: the first run may allocate
        self.profiler: IProfiler | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.engine.trt.cuda.streams
        self.batch = self.engine.trt.profiles[profile]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in self.engine.inputs and shape == (self.batch, *self.engine.get_tensor_shape(name)[1:])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output once all inputs have theirs."""
        if name in self.engine.inputs:
            return self.shapes[name]
        batch = self.batch if self.shapes.keys() == self.engine.inputs.keys() else -1
        return (batch, *self.engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors and address % ALIGNMENT == 0

    def execute_async_v3(self, handle: int) -> bool:
        trt, stream = self.engine.trt, self.engine.trt.cuda.streams[handle]
        faults = {
            "out of memory": trt.failing or (trt.failing_in_capture and stream.captured is not None),
            "an address is missing": self.addresses.keys() != self.engine.tensors.keys(),
            "captured before its first run": stream.captured is not None and not self.warm,
            "a DLA's work was captured": stream.captured is not None and self.engine.on_dla,
            "captured twice": stream.captured is not None and trt.flavour == "tensorrt-rtx",
        }
        for fault, found in faults.items():
            if found:
                self.engine.logger.log(ILogger.ERROR, fault)
                return False
        addresses, self.warm = dict(self.addresses), True
        stream.enqueue(lambda: self.run(addresses))
        return True

    def run(self, addresses: dict[str, int]) -> None:
        cuda, session = self.engine.trt.cuda, self.engine.session

        def tensor(name: str) -> NDArray[np.float32]:
            shape = self.get_tensor_shape(name)
            return cuda.memory.at(addresses[name], 4 * int(np.prod(shape))).view(np.float32).reshape(shape)

        feed = {name: tensor(name).copy() for name in self.engine.inputs}
        names = [name for name in self.engine.tensors if name not in self.engine.inputs]
        for name, value in zip(names, session.run(names, feed), strict=True):
            tensor(name)[:] = value
        cuda.ran["step engine" if "std" in feed else "classifier"] += 1
        cuda.fed.append(as_bytes(feed))
        for layer, ms in self.engine.trt.layers.items() if self.profiler else ():
            assert self.profiler is not None
            self.profiler.report_layer_time(layer, ms)


def as_bytes(feed: dict[str, NDArray[np.float32]]) -> bytes:
    return b"".join(name.encode() + np.ascontiguousarray(feed[name]).tobytes() for name in sorted(feed))


@contextmanager
def on_host(trt: HostTensorRT) -> Iterator[None]:
    """While a TensorRT device opens: it finds a GPU, cuda.core and its flavour of TensorRT, all of this module."""
    with pytest.MonkeyPatch.context() as patch:
        library = Library(trt.flavour, trt.__version__, trt)
        patch.setattr(tensorrt_device, "library_for", lambda plan, name, rebuild: {trt.flavour: library}[plan.flavour])
        patch.setattr(gpu, "find", lambda: GPU)
        patch.setattr(tensorrt_device, "import_cuda", lambda here: trt.cuda)
        patch.setattr(tensorrt_device, "compile_kernels", lambda cuda, arch: {name: name for name in PARAMETERS})
        yield


@contextmanager
def opened_on_host(
    library: ctypes.CDLL, bundle: Bundle, batch: int | None = None, early: bool = False
) -> Iterator[tuple[TensorRTDevice, HostTensorRT]]:
    """A bundle of plans on its device, and what stands for the GPU. Closing the device must leave no memory behind."""
    assert bundle.unet.plan is not None
    trt = HostTensorRT(HostCuda(library, early), bundle.unet.plan.flavour, bundle.unet.plan.batches)
    with on_host(trt):
        device = open_device(bundle, batch, threads=1)
    assert isinstance(device, TensorRTDevice)
    try:
        yield device, trt
    finally:
        device.close()
    for stream in trt.cuda.streams.values():
        stream.sync()  # what close has left to be freed
    assert not trt.cuda.memory.live
    assert trt.cuda.memory.fences_hold()


def plan_of(content: bytes, flavour: Flavour, version: str = VERSION) -> bytes:
    """A plan's header before these bytes."""
    tag = next(tag for tag, known in TAGS.items() if known == flavour)
    parts = (*release(version), 0, 0)[:4]
    return HEADER.pack(tag, 0, HEADER.size + len(content), *parts) + content


def as_plans(bundle: Bundle, flavour: Flavour, batches: tuple[int, ...], **recipe: str) -> Bundle:
    """The plans of a bundle of ONNX files, beside them: the same bytes behind a plan's header, and their sidecars."""

    def write(path: Path, sidecar: Sidecar, **changes: Any) -> FileRef:
        plan = plan_path(path, flavour)
        plan.write_bytes(plan_of(path.read_bytes(), flavour))
        ref = FileRef(plan.name, sha256_of(plan))
        facts = Plan(flavour, VERSION, batches, (GPU.compute_capability,), None, sidecar.file, {}, recipe)
        sidecar_path(plan).write_text(to_json(dataclasses.replace(sidecar, file=ref, plan=facts, **changes)))
        return ref

    classifier = write(bundle.classifier_path, bundle.classifier)
    write(bundle.unet_path, bundle.unet, classifier=classifier)
    return open_bundle(plan_path(bundle.unet_path, flavour))
