"""Classifiers from every source: real ones that packages ship, toys for what can go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.export.convert.step_graph import ClassifyGraph
from densepure_rt.export.convert.to_onnx import classifier_onnx, to_onnx
from densepure_rt.export.models import onnx_files
from densepure_rt.export.models.classifiers import (
    PROCESSORS,
    ClassifierModel,
    Declared,
    Preprocessed,
    declare,
    open_classifier,
    outputs_of,
    timm_preprocessing,
    transformers_preprocessing,
    zoo_classifier,
)
from densepure_rt.export.models.onnx_classifiers import OnnxNetwork, merged_onnx
from densepure_rt.export.models.onnx_files import onnx_sha256, tensors_of
from densepure_rt.export.models.preprocessing import Preprocess, Preprocessing
from densepure_rt.export.models.unets import state_sha256
from densepure_rt.images.datasets import open_images
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS
from densepure_rt.runtime.noise import first_state
from tests.support.packaged_classifiers import (
    CIFAR_10_MODEL,
    EFFICIENTNET,
    cifar10_images,
    cifar_10_model,
    imagenet_images,
    needs_packages,
)

PACKAGED = "tests.support.packaged_classifiers:"
RGB = (3, 32, 32)
AS_IT_IS = declare("-1,1")
SILABS, LEVELS = declare("0,255", "128", "128"), declare("0,255")
CIFAR_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
Images = NDArray[np.uint8]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}, which the tests' environment does not have")


class Toy(nn.Module):
    """Pixels [B, 3, 32, 32] -> logits [B, 5], with a norm and a dropout that must be off."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.norm, self.dropout, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3 * size * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.norm(x)).flatten(1))
        return logits


@dataclasses.dataclass
class Record:
    features: Tensor
    scores: Tensor


class Named(NamedTuple):
    features: Tensor
    logits: Tensor


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A module `toys` with networks to name, in the working directory."""
    (tmp_path / "toys.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toys", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    class Wrapping(nn.Module):
        def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.toy, self.wrap = Toy(), wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.toy(x))

    module: Any = importlib.import_module("toys")
    module.Toy = Toy
    module.half = lambda: Toy().half()
    module.large = lambda: Toy(48)
    for name, wrap in {
        "tuple_": lambda y: (None, y, y[:, :, None, None].expand(-1, -1, 2, 2)),
        "features": lambda y: (y.repeat(1, 2), y),
        "features_in_a_map": lambda y: (y[:, :, None, None], y),
        "features_in_a_dict": lambda y: {"features": y.repeat(1, 2), "prediction": y},
        "features_and_labels": lambda y: (y.repeat(1, 2), y.argmax(1)),
        "two_heads": lambda y: {"first": {"logits": y}, "second": {"logits": y * 2}},
        "record": lambda y: Record(y.repeat(1, 2), y),
        "named": lambda y: Named(y.repeat(1, 2), y),
        "within": lambda y: (y.repeat(1, 2), {"logits": y}),
        "dict_": lambda y: {"aux": y * 2, "logits": y},
        "output": lambda y: types.SimpleNamespace(logits=y),
        "nothing": lambda y: {"loss": None},
        "flat": lambda y: y.flatten(),
        "pairs": lambda y: y.reshape(2, 5),
        "one_class": lambda y: y[:, :1],
        "map_": lambda y: y[:, :, None],
    }.items():
        setattr(module, name, lambda wrap=wrap: Wrapping(wrap))
    return "toys:"


def fed(pixels: Images) -> Tensor:
    return torch.from_numpy(first_state(pixels.astype(np.int32), 1.0))


def correct(model: ClassifierModel, data: tuple[Images, NDArray[np.int64]]) -> int:
    """How many of the images get their label."""
    with torch.inference_mode():
        found: NDArray[np.int64] = model.network(fed(data[0])).argmax(1).numpy()
    return int((found == data[1]).sum())


def preprocessing_onnx(model: ClassifierModel) -> onnx.ModelProto:
    assert isinstance(model.network, Preprocessed)
    example = (torch.zeros(2, *model.image),)
    graph = ClassifyGraph(model.network.preprocess)
    return onnx.load_model_from_string(to_onnx(graph, example, CLASSIFY_INPUTS, CLASSIFY_OUTPUTS))


def saved_onnx(network: nn.Module, path: Path, shape: tuple[int, ...], opset: int = 13, free: bool = False) -> Path:
    """An ONNX file of torch's older exporter, as most of those that people have are."""
    axes = {"dynamic_axes": {"image": {0: "N"}, "scores": {0: "N"}}} if free else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(shape),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["image"],
            output_names=["scores"],
            **axes,  # type: ignore[arg-type]
        )
    return path


