"""A lowered graph is walked node by node: which type each tensor has, by onnx's own inference of types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.convert import casting, parity, precision
from densepure_rt.export.convert.build_options import BuildOptions
from densepure_rt.export.convert.lowering import TYPES, computed_in_float32, lowered
from densepure_rt.export.convert.precision import TIME_EMBEDDING
from densepure_rt.export.convert.to_onnx import lowered as lowered_in_pytorch
from densepure_rt.export.convert.to_onnx import step_onnx
from densepure_rt.export.convert.to_tensorrt import build
from densepure_rt.export.models.onnx_graph import SCOPES, checked, products, scopes, types_of
from densepure_rt.export.models.openai_unet import Architecture, Heads, OpenAIUNet
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.bundle import shipped_engine
from densepure_rt.runtime.device import STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.onnx_device import open_session
from densepure_rt.runtime.schedule import Schedule
from tests.support.precision_toys import classifier, diffusion

FLOAT = TensorProto.FLOAT
# CIFAR-10's of Nichol & Dhariwal in small: attention, scale and shift, a learned variance.
CIFAR = Architecture(3, 32, (32, 64), 1, (False, True), "conv", True, True)
NORMS = {"InstanceNormalization", "LayerNormalization", "Softmax"}
KINDS = pytest.mark.parametrize("kind", ["fp16", "bf16"])


def openai() -> DiffusionModel:
    torch.manual_seed(0)
    network = OpenAIUNet(CIFAR, Heads(number=2)).eval()
    for parameter in network.parameters():  # many begin as zeros, which would hide what stands before them
        torch.nn.init.normal_(parameter, std=0.08)
    return DiffusionModel(network, (3, 32, 32), Schedule("cosine", 4000), "learned_range", "epsilon", (-1, 1), "0" * 64)


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    """Three float32 step graphs: the one that ships, OpenAI's layout, and one that casts its own embedding."""
    contents = shipped_engine().read_bytes(), step_onnx(openai()), step_onnx(diffusion())
    return dict(zip(("shipped", "openai", "toy"), map(onnx.load_model_from_string, contents), strict=True))


GRAPHS = pytest.mark.parametrize("name", ["shipped", "openai", "toy"])


def types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def outside(node: NodeProto) -> bool:
    recorded = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
    return recorded is not None and "network" not in ast.literal_eval(recorded)


def computed(model: onnx.ModelProto) -> Iterator[tuple[NodeProto, set[int]]]:
    """Every node that is no cast, and the float types of what it takes and gives."""
    known = types(model)
    floating = {FLOAT, *TYPES.values()}
    for node in model.graph.node:
        if node.op_type not in ("Cast", "Shape"):
            yield node, {known[name] for name in (*node.input, *node.output) if name} & floating


# Islands


@KINDS
@GRAPHS
def test_products_are_in_the_smaller_type_and_islands_in_float32(
    graphs: dict[str, onnx.ModelProto], name: str, kind: str
) -> None:
    model = lowered(graphs[name], kind)
    checked(model)
    seen = dict.fromkeys(("norm", "time", "outside", "product"), 0)
    for node, found in computed(model):
        in_time = any(fnmatchcase(module, pattern) for module in scopes(node) for pattern in TIME_EMBEDDING)
        if node.op_type in NORMS or in_time or outside(node):
            assert found <= {FLOAT}, node.name
            seen["norm" if node.op_type in NORMS else "time" if in_time else "outside"] += bool(found)
        elif node.op_type in ("Conv", "MatMul", "Gemm"):
            assert found == {TYPES[kind]}, node.name
            seen["product"] += 1
        elif node.op_type != "Resize":  # whose scales are float32 in any case
            assert len(found) <= 1, node.name
    assert min(seen.values()) > 0


@KINDS
@GRAPHS
def test_a_norm_is_float32_up_to_its_scale_and_shift_and_given_back(
    graphs: dict[str, onnx.ModelProto], name: str, kind: str
) -> None:
    """What follows a group norm, and is no part of it, is as cheap as what came before."""
    model = lowered(graphs[name], kind)
    within = [(node, found) for node, found in computed(model) if any("norm" in module for module in scopes(node))]
    assert {node.op_type for node, _ in within} >= {"InstanceNormalization", "Mul", "Add", "Reshape"}
    assert all(found <= {FLOAT} for node, found in within if node.op_type in ("InstanceNormalization", "Mul", "Add"))
    silu = [
        found for node, found in computed(model) if node.op_type == "Sigmoid" and "time" not in "".join(scopes(node))
    ]
    assert silu.count({TYPES[kind]}) > len(silu) / 2


