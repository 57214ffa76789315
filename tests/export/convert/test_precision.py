from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.convert import casting, parity, precision
from densepure_rt.export.convert.casting import cast
from densepure_rt.export.convert.parity import Exported
from densepure_rt.export.convert.precision import Feeds, check_types, quantize_int8, to_fp8
from densepure_rt.export.convert.to_onnx import classifier_onnx, export_bundle, step_onnx
from densepure_rt.export.models.check_images import Images
from densepure_rt.export.models.onnx_graph import PRODUCT_OPS, nodes_within, refuse_for_tensorrt, types_of
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.bundle import open_bundle
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.noise import image_key, smoothing_law, smoothing_noise
from densepure_rt.runtime.onnx_device import OnnxDevice
from densepure_rt.runtime.reverse import decide
from densepure_rt.runtime.schedule import Schedule, make_chain
from densepure_rt.smoothing.voting import Ballot
from tests.support.precision_toys import IMAGE, ToyClassifier, ToyUnet, classifier, diffusion

TINY = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # a few units in the last place, relative


def taken(network: nn.Module, name: str, *args: Tensor) -> Tensor:
    """What a module takes while the network runs."""
    found: list[Tensor] = []
    network.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        network(*args)
    return found[0]


def inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(n, *IMAGE, generator=draw), torch.tensor([396.0, 144.0, 7.0, 0.0][:n])


def relative(found: Tensor | NDArray[np.float32], expected: Tensor | NDArray[np.float32]) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@dataclass(frozen=True)
class Toy:
    step: bytes
    classify: bytes
    feeds: Feeds
    pixels: NDArray[np.uint8]


@pytest.fixture(scope="module")
def toy() -> Toy:
    pixels = np.random.default_rng(0).integers(0, 256, (18, *IMAGE), dtype=np.uint8)
    step = step_onnx(diffusion())
    return Toy(step, classifier_onnx(classifier()), precision.calibration_feeds(step, diffusion(), pixels), pixels)


@pytest.fixture(scope="module")
def int8(toy: Toy) -> bytes:
    return quantize_int8(toy.step, toy.feeds.step)


@pytest.fixture(scope="module")
def int8_cpu(toy: Toy) -> bytes:
    return quantize_int8(toy.step, toy.feeds.step, cpu=True)


@pytest.fixture(scope="module")
def fp8(toy: Toy) -> bytes:
    return to_fp8(toy.step, toy.feeds.step)


def test_calibration_walks_the_chains_of_the_model_s_own_timestep_rule(toy: Toy) -> None:
    model = dataclasses.replace(diffusion(), timestep_rule="carlini")
    feeds = precision.calibration_feeds(toy.step, model, toy.pixels[:9])
    chains = [
        make_chain(model.schedule, model.variance, sigma, steps, "carlini")
        for sigma in precision.SIGMAS
        for steps in precision.STEPS
    ]
    assert np.concatenate([feed["t"] for feed in feeds.step]).tolist() == [t for chain in chains for t in chain.t]
    coefficients = np.concatenate([feed["coef"] for feed in feeds.step])
    assert np.array_equal(coefficients, np.concatenate([chain.coef for chain in chains]))
    other = np.concatenate(
        [feed["coef"] for feed in precision.calibration_feeds(toy.step, diffusion(), toy.pixels[:9]).step]
    )
    assert not np.array_equal(coefficients, other)


