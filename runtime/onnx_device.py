"""The reference device: numpy for noise and slots, ONNX Runtime on the CPU for the networks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import DATA_KEY, Bundle, Sidecar, data_mark, verified_engine
from densepure_rt.runtime.device import (
    CLASSIFY_INPUTS,
    CLASSIFY_OUTPUTS,
    NOT_FINITE,
    STEP_INPUTS,
    STEP_OUTPUTS,
    Batch,
    Floats,
    Provider,
    probe,
    processor,
)
from densepure_rt.runtime.noise import Key, RoundedNormal, first_state, smoothing_law, smoothing_noise, vote_noise

SILENT = 4  # ONNX Runtime's log level "fatal"; what it raises is reported anyway
EXECUTION_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PROVIDER_OPTIONS: dict[Provider, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}, "tensorrt": {}}
GPU, FIRST = "cuda", 0  # where a GPU provider's values live
# Precisions that ONNX Runtime 1.32 loads and computes wrongly (fp8: its optimiser moves the quantization, and the
# default classifier is off by twice its norm) or, on a CPU, has no kernels for.
UNRUNNABLE: dict[Provider, tuple[str, ...]] = {"cpu": ("fp8", "bf16"), "cuda": ("fp8",), "tensorrt": ("fp8",)}


@dataclass(frozen=True)
class OpenImage:
    pixels: NDArray[np.uint8]
    key: Key
    law: RoundedNormal
    scale: float


def open_session(
    content: bytes,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    provider: Provider = "cpu",
    folder: Path | None = None,
    optimised: bool = True,
) -> onnxruntime.InferenceSession:
    """A session of one thread: parallel work is one caller a core on the same session, which shares the weights.

    content: of a graph. folder: where the file of weights lies that the graph names, if it names one.

    ONNX Runtime on the CPU is bitwise independent of the batch size in every case tried, and this is its fastest
    setting there: batches of 8 to 32, one thread an operator.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = EXECUTION_PROVIDERS[provider]
    if provider != "cpu":
        refuse_absent(provider)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=[(wanted, PROVIDER_OPTIONS[provider])], enable_fallback=False
        )
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        if provider != "cpu":
            raise EnvironmentFault(unusable(provider, str(error))) from error
        raise CheckFailed(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {error}") from error
    if (used := session.get_providers()[0]) != wanted:  # it falls back without raising
        raise EnvironmentFault(unusable(provider, f"it took {used} in its place"))
    found = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
    if found != (list(inputs), list(outputs)):
        raise CheckFailed(
            f"{name} takes {', '.join(found[0])} and gives {', '.join(found[1])}; expected {', '.join(inputs)} and "
            f'{", ".join(outputs)}: export it again with "densepure-rt export"'
        )
    return session


def refuse_unrunnable(name: str, precision: str, provider: Provider) -> None:
    """Raise UsageError for an engine in a precision that this provider does not compute rightly."""
    if precision in UNRUNNABLE[provider]:
        raise UsageError(
            f"{name} is {precision}, which ONNX Runtime does not run rightly with --provider {provider}: build a plan "
            f'from it with "densepure-rt export --target tensorrt --precision {precision}", or use an fp32 engine'
        )


def refuse_absent(provider: Provider) -> None:
    """Raise EnvironmentFault when this ONNX Runtime was built without that provider."""
    if EXECUTION_PROVIDERS[provider] not in (built_in := onnxruntime.get_available_providers()):
        raise EnvironmentFault(
            f"--provider {provider}: this ONNX Runtime {onnxruntime.__version__} holds {', '.join(built_in)} only: "
            f'run "pip uninstall -y onnxruntime", then "pip install \'densepure-rt[gpu]\'"'
        )


def unusable(provider: Provider, reason: str) -> str:
    lines = [line for line in reason.splitlines() if line.strip()]
    return (
        f"--provider {provider}: ONNX Runtime {onnxruntime.__version__} cannot use {EXECUTION_PROVIDERS[provider]} "
        f"here ({lines[0] if lines else 'no reason given'}): check the driver and the CUDA libraries with "
        f'"densepure-rt doctor", or leave --provider out to run on the CPU'
    )


class Network:
    """One engine, loaded: feed -> outputs, whole batches. On a GPU both are bound there, and copied once each way."""

    def __init__(
        self, path: Path, sidecar: Sidecar, inputs: Sequence[str], outputs: Sequence[str], provider: Provider
    ) -> None:
        self.outputs, self.provider = outputs, provider
        self.session = open_session(
            verified_engine(path, sidecar), path.name, inputs, outputs, provider, path.parent if sidecar.data else None
        )
        promised = self.session.get_modelmeta().custom_metadata_map.get(DATA_KEY)
        if promised != (data_mark(sidecar.data) if sidecar.data else None):
            raise CheckFailed(
                f"{path.name} names other weights than its sidecar does: copy both again, or export the bundle again"
            )

    def __call__(self, feed: Mapping[str, Floats]) -> list[Floats]:
        if self.provider == "cpu":
            results: list[Floats] = self.session.run(self.outputs, feed)
            return results
        binding = self.session.io_binding()
        for name, value in feed.items():
            on_gpu = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), GPU, FIRST)
            binding.bind_ortvalue_input(name, on_gpu)
        for name in self.outputs:
            binding.bind_output(name, GPU, FIRST)
        self.session.run_with_iobinding(binding)
        results = binding.copy_outputs_to_cpu()
        return results


