"""ONNX Runtime's GPU providers without a GPU: its real build decides on the graphs, on libraries that do nothing.

Nothing here ran on a GPU. The rule by which nodes go to the CPU is here a second time, written from its source.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.runs.identity import arithmetic_of
from densepure_rt.runtime import gpu, onnxruntime_api, onnxruntime_gpu
from densepure_rt.runtime.bundle import open_bundle, shipped_engine
from densepure_rt.runtime.device import STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.machine import available_cores
from densepure_rt.runtime.onnx_device import BATCH_AXIS, Place, open_session, session_options
from densepure_rt.runtime.onnxruntime_gpu import at_opset, engine_folder, engines_sha256, with_engines
from densepure_rt.runtime.open_device import default_threads, open_device
from tests.runtime.stand_in_cuda import BUILT_FOR_GPUS, make_stand_in, needs_stand_in, with_stand_in

BATCH = 64
SHAPE_NODES = {"Slice": 12, "Concat": 8, "Gather": 4}  # that the CUDA provider leaves to the CPU at an unknown batch
SMALL = 100  # elements: kSmallInitializerThreshold
# What CUDA kernels keep in the CPU's memory, by operator: `OutputMemoryType(OrtMemTypeCPUOutput)` of Shape and Size,
# `InputMemoryType(OrtMemTypeCPUInput, ...)` in onnxruntime/core/providers/cuda/{tensor,math,reduction,generator}/*.cc.
OUTPUTS_ON_CPU = {"Shape", "Size"}
INPUTS_ON_CPU = {
    "ConstantOfShape": {0},
    "Expand": {1},
    "Pad": {1, 2, 3},
    "ReduceMax": {1},
    "ReduceMean": {1},
    "ReduceSum": {1},
    "Reshape": {1},
    "Resize": {1, 2, 3},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Tile": {1},
    "Unsqueeze": {1},
}
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def cpu_preferred(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that ONNX Runtime gives the CPU though the CUDA provider has kernels for them.

    Source: GetCpuPreferredNodes in onnxruntime/core/framework/fallback_cpu_capability.cc: what depends on CPU tensors,
    small initializers and graph inputs alone, and on one of the first, goes to the CPU, unless the kernel for CUDA
    wants that input there anyway or it is of 16 bits. The nodes of a file are in topological order.
    """
    graph = model.graph
    free = {tensor.name for tensor in graph.initializer if int(np.prod(tensor.dims)) <= SMALL}
    free |= {value.name for value in graph.input}
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type in HALVES}
    on_cpu = {name for node in graph.node if node.op_type in OUTPUTS_ON_CPU for name in node.output}
    found = []
    for node in graph.node:
        wanted_there = INPUTS_ON_CPU.get(node.op_type, set())
        inputs = [(place, name) for place, name in enumerate(node.input) if name]
        if (
            any(name in on_cpu for _, name in inputs)
            and not any(name in halves for _, name in inputs)
            and all(name in free or (name in on_cpu and place not in wanted_there) for place, name in inputs)
        ):
            found.append(node)
            on_cpu |= set(node.output)
    return found


