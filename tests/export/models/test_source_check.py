"""Sources that are at fault themselves, each told by its own message, against networks whose fault is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed
from densepure_rt.export.convert.to_onnx import check_sources, export_bundle
from densepure_rt.export.models import onnx_classifiers
from densepure_rt.export.models.classifiers import ClassifierModel, declare, open_classifier
from densepure_rt.export.models.source_check import as_function, check_source, distance, torch_source
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel, no_unet
from densepure_rt.runtime.schedule import Schedule

IMAGE = (3, 8, 8)
PIXELS: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (6, *IMAGE), dtype=np.uint8)


class Net(nn.Module):
    """A small classifier whose features pass through `middle`."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.head = nn.Conv2d(3, 4, 3, padding=1), middle, nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.middle(torch.tanh(self.first(x))).flatten(1))
        return found


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


FAULTS: dict[str, tuple[nn.Module, str]] = {
    "dropout left on": (
        Function(lambda x: F.dropout(x, 0.5)),
        r"other values when it is run again .*first in module middle \(Function\).*self\.training",
    ),
    "drawn noise": (Function(lambda x: x + torch.randn_like(x)), "other values when it is run again"),
    "batch statistics": (
        nn.BatchNorm2d(4, track_running_stats=False),
        r"in a batch of 6 than alone .*first in module middle \(BatchNorm2d\).*track_running_stats=True",
    ),
    "mean over the batch": (Function(lambda x: x - x.mean(0)), "in a batch of 6 than alone"),
    "logarithm": (
        Function(lambda x: x.log()),
        r"itself gives NaN or Inf, first in module middle \(Function\), before any export",
    ),
}


def test_sound_network_passes() -> None:
    check_sources(
        Models(no_unet(IMAGE), ClassifierModel(Net(nn.Identity()).eval(), IMAGE, tuple("abcde"), "0" * 64)), PIXELS
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_classifier_in_pytorch_is_told_before_its_export(tmp_path: Path, fault: str) -> None:
    middle, said = FAULTS[fault]
    classifier = ClassifierModel(Net(middle), IMAGE, tuple("abcde"), "0" * 64)
    with pytest.raises(CheckFailed, match=f"the classifier in PyTorch .*{said}"):
        export_bundle(Models(no_unet(IMAGE), classifier), tmp_path / "out", PIXELS)
    assert not (tmp_path / "out").exists()


class Unet(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 3, padding=1), middle, nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(torch.tanh(self.first(x) + t[:, None, None, None] / 1000)))
        return found


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_unet_is_told(fault: str) -> None:
    middle, said = FAULTS[fault]
    network = Unet(middle).eval()
    unet = DiffusionModel(network, IMAGE, Schedule("linear", 1000), "fixed_small", "epsilon", (-1.0, 1.0), "0" * 64)
    classifier = ClassifierModel(Net(nn.Identity()).eval(), IMAGE, tuple("abcde"), "0" * 64)
    with pytest.raises(CheckFailed, match=f"the UNet in PyTorch .*{said}"):
        check_sources(Models(unet, classifier), PIXELS)


def test_one_image_alone_shows_dependence_on_the_batch_too() -> None:
    classifier = ClassifierModel(Net(FAULTS["batch statistics"][0]).eval(), IMAGE, tuple("abcde"), "0" * 64)
    with pytest.raises(CheckFailed, match="in a batch of 2 than alone"):
        check_sources(Models(no_unet(IMAGE), classifier), PIXELS[:1])