@needs_packages
@pytest.mark.parametrize(
    ("name", "declared", "expected"), [("silabs_resnet", SILABS, 18), ("cifar_10_model", LEVELS, 20)]
)
def test_real_cifar_10_classifiers_label_real_images(name: str, declared: Declared, expected: int) -> None:
    """18 and 20 of foolbox's 20, as Keras' weights gave them in another implementation (facts on packaged data)."""
    model = open_classifier(PACKAGED + name, RGB, declared=declared)
    assert correct(model, cifar10_images()) == expected
    assert model.class_names == tuple("0123456789")
    assert model.preprocessing is not None
    assert model.preprocessing.scale == (0, 255)


@needs_packages
def test_real_classifier_fails_on_pixels_of_another_range() -> None:
    """What a wrong declaration costs, and why none is assumed."""
    assert correct(open_classifier(PACKAGED + "cifar_10_model", RGB, declared=AS_IT_IS), cifar10_images()) < 10


@needs_packages
@pytest.mark.parametrize(("opset", "free"), [(11, False), (13, True), (17, False)])
def test_real_classifier_as_an_onnx_file(tmp_path: Path, opset: int, free: bool) -> None:
    """A fixed batch of one is made free, an older opset raised; the merged graph labels as the file does."""
    path = saved_onnx(cifar_10_model(), tmp_path / "cifar.onnx", (1, *RGB), opset, free)
    model = open_classifier(str(path), RGB, declared=LEVELS)
    assert (model.onnx, model.weights_sha256) == (path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert correct(model, cifar10_images()) == 20
    merged = merged_onnx(preprocessing_onnx(model), onnx.load(path))
    assert [(entry.domain, entry.version) for entry in merged.opset_import] == [("", 20)]
    assert [value.name for value in (*merged.graph.input, *merged.graph.output)] == ["mean", "logits"]
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in (*merged.graph.input, *merged.graph.output)}
    assert len(batches) == 1
    assert "" not in batches
    assert b"packaged_classifiers" not in merged.SerializeToString()
    x = fed(cifar10_images()[0])
    for batch in (1, 3, 20):
        torch.testing.assert_close(OnnxNetwork(merged)(x[:batch]), model.network(x[:batch]), atol=1e-4, rtol=1e-5)


@needs_packages
def test_real_imagenet_classifier_at_224_of_256() -> None:
    """18 of foolbox's 20: weights from a file, the middle 224x224 of a 256x256 image."""
    declared = declare("0,255", "127", "128", crop="224")
    name = PACKAGED + "efficientnet_lite0"
    model = open_classifier(name, (3, 256, 256), weights=EFFICIENTNET, declared=declared)
    assert model.weights_sha256.startswith("579344248a93e230")
    assert len(model.class_names) == 1000
    assert correct(model, imagenet_images()) == 18


@needs_packages
def test_real_classifier_is_exported(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CIFAR_10) + "\n\n")
    model = open_classifier(PACKAGED + "silabs_resnet", RGB, declared=SILABS, labels=labels)
    assert list(model.class_names) == CIFAR_10
    x = fed(cifar10_images()[0])
    found = OnnxNetwork(onnx.load_model_from_string(classifier_onnx(model)))(x)
    torch.testing.assert_close(found, model.network(x), atol=1e-5, rtol=1e-4)


@needs_packages
def test_packaged_weights_are_those_that_were_measured() -> None:
    assert hashlib.sha256(CIFAR_10_MODEL.read_bytes()).hexdigest().startswith("0eddc60b9fcbcab4")