def optimised(path: Path, folder: Path, place: Place) -> onnx.ModelProto:
    """Return a graph as it is partitioned: after the basic optimisations, with the options of a GPU provider."""
    options = session_options(place)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step graph of the published CIFAR-10 network, node for node, with a quarter of its channels."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from densepure_rt.export.convert.to_onnx import step_onnx
    from densepure_rt.export.models.openai_unet import PUBLISHED, unloaded
    from densepure_rt.export.models.unets import DiffusionModel

    known = PUBLISHED[0]
    narrow = dataclasses.replace(
        known.architecture, model_channels=32, widths=tuple(width // 4 for width in known.architecture.widths)
    )
    network = unloaded(narrow, known.heads).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    image = (3, known.image_size, known.image_size)
    model = DiffusionModel(network, image, known.schedule, "learned_range", "epsilon", (-1.0, 1.0), "0" * 64)
    path = tmp_path_factory.mktemp("cifar") / "unet.onnx"
    path.write_bytes(step_onnx(model))
    return path


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    make_stand_in(folder)
    return folder


def shipped(name: str) -> Path:
    return shipped_engine().with_name(name)


def test_the_rule_finds_what_the_cuda_provider_leaves_to_the_cpu_at_an_unknown_batch(tmp_path: Path) -> None:
    nodes = cpu_preferred(optimised(shipped("unet.onnx"), tmp_path, Place("cuda")))
    assert Counter(node.op_type for node in nodes) == SHAPE_NODES


@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_the_rule_leaves_nothing_of_the_shipped_graphs_to_the_cpu_at_a_batch(tmp_path: Path, name: str) -> None:
    model = optimised(shipped(name), tmp_path, Place("cuda", BATCH))
    assert cpu_preferred(model) == []
    assert not OUTPUTS_ON_CPU & {node.op_type for node in model.graph.node}


@pytest.mark.slow
def test_the_rule_leaves_nothing_of_a_cifar10_graph_to_the_cpu_at_a_batch(tmp_path: Path, cifar: Path) -> None:
    model = optimised(cifar, tmp_path, Place("cuda", BATCH))
    assert len(model.graph.node) > 800
    assert cpu_preferred(model) == []


def test_the_batch_of_a_shipped_graph_has_the_name_that_is_overridden() -> None:
    for name in ("unet.onnx", "classifier.onnx"):
        for value in onnx.load(shipped(name)).graph.input:
            assert value.type.tensor_type.shape.dim[0].dim_param == BATCH_AXIS


# What the tests below run in a Python with the GPU build.
OPEN = """
import json, os, sys
from densepure_rt.errors import DensePureError
from densepure_rt.runtime import gpu, onnx_device
from densepure_rt.runtime.onnx_device import Place, open_session
path, place = sys.argv[1], Place(sys.argv[2], json.loads(sys.argv[3]))
inputs, outputs = (("mean",), ("logits",)) if "classifier" in path else (
    onnx_device.STEP_INPUTS, onnx_device.STEP_OUTPUTS)
try:
    session = open_session(open(path, "rb").read(), "the graph", inputs, outputs, place)
    found = {"used": session.get_providers(), "options": session.get_provider_options(),
             "shape": session.get_inputs()[0].shape}
except DensePureError as error:
    found = {"error": str(error), "exit_code": error.exit_code}
print(json.dumps(found | {"tf32": os.environ.get("NVIDIA_TF32_OVERRIDE")}))
"""


def opened(folder: Path, path: Path, batch: int | None, provider: str = "cuda") -> dict[str, object]:
    found: dict[str, object] = json.loads(with_stand_in(OPEN, folder, path, provider, json.dumps(batch)))
    return found


@needs_stand_in
@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx", pytest.param("cifar", marks=pytest.mark.slow)])
def test_the_real_cuda_provider_takes_every_node_at_a_batch(
    stand_in: Path, request: pytest.FixtureRequest, name: str
) -> None:
    path = request.getfixturevalue("cifar") if name == "cifar" else shipped(name)
    found = opened(stand_in, path, BATCH)
    assert "error" not in found, found
    assert found["used"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert isinstance(found["shape"], list)
    assert found["shape"][0] == BATCH


@needs_stand_in
def test_the_real_cuda_provider_chooses_its_kernels_without_timing_them_and_without_tf32(stand_in: Path) -> None:
    found = opened(stand_in, shipped("classifier.onnx"), BATCH)
    assert isinstance(found["options"], dict)
    options = found["options"]["CUDAExecutionProvider"]
    assert (options["use_tf32"], options["cudnn_conv_algo_search"]) == ("0", "HEURISTIC")
    assert found["tf32"] == "0"
    assert session_options(Place("cuda", BATCH)).use_deterministic_compute


@needs_stand_in
def test_the_real_cuda_provider_refuses_an_unknown_batch_and_the_error_says_that_nodes_are_left_to_the_cpu(
    stand_in: Path,
) -> None:
    found = opened(stand_in, shipped("unet.onnx"), None)
    assert found["exit_code"] == 3
    assert "would run nodes of the graph on the CPU" in str(found["error"])
    assert "libraries" not in str(found["error"])


@needs_stand_in
def test_the_real_cuda_provider_places_the_nodes_that_the_rule_names(stand_in: Path) -> None:
    code = """
import onnxruntime, sys
options = onnxruntime.SessionOptions()
options.log_severity_level = 0
options.log_verbosity_level = 1
import os; os.dup2(1, 2)
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
"""
    said = with_stand_in(code, stand_in, shipped("unet.onnx")).partition("placed on [CPUExecutionProvider]")[2]
    on_cpu = said.partition("placed on [CUDAExecutionProvider]")[0]
    assert Counter(re.findall(r"\]   (\w+) \(", on_cpu)) == SHAPE_NODES


@needs_stand_in
@pytest.mark.parametrize(
    ("missing", "said"), [("libcublas", "libcublas"), ("libcudnn", "libcudnn.so.9"), ("libcuda.", "no NVIDIA GPU here")]
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, stand_in: Path, missing: str, said: str
) -> None:
    for library in stand_in.glob("*.so.*"):
        if not library.name.startswith(missing) and library.name[-1].isdigit():
            (tmp_path / library.name).symlink_to(library)
    found = opened(tmp_path, shipped("classifier.onnx"), BATCH)
    assert found["exit_code"] == 3
    assert "`provider` cuda" in str(found["error"])
    assert said in str(found["error"])
    assert "on the CPU:" not in str(found["error"])
    if missing != "libcuda.":
        assert "pip install 'densepure-rt[gpu-cu13]'" in str(found["error"])


@needs_stand_in
def test_a_driver_that_is_too_old_for_this_build_is_told_the_extra_that_fits(tmp_path: Path) -> None:
    make_stand_in(tmp_path, driver=12)
    for library in tmp_path.glob("libcublas*"):  # so that it fails, as it would with such a driver
        library.unlink()
    found = opened(tmp_path, shipped("classifier.onnx"), BATCH)
    assert "is built for CUDA 13, the driver runs CUDA 12.0" in str(found["error"])
    assert "densepure-rt[gpu-cu12]" in str(found["error"])


@needs_stand_in
def test_the_tensorrt_provider_names_the_library_that_it_is_linked_to(stand_in: Path) -> None:
    found = opened(stand_in, shipped("classifier.onnx"), BATCH, "tensorrt")
    assert "libnvinfer.so.10" in str(found["error"])
    assert "pip install 'densepure-rt[gpu-cu13]' 'tensorrt-cu13<11'" in str(found["error"])
    assert found["tf32"] == "0"


def test_a_machine_without_a_gpu_is_told_so_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIBCUDA", "libno-driver-here.so.1")
    with pytest.raises(EnvironmentFault, match="^`provider` tensorrt: no NVIDIA GPU here"):
        onnxruntime_gpu.prepare("tensorrt")


def test_a_graph_of_an_older_opset_computes_the_same_bits() -> None:
    """For CUDA 12 there is no newer ONNX Runtime than 1.26, whose CUDA provider has no ReduceMax of opset 20."""
    rng = np.random.default_rng(0)
    mean, std, noise = rng.standard_normal((3, 2, 1, 28, 28), np.float32)
    feed = {"mean": mean, "std": std, "noise": noise, "t": np.array([3, 700], np.float32)}
    feed["coef"] = rng.uniform(0.1, 0.9, (2, 6)).astype(np.float32)
    content = shipped("unet.onnx").read_bytes()
    older = at_opset(content)
    model = onnx.load_from_string(older)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    onnx.checker.check_model(model, full_check=True)
    results = [open_session(x, "x", STEP_INPUTS, STEP_OUTPUTS).run(STEP_OUTPUTS, feed) for x in (content, older)]
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("version", [17, 18, 21, 22])
def test_graphs_of_other_opsets_and_what_is_no_graph_stay_as_they_are(version: int) -> None:
    model = onnx.load(shipped("classifier.onnx"))
    model.opset_import[0].version = version
    content = model.SerializeToString()
    assert at_opset(content) == content
    for other in (b"", content[:1000], b"\xff" * 20, b"not a graph"):
        assert at_opset(other) == other


def test_the_network_of_the_tensorrt_provider_has_the_types_of_its_graph() -> None:
    """Its source makes a strongly typed network while both switches are off; with one on, TensorRT would choose."""
    options = onnxruntime_gpu.provider_options("tensorrt", Path("kept"))
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("0", "0")
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("1", "kept")


@pytest.mark.skipif(not BUILT_FOR_GPUS.is_dir(), reason="no ONNX Runtime with GPU providers here")
def test_the_real_tensorrt_provider_knows_these_options() -> None:
    library = BUILT_FOR_GPUS / "onnxruntime/capi/libonnxruntime_providers_tensorrt.so"
    content = library.read_bytes()
    for name in onnxruntime_gpu.provider_options("tensorrt", Path("kept")):
        assert name.encode() + b"\0" in content


def build(folder: Path, content: bytes) -> bytes:
    """Stand for a session: builds an engine where there is none, and returns what it runs."""
    engine = folder / "graph_sm90.engine"
    if not engine.exists():
        engine.write_bytes(content)
    return engine.read_bytes()


def test_the_first_process_runs_the_engine_that_later_ones_load(tmp_path: Path) -> None:
    folder, timings = tmp_path / "cache" / "key", iter((b"first", b"second", b"third"))
    found = [with_engines(folder, lambda place: build(place, next(timings))) for _ in range(2)]
    assert found == [b"first", b"first"]
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_of_two_processes_that_build_both_run_the_engine_that_was_kept(tmp_path: Path) -> None:
    folder, meet = tmp_path / "key", threading.Barrier(2)
    found = []

    def one(content: bytes) -> None:
        def opening(place: Path) -> bytes:
            if place != folder:
                meet.wait(30)  # both have found no folder
            return build(place, content)

        found.append(with_engines(folder, opening))

    threads = [threading.Thread(target=one, args=(content,)) for content in (b"one", b"other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]


def test_a_provider_that_keeps_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="`provider` tensorrt: .* has left no engine in its cache"):
        with_engines(tmp_path / "key", lambda place: None)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_the_engines_and_their_folder_change_with_what_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("unet", "classifier")]
    for folder in folders:
        folder.mkdir()
        build(folder, folder.name.encode())
    first = engines_sha256(*folders)
    assert engines_sha256(*reversed(folders)) != first
    (folders[0] / "graph_sm90.engine").write_bytes(b"timed again")
    assert engines_sha256(*folders) != first

    def here(name: str, capability: str, driver: str, release: str) -> None:
        monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu(name, capability, driver, release))

    here("H100", "9.0", "13.0", "580.1")
    own = engine_folder(b"graph", 64)
    assert own == engine_folder(b"graph", 64)
    assert len({own, engine_folder(b"other", 64), engine_folder(b"graph", 32)}) == 3
    here("H100", "9.0", "13.0", "580.2")
    assert engine_folder(b"graph", 64) != own


def test_the_identity_of_a_run_holds_the_gpu_its_libraries_and_the_engines() -> None:
    here = gpu.Gpu("NVIDIA H100", "9.0", "13.0", "580.65.06")
    versions = {"cuda": "13000", "cudnn": "92000", "tensorrt": "101601"}
    device: dict[str, str | int | bool] = {"onnxruntime": "1.31.1", "fingerprint": "f" * 64, "batch": 64}
    device["independent_of_batch"] = False
    found = arithmetic_of(device | here.facts | versions | {"engines": "e" * 64})
    assert (found.driver, found.cuda, found.cudnn) == ("580.65.06, CUDA 13.0", "13000", "92000")
    assert (found.tensorrt, found.batch) == (f"101601, engines {'e' * 64}", 64)
    assert found != arithmetic_of(device | here.facts | versions | {"engines": "d" * 64})


def test_a_gpu_has_two_callers_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads("cpu") == available_cores()
    assert default_threads("cuda") == default_threads("tensorrt") == 2


def test_an_engine_for_cpus_is_not_run_by_tensorrt() -> None:
    bundle = open_bundle(shipped_engine())
    bundle = dataclasses.replace(bundle, unet=dataclasses.replace(bundle.unet, precision="int8-cpu"))
    with pytest.raises(UsageError, match="unet.onnx is int8-cpu, which is for CPUs alone: use an int8 engine"):
        open_device(bundle, None, 1, "tensorrt")


@pytest.mark.parametrize(
    ("driver", "python", "extra"),
    [
        ("13.0", (3, 12), "gpu-cu13"),
        ("12.4", (3, 12), "gpu-cu12"),
        ("14.0", (3, 12), "gpu-cu13"),
        ("13.0", (3, 10), "gpu-cu12"),  # onnxruntime-gpu for CUDA 13 needs Python 3.11
    ],
)
def test_the_extra_is_the_one_that_driver_and_python_run(
    monkeypatch: pytest.MonkeyPatch, driver: str, python: tuple[int, int], extra: str
) -> None:
    monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu("H100", "9.0", driver))
    monkeypatch.setattr(sys, "version_info", (*python, 0, "final", 0))
    assert onnxruntime_api.gpu_wheels("cuda") == f"'densepure-rt[{extra}]'"
    cuda = extra.rpartition("-")[2]
    assert onnxruntime_api.gpu_wheels("tensorrt") == f"'densepure-rt[{extra}]' 'tensorrt-{cuda}<11'"