# A smaller type


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lowered_network_is_the_float32_one_up_to_rounding(dtype: torch.dtype) -> None:
    network = ToyUnet().eval()
    with torch.no_grad():
        found, expected = cast(network, dtype)(*inputs()), network(*inputs())
    assert found.dtype == torch.float32
    assert 0 < relative(found, expected) < TINY[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_that_was_given_is_left_as_it_was(dtype: torch.dtype) -> None:
    network = ToyUnet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cast(network, dtype)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_products_have_weights_of_the_smaller_type_and_norms_and_time_embedding_do_not() -> None:
    weights = {name: value.dtype for name, value in cast(ToyUnet(), torch.float16).named_parameters()}
    float32 = {name for name, dtype in weights.items() if dtype == torch.float32}
    assert float32 == {name for name in weights if "norm" in name or "time_embedding" in name}
    assert len(weights) > len(float32) > 0


def test_the_time_embedding_is_never_rounded_although_the_network_asks_for_it() -> None:
    """bfloat16 holds sin and cos to one part in 256; the network's own cast to its weights' type must do nothing."""
    found = taken(cast(ToyUnet(), torch.bfloat16), "network.time_embedding.0", *inputs())
    assert found.dtype == torch.float32
    assert torch.equal(found, taken(ToyUnet(), "time_embedding.0", *inputs()))


@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        (nn.GroupNorm(2, 4), 300.0),
        (nn.LayerNorm([4, 6, 6]), 300.0),
        (nn.RMSNorm([4, 6, 6]), 300.0),
        (nn.BatchNorm2d(4), 300.0),
        (nn.InstanceNorm2d(4, affine=True), 300.0),
        (nn.Softmax(1), 3.0),
        (nn.LogSoftmax(1), 3.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_and_softmax_are_computed_in_float32(norm: nn.Module, scale: float) -> None:
    """At 300 the squares are beyond what a half can hold."""
    first = nn.Conv2d(1, 4, 1)
    nn.init.constant_(first.weight, scale)
    network = nn.Sequential(first, norm, nn.Conv2d(4, 1, 1)).eval()
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = network(x), cast(network, torch.float16)(x)
    assert relative(found, expected) < 1e-2


class Attention(nn.Module):
    def __init__(self, options: dict[str, object]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.options = nn.Linear(8, 24), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, **self.options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7},
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 5).tril().bool()},
        {"attn_mask": torch.eye(5)},
    ],
    ids=["plain", "scale", "causal", "mask", "bias"],
)
def test_functional_attention_is_kept_in_every_form(options: dict[str, object]) -> None:
    network, x = Attention(options).eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(cast(network, torch.float16)(x), network(x)) < 2e-3


def test_attention_with_scores_beyond_a_half_has_a_float32_softmax() -> None:
    """exp(12) is beyond what a half can hold; a softmax without care would overflow."""
    network = Attention({"scale": 4.0}).eval()
    x = 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(cast(network, torch.float16)(x), network(x)) < 2e-2


def test_a_kept_module_and_all_below_it_stays_float32() -> None:
    network = cast(ToyUnet(), torch.float16, ["block", "conv_*"])
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    x, t = inputs()
    with torch.no_grad():
        assert relative(network(x, t), ToyUnet()(x, t)) < 1e-6


def test_a_kept_module_in_the_middle_takes_float32() -> None:
    network = cast(ToyUnet(), torch.float16, ["block.qkv"])
    assert taken(network, "network.block.qkv", *inputs()).dtype == torch.float32
    assert taken(network, "network.block.temb", *inputs()).dtype == torch.float32  # of the float32 time embedding