@pytest.mark.parametrize("name", ["Toy", "tuple_", "dict_", "output", "named", "within", "half"])
def test_logits_are_found_in_what_the_network_gives(toys: str, name: str) -> None:
    model = open_classifier(toys + name, RGB, declared=AS_IT_IS)
    x = torch.rand(2, *RGB)
    tolerance = 1e-2 if name == "half" else 0
    torch.testing.assert_close(model.network(x), Toy().eval()(x), atol=tolerance, rtol=0)
    assert model.class_names == ("0", "1", "2", "3", "4")
    assert not any(module.training for module in model.network.modules())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "gives nothing with a tensor in it: it should return logits"),
        ("features", r"gives 2 tensors, 0 \['B', 10\], 1 \['B', 5\], and 0 and 1 may all be logits: wrap it"),
        ("features_in_a_map", "0 and 1 may all be logits"),
        ("features_in_a_dict", "features and prediction may all be logits.*name them 'logits' in a dictionary"),
        ("features_and_labels", r"1 \['B'\], and 0 and 1 may all be logits"),
        ("two_heads", r"first\.logits and second\.logits may all be logits"),
        ("record", "features and scores may all be logits"),
        ("flat", r"gives \[10\] for a batch of 2"),
        ("one_class", r"gives \[2, 1\] for a batch of 2: a classifier gives logits \[2, K\] of two classes or more"),
        ("map_", r"gives \[2, 5, 1\]"),
        ("pairs", r"does not take .*float32 \[3, 3, 32, 32\] .*let it take any batch"),
        ("large", r"does not take what preprocessing makes of \[3, 32, 32\], float32 \[2, 3, 32, 32\] .*`resize`"),
    ],
)
def test_network_that_is_no_classifier_of_these_images_is_refused(toys: str, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        open_classifier(toys + name, RGB, declared=AS_IT_IS)
    assert "\n" not in str(caught.value)


def test_declared_resize_makes_the_image_fit(toys: str) -> None:
    model = open_classifier(toys + "large", RGB, declared=declare("0,1", "0.5", "0.25", resize="48"))
    assert model.preprocessing == Preprocessing((0, 1), (0.5,), (0.25,), resize=(48, 48))
    assert model.network(torch.zeros(2, *RGB)).shape == (2, 5)


@pytest.mark.parametrize("declared", [None, Declared(), declare(resize="224"), declare(None, "0.5", "0.5")])
def test_network_that_says_nothing_of_pixels_needs_a_declaration(toys: str, declared: Declared | None) -> None:
    with pytest.raises(UsageError, match=r"declare it with `pixel_range`.*0\.485,0\.456,0\.406.*`pixel_range`=-1,1"):
        open_classifier(toys + "Toy", RGB, declared=declared)


def test_mean_without_std_is_refused(toys: str) -> None:
    with pytest.raises(UsageError, match="`mean` and `std` belong together"):
        open_classifier(toys + "Toy", RGB, declared=declare("0,1", mean="0.5"))


def test_options_are_read() -> None:
    found = declare("0,255", "1,2,3", "4,5,6", "bgr", "224", "bilinear", False, "200x100")
    assert found == Declared((0, 255), (1, 2, 3), (4, 5, 6), "BGR", (224, 224), "bilinear", False, (200, 100))
    assert declare() == Declared()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pixel_range": "1"}, "`pixel_range` 1: two numbers"),
        ({"pixel_range": "0..1"}, "`pixel_range` 0..1: numbers with commas"),
        ({"mean": "a"}, "`mean` a: numbers with commas between"),
        ({"std": ""}, "`std`"),
        ({"channel_order": "CMYK"}, "`channel_order` CMYK is not known: RGB, BGR or grey"),
        ({"resize": "224,224"}, "`resize` 224,224: HEIGHTxWIDTH"),
        ({"crop": "-1"}, "`crop` -1: HEIGHTxWIDTH"),
        ({"interpolation": "lanczos"}, "`interpolation` lanczos is not known: bicubic, bilinear, nearest"),
    ],
)
def test_options_that_cannot_be_read_are_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        declare(**options)  # type: ignore[arg-type]


def test_grey_images_are_declared_grey_unless_said_otherwise() -> None:
    assert AS_IT_IS.alone("net", (1, 28, 28)).channels == "grey"
    assert declare("-1,1", channel_order="RGB").alone("net", (1, 28, 28)).channels == "RGB"


def test_said_resize_ends_a_known_crop() -> None:
    known = Preprocessing((0, 1), resize=(256, 256), crop=(224, 224))
    assert declare(resize="224").over(known) == Preprocessing((0, 1), resize=(224, 224))
    assert declare(resize="240", crop="224").over(known).crop == (224, 224)


@pytest.mark.parametrize("count", [4, 6])
def test_class_names_of_another_number_are_refused(toys: str, tmp_path: Path, count: int) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"class {i}" for i in range(count)))
    with pytest.raises(UsageError, match=f"labels.txt names {count} classes, the classifier has 5"):
        open_classifier(toys + "Toy", RGB, declared=AS_IT_IS, labels=labels)


def test_class_names_that_cannot_be_read_are_refused(toys: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the class names in .*none.txt"):
        open_classifier(toys + "Toy", RGB, declared=AS_IT_IS, labels=tmp_path / "none.txt")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_from_a_file(toys: str, tmp_path: Path, prefix: str) -> None:
    other, path = Toy(), tmp_path / "weights.safetensors"
    with torch.no_grad():
        other.head.weight.mul_(-1)
    save_file({prefix + name: tensor for name, tensor in other.state_dict().items()}, path)
    model = open_classifier(toys + "Toy", RGB, declared=AS_IT_IS, weights=path, prefix=prefix)
    x = torch.rand(2, *RGB)
    assert torch.equal(model.network(x), other.eval()(x))
    assert model.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if prefix:
        with pytest.raises(UsageError, match=r"`classifier_prefix` module\."):
            open_classifier(toys + "Toy", RGB, declared=AS_IT_IS, weights=path)


def test_weights_of_another_network_are_refused(toys: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(Toy(16).state_dict(), path)
    with pytest.raises(UsageError, match=r"head.weight should be \[5, 3072\], found \[5, 768\]"):
        open_classifier(toys + "Toy", RGB, declared=AS_IT_IS, weights=path)


def test_weights_without_a_file_are_told_apart_by_their_values(toys: str) -> None:
    model = open_classifier(toys + "Toy", RGB, declared=AS_IT_IS)
    other = Toy()
    assert model.weights_sha256 == state_sha256(other)
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    assert model.weights_sha256 != state_sha256(other)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet50", "`classifier` resnet50 is none of timm:NAME"),
        ("nowhere.onnx", "no classifier at nowhere.onnx"),
        ("nowhere.pt2", "no classifier at nowhere.pt2"),
        ("nowhere/at/all", "is none of .*check its spelling$"),
        ("org/name", "is none of .*no such folder is here.*hf download org/name --local-dir name.*`classifier` name$"),
        ("https://huggingface.co/org/name-1", "hf download org/name-1 --local-dir name-1"),
        ("no_such_module:make", "no module 'no_such_module'"),
    ],
)
def test_classifier_that_is_nowhere_is_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_classifier(spec, RGB, declared=AS_IT_IS)