@KINDS
@GRAPHS
def test_inputs_and_outputs_stay_float32(graphs: dict[str, onnx.ModelProto], name: str, kind: str) -> None:
    model = lowered(graphs[name], kind)
    assert [value.name for value in model.graph.input] == list(STEP_INPUTS)
    assert [value.name for value in model.graph.output] == list(STEP_OUTPUTS)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == FLOAT


@KINDS
def test_the_islands_are_those_of_the_cast_in_pytorch(graphs: dict[str, onnx.ModelProto], kind: str) -> None:
    smaller, _ = lowered_in_pytorch(Models(diffusion(), classifier()), kind, ())
    theirs = step_onnx(smaller, precision.OPSETS[kind])
    assert types_of(checked(lowered(graphs["toy"], kind))) == types_of(theirs)


def test_a_module_that_is_kept_is_float32_in_all_its_products(graphs: dict[str, onnx.ModelProto]) -> None:
    kept = {
        product.kind
        for product in products(checked(lowered(graphs["toy"], "fp16", ["block.conv"])))
        if "block.conv" in scopes(product.node)
    }
    assert kept == {"FLOAT"}


def test_a_weight_has_its_name_in_whatever_type(graphs: dict[str, onnx.ModelProto]) -> None:
    before = {tensor.name: tensor for tensor in graphs["shipped"].graph.initializer}
    after = {tensor.name: tensor for tensor in lowered(graphs["shipped"], "fp16").graph.initializer}
    weights = [name for name in before if name.endswith(".weight")]
    assert weights
    for name in weights:
        values, rounded = (numpy_helper.to_array(tensors[name]) for tensors in (before, after))
        assert np.array_equal(rounded, values.astype(rounded.dtype))
    assert sum(tensor.ByteSize() for tensor in after.values()) < 0.55 * sum(t.ByteSize() for t in before.values())


def test_the_graph_that_was_given_is_left_as_it_was(graphs: dict[str, onnx.ModelProto]) -> None:
    before = graphs["toy"].SerializeToString(deterministic=True)
    assert checked(lowered(graphs["toy"], "fp16")) == checked(lowered(graphs["toy"], "fp16"))
    assert graphs["toy"].SerializeToString(deterministic=True) == before


# Numbers


def states(image: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(2, *image)).astype(np.float32)


@GRAPHS
def test_an_fp16_graph_is_opened_by_onnx_runtime_and_near_the_float32_one(
    graphs: dict[str, onnx.ModelProto], name: str
) -> None:
    image = {"shipped": (1, 28, 28), "openai": (3, 32, 32), "toy": (1, 8, 8)}[name]
    x, t = states(image), np.float32(300)
    expected, found = (
        parity.eps_of(parity.runner(checked(model), name, STEP_INPUTS, STEP_OUTPUTS, "fp16"), x, t)
        for model in (graphs[name], lowered(graphs[name], "fp16"))
    )
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert 0 < distance < parity.RELATIVE_L2["fp16"]


def test_a_bf16_graph_computed_in_float32_is_the_one_by_the_standard(graphs: dict[str, onnx.ModelProto]) -> None:
    """What evaluates labels in bf16 rounds where onnx.reference does, but for sums, which that rounds on the way."""
    small, x, t = lowered(graphs["toy"], "bf16"), states((1, 8, 8)), np.float32(300)
    kinds = {"fp32": graphs["toy"], "bf16": small, "rounded": computed_in_float32(small)}
    exact, by_the_standard, found = (
        parity.eps_of(parity.runner(checked(model), "toy", STEP_INPUTS, STEP_OUTPUTS, kind), x, t)
        for kind, model in kinds.items()
    )
    loss = np.linalg.norm(by_the_standard - exact)
    assert np.linalg.norm(found - by_the_standard) < loss
    assert 0.5 * loss < np.linalg.norm(found - exact) < 1.1 * loss


# Graphs of other origin