def test_module_after_the_fault_is_not_blamed() -> None:
    """`head` ends before the module that drops around it does, and gives other values; it is given others."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(F.dropout(x, 0.5))
            return found

    network = nn.Sequential(nn.Linear(4, 4), Around()).eval()
    with pytest.raises(CheckFailed, match=r"first in module 1 \(Around\)"):
        check_source(torch_source("it", as_function(network), network), np.ones((3, 4), np.float32))


def test_distance_is_relative_and_counts_what_is_not_finite() -> None:
    x = np.array([3.0, 4.0], np.float32)
    assert distance(x, x) == distance(x * 0, x * 0) == 0
    assert distance(x, np.array([3.0, 9.0], np.float32)) == pytest.approx(5 / np.hypot(3, 9))
    assert distance(x, x[:1]) == distance(x, x * np.nan) == np.inf
    assert distance(x * np.nan, x * np.nan) == 0


def onnx_file(path: Path, middle: list[onnx.NodeProto], opset: int = 13, batch: str | int = "N") -> Path:
    """Pixels -> means of four features, which pass through `middle` from "r" to "m"."""
    draw = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["c"], ["r"], name="tanh"),
        *middle,
        helper.make_node("GlobalAveragePool", ["m"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["y"], name="flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *IMAGE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [
            onnx.numpy_helper.from_array(draw.normal(size=(4, 3, 3, 3)).astype(np.float32), "w"),
            onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "grow"),
            onnx.numpy_helper.from_array(np.array([1, 1, 0.6, 0.6], np.float32), "shrink"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def opened(path: Path) -> ClassifierModel:
    return open_classifier(str(path), IMAGE, declared=declare("-1,1"))


QUANTIZE = [
    helper.make_node("DynamicQuantizeLinear", ["r"], ["q", "s", "z"], name="quantize"),
    helper.make_node("DequantizeLinear", ["q", "s", "z"], ["m"], name="back"),
]
ONNX_FAULTS = {
    "random": (
        [
            helper.make_node("RandomNormalLike", ["r"], ["n"], name="noise"),
            helper.make_node("Add", ["r", "n"], ["m"], name="add"),
        ],
        r"toy\.onnx gives other values when it is run again .*node noise \(RandomNormalLike\).*model\.eval\(\)",
    ),
    "not finite": (
        [helper.make_node("Log", ["r"], ["m"], name="log")],
        r"toy\.onnx itself gives NaN or Inf, first in node log \(Log\), before any export.*`pixel_range`",
    ),
    "dynamic quantization": (
        QUANTIZE,
        r"toy\.onnx gives an image other values in a batch of 6 than alone .*before quantize_dynamic",
    ),
}


@pytest.mark.parametrize("fault", ONNX_FAULTS)
def test_fault_of_an_onnx_file_is_told_of_the_file(tmp_path: Path, fault: str) -> None:
    middle, said = ONNX_FAULTS[fault]
    with pytest.raises(CheckFailed, match=said) as caught:
        export_bundle(
            Models(no_unet(IMAGE), opened(onnx_file(tmp_path / "toy.onnx", middle))), tmp_path / "out", PIXELS
        )
    assert "PyTorch" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["random", "not finite"])
def test_fixed_batch_does_not_hide_the_fault(tmp_path: Path, fault: str) -> None:
    middle, said = ONNX_FAULTS[fault]
    with pytest.raises(CheckFailed, match=said):
        export_bundle(
            Models(no_unet(IMAGE), opened(onnx_file(tmp_path / "toy.onnx", middle, batch=1))), tmp_path, PIXELS
        )


def test_export_of_an_onnx_file_speaks_of_the_file(tmp_path: Path) -> None:
    said: list[str] = []
    path = onnx_file(tmp_path / "toy.onnx", [helper.make_node("Relu", ["r"], ["m"])])
    done = export_bundle(Models(no_unet(IMAGE), opened(path)), tmp_path / "out", PIXELS, say=said.append)
    assert done.against == "toy.onnx"
    assert "comparing numbers with toy.onnx" in said
    assert not any("PyTorch" in line for line in said)


class Overflowing(nn.Module):
    """Finite in float32 and beyond 65504 within `wide`, which a division brings back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.head = nn.Linear(192, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.wide(x.flatten(1) * 1e6) / 1e6)
        return found


def test_overflow_of_a_small_type_names_the_module_and_the_option(tmp_path: Path) -> None:
    classifier = ClassifierModel(Overflowing(), IMAGE, tuple("abcde"), "0" * 64)
    with pytest.raises(
        CheckFailed,
        match=r"overflows in fp16, which ends at 65,504, first in module wide .*`keep` 'wide'.*or export bf16",
    ):
        export_bundle(Models(no_unet(IMAGE), classifier), tmp_path / "out", PIXELS, kind="fp16")


def test_network_that_gives_zeros_is_exported(tmp_path: Path) -> None:
    """As one does whose last layer begins with zeros."""
    network = Net(nn.Identity())
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    done = export_bundle(
        Models(no_unet(IMAGE), ClassifierModel(network, IMAGE, tuple("abcde"), "0" * 64)), tmp_path / "out", PIXELS
    )
    assert done.worst_logits.relative_l2 == 0


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(
    ("opset", "operator", "scales"), [(9, "Upsample", "grow"), (10, "Resize", "grow"), (10, "Resize", "shrink")]
)
def test_resize_means_the_same_in_a_later_opset(
    tmp_path: Path, opset: int, operator: str, mode: str, scales: str
) -> None:
    """What the file gives, run as it is, against the merged graph; onnx's own conversion is off by half a pixel."""
    path = onnx_file(tmp_path / "toy.onnx", [helper.make_node(operator, ["r", scales], ["m"], mode=mode)], opset)
    model = onnx.load(path)
    corner = [
        helper.make_node("Slice", ["m", "start", "end"], ["k"]) if opset > 9 else None,
        helper.make_node("Slice", ["m"], ["k"], starts=[0, 0, 0, 0], ends=[9999, 4, 2, 2]) if opset <= 9 else None,
    ]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(v, np.int64), n)
        for n, v in (("start", [0, 0, 0, 0]), ("end", [9999, 4, 2, 2]))
    )
    model.graph.node[-2].input[0] = "k"  # the mean of a part, which moves with the pixels
    model.graph.node.insert(len(model.graph.node) - 2, next(node for node in corner if node is not None))
    onnx.save(model, path)
    done = export_bundle(Models(no_unet(IMAGE), opened(path)), tmp_path / "out", PIXELS)
    assert done.worst_logits.relative_l2 < 1e-5


def test_conversion_that_changes_numbers_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnx's own does to a Resize, left alone here."""
    monkeypatch.setattr(onnx_classifiers, "_declare_resizes", lambda model: None)
    middle = [
        helper.make_node("Resize", ["r", "grow"], ["b"], name="bigger", mode="linear"),
        helper.make_node("Tanh", ["b"], ["t"]),
        helper.make_node("Mul", ["t", "t"], ["m"]),
    ]
    said = r"changes what .*toy\.onnx computes when it brings it from opset 10 to 20 .*node bigger \(Resize\)"
    with pytest.raises(CheckFailed, match=said):
        export_bundle(
            Models(no_unet(IMAGE), opened(onnx_file(tmp_path / "toy.onnx", middle, 10))), tmp_path / "out", PIXELS
        )
