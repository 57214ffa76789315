"""What only an NVIDIA GPU can show. `make test-gpu` runs it and writes runs/gpu-report.txt to send back.

Everything is compared with numpy and with ONNX Runtime on the CPU, from the same noise.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from densepure_rt.commands.inspection import inspection
from densepure_rt.errors import EnvironmentFault
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.keys import seeded_secret
from densepure_rt.runtime import gpu
from densepure_rt.runtime.bundle import Bundle, Flavour, open_bundle, plan_path, shipped_engine
from densepure_rt.runtime.device import (
    CLASSIFY_INPUTS,
    CLASSIFY_OUTPUTS,
    NOT_FINITE,
    STEP_INPUTS,
    STEP_OUTPUTS,
    Batch,
    Device,
    Floats,
)
from densepure_rt.runtime.machine import available_cores
from densepure_rt.runtime.noise import Key, first_state, image_key, smoothing_law, smoothing_noise, vote_law, vote_noise
from densepure_rt.runtime.onnx_device import OnnxDevice, open_session
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.reverse import Outcome, decide
from densepure_rt.runtime.schedule import Chain, make_chain
from densepure_rt.runtime.tensorrt_api import import_flavour
from densepure_rt.runtime.tensorrt_device import (
    IMAGE,
    THREADS_PER_BLOCK,
    TensorRTDevice,
    as_array,
    compile_kernels,
    import_cuda,
)
from densepure_rt.smoothing.classifier import SmoothedClassifier
from densepure_rt.smoothing.samplers import OnDevice
from densepure_rt.smoothing.settings import Settings
from densepure_rt.smoothing.voting import Ballot
from tests.gpu.report import Report, densepure_rt
from tests.gpu_box import PLAN_RAN, RTX_CAPABILITIES

# What other libraries warn of on machines that nobody here has seen must not end a check.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BATCHES = (8, 64)
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
FULL = ("fp32", "fp16")  # precisions that must build wherever the library runs; the others need newer GPUs
# What a plan may lose to the float32 graph on the CPU, in relative L2. Of float32, between what Winograd's convolutions
# and what TensorFloat-32 lose: test_bar.py. Of fp16, above what the shipped UNet loses when every result is rounded,
# 3.5e-3 (ONNX Runtime's CPU keeps some in float32). Of bf16, as much as export/convert/parity.py allows. A quantized
# one is judged by its labels.
RELATIVE_L2 = {"fp32": 2e-5, "fp16": 6e-3, "bf16": 2e-2}
LABELS = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.05, "int8": 0.1, "fp8": 0.1}  # the share that may differ
LABEL_IMAGES, LABEL_SAMPLES = 20, 50
SIGMA, STEPS = 0.5, 2
SECRET = seeded_secret(1)
KEY: Key = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
SECONDS = 3.0  # of measuring, after as long a warm-up as one batch
# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": results of 32-bit floating-point add,
# multiply and multiply-add per clock cycle and multiprocessor, by compute capability.
FLOAT32_PER_CLOCK = {
    "7.5": 64,
    "8.0": 64,
    "8.6": 128,
    "8.7": 128,
    "8.9": 128,
    "9.0": 128,
    "10.0": 128,
    "12.0": 128,
}


@pytest.fixture(scope="session")
def here() -> gpu.Gpu:
    try:
        return gpu.find()
    except EnvironmentFault as fault:
        pytest.skip(str(fault))


@pytest.fixture(scope="session", autouse=True)
def report(here: gpu.Gpu, request: pytest.FixtureRequest) -> Iterator[Report]:
    found = Report.begin()
    request.config.pluginmanager.register(found)
    found.add("GPU", **dataclasses.asdict(here))
    yield found
    print(f"\nwrote {found.path}")


@pytest.fixture(scope="session")
def shipped() -> Bundle:
    return open_bundle(shipped_engine())


class Plans:
    """Plans of the default model, built by the command line as a user does; of each kind once."""

    def __init__(self, folder: Path, here: gpu.Gpu, report: Report) -> None:
        self.folder, self.here, self.report = folder, here, report
        self.done: dict[tuple[Flavour, str], Bundle | str] = {}
        for path in shipped_engine().parent.glob("*.onnx*"):
            shutil.copy(path, folder)

    def onnx(self, precision: str) -> Path:
        return self.folder / ("unet.onnx" if precision == "fp32" else f"unet.{precision}.onnx")

    def __call__(self, flavour: Flavour, precision: str) -> Bundle:
        """Skips when this machine cannot have that plan; fails when it should have."""
        kind = (flavour, precision)
        if kind not in self.done:
            self.done[kind] = self.build(flavour, precision)
            if isinstance(reason := self.done[kind], str):
                self.report.add("Plans", flavour=flavour, precision=precision, none=reason)
        found = self.done[kind]
        if isinstance(found, Bundle):
            return found
        if found.startswith("FAILED"):
            pytest.fail(found)
        pytest.skip(found)

    def build(self, flavour: Flavour, precision: str) -> Bundle | str:
        """The bundle, or why there is none."""
        try:
            version = import_flavour(flavour).__version__
        except EnvironmentFault as fault:
            return str(fault)
        if not self.onnx(precision).exists():
            done = densepure_rt("export", "--precision", precision, "--out", str(self.folder))
            if done.returncode or not self.onnx(precision).exists():
                return f"no {self.onnx(precision).name} could be exported: {done.stderr.strip()[-500:]}"
        command = ["export", "--target", flavour, "--out", str(self.folder), "--batch", ",".join(map(str, BATCHES))]
        command += ["--precision", precision] if precision != "fp32" else []
        command += ["--compute-capability", self.here.compute_capability] if flavour == "tensorrt-rtx" else []
        begun = time.monotonic()
        done = densepure_rt(*command)
        if done.returncode:
            what = f"no {flavour} {version} plan of {precision}: {done.stderr.strip()[-800:]}"
            foreign = flavour == "tensorrt-rtx" and self.here.compute_capability not in RTX_CAPABILITIES
            excused = precision not in FULL or foreign
            return what if excused else f"FAILED: {what}"
        bundle = open_bundle(plan_path(self.onnx(precision), flavour))
        assert bundle.unet.plan is not None
        self.report.add(
            "Plans",
            flavour=flavour,
            precision=precision,
            version=version,
            seconds=time.monotonic() - begun,
            mib=bundle.unet_path.stat().st_size / 2**20,
            types=dict(bundle.unet.plan.types),
        )
        return bundle


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory, here: gpu.Gpu, report: Report) -> Plans:
    return Plans(tmp_path_factory.mktemp("plans"), here, report)


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    found: Flavour = request.param
    return found


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def plan(plans: Plans, flavour: Flavour, precision: str) -> Bundle:
    return plans(flavour, precision)


@pytest.fixture(params=BATCHES)
def device(plan: Bundle, request: pytest.FixtureRequest) -> Iterator[TensorRTDevice]:
    with closing(on_gpu(plan, request.param)) as opened:
        yield opened


@pytest.fixture(scope="session")
def images(shipped: Bundle) -> list[LabelledImage]:
    """Shipped images, evenly spread."""
    everything = open_images(None, shipped.unet.image, shipped.classifier.class_names)
    return list(everything.select(len(everything) // LABEL_IMAGES, LABEL_IMAGES))


@pytest.fixture(scope="session")
def labels_on_cpu(shipped: Bundle, images: list[LabelledImage]) -> list[Outcome]:
    with closing(OnnxDevice(shipped, 16, available_cores())) as device:
        return outcomes(device, shipped, images)


def on_gpu(plan: Bundle, batch: int | None = None) -> TensorRTDevice:
    device = open_device(plan, batch, threads=1)
    assert isinstance(device, TensorRTDevice)
    return device


def chain_of(bundle: Bundle, sigma: float = SIGMA, steps: int = STEPS) -> Chain:
    return make_chain(bundle.unet.schedule, bundle.unet.variance, sigma, steps)


def outcomes(device: Device, bundle: Bundle, images: Sequence[LabelledImage]) -> list[Outcome]:
    """LABEL_SAMPLES noisy copies of each image, one vote each."""
    chain = chain_of(bundle)
    keys = [image_key(SECRET, "predict", SIGMA, image.pixels) for image in images]
    opened = [device.open_image(x.pixels, key, SIGMA, chain.scale) for x, key in zip(images, keys, strict=True)]
    work = [(handle, sample) for handle in opened for sample in range(LABEL_SAMPLES)]
    found = list(decide(device, chain, work, lambda: Ballot(1)))
    for handle in opened:
        device.close_image(handle)
    return [outcome._replace(image=opened.index(outcome.image)) for outcome in found]


def disagreements(some: Sequence[Outcome], others: Sequence[Outcome]) -> int:
    return sum(one.label != other.label for one, other in zip(some, others, strict=True))


def feeds(bundle: Bundle, pixels: NDArray[np.uint8], sigma: float, steps: int) -> Iterator[dict[str, Floats]]:
    """What a step engine is given on the way of noisy images [n, C, H, W], each state from float32 on the CPU."""
    session = open_session(bundle.unet_path.read_bytes(), bundle.unet_path.name, STEP_INPUTS, STEP_OUTPUTS)
    chain, law, n = chain_of(bundle, sigma, steps), smoothing_law(sigma), len(pixels)
    levels = np.stack([image + smoothing_noise(law, KEY, i, image.shape) for i, image in enumerate(pixels)])
    mean = first_state(levels, chain.scale)
    std = np.zeros_like(mean)
    for step in range(len(chain)):
        noise = np.stack([vote_noise(KEY, i, 0, step, image.shape) for i, image in enumerate(pixels)]) * (step > 0)
        feed = {"mean": mean, "std": std, "noise": noise.astype(np.float32)}
        feed |= {"t": np.full(n, chain.t[step]), "coef": np.tile(chain.coef[step], (n, 1))}
        yield feed
        mean, std, _ = session.run(STEP_OUTPUTS, feed)


def cycled(images: Sequence[LabelledImage], n: int) -> NDArray[np.uint8]:
    return np.stack([images[i % len(images)].pixels for i in range(n)])


def relative_l2(found: Floats, expected: Floats) -> float:
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / (norm or 1.0)


def test_the_gpu_has_a_name_a_compute_capability_and_a_driver(here: gpu.Gpu) -> None:
    assert here.name
    assert all(part.isdigit() for part in (*here.compute_capability.split("."), *here.driver.split(".")))


class OnGpu:
    """The kernels alone, by cuda.core, without TensorRT."""

    def __init__(self, here: gpu.Gpu) -> None:
        self.cuda = import_cuda(here)
        self.device = self.cuda.Device(0)
        self.device.set_current()
        self.stream = self.device.create_stream()
        self.pinned = self.cuda.LegacyPinnedMemoryResource()
        self.kernels = compile_kernels(self.cuda, self.device.arch)

    def staging(self, size: int) -> tuple[Any, NDArray[np.uint8]]:
        buffer = self.pinned.allocate(size, stream=self.stream)
        return buffer, as_array(buffer, np.uint8)

    def put(self, values: NDArray[Any]) -> Any:
        staging, view = self.staging(values.nbytes)
        view[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        buffer = self.device.allocate(values.nbytes, stream=self.stream)
        buffer.copy_from(staging, stream=self.stream)
        self.stream.sync()
        return buffer

    def get(self, buffer: Any, like: NDArray[Any]) -> NDArray[Any]:
        staging, view = self.staging(like.nbytes)
        buffer.copy_to(staging, stream=self.stream)
        self.stream.sync()
        found: NDArray[Any] = view.copy().view(like.dtype).reshape(like.shape)
        return found

    def launch(self, kernel: str, *arguments: Any, across: int, items: int = 1) -> list[NDArray[Any]]:
        """The arrays among the arguments, as the kernel left them; an integer goes as int32."""
        buffers = [self.put(x) if isinstance(x, np.ndarray) else x for x in arguments]
        values = [np.int32(x) if isinstance(x, int) else x for x in buffers]
        config = self.cuda.LaunchConfig(grid=(-(-across // THREADS_PER_BLOCK), items, 1), block=THREADS_PER_BLOCK)
        self.cuda.launch(self.stream, config, self.kernels[kernel], *values)
        return [self.get(b, x) for b, x in zip(buffers, arguments, strict=True) if isinstance(x, np.ndarray)]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 5, 7)], ids=str)
def test_the_kernels_on_the_gpu_are_numpys_bit_for_bit(
    here: gpu.Gpu, report: Report, shape: tuple[int, int, int]
) -> None:
    on, draw, n, size = OnGpu(here), np.random.default_rng(1), 40, int(np.prod(shape))
    laws = [smoothing_law(sigma) for sigma in (0.25, 0.5, 1.0)]
    scales = [0.9, 0.7, 0.4]
    keys: list[Key] = [KEY, (2**64 - 1, 5), (7, 2**63)]
    pixels = draw.integers(0, 256, (3, *shape), np.uint8)
    held = [(on.put(image), on.put(law.thresholds)) for image, law in zip(pixels, laws, strict=True)]
    table = np.zeros(3, IMAGE)
    for row, (image, thresholds), law, key, scale in zip(table, held, laws, keys, scales, strict=True):
        row["pixels"], row["thresholds"] = int(image.handle), int(thresholds.handle)
        row["key"], row["count"], row["lowest"], row["scale"] = key, len(law.thresholds), law.lowest, scale
    images = table.view(np.uint8)
    which, sample, vote = draw.integers(0, 3, n), draw.integers(0, 2**40, n), draw.integers(0, 2**33, n)
    step, source = draw.integers(0, 12, n), draw.integers(0, n, n)
    items = np.stack([which, sample, vote, step, source, np.arange(n)], axis=1)
    mean, std = draw.standard_normal((2, n, size), np.float32)
    finite = draw.integers(0, 2, n, np.uint8)

    _, _, smoothed, spread, sound = on.launch("smooth", items, images, mean, std, finite, size, across=size, items=n)
    expected = [
        first_state(pixels[i] + smoothing_noise(laws[i], keys[i], int(s), shape), scales[i]).ravel()
        for i, s in zip(which, sample, strict=True)
    ]
    assert smoothed.tobytes() == np.stack(expected).tobytes()
    assert not spread.any()
    assert (sound == 1).all()

    law, nothing = vote_law(), np.full((n, size), np.nan, np.float32)
    votes = (law.thresholds, len(law.thresholds), law.lowest)
    found = on.launch("gather", items, images, mean, std, *votes, nothing, nothing, nothing, size, across=size, items=n)
    drawn = [
        vote_noise(keys[i], int(s), int(v), int(k), shape).ravel() * (k > 0)
        for i, s, v, k in zip(which, sample, vote, step, strict=True)
    ]
    assert found[5].tobytes() == mean[source].tobytes()
    assert found[6].tobytes() == std[source].tobytes()
    assert (found[7] == np.stack(drawn)).all()

    outputs = [*draw.standard_normal((2, n, size), np.float32), np.array([1, 0, np.nan, 0.5] * (n // 4), np.float32)]
    in_place = items.copy()
    in_place[:, 4] = in_place[:, 5]  # no item writes another's source
    found = on.launch("scatter", in_place, *outputs, mean, std, np.ones(n, np.uint8), size, across=size, items=n)
    assert [found[4].tobytes(), found[5].tobytes()] == [outputs[0].tobytes(), outputs[1].tobytes()]
    assert found[6].tolist() == [1, 0, 0, 1] * (n // 4)

    assert on.launch("gather_means", items, mean, nothing, size, across=size, items=n)[2].tobytes() == (
        mean[source].tobytes()
    )
    logits = draw.integers(0, 4, (n, 10)).astype(np.float32)  # so that many tie
    logits[3, 3], logits[4, 0] = np.nan, np.inf
    *_, labels = on.launch("argmax", items, logits, finite, np.zeros(n, np.int32), 10, n, across=n)
    usable = np.isfinite(logits).all(axis=1) & (finite[source] > 0)
    assert labels.tolist() == np.where(usable, logits.argmax(axis=1), NOT_FINITE).tolist()
    report.add("Kernels", shape=list(shape), equal="bit for bit")


def test_plan_outputs_are_those_of_onnx_runtime_on_the_cpu(
    device: TensorRTDevice,
    shipped: Bundle,
    images: list[LabelledImage],
    report: Report,
    flavour: Flavour,
    precision: str,
) -> None:
    """At real states on the way: float32 on the CPU, and the plan from the very same inputs."""
    step = open_session(shipped.unet_path.read_bytes(), "unet.onnx", STEP_INPUTS, STEP_OUTPUTS)
    classify = open_session(shipped.classifier_path.read_bytes(), "classifier.onnx", CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    worst = dict.fromkeys((*STEP_OUTPUTS, *CLASSIFY_OUTPUTS), 0.0)
    for sigma in (0.25, 0.5, 1.0):
        for feed in feeds(shipped, cycled(images, device.batch), sigma, 3):
            expected = [*step.run(STEP_OUTPUTS, feed), *classify.run(CLASSIFY_OUTPUTS, {"mean": feed["mean"]})]
            for name, found, wanted in zip(worst, device._run_engines(feed), expected, strict=True):
                worst[name] = max(worst[name], relative_l2(found, wanted))
    facts = {"flavour": flavour, "precision": precision, "batch": device.batch}
    report.add("Relative L2 to ONNX Runtime on the CPU", **facts, **worst)
    assert worst["finite"] == 0
    if precision in RELATIVE_L2:
        assert max(worst.values()) <= RELATIVE_L2[precision]


def test_polygraphy_finds_the_plan_and_the_onnx_file_alike(
    plans: Plans, shipped: Bundle, images: list[LabelledImage], report: Report
) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    plan = plans("tensorrt", "fp32")
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.comparator import Comparator, CompareFunc

    steps = list(feeds(shipped, cycled(images, BATCHES[0]), SIGMA, 2))
    for onnx_file, plan_file, given in (
        (shipped.unet_path, plan.unet_path, steps),
        (shipped.classifier_path, plan.classifier_path, [{"mean": feed["mean"]} for feed in steps]),
    ):
        runners = [
            OnnxrtRunner(SessionFromOnnx(str(onnx_file), providers=["cpu"])),
            TrtRunner(EngineFromBytes(plan_file.read_bytes()), optimization_profile=0),
        ]
        results = Comparator.run(runners, data_loader=given)
        try:
            from polygraphy.comparator import SimpleCompareFunc

            compare = SimpleCompareFunc(atol=1e-3, rtol=1e-3)
        except ImportError:  # an older polygraphy
            compare = CompareFunc.simple(atol=1e-3, rtol=1e-3)
        alike = bool(Comparator.compare_accuracy(results, compare_func=compare))
        report.add("Polygraphy, TrtRunner against OnnxrtRunner", file=plan_file.name, feeds=len(given), alike=alike)
        assert alike


def test_labels_are_those_of_the_cpu_or_the_report_says_how_many_are_not(
    device: TensorRTDevice,
    plan: Bundle,
    images: list[LabelledImage],
    labels_on_cpu: list[Outcome],
    report: Report,
    flavour: Flavour,
    precision: str,
) -> None:
    found = outcomes(device, plan, images)
    differ, total = disagreements(found, labels_on_cpu), len(found)
    facts = {"flavour": flavour, "precision": precision, "batch": device.batch}
    report.add("Labels unlike the float32 graph's on the CPU", **facts, differ=differ, of=total, sigma=SIGMA)
    assert total == LABEL_IMAGES * LABEL_SAMPLES
    assert differ <= LABELS[precision] * total


def test_two_runs_count_the_same(
    device: TensorRTDevice,
    plan: Bundle,
    images: list[LabelledImage],
    report: Report,
    flavour: Flavour,
    precision: str,
) -> None:
    settings = Settings(SIGMA, STEPS, votes=5, n0=50, n=300, method="fixed")

    def counts(device: TensorRTDevice) -> list[Any]:
        certified = SmoothedClassifier(plan, OnDevice(device), SECRET).certify_each(images[:4], settings)
        return [(found.certificate, found.cost.unet_calls) for found in certified]

    first, second = counts(device), counts(device)
    with closing(on_gpu(plan, device.batch)) as another:
        reopened = counts(another)
    facts = {"flavour": flavour, "precision": precision, "batch": device.batch}
    report.add(PLAN_RAN, **facts, equal=first == second, equal_when_opened_again=first == reopened)
    report.add("Certificates", **facts, found=[str(certificate) for certificate, _ in first])
    assert first == second == reopened


def test_an_item_does_not_depend_on_its_batch_mates(
    device: TensorRTDevice,
    shipped: Bundle,
    images: list[LabelledImage],
    report: Report,
    flavour: Flavour,
    precision: str,
) -> None:
    """Stricter than the probe: at every place, beside ordinary mates, zeros, huge values, Inf and NaN."""
    batch = device.batch
    chain_feeds = [feed for sigma in (0.25, 1.0) for feed in feeds(shipped, cycled(images, batch), sigma, 2)]
    ordinary = {name: np.concatenate([feed[name][:1] for feed in chain_feeds]) for name in STEP_INPUTS}
    dependent = 0
    for item in range(len(chain_feeds)):
        seen = set()
        for mates in (*chain_feeds, 0.0, 1e30, np.inf, np.nan):
            for place in sorted({0, 1, batch // 2, batch - 1}):
                if isinstance(mates, dict):
                    feed = {name: values.copy() for name, values in mates.items()}
                else:
                    shapes = {name: chain_feeds[0][name].shape for name in STEP_INPUTS}
                    feed = {name: np.full(shape, mates, np.float32) for name, shape in shapes.items()}
                for name in STEP_INPUTS:
                    feed[name][place] = ordinary[name][item]
                seen.add(b"".join(output[place].tobytes() for output in device._run_engines(feed)))
        dependent += len(seen) > 1
    facts = {"flavour": flavour, "precision": precision, "batch": batch}
    report.add("Items that depend on their batch mates", **facts, dependent=dependent, of=len(chain_feeds))
    assert dependent == 0


def test_labels_are_the_same_with_and_without_captured_graphs(
    plan: Bundle,
    images: list[LabelledImage],
    report: Report,
    flavour: Flavour,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with closing(on_gpu(plan)) as device:
        captured = outcomes(device, plan, images)
        states = [part.tobytes() for part in device.read(range(8))]
    monkeypatch.setattr(
        TensorRTDevice, "_launch", lambda self, kind: self._issue(kind, self._stream, int(self._stream.handle))
    )
    monkeypatch.setattr(TensorRTDevice, "_new_context", lambda self, engine, path: engine.create_execution_context())
    with closing(on_gpu(plan)) as device:
        plain = outcomes(device, plan, images)
        equal_states = [part.tobytes() for part in device.read(range(8))] == states
    differ = disagreements(captured, plain)
    facts = {"flavour": flavour, "precision": precision}
    report.add("Captured graphs", **facts, labels_that_differ=differ, equal_states=equal_states)
    assert captured == plain


def test_a_plan_of_one_batch_runs_and_tells_its_layers_and_their_times(
    plans: Plans,
    tmp_path: Path,
    images: list[LabelledImage],
    labels_on_cpu: list[Outcome],
    report: Report,
    flavour: Flavour,
) -> None:
    """Built with fixed shapes and the promise for one profile; that of tensorrt for later versions, by the lean library
    where it is installed. Opened twice: of tensorrt-rtx, the second time with the kernels that were kept."""
    plans(flavour, "fp32")  # skips where there is none
    for path in plans.folder.glob("*.onnx*"):
        shutil.copy(path, tmp_path)
    command = ["export", "--target", flavour, "--out", str(tmp_path), "--batch", "64"]
    command += ["--version-compatible"] if flavour == "tensorrt" else []
    command += ["--compute-capability", plans.here.compute_capability] if flavour == "tensorrt-rtx" else []
    done = densepure_rt(*command)
    assert done.returncode == 0, done.stderr
    plan, seconds = open_bundle(plan_path(tmp_path / "unet.onnx", flavour)), []
    for _ in range(2):
        begun = time.monotonic()
        with closing(on_gpu(plan)) as device:
            seconds.append(time.monotonic() - begun)
            found, library, times = outcomes(device, plan, images), str(device.library), device.layer_times(5)
    layers = inspection(plan.unet_path, layers=True)["layers"]
    differ = disagreements(found, labels_on_cpu)
    report.add(
        "Plan of one batch",
        flavour=flavour,
        library=library,
        differ=differ,
        seconds_to_open=seconds,
        layers=len(layers),
        ms_of_a_step=sum(times["step"].values()),
        ms_of_a_classify_batch=sum(times["classify"].values()),
    )
    assert differ <= LABELS["fp32"] * len(found)
    assert all("LayerType" in layer for layer in layers)


def calls_a_second(run: Callable[[], object], items: int, wait: Callable[[], object] = lambda: None) -> float:
    """How many items a second `run` does, of so many each, over about SECONDS."""
    run()
    wait()
    begun, rounds = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        for _ in range(8):
            run()
        wait()
        rounds += 8
    return items * rounds / (time.perf_counter() - begun)


def step_batch(device: Device, chain: Chain, image: NDArray[np.uint8]) -> Batch:
    """A whole batch of second steps, each from a slot of its own into the same."""
    handle = device.open_image(image, KEY, SIGMA, chain.scale)
    device.reserve(device.batch)
    slots = np.arange(device.batch)
    device.submit(Batch.of(chain, "smooth", slots, image=handle, sample=slots))
    device.collect()
    return Batch.of(chain, "step", slots, image=handle, sample=slots, step=1)


def float_operations(path: Path) -> float | None:
    """Two for each multiply-add of the Conv, MatMul and Gemm nodes of an ONNX file, for one item."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    import onnxruntime

    model = onnx.load(str(path))
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    known = {value.name for value in (*model.graph.output, *model.graph.input)} | weights.keys()
    wanted = sorted({name for node in products for name in (*node.input[:2], node.output[0])} - known)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {}
    for value in session.get_inputs():
        feed[value.name] = np.ones([size if isinstance(size, int) else 1 for size in value.shape], np.float32)
    names = [output.name for output in session.get_outputs()]
    shapes = {name: found.shape for name, found in zip(names, session.run(names, feed), strict=True)}
    shapes |= {name: value.shape for name, value in feed.items()} | weights
    total = 0
    for node in products:
        left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
        turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        depth = int(np.prod(right[1:])) if node.op_type == "Conv" else left[0] if turned else left[-1]
        total += 2 * int(np.prod(out)) * depth
    return float(total)