class OnnxDevice:
    """See `densepure_rt.runtime.device.Device`. `threads` callers share one session; each runs whole batches.

    With a GPU provider the networks run there; slots and noise stay with numpy. The TensorRT device keeps all on the
    GPU.
    """

    def __init__(self, bundle: Bundle, batch: int, threads: int, provider: Provider = "cpu") -> None:
        self.batch, self.provider = batch, provider
        self.in_flight = self.threads = threads
        self.image_shape = bundle.unet.image
        for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier)):
            refuse_unrunnable(path.name, sidecar.precision, provider)
        self._step = Network(bundle.unet_path, bundle.unet, STEP_INPUTS, STEP_OUTPUTS, provider)
        self._classify = Network(bundle.classifier_path, bundle.classifier, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, provider)
        self._images: dict[int, OpenImage] = {}
        self._handles, self._tickets = itertools.count(), itertools.count()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="densepure-rt")
        self._outstanding: dict[Future[NDArray[np.int64] | None], int] = {}
        self._mean = self._std = np.empty((0, *self.image_shape), np.float32)
        self._finite = np.empty(0, bool)
        probe(bundle, batch, lambda feed: [*self._step(feed), *self._classify({"mean": feed["mean"]})])

    def open_image(self, pixels: NDArray[np.uint8], key: Key, sigma: float, scale: float) -> int:
        handle = next(self._handles)
        self._images[handle] = OpenImage(pixels.copy(), key, smoothing_law(sigma), scale)
        return handle

    def close_image(self, handle: int) -> None:
        self._images.pop(handle, None)

    def reserve(self, slots: int) -> None:
        if slots > len(self._mean):
            self._mean = np.zeros((slots, *self.image_shape), np.float32)
            self._std = np.zeros((slots, *self.image_shape), np.float32)
            self._finite = np.zeros(slots, bool)

    def submit(self, batch: Batch) -> int:
        run = {"smooth": self._run_smooth, "step": self._run_step, "classify": self._run_classify}[batch.kind]
        ticket = next(self._tickets)
        self._outstanding[self._pool.submit(run, batch)] = ticket
        return ticket

    def collect(self) -> tuple[int, NDArray[np.int64] | None]:
        done, _ = wait(self._outstanding, return_when=FIRST_COMPLETED)
        oldest = min(done, key=self._outstanding.__getitem__)
        return self._outstanding.pop(oldest), oldest.result()

    def drain(self) -> None:
        wait(self._outstanding)
        self._outstanding.clear()

    def read(self, slots: Sequence[int]) -> tuple[Floats, Floats]:
        return self._mean[list(slots)], self._std[list(slots)]

    def describe(self) -> Mapping[str, str | int | bool]:
        return {
            "provider": "onnxruntime CPU" if self.provider == "cpu" else f"onnxruntime {self.provider}",
            "onnxruntime": onnxruntime.__version__,
            "processor": processor(),
            "threads": self.threads,
            "batch": self.batch,
            "independent_of_batch_mates": True,  # or `probe` would have raised
        }

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._outstanding.clear()
        self._images.clear()

    def _run_smooth(self, batch: Batch) -> None:
        for handle, sample, slot in zip(batch.image, batch.sample, batch.target, strict=True):
            image = self._images[int(handle)]
            levels = image.pixels + smoothing_noise(image.law, image.key, int(sample), image.pixels.shape)
            self._mean[slot] = first_state(levels, image.scale)
            self._std[slot] = 0
            self._finite[slot] = True

    def _run_step(self, batch: Batch) -> None:
        n = len(batch.source)
        noise = np.zeros((self.batch, *self.image_shape), np.float32)
        for i in np.flatnonzero(batch.step):
            key = self._images[int(batch.image[i])].key
            noise[i] = vote_noise(key, int(batch.sample[i]), int(batch.vote[i]), int(batch.step[i]), self.image_shape)
        mean, std, finite = self._step(
            {
                "mean": self._padded(self._mean[batch.source]),
                "std": self._padded(self._std[batch.source]),
                "noise": noise,
                "t": self._padded(batch.t),
                "coef": self._padded(batch.coef),
            },
        )
        self._mean[batch.target] = mean[:n]
        self._std[batch.target] = std[:n]
        self._finite[batch.target] = self._finite[batch.source] & (finite[:n] > 0)

    def _run_classify(self, batch: Batch) -> NDArray[np.int64]:
        n = len(batch.source)
        (logits,) = self._classify({"mean": self._padded(self._mean[batch.source])})
        finite = self._finite[batch.source] & np.isfinite(logits[:n]).all(axis=1)
        return np.where(finite, logits[:n].argmax(axis=1), NOT_FINITE)

    def _padded(self, values: Floats) -> Floats:
        """`values` filled up to a whole batch with copies of the first item: a batch always has the same shape."""
        return np.concatenate([values, np.repeat(values[:1], self.batch - len(values), axis=0)])