def test_checkpoint_alone_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "best.pth.tar").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"holds weights and no network: give .*`classifier_weights` .*best\.pth\.tar"):
        open_classifier(str(tmp_path / "best.pth.tar"), RGB, declared=AS_IT_IS)


def test_file_of_an_unknown_suffix_is_not_called_misspelt(tmp_path: Path) -> None:
    (tmp_path / "model.weights").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"none of timm:NAME.*the file is there, but not its suffix among these"):
        open_classifier(str(tmp_path / "model.weights"), RGB, declared=AS_IT_IS)


def test_options_that_do_nothing_are_refused(toys: str, tmp_path: Path) -> None:
    path = saved_onnx(Toy(), tmp_path / "toy.onnx", (1, *RGB))
    with pytest.raises(UsageError, match="has its own"):
        open_classifier(str(path), RGB, declared=AS_IT_IS, weights=path)
    with pytest.raises(UsageError, match="`classifier_prefix` module. is of the names in `classifier_weights`"):
        open_classifier(toys + "Toy", RGB, declared=AS_IT_IS, prefix="module.")


def test_program_of_torch_export_is_a_classifier(tmp_path: Path) -> None:
    path, batch = tmp_path / "toy.pt2", torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free, fixed = (
            torch.export.export(Toy().eval(), (torch.zeros(2 if shapes else 1, *RGB),), dynamic_shapes=shapes)
            for shapes in (({0: batch},), None)
        )
        torch.export.save(free, path)
        torch.export.save(fixed, tmp_path / "fixed.pt2")
    model = open_classifier(str(path), RGB, declared=AS_IT_IS)
    x = torch.rand(3, *RGB)
    torch.testing.assert_close(model.network(x), Toy().eval()(x))
    found = OnnxNetwork(onnx.load_model_from_string(classifier_onnx(model)))(x)
    torch.testing.assert_close(found, model.network(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="fixed.pt2 does not take .*let it take any batch"):
        open_classifier(str(tmp_path / "fixed.pt2"), RGB, declared=AS_IT_IS)


def test_default_classifier_takes_pixels_as_they_are() -> None:
    model = zoo_classifier()
    assert (model.preprocessing, model.onnx) == (None, None)
    images = open_images(None, model.image, model.class_names).select(limit=20)
    pixels = np.stack([image.pixels for image in images])
    assert (model.network(fed(pixels)).argmax(1).numpy() == [image.label for image in images]).mean() > 0.8


def graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    kind: int = TensorProto.FLOAT,
    opsets: dict[str, int] | None = None,
    weights: list[TensorProto] | None = None,
) -> onnx.ModelProto:
    ins, outs = ([helper.make_tensor_value_info(n, kind, s) for n, s in side.items()] for side in (inputs, outputs))
    made = helper.make_graph(nodes, "toy", ins, outs, weights or [])
    imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": 17}).items()]
    model: onnx.ModelProto = helper.make_model(made, opset_imports=imports, ir_version=8)
    return model