def test_a_pattern_that_matches_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match="`keep` nothing.* matches no module: .*conv_in") as caught:
        cast(ToyUnet(), torch.float16, ["conv_in", "nothing*"])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("kind", "name"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_the_exported_graph_computes_in_the_type_that_was_asked(kind: str, name: str) -> None:
    """The standard's own evaluator on the file, against the lowered module in PyTorch, and against float32."""
    model = diffusion()
    network = cast(model.network, casting.DTYPES[kind])
    opset = precision.OPSETS[kind]
    content = step_onnx(
        DiffusionModel(network, IMAGE, model.schedule, "fixed_small", "epsilon", model.clip, "0" * 64), opset
    )
    loaded = onnx.load_model_from_string(content)
    assert [entry.version for entry in loaded.opset_import] == [opset]
    for value in (*loaded.graph.input, *loaded.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    types = types_of(content)
    assert types["Conv"] == {name: 3}
    assert types["Gemm"] == {name: 1, "FLOAT": 2}  # the time embedding has two layers
    assert set(types["MatMul"]) == {name}
    check_types(content, kind, precision.TIME_EMBEDDING)
    with pytest.raises(CheckFailed, match="time_embedding.*computes in FLOAT"):
        check_types(content, kind)
    softmax = [node.input[0] for node in loaded.graph.node if node.op_type in ("Softmax", "InstanceNormalization")]
    elements = {value.name: value.type.tensor_type.elem_type for value in loaded.graph.value_info}
    assert {elements[source] for source in softmax} == {onnx.TensorProto.FLOAT}

    x, t = inputs(2)
    run = parity.runner(content, kind, STEP_INPUTS, STEP_OUTPUTS, "bf16")  # onnx.reference, for both
    for i in range(2):
        found = parity.eps_of(run, x[i : i + 1].numpy(), np.float32(t[i]))
        with torch.no_grad():
            assert relative(found, network(x[i : i + 1], t[i : i + 1])) < TINY[casting.DTYPES[kind]]
            assert relative(found, model.network(x[i : i + 1], t[i : i + 1])) < 2 * TINY[casting.DTYPES[kind]]


def test_float32_graph_that_is_called_fp16_is_found(toy: Toy) -> None:
    check_types(toy.step, "fp32")
    assert set(types_of(toy.step)["Conv"]) == {"FLOAT"}
    with pytest.raises(CheckFailed, match="fp16 was asked, but .* computes in FLOAT"):
        check_types(toy.step, "fp16", precision.TIME_EMBEDDING)


def test_eps_is_read_through_the_step_graph_without_meeting_the_clip(toy: Toy) -> None:
    model, (x, t) = diffusion(), inputs(3)
    run = parity.runner(toy.step, "toy", STEP_INPUTS, STEP_OUTPUTS, "fp32")
    for i in range(3):
        found = parity.eps_of(run, 4 * x[i : i + 1].numpy(), np.float32(t[i]))
        with torch.no_grad():
            expected = model.network(4 * x[i : i + 1], t[i : i + 1])
        np.testing.assert_allclose(found, expected.numpy(), atol=5e-6)


# Calibration


def test_calibration_walks_every_chain_to_its_end_with_every_image(toy: Toy) -> None:
    feeds = toy.feeds
    assert len(feeds.step) == 3 * (1 + 2 + 10)
    assert len(feeds.classify) == 9
    assert sum(len(feed["mean"]) for feed in feeds.classify) == len(toy.pixels)
    timesteps = {float(feed["t"][0]) for feed in feeds.step}
    assert {144.0, 258.0, 396.0} <= timesteps  # where the three noise levels begin on the linear schedule
    assert len(timesteps) > 25
    for feed in feeds.step:
        assert {name: value.dtype for name, value in feed.items()} == dict.fromkeys(STEP_INPUTS, np.float32)
        assert len({len(value) for value in feed.values()}) == 1


def test_calibration_starts_from_the_images_under_the_noise_of_its_own_purpose(toy: Toy) -> None:
    """The first chain, sigma 0.25 in one step, from the formulas: u + k on the 1/255 grid, scaled by 1 / sqrt(1.25)."""
    feed = toy.feeds.step[0]
    for row, image in zip(feed["mean"], toy.pixels[::9], strict=True):
        key = image_key(precision.CALIBRATION_SECRET, "calibrate", 0.25, image)
        levels = image + smoothing_noise(smoothing_law(0.25), key, 0, IMAGE)
        np.testing.assert_allclose(row, (2 * levels / 255 - 1) / np.sqrt(1.25), atol=1e-6)
    assert not feed["noise"].any()
    assert toy.feeds.step[2]["noise"].std() > 0.5  # the second step of the chain of two


# int8


def test_int8_quantizes_every_product_in_front_and_nothing_else(toy: Toy, int8: bytes) -> None:
    plain, found = types_of(toy.step), types_of(int8)
    assert {op: sum(counts.values()) for op, counts in found.items()} == {
        op: sum(counts.values()) for op, counts in plain.items()
    }
    assert {kind for counts in found.values() for kind in counts} == {"INT8"}
    check_types(int8, "int8")
    graph = onnx.load_model_from_string(int8).graph
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.op_type for node in graph.node if rounded.intersection(node.input)}
    assert readers == set(PRODUCT_OPS)
    onnx.checker.check_model(onnx.load_model_from_string(int8), full_check=True)


def test_int8_weights_are_the_float_ones_rounded_channel_by_channel(toy: Toy, int8: bytes) -> None:
    """Quantized again here in numpy: scale = largest / 127 of each output channel, round half to even."""
    floats = {tensor.name: tensor for tensor in onnx.load_model_from_string(toy.step).graph.initializer}
    graph = onnx.load_model_from_string(int8).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    checked = 0
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        weight = onnx.numpy_helper.to_array(floats[node.input[0].removesuffix("_quantized")])
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
        scale = np.abs(weight).max(axis=others) / 127
        np.testing.assert_allclose(tensors[node.input[1]], scale, rtol=1e-5)
        shape = [-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)]
        exact = weight / scale.reshape(shape)
        assert np.abs(tensors[node.input[0]] - exact).max() <= 0.5 + 1e-3
        assert np.abs(tensors[node.input[0]].astype(int)).max() == 127
        checked += 1
    assert checked >= 6