def graph_of(*nodes: NodeProto, opset: int = 20, **weights: object) -> onnx.ModelProto:
    """A graph from x [2, 3, 4] to y."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 3, 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", "rows", "columns"])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def run(model: onnx.ModelProto) -> NDArray[np.float32]:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    session = open_session(checked(model), "small", ["x"], ["y"])
    found: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
    return found


SQUARE = np.eye(4) + 0.1


def test_a_constant_that_both_types_read_is_there_in_both() -> None:
    """Where onnxconverter-common 1.16 leaves a product of half and float."""
    model = graph_of(
        helper.make_node("Add", ["x", "one"], ["before"], "float32"),
        helper.make_node("MatMul", ["before", "square"], ["product"], "product"),
        helper.make_node("Mul", ["product", "one"], ["y"], "smaller"),
        one=1.0,
        square=SQUARE,
    )
    small = lowered(model, "fp16")
    assert {tensor.name: tensor.data_type for tensor in small.graph.initializer} == {
        "one": FLOAT,
        "one.fp16": TensorProto.FLOAT16,
        "square": TensorProto.FLOAT16,
    }
    assert run(small) == pytest.approx(run(model), rel=2e-3, abs=2e-3)


def test_a_constant_beyond_the_smaller_type_is_not_rounded_to_infinity() -> None:
    model = graph_of(
        helper.make_node("MatMul", ["x", "square"], ["product"]),
        helper.make_node("Mul", ["product", "large"], ["larger"]),
        helper.make_node("Div", ["larger", "large"], ["y"]),
        large=1e6,
        square=SQUARE,
    )
    assert run(lowered(model, "fp16")) == pytest.approx(run(model), rel=2e-3, abs=2e-3)


def test_a_norm_that_is_written_out_is_float32() -> None:
    """Squares of 300 are beyond a half, as in a norm of an older exporter."""
    model = graph_of(
        helper.make_node("MatMul", ["x", "square"], ["h"]),
        helper.make_node("Pow", ["h", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], keepdims=1),
        helper.make_node("Sqrt", ["mean"], ["root"]),
        helper.make_node("Div", ["h", "root"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "square"], ["y"]),
        two=2.0,
        square=SQUARE * 300,
    )
    assert run(lowered(model, "fp16")) == pytest.approx(run(model), rel=5e-3, abs=0.5)


def test_a_resize_keeps_its_scales_in_float32() -> None:
    """They are of one type alone, by the schema of the operator."""
    model = graph_of(
        helper.make_node("MatMul", ["x", "square"], ["h"]),
        helper.make_node("Resize", ["h", "", "scales"], ["y"], mode="nearest"),
        scales=[1.0, 1.0, 2.0],
        square=SQUARE,
    )
    assert run(lowered(model, "fp16")) == pytest.approx(run(model), rel=2e-3, abs=2e-3)


def test_constants_among_the_nodes_are_weights_too() -> None:
    value = numpy_helper.from_array(np.asarray(SQUARE, np.float32), "value")
    model = graph_of(
        helper.make_node("Constant", [], ["square"], value=value), helper.make_node("MatMul", ["x", "square"], ["y"])
    )
    small = lowered(model, "fp16")
    assert [node.op_type for node in small.graph.node] == ["Cast", "MatMul", "Cast"]
    assert run(small) == pytest.approx(run(model), rel=2e-3, abs=2e-3)


def test_a_weight_beyond_the_smaller_type_is_named() -> None:
    model = graph_of(helper.make_node("MatMul", ["x", "wide"], ["y"], "node_wide"), wide=SQUARE * 1e6)
    with pytest.raises(CheckFailed, match=r"weight wide of node node_wide .* beyond what fp16 holds: keep"):
        lowered(model, "fp16")
    checked(lowered(model, "bf16"))  # which reaches as far as float32


def test_a_graph_within_the_graph_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", FLOAT, None)]
    )
    model = graph_of(
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], "node_if", then_branch=branch, else_branch=branch),
        zero=0.0,
    )
    with pytest.raises(UsageError, match=r"node node_if \(If\) holds a graph of its own"):
        lowered(model, "fp16")


def test_an_operator_of_another_domain_is_refused() -> None:
    model = graph_of(
        helper.make_node("FusedMatMul", ["x", "square"], ["y"], "fused", domain="com.microsoft"), square=SQUARE
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(CheckFailed, match=r"fused \(FusedMatMul\) is no operator of ONNX"):
        lowered(model, "fp16")


def test_an_operator_that_changes_with_the_opset_is_refused() -> None:
    """The group norm of opset 18 has a scale for each group, that of opset 21 one for each channel."""
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], "node_norm", num_groups=1)
    model = graph_of(node, scale=[1.0], bias=[0.0])
    with pytest.raises(UsageError, match=r"node_norm \(GroupNormalization\) is another operator in opset 22"):
        lowered(model, "bf16")


def test_the_types_of_the_two_ways_have_one_name() -> None:
    assert set(TYPES) == set(casting.DTYPES) == set(precision.CAST)


def test_a_unet_in_openai_s_layout_is_built_by_tensorrt_rtx(graphs: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    content = checked(lowered(graphs["openai"], "fp16"))
    plan, types = build(
        trt, "tensorrt-rtx", content, tmp_path / "unet.fp16.onnx", "fp16", BuildOptions(batches=(4,)), ("8.9",)
    )
    assert plan[:4] == b"vtrt"
    assert types["HALF"] > 0.8 * sum(types.values())