POOL = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)]
FIXED = [
    helper.make_node("Constant", [], ["shape"], value_ints=[1, -1]),
    helper.make_node("Reshape", ["x", "shape"], ["y"]),
]
CUSTOM = [helper.make_node("Swish", ["x"], ["y"], domain="mine")]
ONNX_REFUSED = {
    "two inputs": (graph([*POOL], {"x": ["N", *RGB], "z": ["N"]}, {"y": ["N", 3]}), UsageError, "one image as input"),
    "two outputs": (
        graph([*POOL, helper.make_node("Relu", ["y"], ["w"])], {"x": ["N", *RGB]}, {"y": ["N", 3], "w": ["N", 3]}),
        UsageError,
        "logits as its only output",
    ),
    "half": (graph(POOL, {"x": ["N", *RGB]}, {"y": ["N", 3]}, TensorProto.FLOAT16), UsageError, "'x' is FLOAT16"),
    "channels last": (
        graph(POOL, {"x": ["N", 32, 32, 3]}, {"y": ["N", 32]}),
        UsageError,
        r"takes \['any', 32, 32, 3\] as 'x', preprocessing makes \['any', 3, 32, 32\].*channels come first.*-nchw x",
    ),
    "vectors": (
        graph([helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 768]}, {"y": ["N", 768]}),
        UsageError,
        r"takes \['any', 768\] as 'x'.*is no image classifier by itself; export the whole model",
    ),
    "one image": (graph(POOL, {"x": [*RGB]}, {"y": ["N", 3]}), CheckFailed, "not a sound ONNX file"),
    "other size": (graph(POOL, {"x": ["N", 3, 64, 48]}, {"y": ["N", 3]}), UsageError, "declare `resize` 64x48$"),
    "grey": (
        graph(POOL, {"x": ["N", 1, 32, 32]}, {"y": ["N", 1]}),
        UsageError,
        "declare the channels .*`channel_order`",
    ),
    "custom": (
        graph(CUSTOM, {"x": ["N", 3]}, {"y": ["N", 3]}, opsets={"": 17, "mine": 1}),
        CheckFailed,
        "uses Swish of mine",
    ),
    "fixed batch": (
        graph(FIXED, {"x": [1, *RGB]}, {"y": [1, 3072]}),
        UsageError,
        "made for batches of 1 alone: export it with a free batch dimension",
    ),
    "unsound": (graph(POOL, {"w": ["N", *RGB]}, {"y": ["N", 3]}), CheckFailed, "not a sound ONNX file"),
}


@pytest.mark.parametrize("case", ONNX_REFUSED)
def test_onnx_file_that_is_no_such_classifier_is_refused(tmp_path: Path, case: str) -> None:
    model, kind, said = ONNX_REFUSED[case]
    path = tmp_path / "toy.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(kind, match=said) as caught:
        open_classifier(str(path), RGB, declared=AS_IT_IS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "toy.onnx").write_bytes(content)
    with pytest.raises(DensePureError, match="toy.onnx"):
        open_classifier(str(tmp_path / "toy.onnx"), RGB, declared=AS_IT_IS)


def test_onnx_file_needs_a_declaration(tmp_path: Path) -> None:
    path = saved_onnx(Toy(), tmp_path / "toy.onnx", (1, *RGB))
    with pytest.raises(UsageError, match="declare it with `pixel_range`"):
        open_classifier(str(path), RGB)


def test_onnx_weights_may_lie_beside_the_file(tmp_path: Path) -> None:
    path = saved_onnx(Toy(), tmp_path / "inner.onnx", (1, *RGB))
    model = onnx.load(path)
    out = tmp_path / "toy.onnx"
    onnx.save_model(model, out, save_as_external_data=True, location="toy.data", size_threshold=0)
    opened = open_classifier(str(out), RGB, declared=AS_IT_IS)
    x = torch.rand(3, *RGB)
    torch.testing.assert_close(opened.network(x), Toy().eval()(x), atol=1e-5, rtol=1e-5)
    merged = merged_onnx(preprocessing_onnx(opened), onnx.load(out))
    torch.testing.assert_close(OnnxNetwork(merged)(x), opened.network(x), atol=1e-5, rtol=1e-5)
    before = onnx_sha256(out)
    content = bytearray((tmp_path / "toy.data").read_bytes())
    content[-1] ^= 1
    (tmp_path / "toy.data").write_bytes(content)
    assert onnx_sha256(out) != before == opened.weights_sha256


def weights_of_an_attribute(tmp_path: Path, place: str) -> Path:
    """A classifier whose bias is a Constant's value, or one within an If, and lies in another file."""
    bias = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "b")
    nodes = [helper.make_node("ReduceMean", ["x"], ["p"], axes=[2, 3], keepdims=0)]
    constant = helper.make_node("Constant", [], ["b"], value=bias)
    if place == "attribute":
        nodes += [constant]
    else:
        out = [helper.make_tensor_value_info("b", TensorProto.FLOAT, [3])]
        branch = helper.make_graph([constant] if place == "branch" else [], "branch", [], out)
        if place == "branch's weight":
            branch.initializer.append(bias)
        yes = onnx.numpy_helper.from_array(np.array(True), "yes")
        nodes += [helper.make_node("Constant", [], ["yes"], value=yes)]
        nodes += [helper.make_node("If", ["yes"], ["b_"], then_branch=branch, else_branch=branch)]
    nodes += [helper.make_node("Add", ["p", "b" if place == "attribute" else "b_"], ["y"])]
    path = tmp_path / "toy.onnx"
    model = graph(nodes, {"x": ["N", *RGB]}, {"y": ["N", 3]})
    for tensor in tensors_of(model):
        if tensor.name == "b":
            onnx.external_data_helper.set_external_data(tensor, "toy.data", 0, len(bias.raw_data))
            tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    (tmp_path / "toy.data").write_bytes(bias.raw_data)
    return path