def test_int8_file_computes_what_the_standard_says_of_it(toy: Toy, int8: bytes) -> None:
    feed = toy.feeds.step[4]
    run = parity.runner(int8, "toy", STEP_INPUTS, STEP_OUTPUTS, "int8")
    expected = ReferenceEvaluator(int8).run(list(STEP_OUTPUTS), dict(feed))
    assert isinstance(expected, list)
    np.testing.assert_allclose(run(feed)[0], expected[0], atol=2e-2)  # a value on a rounding edge falls either way
    assert relative(run(feed)[0], expected[0]) < 5e-3


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_int8_is_near_float32_by_either_method_of_calibration(
    toy: Toy, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = quantize_int8(toy.classify, toy.feeds.classify, method=method)
    run = parity.runner(content, "toy", CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, "int8")
    x = toy.feeds.classify[-1]
    with torch.no_grad():
        expected = ToyClassifier().eval()(torch.from_numpy(x["mean"]))
    assert relative(run(x)[0], expected) < 0.1
    assert capsys.readouterr().out == ""  # the calibrators' chatter would spoil --json


def test_int8_leaves_the_excluded_modules_alone(toy: Toy) -> None:
    names = nodes_within(toy.step, ["time_embedding", "conv_out"])
    assert len(names) == 3
    types = types_of(quantize_int8(toy.step, toy.feeds.step, names))
    assert types["Conv"] == {"FLOAT": 1, "INT8": 2}
    assert types["Gemm"] == {"FLOAT": 2, "INT8": 1}


def test_int8_is_the_same_bytes_again(toy: Toy, int8: bytes) -> None:
    assert quantize_int8(toy.step, toy.feeds.step) == int8


def test_int8_for_the_cpu_has_unsigned_activations_on_both_sides(int8_cpu: bytes) -> None:
    check_types(int8_cpu, "int8-cpu")
    assert types_of(int8_cpu)["Conv"] == {"UINT8 x INT8": 3}
    graph = onnx.load_model_from_string(int8_cpu).graph
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert sum(node.output[0] in quantized for node in graph.node if node.op_type == "Conv") >= 1
    onnx.checker.check_model(onnx.load_model_from_string(int8_cpu), full_check=True)


@pytest.mark.parametrize("which", ["int8", "int8_cpu", "fp8"])
def test_the_update_of_a_quantized_graph_is_float32(request: pytest.FixtureRequest, which: str) -> None:
    """With sigma = 0 the network has no say: mean_next is x itself, to the last bit."""
    content: bytes = request.getfixturevalue(which)
    run = parity.runner(content, "toy", STEP_INPUTS, STEP_OUTPUTS, "fp8" if which == "fp8" else "int8")
    x, t = inputs(3)
    mean = x.numpy() / 8
    feed = {"mean": mean, "std": np.ones_like(mean), "noise": mean / 2, "t": t.numpy()}
    coef = np.tile(np.array([0, 2, 0.5, 0.25, -1, -1], np.float32), (3, 1))
    found = run(feed | {"coef": coef})[0]
    state = mean + mean / 2
    np.testing.assert_array_equal(
        found, np.float32(0.5) * (state / np.float32(2)).clip(-1, 1) + np.float32(0.25) * state
    )


@pytest.mark.parametrize("cpu", [False, True])
def test_logits_of_a_quantized_classifier_are_not_rounded(toy: Toy, cpu: bool) -> None:
    """Eight bits would make ties, and a tie goes to the first class."""
    content = quantize_int8(toy.classify, toy.feeds.classify, cpu=cpu)
    graph = onnx.load_model_from_string(content).graph
    last = next(node for node in graph.node if "logits" in node.output)
    assert last.op_type == "Gemm"
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)


# What TensorRT is given


def test_tensorrt_is_given_float_s8_and_fp8_graphs(toy: Toy, int8: bytes, fp8: bytes) -> None:
    for content in (toy.step, int8, fp8):
        refuse_for_tensorrt(onnx.load_model_from_string(content), "toy.onnx")


def test_tensorrt_is_not_given_unsigned_activations(int8_cpu: bytes) -> None:
    with pytest.raises(CheckFailed, match=r"toy\.onnx: .* has UINT8 values; TensorRT takes S8 .*`precision` int8"):
        refuse_for_tensorrt(onnx.load_model_from_string(int8_cpu), "toy.onnx")


