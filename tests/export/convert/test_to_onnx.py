from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import densepure_rt
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.export.convert import to_onnx
from densepure_rt.export.convert.build_options import BuildOptions
from densepure_rt.export.convert.parity import Exported, file_labels, noisy_labels
from densepure_rt.export.convert.step_graph import StepGraph
from densepure_rt.export.convert.to_onnx import classifier_onnx, export_bundle, step_onnx, torch_labels
from densepure_rt.export.convert.to_tensorrt import build_plans
from densepure_rt.export.models.check_images import Images
from densepure_rt.export.models.classifiers import ClassifierModel, zoo_classifier
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel, no_unet, zoo_unet
from densepure_rt.export.zoo.models import ZOO
from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.runtime.bundle import DATA_KEY, Prediction, open_bundle, shipped_engine, sidecar_path
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.noise import image_key, smoothing_law, smoothing_noise
from densepure_rt.runtime.onnx_device import open_session
from densepure_rt.runtime.schedule import Schedule, Variance, make_chain
from densepure_rt.smoothing.classifier import load

ROOT = Path(__file__).resolve().parent.parent.parent.parent
IMAGE = (2, 6, 5)
NAMES = ("a", "b", "c")
FILES = ["classifier.onnx", "classifier.onnx.json", "unet.onnx", "unet.onnx.json"]
RANDOM_OPS = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}

Folder = dict[str, bytes]


class ToyUnet(nn.Module):
    """Two convolutions and a dropout that must be off. `gain` is what the exported graph is wrong by."""

    def __init__(self, learned: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.dropout = nn.Conv2d(2, 8, 3, padding=1), nn.Dropout(0.5)
        self.last = nn.Conv2d(8, 4 if learned else 2, 3, padding=1)
        self.gain = gain

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x) + torch.sin(t / 100)[:, None, None, None])
        output: Tensor = self.last(self.dropout(hidden))
        return output * self.gain if torch.compiler.is_exporting() else output