@pytest.mark.parametrize("place", ["attribute", "branch", "branch's weight"])
def test_hash_covers_the_weights_of_attributes_and_branches(tmp_path: Path, place: str) -> None:
    path = weights_of_an_attribute(tmp_path, place)
    opened = open_classifier(str(path), RGB, declared=AS_IT_IS)
    assert opened.network(torch.zeros(1, *RGB)).tolist() == [[0, 1, 2]]
    (tmp_path / "toy.data").write_bytes(np.arange(3, 6, dtype=np.float32).tobytes())
    assert onnx_sha256(path) != opened.weights_sha256


def test_onnx_classifier_is_exported_as_it_was_when_it_was_checked(tmp_path: Path) -> None:
    path = saved_onnx(Toy(), tmp_path / "toy.onnx", (1, *RGB))
    opened = open_classifier(str(path), RGB, declared=AS_IT_IS)
    path.write_bytes(b"another file by now")
    found = OnnxNetwork(onnx.load_model_from_string(classifier_onnx(opened)))
    x = torch.rand(3, *RGB)
    torch.testing.assert_close(found(x), opened.network(x), atol=1e-5, rtol=1e-5)


def test_onnx_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_onnx(Toy(), tmp_path / "toy.onnx", (1, *RGB))
    digests = iter(["a" * 64, "b" * 64])
    monkeypatch.setattr(onnx_files, "onnx_sha256", lambda path: next(digests))
    with pytest.raises(CheckFailed, match="toy.onnx or its weights changed while they were read"):
        open_classifier(str(path), RGB, declared=AS_IT_IS)


@pytest.mark.parametrize("batch", ["N", 1])
def test_sound_onnx_file_that_onnx_runtime_cannot_run_is_a_failed_check(tmp_path: Path, batch: str | int) -> None:
    kind = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("Conv", ["h", "w"], ["c"]),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["f"], ["y"]),
    ]
    weights = [helper.make_tensor("w", kind, [4, 3, 32, 32], np.zeros(4 * 3 * 32 * 32).tolist())]
    model = graph(nodes, {"x": [batch, *RGB]}, {"y": [batch, 4]}, weights=weights, opsets={"": 22})
    model.ir_version = 10
    path = tmp_path / "toy.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckFailed, match=r"ONNX Runtime .* cannot run toy.onnx \(.+\): export it") as caught:
        open_classifier(str(path), RGB, declared=AS_IT_IS)
    assert "\n" not in str(caught.value)