def spoiled(content: bytes, change: str) -> bytes:
    """An int8 graph with one thing that TensorRT refuses."""
    model = onnx.load_model_from_string(content)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and (node.input[0] in tensors) == (change != "zero point")
    )
    if change == "zero point":
        tensors[node.input[2]].CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8), node.input[2]))
    elif change == "per tensor":
        tensors[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(np.array(0.1, np.float32), node.input[1]))
    elif change == "bias":
        tensors[node.input[0]].CopyFrom(onnx.numpy_helper.from_array(np.zeros(8, np.int32), node.input[0]))
    else:
        del node.input[2]
    result: bytes = model.SerializeToString()
    return result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("zero point", "a zero point other than 0"),
        ("per tensor", "one scale for all channels"),
        ("bias", "an int32 bias"),
        ("no zero point", "UINT8 values"),
    ],
)
def test_tensorrt_is_not_given_anything_else(int8: bytes, change: str, words: str) -> None:
    with pytest.raises(CheckFailed, match=words) as caught:
        refuse_for_tensorrt(onnx.load_model_from_string(spoiled(int8, change)), "toy.onnx")
    assert caught.value.exit_code == 1


# fp8


def test_fp8_weights_are_the_float_ones_rounded_to_the_nearest(toy: Toy, fp8: bytes) -> None:
    floats = {tensor.name: tensor for tensor in onnx.load_model_from_string(toy.step).graph.initializer}
    graph = onnx.load_model_from_string(fp8).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    grid = np.sort(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    grid = grid[np.isfinite(grid)]
    checked = 0
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        assert tensors[node.input[0]].data_type == onnx.TensorProto.FLOAT8E4M3FN
        weight = onnx.numpy_helper.to_array(floats[node.input[0].removesuffix("_quantized")])
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis") % weight.ndim
        scale = onnx.numpy_helper.to_array(tensors[node.input[1]])
        found = onnx.numpy_helper.to_array(tensors[node.input[0]]).astype(np.float32)
        exact = np.moveaxis(weight, axis, -1) / scale
        assert np.abs(exact).max() == pytest.approx(448, rel=1e-5)
        nearest = np.abs(exact[..., None] - grid).min(-1)
        np.testing.assert_allclose(np.abs(np.moveaxis(found, axis, -1) - exact), nearest, atol=1e-3)
        checked += 1
    assert checked >= 6
    assert {kind for counts in types_of(fp8).values() for kind in counts} == {"FLOAT8E4M3FN"}
    check_types(fp8, "fp8")


def test_fp8_evaluator_here_agrees_with_the_standard(toy: Toy, fp8: bytes) -> None:
    """onnxruntime's optimiser is off for these: it moves their quantization, and the results become garbage."""
    feed = toy.feeds.step[4]
    run = parity.runner(fp8, "toy", STEP_INPUTS, STEP_OUTPUTS, "fp8")
    expected = ReferenceEvaluator(fp8).run(list(STEP_OUTPUTS), dict(feed))
    assert isinstance(expected, list)
    assert relative(run(feed)[0], expected[0]) < 1e-2
    plain = parity.runner(toy.step, "toy", STEP_INPUTS, STEP_OUTPUTS, "fp32")
    assert 0 < relative(run(feed)[0], plain(feed)[0]) < 0.1


# Labels


def constant(label: int) -> parity.Labeller:
    return lambda mean, chain: np.full(len(mean), label)


@settings(max_examples=25, deadline=None)
@given(flips=st.integers(0, 60), seed=st.integers(0, 99))
def test_label_parity_counts_every_disagreement_and_bounds_it(flips: int, seed: int) -> None:
    """60 labels of which `flips` differ. The bound by its meaning: at it, so few are as unlikely as alpha."""
    from scipy.stats import binom

    places = np.random.default_rng(seed).permutation(60) < flips
    parts = iter(places.reshape(3, 20))
    found = parity.compare_labels(
        (constant(1), lambda mean, chain: 1 + next(parts)),
        "a stand-in",
        Models(diffusion(), classifier()),
        [LabelledImage(i, np.zeros(IMAGE, np.uint8), 1) for i in range(3)],
        samples=20,
    )
    assert (found.disagreements, found.total) == (flips, 60)
    if flips < 60:
        assert binom.cdf(flips, 60, found.upper) == pytest.approx(parity.ALPHA, rel=1e-6)
    else:
        assert found.upper == 1


def test_label_parity_certifies_both_engines_from_the_same_samples() -> None:
    images = [LabelledImage(i, np.full(IMAGE, i, np.uint8), label) for i, label in enumerate([1, 1, 2, 0])]
    models = Models(diffusion(), classifier())
    found = parity.compare_labels((constant(1), constant(2)), "a stand-in", models, images, samples=50)
    assert [row[0] for row in found.accuracy] == [0.5, 0.25]
    assert found.accuracy[0][-1] is None  # 45 samples reach no radius of 0.75 at sigma 0.5


def test_labels_that_certainly_differ_too_often_are_an_error() -> None:
    def found(disagreements: int) -> parity.LabelParity:
        return parity.LabelParity("it", 0.5, 10, 20, disagreements, 0.5, (0.0,), ((1.0,), (1.0,)))

    parity.check_labels(found(15), "int8")  # 7.5 % of 200: not certain
    with pytest.raises(CheckFailed, match="40 of 200 labels differ on equal noise"):
        parity.check_labels(found(40), "int8")


# Bundles


def images(toy: Toy) -> Images:
    labelled = [LabelledImage(i, image, 0) for i, image in enumerate(toy.pixels[:4])]
    return Images(toy.pixels[:3], labelled, 10, toy.pixels)


@pytest.fixture(scope="module")
def bundles(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    out = tmp_path_factory.mktemp("bundles")
    return {
        kind: export_bundle(Models(diffusion(), classifier()), out, images(toy), kind=kind)
        for kind in ("fp16", "bf16", "int8", "fp8")
    }


KINDS = pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "fp8"])


