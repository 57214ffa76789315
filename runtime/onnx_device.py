"""The reference device: ONNX Runtime runs the networks, numpy all else."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from densepure_rt.errors import CheckFailed, EnvironmentFault
from densepure_rt.runtime import gpu, onnxruntime_gpu
from densepure_rt.runtime.bundle import DATA_KEY, Bundle, Sidecar, data_mark, verified_engine
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS, Floats, Provider
from densepure_rt.runtime.gpu_noise import best_noise
from densepure_rt.runtime.host_device import Calls, HostDevice, Networks
from densepure_rt.runtime.machine import gpu_libraries, instruction_sets, processor
from densepure_rt.runtime.native_calls import stoppable
from densepure_rt.runtime.onnxruntime_api import gpu_wheels, refuse_unrunnable

SILENT = 4  # ONNX Runtime's log level "fatal"; what it raises is reported anyway
EXECUTION_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
GPU, FIRST = "cuda", 0  # where a GPU provider's values live
BATCH_AXIS = "batch"  # what `export` calls the first axis of every input
# Products of uint8 and int8 overflow int16 on an x86 without VNNI: AVX2 adds two of them there and saturates. ONNX
# Runtime then computes them in uint8 and uint8, which is exact; with VNNI, and on an Arm, the entry changes nothing.
EXACT_INT8 = ("session.x64quantprecision", "1")


@dataclass(frozen=True)
class Place:
    """The place where a graph runs.

    Attributes:
        provider: Of ONNX Runtime.
        batch: Items of every call; None for any. A GPU provider must be told: it puts arithmetic on shapes that are not
            known on the CPU, on purpose, and that is refused.
        engines: The folder of the engines that the TensorRT provider builds of the graph.
    """

    provider: Provider = "cpu"
    batch: int | None = None
    engines: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.provider != "cpu"


CPU = Place()


def session_options(place: Place = CPU, folder: Path | None = None, optimised: bool = True) -> Any:
    """Return the options of a session of one thread; see `open_session`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    options.add_session_config_entry(*EXACT_INT8)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if place.on_gpu:
        options.use_deterministic_compute = True
        if place.batch is not None:
            options.add_free_dimension_override_by_name(BATCH_AXIS, place.batch)
    return options