def test_onnx_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    path = saved_onnx(Toy(), tmp_path / "inner.onnx", (1, *RGB))
    (tmp_path / "model").mkdir()
    out = tmp_path / "model" / "toy.onnx"
    onnx.save_model(onnx.load(path), out, save_as_external_data=True, location="toy.data", size_threshold=0)
    os.rename(tmp_path / "model" / "toy.data", tmp_path / "toy.data")
    model = onnx.load(out, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../toy.data" if entry.key == "location" else entry.value
    out.write_bytes(model.SerializeToString())
    with pytest.raises(CheckFailed, match=r"keeps weights in '\.\./toy\.data', outside its folder, which is not read"):
        open_classifier(str(out), RGB, declared=AS_IT_IS)


def test_onnx_function_is_inlined_and_a_weight_is_no_input(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    pool = helper.make_function("mine", "Pool", ["x"], ["y"], POOL, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Pool", ["x"], ["p"], domain="mine"), helper.make_node("Add", ["p", "b"], ["y"])]
    weights = [onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "b")]
    model = graph(nodes, {"x": ["N", *RGB], "b": [3]}, {"y": ["N", 3]}, opsets={"": 17, "mine": 1}, weights=weights)
    model.functions.append(pool)
    assert len(model.opset_import) == len(opsets)
    path = tmp_path / "toy.onnx"
    path.write_bytes(model.SerializeToString())
    opened = open_classifier(str(path), RGB, declared=AS_IT_IS)
    x = torch.rand(2, *RGB)
    expected = x.mean((2, 3)) + torch.tensor([1.0, 2, 3])
    torch.testing.assert_close(opened.network(x), expected)
    merged = merged_onnx(preprocessing_onnx(opened), onnx.load(path))
    assert not merged.functions
    torch.testing.assert_close(OnnxNetwork(merged)(x), expected)


def test_preprocessing_is_raised_to_a_later_opset() -> None:
    nodes = [helper.make_node("Constant", [], ["axes"], value_ints=[2, 3])]
    nodes += [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)]
    later = graph(nodes, {"x": ["N", *RGB]}, {"y": ["N", 3]}, opsets={"": 22})
    wanted = Preprocessing((0, 1), (0.5,), (0.5,), "BGR", resize=(40, 40), crop=(32, 32))
    preprocess = Preprocess(wanted, RGB).eval()
    first = to_onnx(ClassifyGraph(preprocess), (torch.zeros(2, *RGB),), CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    merged = merged_onnx(onnx.load_model_from_string(first), later)
    assert merged.opset_import[0].version == 22
    x = torch.rand(3, *RGB)
    torch.testing.assert_close(OnnxNetwork(merged)(x), preprocess(x).mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_outputs_have_names_at_any_depth() -> None:
    y = torch.zeros(2, 5)
    assert outputs_of(y) == {"": y}
    assert list(outputs_of((None, {"a": [y, 3]}, Record(y, y)))) == ["1.a.0", "2.features", "2.scores"]
    assert outputs_of(3) == {}


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("tuple_", "taking 1 [B, 5] of toys:tuple_'s outputs (1 ['B', 5], 2 ['B', 5, 2, 2]) as logits of 5 classes"),
        (
            "dict_",
            "taking logits [B, 5] of toys:dict_'s outputs (aux ['B', 5], logits ['B', 5]) as logits of 5 classes",
        ),
        ("Toy", None),
        ("output", None),
    ],
)
def test_choice_among_outputs_is_told(toys: str, name: str, note: str | None) -> None:
    model = open_classifier(toys + name, RGB, declared=AS_IT_IS)
    assert model.notes == ((note,) if note else ())
    assert OnnxNetwork(onnx.load_model_from_string(classifier_onnx(model)))(torch.zeros(3, *RGB)).shape == (3, 5)


VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessorFast"}
CROPPED = {"resize": (256, 256), "crop": (224, 224)}
SIGNED = {"scale": (-1, 1), "mean": (0,), "std": (1,)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 224}, {}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"do_resize": False}, {"resize": None}),
        ({"size": {"height": 32, "width": 32}}, {"resize": None}),
        ({"do_rescale": False}, {"scale": (0, 255), "mean": (0.5,) * 3}),
        ({"do_normalize": False}, {"mean": (0,), "std": (1,)}),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, CROPPED),
        ({**CONVNEXT, "size": {"shortest_edge": 224}, "crop_pct": 0.875}, CROPPED),
        ({**CONVNEXT, "size": {"shortest_edge": 384}, "crop_pct": 0.875}, {"resize": (384, 384)}),
        ({"image_processor_type": "EfficientNetImageProcessor", "include_top": True}, {"std": (0.25,) * 3}),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, SIGNED),
        ({"do_flip_channel_order": True}, {"channels": "BGR"}),
    ],
)
def test_preprocessor_config_is_read(change: dict[str, Any], expected: dict[str, Any]) -> None:
    known = Preprocessing((0, 1), (0.5,) * 3, (0.5,) * 3, resize=(224, 224), interpolation="bilinear")
    assert transformers_preprocessing(VIT | change, RGB) == dataclasses.replace(known, **expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_processor_type": "LevitImageProcessor"}, "of a LevitImageProcessor; known are ViT"),
        ({"image_processor_type": None}, "of a None; known are"),
        ({"do_pad": True}, "without padding"),
        ({"resample": 1}, "has resample 1"),
        ({"size": {"longest_edge": 224}}, "is not understood"),
        ({"size": "large"}, "is not understood"),
        ({"crop_size": 224}, "has crop_size but no do_center_crop"),
        ({"image_std": None}, "is not understood"),
    ],
)
def test_preprocessor_config_that_is_not_known_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"preprocessor_config.json.*{said}"):
        transformers_preprocessing(VIT | change, RGB)


@pytest.mark.parametrize(
    ("kind", "without", "said"),
    [
        (
            "ViT",
            ["do_resize", "size", "do_normalize", "image_mean", "resample"],
            "does not say do_resize, do_normalize,",
        ),
        ("ViT", ["resample"], "does not say resample,"),
        ("EfficientNet", [], "does not say include_top,"),
        ("CLIP", [], "does not say do_center_crop,"),
        ("MobileViT", [], "does not say do_center_crop, do_flip_channel_order,"),
    ],
)
def test_preprocessor_config_that_leaves_it_to_its_class_is_refused(kind: str, without: list[str], said: str) -> None:
    """The classes resize, normalise, crop or flip by default, so silence is not "nothing"."""
    config = {name: value for name, value in VIT.items() if name not in without}
    with pytest.raises(UsageError, match=f"{said}.*save_pretrained.*`pixel_range`, `mean`, `std`"):
        transformers_preprocessing(config | {"image_processor_type": f"{kind}ImageProcessor"}, RGB)