def float32_peak(here: gpu.Gpu) -> float | None:
    """Float32 operations a second outside the tensor cores, at the clock that the driver calls typical."""
    per_clock = FLOAT32_PER_CLOCK.get(here.compute_capability)
    device = import_cuda(here).Device(0)
    device.set_current()
    kilohertz = getattr(device.properties, "clock_rate", None)
    if per_clock is None or not kilohertz:
        return None
    return float(2 * per_clock * device.properties.multiprocessor_count * kilohertz * 1000)


def test_throughput_is_measured(
    plan: Bundle,
    device: TensorRTDevice,
    shipped: Bundle,
    images: list[LabelledImage],
    here: gpu.Gpu,
    report: Report,
    flavour: Flavour,
    precision: str,
) -> None:
    batch = step_batch(device, chain_of(plan), images[0].pixels)
    waiting = 0

    def run() -> None:
        nonlocal waiting
        if waiting == device.in_flight:
            device.collect()
            waiting -= 1
        device.submit(batch)
        waiting += 1

    def wait() -> None:
        nonlocal waiting
        while waiting:
            device.collect()
            waiting -= 1

    calls = calls_a_second(run, device.batch, wait)
    settings = Settings(SIGMA, STEPS, votes=5, n0=100, n=1000, method="fixed")
    begun = time.perf_counter()
    certified = list(SmoothedClassifier(plan, OnDevice(device), SECRET).certify_each(images[:5], settings))
    seconds = (time.perf_counter() - begun) / len(certified)
    operations, peak = float_operations(shipped.unet_path), float32_peak(here)
    report.add(
        "UNet calls a second, noise and slots included",
        by=flavour,
        precision=precision,
        batch=device.batch,
        calls=calls,
        seconds_an_image_of_1100_samples=seconds,
        gflop_a_call=operations / 1e9 if operations else "unknown",
        of_the_float32_peak=calls * operations / peak if operations and peak else "unknown",
    )
    assert calls > 0


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_throughput_of_pytorch_on_the_same_gpu_is_measured(
    here: gpu.Gpu, report: Report, kind: str, batch: int
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has no CUDA here")
    from densepure_rt.export.models.unets import zoo_unet

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[kind]
    network = copy.deepcopy(zoo_unet().network).eval().to("cuda", dtype)
    x, t = torch.zeros(batch, 1, 28, 28, device="cuda", dtype=dtype), torch.full((batch,), 100.0, device="cuda")
    with torch.inference_mode():
        calls = calls_a_second(lambda: network(x, t), batch, torch.cuda.synchronize)
    operations, peak = float_operations(shipped_engine()), float32_peak(here)
    report.add(
        "UNet calls a second, noise and slots included",
        by=f"PyTorch {torch.__version__}, eager, the network alone",
        precision=kind,
        batch=batch,
        calls=calls,
        of_the_float32_peak=calls * operations / peak if operations and peak else "unknown",
    )
    assert calls > 0


def test_a_captured_graph_of_the_kernels_does_what_they_do(here: gpu.Gpu, report: Report) -> None:
    """As TensorRTDevice captures a step, with a copy on the GPU in the engine's place: no TensorRT is needed."""
    on, draw, n, size = OnGpu(here), np.random.default_rng(2), 16, 28 * 28
    mean, std = draw.standard_normal((2, n, size), np.float32)
    items = np.zeros((n, 6), np.int64)
    items[:, 4] = items[:, 5] = np.arange(n)
    held = {"items": on.put(items), "mean": on.put(mean), "engine": on.put(np.zeros_like(mean))}
    held |= {"std": on.put(std), "out": on.put(np.zeros_like(mean)), "out_std": on.put(np.zeros_like(mean))}
    held |= {"finite": on.put(np.ones(n, np.float32)), "all": on.put(np.zeros(n, np.uint8))}
    config = on.cuda.LaunchConfig(grid=(-(-size // THREADS_PER_BLOCK), n, 1), block=THREADS_PER_BLOCK)

    def issue(stream: Any) -> None:
        across = np.int32(size)
        gathered = (held["items"], held["mean"], held["engine"], across)
        scattered = (held["items"], held["engine"], held["std"], held["finite"])
        on.cuda.launch(stream, config, on.kernels["gather_means"], *gathered)
        on.cuda.launch(
            stream, config, on.kernels["scatter"], *scattered, held["out"], held["out_std"], held["all"], across
        )

    issue(on.stream)
    on.stream.sync()
    with closing(on.stream.create_graph_builder()) as builder:
        builder.begin_building()
        issue(builder)  # recorded, not run
        graph = builder.end_building().complete()
    for other in (mean, draw.standard_normal((n, size), np.float32)):
        held["mean"].copy_from(on.put(other), stream=on.stream)
        graph.launch(on.stream)
        assert on.get(held["out"], other).tobytes() == other.tobytes()
        assert on.get(held["out_std"], std).tobytes() == std.tobytes()
    report.add("Captured graph of the kernels", equal="bit for bit")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnx_runtime_on_the_gpu_gives_the_labels_of_the_cpu_or_the_report_says_how_many_differ(
    shipped: Bundle,
    images: list[LabelledImage],
    labels_on_cpu: list[Outcome],
    report: Report,
    provider: Any,
) -> None:
    try:
        device = open_device(shipped, 64, 2, provider)
    except EnvironmentFault as fault:
        report.add("ONNX Runtime on the GPU", provider=provider, none=str(fault))
        pytest.skip(str(fault))
    with closing(device):
        begun = time.perf_counter()
        found = outcomes(device, shipped, images)
        seconds = time.perf_counter() - begun
    differ = disagreements(found, labels_on_cpu)
    report.add(
        "ONNX Runtime on the GPU",
        provider=provider,
        differ=differ,
        of=len(found),
        samples_a_second=len(found) / seconds,
    )
    assert differ <= LABELS["fp32"] * len(found)
