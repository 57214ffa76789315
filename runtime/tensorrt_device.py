"""The TensorRT device: slots, noise and both engines on the GPU; only labels, counters and coefficients cross.

A batch is one copy of its index arrays to the GPU and one CUDA graph: gather, noise, step, scatter; or gather,
classify, argmax. Batches run one after another on one stream, so they share the engines' buffers; what the host writes
is staged in pinned memory that is used again only after its batch is done. Images go there by a ring of such memory:
nothing is allocated and nobody waits when one is opened.

Not run on a GPU yet: `make test-gpu` runs its checks and writes a report to send back.

This module is long because one class owns the GPU's buffers, its graph and its engines.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepure_rt import logs
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime import gpu
from densepure_rt.runtime.bundle import (
    Bundle,
    Plan,
    Sidecar,
    rebuild_command,
    refuse_damaged_plan,
    verified_engine,
)
from densepure_rt.runtime.control import control_layout, fill_control
from densepure_rt.runtime.device import (
    CLASSIFY_INPUTS,
    CLASSIFY_OUTPUTS,
    STEP_INPUTS,
    STEP_OUTPUTS,
    Batch,
    Floats,
    Kind,
    forked,
)
from densepure_rt.runtime.machine import installed_versions
from densepure_rt.runtime.noise import Key, RoundedNormal, smoothing_law, vote_law
from densepure_rt.runtime.probe import probe
from densepure_rt.runtime.reverse import slots_of
from densepure_rt.runtime.tensorrt_api import (
    KernelCache,
    Library,
    first_line,
    library_for,
    new_logger,
    new_profiler,
    new_runtimes,
)

IN_FLIGHT = 2  # one batch runs while the host prepares the next
THREADS_PER_BLOCK, WARP = 256, 32
MAX_IMAGES = 4096  # open at a time
UPLOADS, UPLOAD_BYTES = 16, 1 << 16  # pinned regions for what goes to the GPU, in turn: a MiB, some images of 64 x 64
# The states of a loop take at most this, nor more than half of the GPU's memory: engines, cuBLAS and others want some.
MOST_STATE_BYTES = 16 << 30
STATES_AN_ITEM = sum(slots_of(1, IN_FLIGHT))  # that the loop holds for an item of a batch
AMPERE = (8, 0)  # what HardwareCompatibilityLevel.AMPERE_PLUS asks for at least
KERNELS = ("smooth", "gather", "scatter", "gather_means", "argmax")
# What `close` lets go of, which frees it: contexts before the runtime, all before the stream.
HELD = "_step _classify _mean _std _finite _control _labels _table _vote_law _runtimes _stream".split()

# The struct of kernels.cu, as `control.ITEM` is; a test compares their sizes with the compiler's.
IMAGE = np.dtype(
    [
        ("pixels", np.uint64),
        ("thresholds", np.uint64),
        ("key", np.uint64, 2),
        ("count", np.int32),
        ("lowest", np.int32),
        ("scale", np.float32),
        ("pad", np.int32),
    ]
)


def refuse_misfit(bundle: Bundle, batch: int | None, memory: int = 0) -> int:
    """The batch to run at: the one that was asked for, or the largest whose states fit the GPU's memory, in bytes.

    memory: 0 where it is not known. Raises UsageError when the plans hold no such batch.
    """
    held = [set(sidecar.plan.batches) for sidecar in (bundle.unet, bundle.classifier) if sidecar.plan]
    held = [batches for batches in held if batches]  # a plan without a sidecar does not say
    if not held:
        if batch is None:
            raise UsageError("a plan without a sidecar does not say its batch: give it with `batch`")
        return batch
    common = set.intersection(*held)
    if not common:
        raise UsageError(
            f"{bundle.unet_path.name} and {bundle.classifier_path.name} were built for different batches: run "
            f'"{rebuild_command(bundle.unet_path, bundle.unet)}"'
        )
    if batch is not None and batch not in common:
        raise UsageError(
            f"`batch` {batch}: {bundle.unet_path.name} was built for {', '.join(map(str, sorted(common)))}; use one of "
            f"these, or build it again with `batch` {batch}"
        )
    if batch is not None:
        return batch
    most = most_states(math.prod(bundle.unet.image), memory)
    return max((size for size in common if size * STATES_AN_ITEM <= most), default=min(common))


def most_states(size: int, memory: int) -> int:
    """Count the states of `size` values that a GPU with so many bytes may be asked to hold; see `reserve`."""
    return (min(MOST_STATE_BYTES, memory // 2) if memory else MOST_STATE_BYTES) // state_bytes(size)


def state_bytes(size: int) -> int:
    """Return the bytes of a slot: mean and std of `size` values, float32, and whether they are finite."""
    return 8 * size + 1


def refuse_other_gpu(engine_name: str, plan: Plan, here: gpu.Gpu, rebuild: str) -> None:
    """Raise EnvironmentFault when a plan was built for other GPUs.

    A plan of tensorrt-rtx is documented to run on later GPUs too; whether it does, the library says when it is opened.
    """
    ours = capability_of(here.compute_capability)
    built = [capability_of(capability) for capability in plan.compute_capabilities]
    if plan.recipe.get("hw_compat") == "ampere-plus":
        fits = ours >= AMPERE
    else:
        fits = not built or ours in built or (plan.flavour == "tensorrt-rtx" and ours > min(built))
    if not fits:
        raise EnvironmentFault(
            f"{engine_name} was built for compute capability {', '.join(plan.compute_capabilities)}, this GPU "
            f'({here.name}) has {here.compute_capability}: run "{rebuild}"'
        )


def capability_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def library_of(contents: Sequence[tuple[Path, Sidecar, bytes]]) -> Library:
    """The one library that runs both plans, which are whole. Raises EnvironmentFault or CheckFailed."""
    found = []
    for path, sidecar, content in contents:
        assert sidecar.plan is not None
        refuse_damaged_plan(path.name, sidecar.plan, content)
        found.append(library_for(sidecar.plan, path.name, rebuild_command(path, sidecar)))
    step, classify = found
    if step != classify:
        raise EnvironmentFault(
            f"{contents[0][0].name} runs on {step}, {contents[1][0].name} on {classify}, and one device runs both: run "
            f'"{rebuild_command(*contents[1][:2])}"'
        )
    return step


@dataclass
class Engine:
    """A deserialised plan with its context and one device buffer for each tensor, all of a fixed shape."""

    engine: Any
    context: Any
    buffers: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


@dataclass
class Staging:
    """Pinned memory of one batch in flight: what goes to the GPU and the labels that come back."""

    control: Any
    labels: Any
    event: Any


@dataclass(frozen=True)
class Upload:
    """A region of pinned memory for what goes to the GPU, and the event behind its last copy."""

    buffer: Any
    content: NDArray[np.uint8]
    event: Any


@dataclass(frozen=True)
class OpenImage:
    index: int
    pixels: Any


@contextlib.contextmanager
def translating_cuda_errors() -> Iterator[None]:
    """Raise what CUDA complains of as one EnvironmentFault; it comes from the GPU's state, not from the request."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("cuda."):
            raise
        move = 'look with "nvidia-smi" and "densepure-rt doctor"'
        if "OUT_OF_MEMORY" in str(error):
            move = "use a smaller `batch`, or close what else holds the GPU's memory"
        raise EnvironmentFault(f"the GPU failed ({first_line(error)}): {move}; what is done is kept") from error


