from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.export.convert import to_onnx, to_precision
from densepure_rt.export.convert.lowering import lowered
from densepure_rt.export.convert.parity import LABELS, RELATIVE_L2, Exported
from densepure_rt.export.convert.precision import COMPUTE_TYPES
from densepure_rt.export.convert.to_onnx import export_bundle
from densepure_rt.export.convert.to_precision import lower_bundle
from densepure_rt.export.models.check_images import Images
from densepure_rt.export.models.onnx_graph import checked, types_of
from densepure_rt.export.models.sources import Models
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.bundle import (
    Bundle,
    FileRef,
    open_bundle,
    read_sidecar,
    sha256_of,
    shipped_engine,
    sidecar_path,
)
from densepure_rt.runtime.onnx_device import OnnxDevice
from tests.support.cli import cli, edit_sidecar, in_a_process, refused
from tests.support.precision_toys import IMAGE, ToyClassifier, classifier, diffusion

BUILD_MACHINE = ("torch", "diffusers", "safetensors", "onnxscript", "onnx_ir", "transformers", "timm")
KINDS = ("fp16", "bf16", "int8", "int8-cpu", "fp8")
FEW = ("--parity-images", 2, "--parity-samples", 2)


def pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (9, *IMAGE), dtype=np.uint8)


@pytest.fixture(scope="module")
def images() -> Images:
    labelled = [LabelledImage(i, image, i % 3) for i, image in enumerate(pixels()[:4])]
    return Images(pixels()[:2], labelled, 4, calibration=pixels())


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A float32 bundle of toy models."""
    done = export_bundle(Models(diffusion(), classifier()), tmp_path_factory.mktemp("toy"), pixels()[:2])
    return open_bundle(done.unet)


@pytest.fixture(scope="module")
def made(toy: Bundle, images: Images, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    out = tmp_path_factory.mktemp("made")
    return {kind: lower_bundle(toy, out, kind, images) for kind in KINDS}


@pytest.fixture
def copied(toy: Bundle, tmp_path: Path) -> Path:
    """The step engine of a copy of the toy bundle."""
    shutil.copytree(toy.unet_path.parent, tmp_path / "toy")
    return tmp_path / "toy" / toy.unet_path.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_in_another_precision_opens_and_says_what_it_is(
    toy: Bundle, made: dict[str, Exported], kind: str
) -> None:
    bundle = open_bundle(made[kind].unet)
    assert bundle.unet_path.name == f"unet.{kind}.onnx"
    assert bundle.unet.classifier.name == bundle.classifier_path.name == f"classifier.{kind}.onnx"
    for path, found, source in (
        (bundle.unet_path, bundle.unet, toy.unet),
        (bundle.classifier_path, bundle.classifier, toy.classifier),
    ):
        assert found.precision == kind
        assert found.weights_sha256 == source.weights_sha256
        assert found.file.sha256 == sha256_of(path)
        products = types_of(path.read_bytes()).values()
        assert any(COMPUTE_TYPES[kind] in counted for counted in products)
    for field in ("schedule", "variance", "prediction", "clip", "image", "timestep_rule"):
        assert getattr(bundle.unet, field) == getattr(toy.unet, field)
    assert bundle.classifier.class_names == toy.classifier.class_names


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_was_compared_with_the_float32_one(made: dict[str, Exported], kind: str) -> None:
    done = made[kind]
    assert done.against == "unet.onnx and classifier.onnx"
    assert 0 < done.worst_step.relative_l2 <= RELATIVE_L2.get(kind, 1.0)
    assert done.labels is not None
    assert done.labels.total == 16
    assert done.labels.disagreements <= 16 * LABELS[kind] + 2
    assert done.labels.by.endswith(f"rounded to {kind}" if kind in ("fp16", "bf16") else done.by)
    accuracy = read_sidecar(done.unet).accuracy
    assert accuracy is not None
    assert (accuracy.relative_l2, accuracy.labels) == (done.worst_step.relative_l2, 16)
    assert accuracy.by == done.by


@pytest.mark.parametrize("kind", ["fp16", "int8-cpu"])
def test_a_bundle_runs_on_the_device(made: dict[str, Exported], kind: str) -> None:
    OnnxDevice(open_bundle(made[kind].unet), batch=4, threads=1).close()


def test_inspect_reads_what_was_written(made: dict[str, Exported]) -> None:
    said = json.loads(cli("inspect", made["fp16"].unet, "--json").stdout)
    assert said["precision"] == "fp16"
    assert said["check"]["matches"] is True


# The bundle that ships


@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_the_shipped_fp16_engines_are_the_float32_ones_lowered(name: str) -> None:
    folder = shipped_engine().parent
    model = onnx.load(folder / f"{name}.onnx")
    small = onnx.load(folder / f"{name}.fp16.onnx")
    ours = lowered(model, "fp16")
    assert checked(ours) == checked(small) == (folder / f"{name}.fp16.onnx").read_bytes()
    assert {t.data_type for t in small.graph.initializer} >= {TensorProto.FLOAT16, TensorProto.INT64} - (
        {TensorProto.INT64} if name == "classifier" else set()
    )


def test_the_shipped_fp16_bundle_is_of_the_shipped_model() -> None:
    one, other = open_bundle(shipped_engine()), open_bundle(shipped_engine(on_gpu=True))
    assert other.unet.precision == other.classifier.precision == "fp16"
    assert other.unet.weights_sha256 == one.unet.weights_sha256
    for field in ("schedule", "variance", "prediction", "clip", "image", "timestep_rule"):
        assert getattr(other.unet, field) == getattr(one.unet, field)
    accuracy = other.unet.accuracy
    assert accuracy is not None
    assert accuracy.relative_l2 < RELATIVE_L2["fp16"]
    assert accuracy.labels >= 400
    assert accuracy.labels_differ == 0


# Without PyTorch


def test_fp16_is_made_where_pytorch_cannot_be_imported(toy: Bundle, tmp_path: Path) -> None:
    given = ("--engine", toy.unet_path, "--out", tmp_path, *FEW, "--json")
    done = in_a_process("export", "--precision", "fp16", *given, without=BUILD_MACHINE)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["onnx"]) == ["fp16"]
    assert open_bundle(tmp_path / "unet.fp16.onnx").unet.precision == "fp16"


def test_int8_is_made_where_pytorch_cannot_be_imported(toy: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=pixels().transpose(0, 2, 3, 1))
    given = ("--engine", toy.unet_path, "--out", tmp_path, *FEW, "--calibration-images", tmp_path / "train.npz")
    done = in_a_process("export", "--precision", "int8,int8-cpu", *given, without=BUILD_MACHINE)
    assert done.returncode == 0, done.stderr
    assert "comparisons with float32 unet.onnx and classifier.onnx" in done.stdout
    assert "wrote" in done.stdout
    assert open_bundle(tmp_path / "unet.int8-cpu.onnx").classifier.precision == "int8-cpu"


# What is refused


def damage(engine: Path, how: str) -> None:
    content = engine.read_bytes()
    if how == "cut short":
        engine.write_bytes(content[: len(content) // 2])
    elif how == "no sidecar":
        sidecar_path(engine).unlink()
    elif how == "no model":
        engine.write_bytes(b"not a model at all")
        edit_sidecar(engine, file={"name": engine.name, "sha256": sha256_of(engine)})
    elif how == "other inputs":
        model = onnx.load_model_from_string(content)
        model.graph.node.insert(0, onnx.helper.make_node("Identity", ["other"], [model.graph.input[0].name]))
        model.graph.input[0].name = "other"
        engine.write_bytes(model.SerializeToString())
        edit_sidecar(engine, file={"name": engine.name, "sha256": sha256_of(engine)})
    elif how == "fp16 already":
        edit_sidecar(engine, precision="fp16")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut short", "has SHA-256"),
        ("no sidecar", "cannot read"),
        ("no model", "is not an ONNX model"),
        ("other inputs", "takes other"),
        ("fp16 already", "is fp16 already: give the float32 ONNX engine"),
    ],
)
def test_a_bundle_that_will_not_do_is_one_error_and_nothing_is_written(
    copied: Path, images: Images, tmp_path: Path, how: str, words: str
) -> None:
    damage(copied, how)
    with pytest.raises(DensePureError, match=words):
        lower_bundle(open_bundle(copied), tmp_path / "out", "fp16", images)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_plan_is_no_source(toy: Bundle, images: Images, tmp_path: Path) -> None:
    plan = json.loads('{"flavour": "tensorrt", "version": "1", "batches": [1], "compute_capabilities": []}')
    from densepure_rt.runtime.bundle import Plan

    facts = Plan("tensorrt", plan["version"], (1,), (), None, FileRef("unet.onnx", "0" * 64), {}, {})
    with pytest.raises(UsageError, match=r"unet\.onnx is a plan: give the float32 ONNX engine"):
        lower_bundle(dataclasses.replace(toy, unet=dataclasses.replace(toy.unet, plan=facts)), tmp_path, "fp16", images)


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_a_precision_that_is_none_is_refused_by_name(toy: Bundle, images: Images, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=f"`precision` {kind}: a float32 bundle is written anew in fp16, bf16"):
        lower_bundle(toy, tmp_path, kind, images)


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_would(
    toy: Bundle, images: Images, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"`keep` nope matches no module: their names are like .*block"):
        lower_bundle(toy, tmp_path, "fp16", images, keep=["nope"])


def test_int8_without_training_images_is_refused(toy: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibrated on training images"):
        lower_bundle(toy, tmp_path, "int8", Images(pixels()[:2]))


def test_a_bundle_of_another_model_is_not_replaced(toy: Bundle, images: Images, tmp_path: Path) -> None:
    lower_bundle(toy, tmp_path, "fp16", images)
    lower_bundle(toy, tmp_path, "fp16", images)  # the same model again
    edit_sidecar(tmp_path / "unet.fp16.onnx", weights_sha256="f" * 64)
    with pytest.raises(UsageError, match="is a bundle of another model"):
        lower_bundle(toy, tmp_path, "fp16", images)
    lower_bundle(toy, tmp_path, "fp16", images, force=True)


class Loud(nn.Module):
    """A classifier whose middle is beyond what a half can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.wide, self.back = ToyClassifier(), nn.Linear(3, 3), nn.Linear(3, 3)
        nn.init.constant_(self.wide.weight, 3e4)
        nn.init.constant_(self.back.weight, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.back(self.wide(self.quiet(x) + 9))
        return logits


def test_an_overflow_is_named_with_its_module_and_mended_by_keeping_that(images: Images, tmp_path: Path) -> None:
    loud = dataclasses.replace(classifier(), network=Loud().eval())
    bundle = open_bundle(export_bundle(Models(diffusion(), loud), tmp_path, pixels()[:2]).unet)
    with pytest.raises(CheckFailed, match=r"classifier\.fp16\.onnx gives NaN or Inf .* of module wide.*`keep` 'wide'"):
        lower_bundle(bundle, tmp_path, "fp16", images)
    assert not (tmp_path / "unet.fp16.onnx").exists()
    kept = dataclasses.replace(images, labelled=())
    lower_bundle(bundle, tmp_path, "fp16", kept, keep=["wide", "back"])


# Weights beside their graph


def test_weights_beside_a_graph_are_read_and_written_there(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "LARGE", 0)
        large = open_bundle(export_bundle(Models(diffusion(), classifier()), tmp_path / "large", pixels()[:2]).unet)
    assert large.unet.data is not None
    small = open_bundle(lower_bundle(large, tmp_path / "small", "fp16", images).unet)
    assert small.unet.data is None
    monkeypatch.setattr(to_precision, "LARGE", 0)
    again = open_bundle(lower_bundle(large, tmp_path / "again", "fp16", images).unet)
    assert again.unet.data == FileRef("unet.fp16.onnx.data", sha256_of(tmp_path / "again" / "unet.fp16.onnx.data"))
    OnnxDevice(again, batch=2, threads=1).close()
    with pytest.raises(UsageError, match="graphs with their weights beside them are not quantized"):
        lower_bundle(large, tmp_path / "int8", "int8", images)
    data = tmp_path / "large" / "unet.onnx.data"
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckFailed, match=r"unet\.onnx\.data has SHA-256"):
        lower_bundle(large, tmp_path / "other", "fp16", images)


# The command


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--precision", "fp16", "--unet", "none"), ("--unet", "is a bundle: give one")),
        (("--precision", "fp16", "--strict"), ("--strict", "is a bundle")),
        ((), ("say in which --precision", "fp16, bf16, int8, int8-cpu, fp8")),
        (("--precision", "fp32"), ("--precision fp32 is not known",)),
        (("--precision", "int8"), ("--calibration-images",)),
        (("--precision", "fp16", "--keep-fp32", "nope"), ("--keep-fp32 nope matches no module",)),
    ],
)
def test_what_a_bundle_cannot_be_given_is_refused(
    toy: Bundle, tmp_path: Path, given: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(cli("export", "--engine", toy.unet_path, "--out", tmp_path, *FEW, *given), 2, *words)