def test_timm_configuration_is_read() -> None:
    """BEiT-L/512, as timm 1.0 resolves it: the whole image, resized to the input size."""
    config = {"input_size": (3, 512, 512), "interpolation": "bicubic", "crop_pct": 1.0}
    config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = timm_preprocessing(config, (3, 256, 256))
    assert found == Preprocessing((0, 1), (0.5,) * 3, (0.5,) * 3, resize=(512, 512))
    assert timm_preprocessing(config | {"input_size": (3, 256, 256)}, (3, 256, 256)).resize is None


@pytest.mark.parametrize(("spec", "package"), [("timm:resnet18", "timm"), ("folder", "transformers")])
def test_missing_package_is_a_fault_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "folder")
    with pytest.raises(EnvironmentFault, match=rf"needs {package}, .*pip install 'densepure-rt\[classifiers\]'"):
        open_classifier(spec, RGB)


def folder(path: Path, change: dict[str, Any] | None = None) -> Path:
    """A transformers folder whose weights are none."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "vit"} | (change or {})))
    (path / "preprocessor_config.json").write_text(json.dumps(VIT))
    save_file({"a": torch.zeros(1)}, path / "model.safetensors")
    return path


def test_folder_that_brings_code_is_refused(tmp_path: Path) -> None:
    found = folder(tmp_path / "folder", {"auto_map": {"AutoModelForImageClassification": "evil.Model"}})
    with pytest.raises(CheckFailed, match=r"brings code of its own \(auto_map\)"):
        open_classifier(str(found), RGB)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_folder_without_one_of_its_files_is_refused(tmp_path: Path, name: str) -> None:
    found = folder(tmp_path / "folder")
    (found / name).unlink()
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        open_classifier(str(found), RGB)


@pytest.mark.parametrize("content", ["not JSON", "[]"])
def test_folder_with_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    found = folder(tmp_path / "folder")
    (found / "config.json").write_text(content)
    with pytest.raises(CheckFailed, match="config.json"):
        open_classifier(str(found), RGB)


@needs("transformers")
def test_vit_of_transformers_is_read_and_exported(tmp_path: Path) -> None:
    import transformers  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(5)
    names = {i: f"class {i}" for i in range(7)}
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=48, patch_size=8
    )
    config.id2label = names
    network = transformers.ViTForImageClassification(config).eval()  # type: ignore[no-untyped-call, unused-ignore]
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT | {"size": {"height": 48, "width": 48}}))
    model = open_classifier(str(tmp_path), RGB)
    assert model.class_names == tuple(names.values())
    x = torch.rand(3, *RGB) * 2 - 1
    assert isinstance(model.network, Preprocessed)
    torch.testing.assert_close(model.network(x), network(model.network.preprocess(x)).logits)
    found = OnnxNetwork(onnx.load_model_from_string(classifier_onnx(model)))(x)
    torch.testing.assert_close(found, model.network(x), atol=1e-5, rtol=1e-4)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("classifier")}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="missing keys, first classifier"):
        open_classifier(str(tmp_path), RGB)


@needs("transformers")
@needs_packages
@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_is_what_transformers_does(tmp_path: Path, kind: str) -> None:
    """On photographs: levels differ by its rounding and clipping to uint8 after each of the resize's two passes."""
    import transformers  # type: ignore[import-not-found, unused-ignore]

    sizes = {"size": {"shortest_edge": 288}} if kind == "MobileViT" else {}  # its defaults pad
    processor = getattr(transformers, f"{kind}ImageProcessor")(**sizes)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    if kind == "MobileViT":  # it never normalises, and does not write that
        config["do_normalize"] = False
    pixels = imagenet_images()[0][:4]
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]
    expected = processor(images, return_tensors="np")["pixel_values"]
    wanted = transformers_preprocessing(config, (3, 256, 256))
    mean, std = (np.reshape(value, (-1, 1, 1)) for value in (wanted.mean, wanted.std))
    found = Preprocess(wanted, (3, 256, 256))(fed(pixels)).numpy()
    clipped = np.clip(found, *((level - mean) / std for level in wanted.scale))
    difference = np.abs(clipped - expected) * std * 255 / (wanted.scale[1] - wanted.scale[0])
    assert difference.mean() < 0.35
    assert difference.max() < 7


@needs("timm")
def test_timm_model_with_weights_of_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)

    torch.manual_seed(6)
    network = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    model = open_classifier("timm:resnet10t", RGB, weights=path)
    assert len(model.class_names) == 7
    assert model.preprocessing is not None
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.preprocessing.resize == (176, 176)
    x = torch.rand(3, *RGB) * 2 - 1
    assert isinstance(model.network, Preprocessed)
    torch.testing.assert_close(model.network(x), network(model.network.preprocess(x)))