class TensorRTDevice:
    """See `densepure_rt.runtime.device.Device`."""

    in_flight = IN_FLIGHT

    @translating_cuda_errors()
    def __init__(self, bundle: Bundle, batch: int | None) -> None:
        plan = bundle.unet.plan
        assert plan is not None
        self.batch, self._process = refuse_misfit(bundle, batch), os.getpid()
        contents = [  # hashed before anything native is loaded
            (path, sidecar, verified_engine(path, sidecar))
            for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier))
        ]
        self.library = library_of(contents)
        self._trt = self.library.bindings
        self.gpu = gpu.find()
        for path, sidecar, _ in contents:
            assert sidecar.plan is not None
            refuse_other_gpu(path.name, sidecar.plan, self.gpu, rebuild_command(path, sidecar))
        self.flavour, self._on_dla = plan.flavour, plan.dla_core is not None
        self.image_shape = bundle.unet.image
        self.size = int(np.prod(self.image_shape))
        largest, self.batch = self.batch, refuse_misfit(bundle, batch, self.gpu.memory)
        if self.batch < largest:
            logs.say(
                f"batches of {self.batch}: the states of {largest} may take more of the GPU's memory than there is for "
                f"them; choose with `batch`",
                logging.WARNING,
            )
        self._cuda = import_cuda(self.gpu)
        self._device = self._cuda.Device(0)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self._pinned = self._cuda.LegacyPinnedMemoryResource()  # needs no memory pools: a Jetson has none
        self._kernels = compile_kernels(self._cuda, self._device.arch)
        self._logger = new_logger(self._trt)  # TensorRT's objects do not keep it alive
        self._runtimes = new_runtimes(self.library, self._logger)  # which allow no host code in a plan
        self._uploads = deque(self._new_upload() for _ in range(UPLOADS))
        self._kernel_caches: list[KernelCache] = []
        # One copy fills it: the items, then t and coef, which are the step engine's own inputs.
        self._offsets, self._control_bytes = control_layout(self.batch)
        self._control = self._allocate(self._control_bytes)
        control = int(self._control.handle)
        self._step = self._load(
            *contents[0],
            STEP_INPUTS,
            STEP_OUTPUTS,
            {"t": control + self._offsets[1], "coef": control + self._offsets[2]},
        )
        self._classify = self._load(*contents[1], CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, {})
        self.classes = self._classify.shapes["logits"][1]
        self._labels = self._allocate(4 * self.batch)
        self._laws: dict[Fraction, Any] = {}
        self._vote_law = self._law(vote_law())
        self._table = self._allocate(IMAGE.itemsize * MAX_IMAGES)
        self._images: dict[int, OpenImage] = {}
        self._free_images = list(range(MAX_IMAGES))
        self._spare_pixels: list[Any] = []  # GPU memory of images that were closed
        self._handles, self._tickets = itertools.count(), itertools.count()
        self._idle = [self._new_staging() for _ in range(IN_FLIGHT)]
        self._outstanding: deque[tuple[int, Kind, int, Staging]] = deque()
        self._slots = 0
        self._graphs: dict[Kind, Any] = {}
        self.probed = probe(bundle, self.batch, self._run_engines, any_batch=False)
        for cache in self._kernel_caches:
            cache.keep()
        for message in self._logger.warned():
            logs.say(f"{self.library}: {message}", logging.WARNING)

    # The contract of Device

    @translating_cuda_errors()
    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        if not self._free_images:
            raise UsageError(f"{MAX_IMAGES} images are open on the GPU, and there is room for no more")
        law, index = smoothing_law(sigma), self._free_images[-1]
        thresholds = self._law(law)
        on_gpu = self._spare_pixels.pop() if self._spare_pixels else self._allocate(self.size)
        self._copy_in(pixels, on_gpu)
        entry = np.zeros((), IMAGE)
        entry["pixels"], entry["thresholds"] = int(on_gpu.handle), int(thresholds.handle)
        entry["key"], entry["count"], entry["lowest"], entry["scale"] = key, len(law.thresholds), law.lowest, scale
        self._copy_in(np.frombuffer(entry.tobytes(), np.uint8), self._table, index * IMAGE.itemsize)
        handle = next(self._handles)
        self._images[handle] = OpenImage(self._free_images.pop(), on_gpu)
        return handle

    @translating_cuda_errors()
    def close_image(self, handle: int) -> None:
        if image := self._images.pop(handle, None):
            self._spare_pixels.append(
                image.pixels
            )  # what is on the stream reads it before another image is copied there
            self._free_images.append(image.index)

    @translating_cuda_errors()
    def reserve(self, slots: int) -> None:
        if self._process != os.getpid():
            raise forked("and its engines are on a GPU")
        self._device.set_current()  # a loop begins here, and its thread may be another than the one that opened this
        if slots > self._slots:
            self.refuse_too_many(slots)
            self._graphs.clear()  # they hold the old addresses
            self._slots = 0
            self._mean = self._std = self._finite = None  # freed before the new ones need the room
            self._mean, self._std = (self._allocate(4 * self.size * slots) for _ in range(2))
            self._finite = self._allocate(slots)
            self._slots = slots

    def refuse_too_many(self, slots: int) -> None:
        """Raise UsageError when so many states would take too much of the GPU's memory."""
        most = most_states(self.size, self.gpu.memory)
        if slots > most:
            needed, room = (count * state_bytes(self.size) / 2**30 for count in (slots, most))
            smaller = max(1, self.batch * most // slots)
            raise UsageError(
                f"`batch` {self.batch} of images {list(self.image_shape)} takes {slots} states, {needed:.1f} GiB of "
                f"the GPU's memory, where {room:.1f} GiB is the most: use `batch` {smaller} or less, with plans that "
                f"were built for it, or fewer `votes`"
            )

    @translating_cuda_errors()
    def submit(self, batch: Batch) -> int:
        staging = self._idle[-1]  # taken at the end, so that an error on the way does not lose it
        fill_control(as_array(staging.control, np.uint8), self.batch, batch, self._images)
        self._control.copy_from(staging.control, stream=self._stream)
        self._launch(batch.kind)
        if batch.kind == "classify":
            self._labels.copy_to(staging.labels, stream=self._stream)
        self._stream.record(staging.event)
        ticket = next(self._tickets)
        self._outstanding.append((ticket, batch.kind, len(batch.image), self._idle.pop()))
        return ticket

    @translating_cuda_errors()
    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        ticket, kind, n, staging = self._outstanding.popleft()  # one stream: the oldest is done first
        staging.event.sync()
        labels = as_array(staging.labels, np.int32)[:n].astype(np.int64) if kind == "classify" else None
        self._idle.append(staging)
        return ticket, labels

    def drain(self) -> None:
        with contextlib.suppress(Exception):  # a GPU that failed has said so where it did, and will again
            self._stream.sync()
        self._idle += [staging for *_, staging in self._outstanding]
        self._outstanding.clear()

    @translating_cuda_errors()
    def read(self, slots: Sequence[int]) -> tuple[Floats, Floats]:
        shape = (self._slots, *self.image_shape)
        mean, std = (
            self._download(buffer, np.float32).reshape(shape)[list(slots)] for buffer in (self._mean, self._std)
        )
        return mean, std

    def describe(self) -> Mapping[str, str | int | bool]:
        facts: dict[str, str | int | bool] = {
            "provider": self.library.name,
            "tensorrt": self.library.version,
            **self.gpu.facts,
            "batch": self.batch,
            "independent_of_batch_mates": True,  # or `probe` would have raised
            "independent_of_batch": self.probed.independent_of_batch,
            "fingerprint": self.probed.fingerprint,
        }
        return facts | installed_versions("cuda-core", "cuda-bindings")

    def close(self) -> None:
        if self._stream is None:
            return
        self.drain()
        for held in (self._graphs, self._images, self._spare_pixels, self._laws, self._idle, self._uploads):
            held.clear()
        for name in HELD:
            setattr(self, name, None)

    # What runs on the GPU

    def _launch(self, kind: Kind) -> None:
        """Run one batch of this kind from the control buffer: a captured graph, or RTX's own capture of its engine.

        What a DLA runs is not captured: https://github.com/NVIDIA/TensorRT/issues/3524.
        """
        if self.flavour == "tensorrt-rtx" or self._on_dla:
            self._issue(kind, self._stream, int(self._stream.handle))
            return
        if kind in self._graphs:
            self._graphs[kind].launch(self._stream)
            return
        self._issue(kind, self._stream, int(self._stream.handle))  # this batch; an engine's first run may allocate
        self._stream.sync()
        with contextlib.closing(self._stream.create_graph_builder()) as builder:
            builder.begin_building()
            self._issue(kind, builder, int(builder.stream.handle))  # recorded, not run
            self._graphs[kind] = builder.end_building().complete()

    def _issue(self, kind: Kind, stream: Any, handle: int) -> None:
        size, items = np.int32(self.size), self._control
        slots = (self._mean, self._std, self._finite)
        elements = self._grid(self.size)
        if kind == "smooth":
            self._call("smooth", stream, elements, items, self._table, *slots, size)
        elif kind == "step":
            buffers, law = self._step.buffers, vote_law()
            votes = (self._vote_law, np.int32(len(law.thresholds)), np.int32(law.lowest))
            inputs = (buffers["mean"], buffers["std"], buffers["noise"])
            self._call("gather", stream, elements, items, self._table, *slots[:2], *votes, *inputs, size)
            self._execute(self._step, handle)
            outputs = tuple(buffers[name] for name in STEP_OUTPUTS)
            self._call("scatter", stream, elements, items, *outputs, *slots, size)
        else:
            buffers = self._classify.buffers
            self._call("gather_means", stream, elements, items, self._mean, buffers["mean"], size)
            self._execute(self._classify, handle)
            counts = (np.int32(self.classes), np.int32(self.batch))
            self._call(
                "argmax",
                stream,
                self._grid(WARP * self.batch, 1),  # a warp an item
                items,
                buffers["logits"],
                self._finite,
                self._labels,
                *counts,
            )

    def _grid(self, elements: int, items: int | None = None) -> Any:
        blocks = -(-elements // THREADS_PER_BLOCK)
        grid = (blocks, self.batch if items is None else items, 1)
        return self._cuda.LaunchConfig(grid=grid, block=THREADS_PER_BLOCK)

    def _call(self, name: str, stream: Any, config: Any, *arguments: Any) -> None:
        self._cuda.launch(stream, config, self._kernels[name], *arguments)

    def _execute(self, engine: Engine, stream: int) -> None:
        if not engine.context.execute_async_v3(stream):
            raise CheckFailed(f"{self.library} failed to run an engine: {self._logger.summary()}")

    def _run_engines(self, feed: dict[str, Floats]) -> list[Floats]:
        """Both engines on host arrays, for the probe."""
        for name, value in feed.items():
            if name in ("t", "coef"):
                self._copy_in(value, self._control, self._offsets[1 if name == "t" else 2])
            else:
                self._copy_in(value, self._step.buffers[name])
        self._copy_in(feed["mean"], self._classify.buffers["mean"])
        for engine in (self._step, self._classify):
            self._execute(engine, int(self._stream.handle))
        outputs = [(self._step, name) for name in STEP_OUTPUTS] + [(self._classify, name) for name in CLASSIFY_OUTPUTS]
        return [
            self._download(engine.buffers[name], np.float32).reshape(engine.shapes[name]) for engine, name in outputs
        ]

    @translating_cuda_errors()
    def layer_times(self, rounds: int) -> dict[str, dict[str, float]]:
        """Milliseconds that each layer of both engines takes of a call, on average, without captured graphs.

        For a device of its own: what is profiled waits after every call.
        """
        found = {}
        for name, engine in (("step", self._step), ("classify", self._classify)):
            times = engine.context.profiler = new_profiler(self._trt)
            for _ in range(rounds):
                self._execute(engine, int(self._stream.handle))
                self._stream.sync()
            found[name] = {layer: total / rounds for layer, total in times.found.items()}
            if not found[name]:
                raise CheckFailed(
                    f"{self.library} reports no times of layers: use a plan of another flavour or version"
                )
        return found

    # Loading

    def _load(
        self,
        path: Path,
        sidecar: Sidecar,
        content: bytes,
        inputs: Sequence[str],
        outputs: Sequence[str],
        addresses: Mapping[str, int],
    ) -> Engine:
        """Deserialise a plan and bind every tensor to an address, at the profile of this batch."""
        assert sidecar.plan is not None
        runtime = self._runtimes[-1]
        if sidecar.plan.dla_core is not None:
            runtime.DLA_core = sidecar.plan.dla_core
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EnvironmentFault(
                f"{self.library} refuses {path.name}, built by {sidecar.plan.version} ({self._logger.summary()}): "
                f'run "{rebuild_command(path, sidecar)}"'
            )
        if engine.streamable_weights_size > 0:
            raise UsageError(
                f"{path.name} was built to stream its weights from the CPU, which no captured graph does: build it "
                f'without that, run "{rebuild_command(path, sidecar)}"'
            )
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if sorted(names) != sorted([*inputs, *outputs]):
            raise CheckFailed(
                f"{path.name} has the tensors {', '.join(names)}; expected {', '.join([*inputs, *outputs])}"
            )
        context = self._new_context(engine, path)
        if context is None:
            raise EnvironmentFault(
                f"{self.library} has no room to run {path.name} in batches of {self.batch} "
                f"({self._logger.summary()}): use a smaller `batch`, or close what else holds the GPU's memory"
            )
        profiles = [
            tuple(engine.get_tensor_profile_shape(inputs[0], i)[1])[0] for i in range(engine.num_optimization_profiles)
        ]
        if self.batch not in profiles:
            raise UsageError(
                f"{path.name} holds profiles for batches {profiles}, not {self.batch}: choose with `batch`"
            )
        if not context.set_optimization_profile_async(profiles.index(self.batch), int(self._stream.handle)):
            raise CheckFailed(f"{path.name}: profile of batch {self.batch} refused: {self._logger.summary()}")
        buffers, shapes = {}, {}
        for name in inputs:
            shape = (self.batch, *tuple(engine.get_tensor_shape(name))[1:])
            if not context.set_input_shape(name, shape):
                raise CheckFailed(f"{path.name}: input {name} refuses shape {list(shape)}: {self._logger.summary()}")
        for name in (*inputs, *outputs):
            if engine.get_tensor_dtype(name) != self._trt.DataType.FLOAT:
                raise CheckFailed(f"{path.name}: tensor {name} is not float32: export the bundle again")
            shapes[name] = tuple(context.get_tensor_shape(name))
            if name not in addresses:
                buffers[name] = self._allocate(4 * int(np.prod(shapes[name])))
            address = addresses[name] if name in addresses else int(buffers[name].handle)
            if not context.set_tensor_address(name, address):
                raise CheckFailed(f"{path.name}: tensor {name} refuses its address: {self._logger.summary()}")
        expected = (self.batch, *self.image_shape)
        if shapes["mean"] != expected:
            raise CheckFailed(
                f"{path.name} takes {list(shapes['mean'])}, its sidecar says {list(expected)}: build it again"
            )
        return Engine(engine, context, buffers, shapes)

    def _new_context(self, engine: Any, path: Path) -> Any:
        if self.flavour != "tensorrt-rtx":
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Not lazily: until the kernels of its own are there, others would run, and a run would mix two functions.
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._kernel_caches.append(KernelCache(config, path))
        return engine.create_execution_context(config)

    # Memory

    def _allocate(self, size: int) -> Any:
        return self._device.allocate(max(1, size), stream=self._stream)

    def _new_staging(self) -> Staging:
        control, labels = (
            self._pinned.allocate(size, stream=self._stream) for size in (self._control_bytes, 4 * self.batch)
        )
        return Staging(control, labels, self._new_event())

    def _new_upload(self) -> Upload:
        buffer = self._pinned.allocate(UPLOAD_BYTES, stream=self._stream)
        return Upload(buffer, as_array(buffer, np.uint8), self._new_event())

    def _new_event(self) -> Any:
        options = self._cuda.EventOptions(blocking_sync=True)  # waiting must not spin: an edge device has few cores
        return self._device.create_event(options)

    def _law(self, law: RoundedNormal) -> Any:
        if law.std not in self._laws:
            self._laws[law.std] = self._upload(law.thresholds)
        return self._laws[law.std]

    def _upload(self, values: NDArray[Any]) -> Any:
        buffer = self._allocate(values.nbytes)
        self._copy_in(values, buffer)
        return buffer

    def _copy_in(self, values: NDArray[Any], buffer: Any, offset: int = 0) -> None:
        """Copy an array to the GPU, behind what is on the stream; waits only when all regions are on their way."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, content.size, UPLOAD_BYTES):
            part, upload = content[start : start + UPLOAD_BYTES], self._uploads[0]
            upload.event.sync()  # of its last copy
            upload.content[: part.size] = part
            source = self._cuda.Buffer.from_handle(int(upload.buffer.handle), part.size, owner=upload.buffer)
            target = self._cuda.Buffer.from_handle(int(buffer.handle) + offset + start, part.size, owner=buffer)
            target.copy_from(source, stream=self._stream)
            self._stream.record(upload.event)
            self._uploads.rotate(-1)

    def _download(self, buffer: Any, dtype: type[Any]) -> NDArray[Any]:
        staging = self._pinned.allocate(buffer.size, stream=self._stream)
        buffer.copy_to(staging, stream=self._stream)
        self._stream.sync()
        values: NDArray[Any] = as_array(staging, dtype).copy()
        staging.close(self._stream)
        return values


def as_array(buffer: Any, dtype: type[Any]) -> NDArray[Any]:
    """Pinned memory as a numpy array, without a copy; it lives as long as the buffer."""
    content = (ctypes.c_ubyte * buffer.size).from_address(int(buffer.handle))
    return np.frombuffer(content, np.uint8).view(dtype)


def import_cuda(here: gpu.Gpu) -> Any:
    """cuda.core. Raises EnvironmentFault when it is missing, or newer than the driver."""
    try:
        import cuda.core
        from cuda.bindings import runtime
    except Exception as error:  # missing, or it does not find the driver's libraries
        raise EnvironmentFault(
            f"cuda-core, which drives the GPU, cannot be imported ({first_line(error)}): run "
            f"\"pip install 'densepure-rt[tensorrt]'\""
        ) from error
    needed = runtime.cudaRuntimeGetVersion()[1]
    if int(here.driver.split(".")[0]) < needed // 1000:
        raise EnvironmentFault(
            f"the NVIDIA driver is too old: it runs CUDA {here.driver} at most, cuda-bindings needs {needed // 1000}: "
            f"update the driver, or run \"pip install 'cuda-bindings<{needed // 1000}'\""
        )
    return cuda.core


def compile_kernels(cuda: Any, arch: str) -> dict[str, Any]:
    """kernels.cu for this GPU, by NVRTC, without fused multiply-add: bit for bit what numpy computes."""
    source = (files("densepure_rt.runtime") / "kernels.cu").read_text(encoding="utf-8")
    options = cuda.ProgramOptions(arch=f"sm_{arch}", fma=False)
    try:
        module = cuda.Program(source, "c++", options).compile("cubin")
    except Exception as error:  # NVRTC's errors have no common base but this
        raise EnvironmentFault(
            f"the GPU's kernels do not compile ({first_line(error)}): run \"pip install 'densepure-rt[tensorrt]'\", "
            f"which brings NVRTC"
        ) from error
    return {name: module.get_kernel(name) for name in KERNELS}