@KINDS
def test_bundle_carries_its_precision_in_name_and_sidecar(bundles: dict[str, Exported], kind: str) -> None:
    exported = bundles[kind]
    assert (exported.unet.name, exported.classifier.name) == (f"unet.{kind}.onnx", f"classifier.{kind}.onnx")
    bundle = open_bundle(exported.unet)
    assert bundle.classifier_path == exported.classifier
    assert {sidecar.precision for sidecar in (bundle.unet, bundle.classifier)} == {kind}
    for sidecar, path in ((bundle.unet, exported.unet), (bundle.classifier, exported.classifier)):
        (opset,) = (entry.version for entry in onnx.load(path).opset_import)
        assert sidecar.opset == opset == (22 if kind in ("bf16", "fp8") else 20)


@KINDS
def test_bundle_says_what_it_was_compared_by(bundles: dict[str, Exported], kind: str) -> None:
    exported = bundles[kind]
    assert ("onnx.reference" in exported.by) == (kind == "bf16")
    assert exported.comparisons > 10
    assert exported.labels is not None
    assert ("PyTorch" in exported.labels.by) == (kind == "bf16")
    assert (exported.labels.images, exported.labels.samples) == (4, 10)
    assert exported.worst_step.relative_l2 < {"fp16": 3e-3, "bf16": 2e-2}.get(kind, 1.0)


def test_bundle_s_labels_are_those_that_the_device_decides(toy: Toy, bundles: dict[str, Exported]) -> None:
    """The reverse loop itself, on the bundle's own device, under the same keys."""
    done = bundles["int8"]
    chain = make_chain(Schedule("linear", 1000), "fixed_small", 0.5, 1)
    labels = parity.noisy_labels(
        parity.file_labels(done.unet, done.classifier, "int8"), chain, list(toy.pixels[:4]), 10
    )
    device = OnnxDevice(open_bundle(done.unet), batch=4, threads=1)
    keys = [image_key(parity.SECRET, "calibrate", 0.5, image) for image in toy.pixels[:4]]
    opened = [device.open_image(image, key, 0.5, chain.scale) for image, key in zip(toy.pixels, keys, strict=False)]
    work = ((handle, sample) for handle in opened for sample in range(10))
    outcomes = [outcome.label for outcome in decide(device, chain, work, lambda: Ballot(1))]
    device.close()
    assert outcomes == labels.flatten().tolist()


def test_precision_that_is_not_known_is_refused(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`kind` int4 is not known: fp32, fp16"):
        export_bundle(Models(diffusion(), classifier()), tmp_path / "out", toy.pixels, kind="int4")
    with pytest.raises(UsageError, match="`keep` does nothing with `kind` fp32"):
        export_bundle(Models(diffusion(), classifier()), tmp_path / "out", toy.pixels, keep=["conv_in"])
    with pytest.raises(UsageError, match="`keep` nope matches no module"):
        export_bundle(Models(diffusion(), classifier()), tmp_path / "out", toy.pixels, kind="fp16", keep=["nope"])
    with pytest.raises(UsageError, match="`kind` int8 is calibrated on training images"):
        export_bundle(Models(diffusion(), classifier()), tmp_path / "out", toy.pixels, kind="int8")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