class ToyClassifier(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head, self.gain = nn.Linear(60, 3), gain

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits * self.gain if torch.compiler.is_exporting() else logits


def unet(gain: float = 1.0, variance: Variance = "fixed_small", weights: str = "a" * 64) -> DiffusionModel:
    network = ToyUnet(variance == "learned_range", gain)
    return DiffusionModel(network, IMAGE, Schedule("cosine", 500), variance, "epsilon", (-1.0, 1.0), weights)


def classifier(gain: float = 1.0, weights: str = "b" * 64) -> ClassifierModel:
    return ClassifierModel(ToyClassifier(gain), IMAGE, NAMES, weights)


def contents(folder: Path) -> Folder:
    """Every file below `folder`; a folder that is left behind shows too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def put_back(folder: Path, files: Folder) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (4, *IMAGE), dtype=np.uint8)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, pixels: NDArray[np.uint8]) -> Exported:
    return export_bundle(Models(unet(), classifier()), tmp_path_factory.mktemp("toy") / "new" / "engines", pixels)


@pytest.fixture(scope="module")
def learned() -> bytes:
    return step_onnx(unet(variance="learned_range"))


@pytest.fixture(scope="module")
def models(toy: Exported, learned: bytes) -> dict[str, bytes]:
    shipped = shipped_engine()
    return {
        "toy step": toy.unet.read_bytes(),
        "toy step, learned variance": learned,
        "toy classifier": toy.classifier.read_bytes(),
        "shipped step": shipped.read_bytes(),
        "shipped classifier": shipped.with_name("classifier.onnx").read_bytes(),
    }


MODELS = ["toy step", "toy step, learned variance", "toy classifier", "shipped step", "shipped classifier"]


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_opset_20_and_passes_the_full_check(models: dict[str, bytes], name: str) -> None:
    model = onnx.load_model_from_string(models[name])
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert len(model.functions) == 0
    assert {node.domain for node in nodes(model.graph)} == {""}


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_contract_s_names_and_a_free_batch(models: dict[str, bytes], name: str) -> None:
    graph = onnx.load_model_from_string(models[name]).graph
    is_step = "step" in name
    assert [value.name for value in graph.input] == (["mean", "std", "noise", "t", "coef"] if is_step else ["mean"])
    assert [value.name for value in graph.output] == (["mean_next", "std_next", "finite"] if is_step else ["logits"])
    batches = set()
    for value in (*graph.input, *graph.output):
        first, *rest = value.type.tensor_type.shape.dim
        batches.add(first.dim_param)
        assert all(dim.dim_value > 0 for dim in rest)
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert len(batches) == 1
    assert "" not in batches


@pytest.mark.parametrize("name", MODELS)
def test_model_draws_nothing_and_needs_no_other_file(models: dict[str, bytes], name: str) -> None:
    graph = onnx.load_model_from_string(models[name]).graph
    assert not RANDOM_OPS & {node.op_type for node in nodes(graph)}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer)
    assert all(not tensor.external_data for tensor in graph.initializer)


@pytest.mark.parametrize("name", MODELS)
def test_model_does_not_tell_where_it_was_made(models: dict[str, bytes], name: str) -> None:
    for trace in ("/site-packages", 'File "', ".py", str(ROOT), str(Path.home()) + os.sep, "densepure_rt/"):
        assert trace.encode() not in models[name]


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_step_model_computes_the_step_graph_at_any_batch(
    models: dict[str, bytes], variance: Variance, batch: int
) -> None:
    is_learned = variance == "learned_range"
    content = models["toy step, learned variance" if is_learned else "toy step"]
    session = open_session(content, "toy", STEP_INPUTS, STEP_OUTPUTS)
    draw = np.random.default_rng(batch)
    chain = make_chain(Schedule("cosine", 500), variance, 0.5, 3)
    steps = np.arange(batch) % 3
    mean, noise = draw.standard_normal((2, batch, *IMAGE), np.float32)
    arrays = (mean, np.abs(mean[::-1]) / 3, noise, chain.t[steps], chain.coef[steps])
    network = ToyUnet(is_learned).eval()
    expected = StepGraph(network, (-1.0, 1.0), is_learned)(*(torch.from_numpy(a.copy()) for a in arrays))
    found = session.run(STEP_OUTPUTS, dict(zip(STEP_INPUTS, arrays, strict=True)))
    for name, ours, theirs in zip(STEP_OUTPUTS, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_step_model_reports_a_network_that_is_not_finite(models: dict[str, bytes]) -> None:
    """The network is what is made to overflow: one item's pixels are beyond what float32 can hold."""
    session = open_session(models["toy step"], "toy", STEP_INPUTS, STEP_OUTPUTS)
    chain = make_chain(Schedule("cosine", 500), "fixed_small", 0.5, 1)
    mean = np.zeros((3, *IMAGE), np.float32)
    mean[1, 0, 0, 0] = math.nan
    zeros = np.zeros_like(mean)
    feed = {"mean": mean, "std": zeros, "noise": zeros, "t": chain.t.repeat(3), "coef": chain.coef.repeat(3, axis=0)}
    *_, finite = session.run(STEP_OUTPUTS, feed)
    assert finite.tolist() == [1.0, 0.0, 1.0]


def test_bundle_is_four_files_that_open(toy: Exported) -> None:
    folder = toy.unet.parent
    assert sorted(contents(folder)) == FILES
    bundle = open_bundle(toy.unet)
    for sidecar, path in ((bundle.unet, toy.unet), (bundle.classifier, toy.classifier)):
        assert sidecar.file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (sidecar.image, sidecar.pixel_range, sidecar.opset, sidecar.precision) == (IMAGE, (-1, 1), 20, "fp32")
        assert sidecar.versions["torch"] == torch.__version__
    assert bundle.unet.schedule == Schedule("cosine", 500)
    assert (bundle.unet.variance, bundle.unet.prediction, bundle.unet.clip) == ("fixed_small", "epsilon", (-1.0, 1.0))
    assert (bundle.unet.weights_sha256, bundle.classifier.weights_sha256) == ("a" * 64, "b" * 64)
    assert bundle.classifier.class_names == NAMES
    assert bundle.unet.classifier == bundle.classifier.file


def test_bundle_was_compared_with_pytorch(toy: Exported) -> None:
    assert toy.comparisons > 100
    assert 0 < toy.worst_step.relative_l2 < 1e-5
    assert toy.worst_logits.what == "logits"
    assert toy.worst_logits.relative_l2 < 1e-5


def test_bundle_certifies(toy: Exported, pixels: NDArray[np.uint8]) -> None:
    with densepure_rt.load(toy.unet, batch=4, threads=1) as smoothed:
        assert smoothed.class_names == NAMES
        found = smoothed.certify(pixels[0], sigma=0.5, steps=3, votes=3, n0=4, n=12, method="fixed")
        assert 0 <= found.n_a <= 12


def test_the_same_model_is_exported_again_in_place(toy: Exported, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    before = contents(toy.unet.parent)
    out = put_back(tmp_path / "engines", before)
    said: list[str] = []
    export_bundle(Models(unet(), classifier()), out, pixels, say=said.append)
    assert contents(out) == before  # the exporter is deterministic
    assert len(said) >= 3


@pytest.mark.parametrize("part", ["UNet", "classifier"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_refused_and_nothing_is_written(
    tmp_path: Path, pixels: NDArray[np.uint8], part: str, value: float
) -> None:
    model, labels = unet(), classifier()
    damaged = model.network if part == "UNet" else labels.network
    name, parameter = list(damaged.named_parameters())[-1]
    with torch.no_grad():
        parameter[-1] = value
    with pytest.raises(CheckFailed) as caught:
        export_bundle(Models(model, labels), tmp_path / "engines", pixels)
    assert part in str(caught.value)
    assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_step_mismatch_publishes_nothing_over_what_was_there(
    toy: Exported, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """The traced graph differs by a thousandth from what the model computes in PyTorch."""
    before = contents(toy.unet.parent)
    out = put_back(tmp_path / "engines", before)
    with pytest.raises(CheckFailed, match=r"not what PyTorch computes: .*step at t = \d+"):
        export_bundle(Models(unet(gain=1.001), classifier()), out, pixels)
    assert contents(out) == before


def test_classifier_mismatch_publishes_nothing_in_a_new_folder(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="not what PyTorch computes: logits"):
        export_bundle(Models(unet(), classifier(gain=1.001)), tmp_path / "engines", pixels)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("other", ["unet", "classifier"])
def test_bundle_of_another_model_is_not_replaced_unless_forced(
    toy: Exported, pixels: NDArray[np.uint8], tmp_path: Path, other: str
) -> None:
    before = contents(toy.unet.parent)
    out = put_back(tmp_path / "engines", before)
    model = unet(weights="c" * 64) if other == "unet" else unet()
    labels = classifier(weights="d" * 64) if other == "classifier" else classifier()
    with pytest.raises(UsageError, match=rf"{other}\.onnx is a bundle of another model .*`force`"):
        export_bundle(Models(model, labels), out, pixels)
    assert contents(out) == before
    if other == "unet":
        export_bundle(Models(model, labels), out, pixels, force=True)
        assert sorted(contents(out)) == FILES
        assert open_bundle(out / "unet.onnx").unet.weights_sha256 == "c" * 64


def test_bundle_that_cannot_be_read_is_not_replaced(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    (tmp_path / "unet.onnx.json").write_text("somebody's notes")
    with pytest.raises(UsageError, match="another model"):
        export_bundle(Models(unet(), classifier()), tmp_path, pixels)
    assert contents(tmp_path) == {"unet.onnx.json": b"somebody's notes"}


@pytest.mark.parametrize("below", ["", "engines"])
def test_file_where_the_folder_should_be_is_a_fault_of_the_environment(
    pixels: NDArray[np.uint8], tmp_path: Path, below: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*taken.*`out`"):
        export_bundle(Models(unet(), classifier()), tmp_path / "taken" / below, pixels)
    assert contents(tmp_path) == {"taken": b"a file"}


def test_full_disk_is_a_fault_of_the_environment(
    pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(EnvironmentFault, match=r"cannot write .*\(No space left on device\).*`out`"):
        large(tmp_path, pixels)
    assert contents(tmp_path) == {}


class Branching(ToyClassifier):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if logits.sum() > 0 else -logits


class Pairs(ToyClassifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, -1))


@pytest.mark.parametrize(
    ("network", "said"), [(Branching, r"to ONNX \(.+\)"), (Pairs, "for batches of 2 alone")], ids=["branches", "pairs"]
)
def test_network_that_torch_cannot_export_is_a_usage_error(network: type[nn.Module], said: str) -> None:
    model = ClassifierModel(network(), IMAGE, NAMES, "b" * 64)
    with pytest.raises(UsageError, match=f"torch can.* export .*{said}: it may not branch .*any batch") as caught:
        classifier_onnx(model)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_that_cannot_be_written_is_a_fault_of_the_environment(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for out in (tmp_path, tmp_path / "engines"):
            with pytest.raises(EnvironmentFault, match="cannot write"):
                export_bundle(Models(unet(), classifier()), out, pixels)
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture(scope="module")
def photographs() -> NDArray[np.uint8]:
    images = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(60, 6)
    return np.stack([image.pixels for image in images])


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory, photographs: NDArray[np.uint8]) -> Path:
    """The default model, exported once more from the weights that ship."""
    return export_bundle(
        Models(zoo_unet(), zoo_classifier()), tmp_path_factory.mktemp("zoo"), photographs[:2]
    ).unet.parent


def walk(folder: Path, pixels: NDArray[np.uint8]) -> Iterator[Floats]:
    """Everything that a bundle's engines give along one chain from real images, and at the end of it."""
    step = open_session((folder / "unet.onnx").read_bytes(), "unet", STEP_INPUTS, STEP_OUTPUTS)
    classify = open_session((folder / "classifier.onnx").read_bytes(), "labels", CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    draw = np.random.default_rng(3)
    for sigma, steps in ((0.25, 1), (0.5, 2), (1.0, 4)):
        chain = make_chain(Schedule("linear", 1000), "fixed_small", sigma, steps)
        noise = draw.standard_normal((steps + 1, *pixels.shape), np.float32)
        mean = (chain.scale * (pixels / 127.5 - 1 + 2 * sigma * noise[0])).astype(np.float32)
        std = np.zeros_like(mean)
        for i, (t, coef) in enumerate(zip(chain.t, chain.coef, strict=True)):
            feed = {"mean": mean, "std": std, "noise": noise[i + 1]}
            feed |= {"t": np.full(len(mean), t), "coef": np.tile(coef, (len(mean), 1))}
            mean, std, finite = step.run(STEP_OUTPUTS, feed)
            yield from (mean, std, finite)
        yield from classify.run(CLASSIFY_OUTPUTS, {"mean": mean})


def test_exporting_again_gives_the_same_function(again: Path, photographs: NDArray[np.uint8]) -> None:
    pairs = list(zip(walk(shipped_engine().parent, photographs), walk(again, photographs), strict=True))
    assert len(pairs) == 7 * 3 + 3
    for shipped, exported in pairs:
        np.testing.assert_allclose(exported, shipped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_shipped_engines_are_those_of_the_shipped_weights(again: Path, name: str) -> None:
    weights = hashlib.sha256((ZOO / f"{name}.safetensors").read_bytes()).hexdigest()
    for folder in (shipped_engine().parent, again):
        bundle = open_bundle(folder / "unet.onnx")
        assert getattr(bundle, name).weights_sha256 == weights


def test_shipped_engine_is_described_as_it_is_exported(again: Path) -> None:
    ours, shipped = open_bundle(again / "unet.onnx"), open_bundle(shipped_engine())
    for name in ("image", "pixel_range", "precision", "opset", "schedule", "variance", "prediction", "clip"):
        assert getattr(ours.unet, name) == getattr(shipped.unet, name)
    assert ours.classifier.class_names == shipped.classifier.class_names


def test_shipped_classifier_knows_the_shipped_images(again: Path) -> None:
    """Right preprocessing and right class order: nine in ten at the least."""
    images = list(open_images(None, (1, 28, 28), [str(label) for label in range(10)]))
    session = open_session((again / "classifier.onnx").read_bytes(), "labels", CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    x = np.stack([image.pixels for image in images]).astype(np.float32) / np.float32(127.5) - 1
    (logits,) = session.run(CLASSIFY_OUTPUTS, {"mean": x})
    assert np.mean(logits.argmax(axis=1) == [image.label for image in images]) > 0.9


def test_classifier_model_has_no_trace_of_training() -> None:
    """Batch norm and dropout in the state of evaluation, even where the caller left them in training."""
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(60, 3))
    network.train()
    content = classifier_onnx(ClassifierModel(network, IMAGE, NAMES, "e" * 64))
    session = open_session(content, "toy", CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    x = np.random.default_rng(0).standard_normal((4, *IMAGE), np.float32)
    together = session.run(CLASSIFY_OUTPUTS, {"mean": x})[0]
    for i in range(4):
        np.testing.assert_allclose(session.run(CLASSIFY_OUTPUTS, {"mean": x[i : i + 1]})[0][0], together[i], rtol=1e-5)
    ours = network.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(together, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("v", "learned"), ("denoiser", "renoised")],
)
def test_step_model_computes_the_step_graph_of_every_prediction(prediction: Prediction, variance: Variance) -> None:
    model = dataclasses.replace(unet(variance=variance), prediction=prediction)
    model = dataclasses.replace(model, network=ToyUnet(learned=model.learned_variance).eval())
    session = open_session(step_onnx(model), "toy", STEP_INPUTS, STEP_OUTPUTS)
    draw = np.random.default_rng(3)
    schedule = Schedule("continuous", 1) if prediction == "denoiser" else model.schedule
    chain = make_chain(schedule, variance, 0.5, 3)
    mean, noise = draw.standard_normal((2, 3, *IMAGE), np.float32)
    arrays = (mean, np.abs(mean[::-1]) / 3, noise, chain.t, chain.coef)
    expected = StepGraph(model.network, model.clip, model.learned_variance, prediction)(
        *(torch.from_numpy(a.copy()) for a in arrays)
    )
    found = session.run(STEP_OUTPUTS, dict(zip(STEP_INPUTS, arrays, strict=True)))
    for name, ours, theirs in zip(STEP_OUTPUTS, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


LARGE_FILES = sorted([*FILES, "unet.onnx.data", "classifier.onnx.data"])
SECRET = bytes(range(32))


def large(out: Path, pixels: NDArray[np.uint8], kind: str = "fp32", model: DiffusionModel | None = None) -> Exported:
    """A bundle of graphs whose weights are taken to be too large for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "LARGE", 0)
        return export_bundle(Models(model or unet(), classifier()), out, pixels, kind=kind)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, pixels: NDArray[np.uint8]) -> Exported:
    return large(tmp_path_factory.mktemp("beside") / "engines", pixels)


@pytest.fixture
def copied(beside: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(beside.unet.parent, tmp_path / "engines"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_large_weights_lie_beside_their_graph_and_are_bound_to_it(beside: Exported, name: str) -> None:
    folder = beside.unet.parent
    assert sorted(contents(folder)) == LARGE_FILES
    model = onnx.load(str(folder / name), load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    for tensor in outside:
        (location,) = (entry.value for entry in tensor.external_data if entry.key == "location")
        assert location == f"{name}.data"
    digest = sha256(folder / f"{name}.data")
    assert {entry.key: entry.value for entry in model.metadata_props} == {DATA_KEY: f"{digest} {name}.data"}
    written = json.loads(sidecar_path(folder / name).read_text())
    assert written["data"] == {"name": f"{name}.data", "sha256": digest}
    assert written["file"]["sha256"] == sha256(folder / name)
    onnx.checker.check_model(str(folder / name), full_check=True)


def test_genuine_weights_under_another_name_do_not_vouch_for_those_that_the_graph_reads(copied: Path) -> None:
    """The graph stays as pinned; its sidecar points at a copy of its weights, and what it reads is tampered with."""
    engine, data = copied / "unet.onnx", copied / "unet.onnx.data"
    shutil.copy(data, copied / "genuine.data")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    values = json.loads(sidecar_path(engine).read_text())
    values["data"]["name"] = "genuine.data"
    sidecar_path(engine).write_text(json.dumps(values))
    with pytest.raises(CheckFailed, match="names other weights than its sidecar does"):
        load(engine, threads=1, engine_sha256=sha256(engine))


def test_weights_of_a_larger_model_go_when_a_smaller_one_replaces_it(copied: Path, pixels: NDArray[np.uint8]) -> None:
    export_bundle(Models(unet(), classifier()), copied, pixels, force=True)
    assert not [path.name for path in copied.iterdir() if path.suffix == ".data"]


def test_large_weights_are_those_of_the_module(beside: Exported) -> None:
    model = onnx.load(str(beside.unet))  # with its data
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, tensor in ToyUnet().state_dict().items():
        np.testing.assert_array_equal(found[f"network.{name}"], tensor)
    for trace in ("/site-packages", ".py", str(ROOT)):
        assert trace.encode() not in beside.unet.read_bytes()


def test_small_weights_stay_in_their_graph(toy: Exported) -> None:
    written = json.loads(sidecar_path(toy.unet).read_text())
    assert "data" not in written
    assert not onnx.load(str(toy.unet)).metadata_props


def test_large_weights_are_exported_again_in_place(beside: Exported, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    before = contents(beside.unet.parent)
    out = put_back(tmp_path / "engines", before)
    large(out, pixels)
    assert contents(out) == before


def test_a_mismatch_leaves_no_large_weights_behind(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="not what PyTorch computes"):
        large(tmp_path / "engines", pixels, model=unet(gain=1.001))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def certificates(engine: Path, pixels: NDArray[np.uint8]) -> list[object]:
    with densepure_rt.load(engine, batch=4, threads=1, secret=SECRET) as smoothed:
        return [
            smoothed.certify(image, sigma=1.0, steps=2, votes=3, n0=10, n=40, alpha=0.3, method="fixed")
            for image in pixels
        ]


def test_a_bundle_certifies_the_same_wherever_its_weights_lie(
    toy: Exported, beside: Exported, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the weights are found beside the graph, not in the working directory
    inline = certificates(toy.unet, pixels)
    assert certificates(beside.unet, pixels) == inline
    assert len({str(certificate) for certificate in inline}) > 1


def edited(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def other_weights(data: Path) -> None:
    """Every weight of another sign: as many bytes, of the same layout."""
    data.write_bytes((-np.frombuffer(data.read_bytes(), np.float32)).tobytes())


def tampered(folder: Path, name: str) -> None:
    other_weights(folder / f"{name}.data")


def missing(folder: Path, name: str) -> None:
    (folder / f"{name}.data").unlink()


def swapped(folder: Path, name: str) -> None:
    """The other engine's weights."""
    other = {"unet.onnx": "classifier.onnx", "classifier.onnx": "unet.onnx"}[name]
    shutil.copy(folder / f"{other}.data", folder / f"{name}.data")


def vouched_for(folder: Path, name: str) -> None:
    """Tampered with, and the sidecar changed to match: the graph itself still names the weights it was made with."""
    other_weights(folder / f"{name}.data")
    data = {"name": f"{name}.data", "sha256": sha256(folder / f"{name}.data")}
    edited(sidecar_path(folder / name), data=data)


def denied(folder: Path, name: str) -> None:
    """A sidecar that says nothing of a file of weights."""
    other_weights(folder / f"{name}.data")
    edited(sidecar_path(folder / name), data=None)


Damage = Callable[[Path, str], None]
DAMAGES = [
    (tampered, CheckFailed, r"{name}\.data has SHA-256 .*its sidecar says .*damaged or belongs to another engine"),
    (missing, UsageError, r"cannot read .*{name}\.data, the weights of {name} .*copy it along with the engine"),
    (swapped, CheckFailed, r"{name}\.data has SHA-256"),
    (vouched_for, CheckFailed, r"{name} names other weights than"),
]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGES)
@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_weights_that_are_not_the_graph_s_are_refused_at_loading(
    copied: Path, name: str, damage: Damage, error: type[Exception], words: str
) -> None:
    damage(copied, name)
    with pytest.raises(error, match=words.format(name=name)):
        densepure_rt.load(copied / "unet.onnx", batch=2, threads=1)


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGES)
@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_weights_that_are_not_the_graph_s_become_no_plan(
    copied: Path, tmp_path: Path, name: str, damage: Damage, error: type[Exception], words: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    damage(copied, name)
    options = BuildOptions(batches=(2,), compute_capabilities=("8.6",))
    with pytest.raises(error, match=words.format(name=name)):
        build_plans(open_bundle(copied / "unet.onnx"), tmp_path / "plans", "tensorrt-rtx", options)
    assert list((tmp_path / "plans").iterdir()) == []


@pytest.mark.parametrize("name", ["unet.onnx", "classifier.onnx"])
def test_a_sidecar_that_is_silent_about_the_weights_is_refused(copied: Path, tmp_path: Path, name: str) -> None:
    denied(copied, name)
    with pytest.raises(CheckFailed, match=name.replace(".", r"\.")):
        densepure_rt.load(copied / "unet.onnx", batch=2, threads=1)
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = BuildOptions(batches=(2,), compute_capabilities=("8.6",))
    with pytest.raises(CheckFailed, match="names other weights than"):
        build_plans(open_bundle(copied / "unet.onnx"), tmp_path / "plans", "tensorrt-rtx", options)


def test_a_plan_holds_the_large_weights_itself(beside: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = BuildOptions(batches=(2,), compute_capabilities=("8.6",))
    plans = build_plans(open_bundle(beside.unet), tmp_path, "tensorrt-rtx", options)
    assert sorted(contents(tmp_path)) == sorted([*(p.name for p in plans), *(f"{p.name}.json" for p in plans)])
    weights = np.frombuffer((beside.unet.parent / "unet.onnx.data").read_bytes(), np.float32)
    for plan in plans:
        written = json.loads(sidecar_path(plan).read_text())
        assert "data" not in written
        source = beside.unet.with_name(plan.name.replace(".rtx.plan", ".onnx"))
        assert written["plan"]["onnx"] == {"name": source.name, "sha256": sha256(source)}
        assert written["accuracy"] == json.loads(sidecar_path(source).read_text())["accuracy"]
    assert plans[0].stat().st_size > weights.nbytes


def test_large_half_precision_weights_lie_beside_their_graph_too(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    exported = large(tmp_path, pixels, "fp16")
    names = [name.replace(".onnx", ".fp16.onnx") for name in LARGE_FILES]
    assert sorted(contents(tmp_path)) == sorted(names)
    assert exported.types["unet"] == {"Conv": {"FLOAT16": 2}}
    found = certificates(exported.unet, pixels[:1])
    assert found
    other_weights(tmp_path / "unet.fp16.onnx.data")
    with pytest.raises(CheckFailed, match=r"unet\.fp16\.onnx\.data has SHA-256"):
        densepure_rt.load(exported.unet, batch=2, threads=1)


@pytest.mark.parametrize("kind", ["int8", "int8-cpu", "fp8"])
def test_large_weights_are_not_quantized(
    pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(to_onnx, "LARGE", 0)
    with pytest.raises(UsageError, match=rf"`kind` {kind}: the weights are .* GiB, .*use fp16"):
        export_bundle(Models(unet(), classifier()), tmp_path, Images(pixels, calibration=pixels), kind=kind)
    assert list(tmp_path.iterdir()) == []


def test_sidecars_say_how_accurate_their_engine_was_found_to_be(toy: Exported) -> None:
    bundle = open_bundle(toy.unet)
    step, classify = bundle.unet.accuracy, bundle.classifier.accuracy
    assert step is not None
    assert classify is not None
    assert step.by == classify.by == toy.by == "ONNX Runtime on the CPU"
    assert step.relative_l2 == toy.worst_step.relative_l2
    assert classify.relative_l2 == toy.worst_logits.relative_l2
    assert step.comparisons + classify.comparisons == toy.comparisons
    assert (step.labels, step.labels_differ, classify.labels, classify.labels_differ) == (0, 0, 0, 0)


def test_sidecars_count_the_labels_that_a_smaller_precision_changes(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    """The counts are found again from the files and the modules."""
    labelled = [LabelledImage(i, image, 0) for i, image in enumerate(pixels)]
    exported = export_bundle(Models(unet(), classifier()), tmp_path, Images(pixels, labelled, 8), kind="fp16")
    assert exported.labels is not None
    chain = make_chain(unet().schedule, "fixed_small", exported.labels.sigma, 1)
    model, labels = unet(), classifier()
    wanted, found = (
        noisy_labels(label, chain, list(pixels), 8)
        for label in (
            torch_labels(
                Models(
                    dataclasses.replace(model, network=model.network.eval()),
                    dataclasses.replace(labels, network=labels.network.eval()),
                )
            ),
            file_labels(exported.unet, exported.classifier, "fp16"),
        )
    )
    for sidecar in (open_bundle(exported.unet).unet, open_bundle(exported.unet).classifier):
        assert sidecar.accuracy is not None
        assert (sidecar.accuracy.labels, sidecar.accuracy.labels_differ) == (32, int((wanted != found).sum()))
        assert (exported.labels.total, exported.labels.disagreements) == (32, sidecar.accuracy.labels_differ)
    assert exported.worst_step.relative_l2 > 1e-5  # it is another precision


def test_networks_in_training_are_exported_and_compared_in_evaluation(
    pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """A dropout that is on would make PyTorch disagree with itself."""
    model, labels = unet(), classifier()
    model.network.train()
    labels.network.train()
    assert export_bundle(Models(model, labels), tmp_path, pixels[:2], kind="fp16").worst_step.relative_l2 < 3e-3


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, pixels: NDArray[np.uint8]) -> Path:
    """A classifier alone."""
    return export_bundle(Models(no_unet(IMAGE), classifier()), tmp_path_factory.mktemp("plain"), pixels).unet


def test_bundle_without_a_unet_is_plain_smoothing_of_its_classifier(plain: Path, pixels: NDArray[np.uint8]) -> None:
    """Cohen et al. 2019: the counts are those of the classifier on the image with rounded Gaussian noise added."""
    bundle = open_bundle(plain)
    assert (bundle.unet.prediction, bundle.unet.schedule.continuous, bundle.unet.clip) == ("none", True, None)
    sigma, network = 0.5, ToyClassifier().eval()
    labels: list[int] = []
    with densepure_rt.load(plain, batch=4, threads=1, secret=SECRET) as smoothed:
        for image in pixels:
            found = smoothed.certify(image, sigma=sigma, steps=0, votes=1, n0=20, n=200, alpha=0.05, method="fixed")
            law, tops = smoothing_law(sigma), []
            for purpose, samples in (("select", 20), ("certify", 200)):
                key = image_key(SECRET, purpose, sigma, image)  # type: ignore[arg-type]
                noisy = np.stack([image + smoothing_noise(law, key, i, IMAGE) for i in range(samples)])
                with torch.inference_mode():
                    logits = network(torch.from_numpy((2 * noisy / 255 - 1).astype(np.float32)))
                tops.append(np.bincount(logits.argmax(1).numpy(), minlength=3))
            assert found.n_a == tops[1][tops[0].argmax()]
            labels.append(int(tops[0].argmax()))
            if found.predict is not None:
                assert found.predict == labels[-1]
    assert len(set(labels)) > 1


@pytest.mark.parametrize("steps", [1, 2])
def test_bundle_without_a_unet_takes_no_steps(plain: Path, pixels: NDArray[np.uint8], steps: int) -> None:
    with (
        densepure_rt.load(plain, batch=2, threads=1, secret=SECRET) as smoothed,
        pytest.raises(UsageError, match=rf"no diffusion network.*{steps} steps.*ask for 0 steps"),
    ):
        smoothed.certify(pixels[0], steps=steps, n0=2, n=4, method="fixed")