def open_session(
    content: bytes,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    place: Place = CPU,
    folder: Path | None = None,
    optimised: bool = True,
) -> onnxruntime.InferenceSession:
    """A session of one thread: parallel work is one caller a core on the same session, which shares the weights.

    content: of a graph. folder: where the file of weights lies that the graph names, if it names one.

    ONNX Runtime on the CPU is bitwise independent of the batch size in every case tried, and this is its fastest
    setting there: batches of 8 to 32, one thread an operator.
    """
    options = session_options(place, folder, optimised)
    if place.on_gpu:
        session = gpu_session(content, name, options, place)
    else:
        try:
            session = new_session(content, options, providers=[EXECUTION_PROVIDERS["cpu"]])
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise CheckFailed(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {error}") from error
    found = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
    if found != (list(inputs), list(outputs)):
        raise CheckFailed(
            f"{name} takes {', '.join(found[0])} and gives {', '.join(found[1])}; expected {', '.join(inputs)} and "
            f'{", ".join(outputs)}: export it again with "densepure-rt export"'
        )
    return session


def gpu_session(content: bytes, name: str, options: Any, place: Place) -> onnxruntime.InferenceSession:
    """Open a session all of whose nodes run on the GPU. Raises EnvironmentFault where that cannot be."""
    provider, wanted = place.provider, EXECUTION_PROVIDERS[place.provider]
    refuse_absent(provider)
    here = onnxruntime_gpu.prepare(provider)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    providers = [(wanted, onnxruntime_gpu.provider_options(provider, place.engines))]
    try:
        try:
            session = new_session(content, options, providers=providers, enable_fallback=False)
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            older = onnxruntime_gpu.at_opset(content) if onnxruntime_gpu.left_to_the_cpu(error) else content
            if older == content:
                raise
            try:
                session = new_session(older, options, providers=providers, enable_fallback=False)
            except Exception:  # the older copy is our own attempt: report the error of the user's graph
                raise error from None
        if (used := session.get_providers()[0]) != wanted:  # it falls back without raising
            raise RuntimeError(f"it took {used} in its place")
        ctypes.CDLL(onnxruntime_gpu.CUDNN)  # else it is missed with the first convolution
    except Exception as error:
        raise EnvironmentFault(onnxruntime_gpu.fault(provider, name, here, str(error))) from error
    return session


def new_session(content: bytes, options: onnxruntime.SessionOptions, **more: Any) -> onnxruntime.InferenceSession:
    """Return `onnxruntime.InferenceSession(...)`; Ctrl-C ends it between two passes over the graph."""

    def stop() -> None:
        if hasattr(options, "set_load_cancellation_flag"):  # since ONNX Runtime 1.21
            options.set_load_cancellation_flag(True)

    return stoppable(partial(onnxruntime.InferenceSession, content, options, **more), stop)


def run_session(
    session: onnxruntime.InferenceSession, outputs: Sequence[str] | None, feed: Mapping[str, Floats]
) -> list[Any]:
    """Return `session.run(outputs, feed)`; Ctrl-C ends it between two nodes of the graph."""
    calls = OnnxCalls()
    return stoppable(partial(session.run, outputs, feed, calls.options), calls.stop)


class OnnxCalls(Calls):
    """Runs of ONNX Runtime that are ended together. options: what such a run is given."""

    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()

    def stop(self) -> None:
        self.options.terminate = True

    def resume(self) -> None:
        self.options = onnxruntime.RunOptions()


def refuse_absent(provider: Provider) -> None:
    """Raise EnvironmentFault when this ONNX Runtime was built without that provider."""
    if EXECUTION_PROVIDERS[provider] not in (built_in := onnxruntime.get_available_providers()):
        raise EnvironmentFault(
            f"`provider` {provider}: this ONNX Runtime {onnxruntime.__version__} holds {', '.join(built_in)} only: "
            f'run "pip uninstall -y onnxruntime", then "pip install {gpu_wheels(provider)}"'
        )


class Network:
    """A loaded engine: feed -> outputs, whole batches. On a GPU both are bound there, and copied once each way."""

    def __init__(
        self,
        path: Path,
        sidecar: Sidecar,
        inputs: Sequence[str],
        outputs: Sequence[str],
        place: Place = CPU,
        calls: OnnxCalls | None = None,
    ) -> None:
        self.outputs, self.place, self.calls = outputs, place, calls or OnnxCalls()
        content, folder = verified_engine(path, sidecar), path.parent if sidecar.data else None

        def open_at(at: Place) -> onnxruntime.InferenceSession:
            return open_session(content, path.name, inputs, outputs, at, folder)

        if place.provider == "tensorrt":
            refuse_absent(place.provider)
            self.engines = onnxruntime_gpu.engine_folder(content, place.batch)
            self.session = onnxruntime_gpu.with_engines(
                self.engines, lambda kept: open_at(replace(place, engines=kept))
            )
        else:
            self.session = open_at(place)
        promised = self.session.get_modelmeta().custom_metadata_map.get(DATA_KEY)
        if promised != (data_mark(sidecar.data) if sidecar.data else None):
            raise CheckFailed(
                f"{path.name} names other weights than its sidecar does: copy both again, or export the bundle again"
            )

    @property
    def any_batch(self) -> bool:
        """Say whether the graph leaves the batch open."""
        return all(not isinstance(value.shape[0], int) for value in self.session.get_inputs())

    def __call__(self, feed: Mapping[str, Floats]) -> list[Floats]:
        if not self.place.on_gpu:
            results: list[Floats] = self.session.run(self.outputs, feed, self.calls.options)
            return results
        binding = self.session.io_binding()
        for name, value in feed.items():
            on_gpu = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), GPU, FIRST)
            binding.bind_ortvalue_input(name, on_gpu)
        for name in self.outputs:
            binding.bind_output(name, GPU, FIRST)
        self.session.run_with_iobinding(binding, self.calls.options)
        results = binding.copy_outputs_to_cpu()
        return results


class OnnxDevice(HostDevice):
    """`threads` callers share one session; each runs whole batches.

    With a GPU provider the networks run there, and so does the noise; slots stay with numpy. The TensorRT device keeps
    all on the GPU.
    """

    def __init__(self, bundle: Bundle, batch: int, threads: int, provider: Provider = "cpu") -> None:
        for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier)):
            refuse_unrunnable(path.name, sidecar.precision, provider)
        calls, place = OnnxCalls(), Place(provider, None if provider == "cpu" else batch)
        step = Network(bundle.unet_path, bundle.unet, STEP_INPUTS, STEP_OUTPUTS, place, calls)
        classify = Network(bundle.classifier_path, bundle.classifier, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, place, calls)
        facts: dict[str, str | int | bool] = {
            "provider": "onnxruntime CPU" if provider == "cpu" else f"onnxruntime {provider}",
            "onnxruntime": onnxruntime.__version__,
            "threads": threads,
        }
        facts |= gpu.find().facts | gpu_libraries() if place.on_gpu else cpu_facts()
        if provider == "tensorrt":
            facts["engines"] = onnxruntime_gpu.engines_sha256(step.engines, classify.engines)
        networks = Networks(step, classify, step.any_batch and classify.any_batch, calls)
        super().__init__(bundle, networks, batch, threads, facts, survives_fork=not place.on_gpu)
        if place.on_gpu:
            self.draw_by(best_noise)


def cpu_facts() -> dict[str, str]:
    return {"processor": processor(), "instruction_sets": " ".join(instruction_sets())}
