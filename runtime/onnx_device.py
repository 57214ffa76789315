"""The reference device: numpy for noise and slots, ONNX Runtime on the CPU for the networks."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed
from densepure_rt.runtime.bundle import Bundle, verified_bytes
from densepure_rt.runtime.device import NOT_FINITE, Batch
from densepure_rt.runtime.noise import Key, RoundedNormal, first_state, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.schedule import make_chain

STEP_INPUTS = ("mean", "std", "noise", "t", "coef")
STEP_OUTPUTS = ("mean_next", "std_next", "finite")
CLASSIFY_INPUTS = ("mean",)
CLASSIFY_OUTPUTS = ("logits",)
PROBE_DEPTH, PROBE_STEPS = 4, 3  # the probe starts at a quarter of the schedule and takes up to three steps
SILENT = 4  # ONNX Runtime's log level "fatal"; what it raises is reported anyway

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class OpenImage:
    pixels: NDArray[np.uint8]
    key: Key
    law: RoundedNormal
    scale: float


def open_session(
    content: bytes, name: str, inputs: Sequence[str], outputs: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session of one thread: parallel work is one caller a core on the same session, which shares the weights.

    ONNX Runtime on the CPU is bitwise independent of the batch size in every case tried, and this is its fastest
    setting there: batches of 8 to 32, one thread an operator.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise CheckFailed(f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {error}") from error
    found = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
    if found != (list(inputs), list(outputs)):
        raise CheckFailed(
            f"{name} takes {', '.join(found[0])} and gives {', '.join(found[1])}; expected {', '.join(inputs)} and "
            f'{", ".join(outputs)}: export it again with "densepure-rt export"'
        )
    return session


class OnnxDevice:
    """See `densepure_rt.runtime.device.Device`. `threads` callers share one session; each runs whole batches."""

    def __init__(self, bundle: Bundle, batch: int, threads: int) -> None:
        self.batch = batch
        self.in_flight = self.threads = threads
        self.image_shape = bundle.unet.image
        self._step = open_session(
            verified_bytes(bundle.unet_path, bundle.unet.file.sha256), bundle.unet_path.name, STEP_INPUTS, STEP_OUTPUTS
        )
        self._classify = open_session(
            verified_bytes(bundle.classifier_path, bundle.classifier.file.sha256),
            bundle.classifier_path.name,
            CLASSIFY_INPUTS,
            CLASSIFY_OUTPUTS,
        )
        self._images: dict[int, OpenImage] = {}
        self._handles, self._tickets = itertools.count(), itertools.count()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="densepure-rt")
        self._outstanding: dict[Future[NDArray[np.int64] | None], int] = {}
        self._mean = self._std = np.empty((0, *self.image_shape), np.float32)
        self._finite = np.empty(0, bool)
        self._probe(bundle)

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
            "provider": "onnxruntime CPU",
            "onnxruntime": onnxruntime.__version__,
            "processor": platform.processor() or platform.machine(),
            "threads": self.threads,
            "batch": self.batch,
            "independent_of_batch_mates": True,  # or _probe would have raised
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
        mean, std, finite = self._step.run(
            STEP_OUTPUTS,
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
        (logits,) = self._classify.run(CLASSIFY_OUTPUTS, {"mean": self._padded(self._mean[batch.source])})
        finite = self._finite[batch.source] & np.isfinite(logits[:n]).all(axis=1)
        return np.where(finite, logits[:n].argmax(axis=1), NOT_FINITE)

    def _padded(self, values: Floats) -> Floats:
        """`values` filled up to a whole batch with copies of the first item: a batch always has the same shape."""
        return np.concatenate([values, np.repeat(values[:1], self.batch - len(values), axis=0)])

    def _probe(self, bundle: Bundle) -> None:
        """Raise CheckFailed when the engines give NaN on ordinary input, or when an item's result depends on its mates.

        A batch of mixed timesteps and spreads is run twice; the second time in reverse order and with every other item
        exchanged. The items that were kept must come out bit for bit the same.
        """
        schedule, draw = bundle.unet.schedule, np.random.Generator(np.random.Philox(0))
        quarter = schedule.steps // PROBE_DEPTH
        sigma = math.sqrt(1 / schedule.alpha_bar()[quarter] - 1) / 2
        chain = make_chain(schedule, bundle.unet.variance, sigma, max(1, min(PROBE_STEPS, quarter)))
        step = np.arange(self.batch) % len(chain)

        def items() -> dict[str, Floats]:
            mean, noise = draw.standard_normal((2, self.batch, *self.image_shape), np.float32)
            std = np.zeros_like(mean) + (step > 0)[:, None, None, None].astype(np.float32) / 4
            return {"mean": mean, "std": std, "noise": noise, "t": chain.t[step], "coef": chain.coef[step]}

        def run(feed: dict[str, Floats]) -> list[Floats]:
            return [*self._step.run(STEP_OUTPUTS, feed), *self._classify.run(CLASSIFY_OUTPUTS, {"mean": feed["mean"]})]

        kept = np.arange(self.batch) % 2 == 0
        some, others = items(), items()
        exchanged = {name: np.where(kept[(...,) + (None,) * (x.ndim - 1)], x, others[name]) for name, x in some.items()}
        try:
            first, second = run(some), run({name: x[::-1] for name, x in exchanged.items()})
        except MemoryError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base but this
            raise CheckFailed(
                f"{bundle.unet_path.name} or {bundle.classifier_path.name} cannot run batches of {self.batch} images "
                f"{list(self.image_shape)}, as its sidecar says ({error}): export the bundle again, or use a smaller "
                f"--batch if the memory is short"
            ) from error
        if first[3].shape != (self.batch, len(bundle.classifier.class_names)):
            raise CheckFailed(
                f"{bundle.classifier_path.name} gives logits of {list(first[3].shape[1:])} for the "
                f"{len(bundle.classifier.class_names)} classes that its sidecar names: export the bundle again"
            )
        if not (np.isfinite(first[0]).all() and (first[2] > 0).all() and np.isfinite(first[3]).all()):
            raise CheckFailed(
                f"{bundle.unet_path.name} or {bundle.classifier_path.name} gives NaN or Inf on ordinary input: "
                f"its weights are damaged; export it again from a sound checkpoint"
            )
        if any(not np.array_equal(a[kept], b[::-1][kept]) for a, b in zip(first, second, strict=True)):
            raise CheckFailed(
                f"on this machine an item's result depends on the others in its batch of {self.batch}, which would "
                f"void the certificates: use --batch 1"
            )
