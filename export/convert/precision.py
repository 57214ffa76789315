"""Precision lives in the graph: the network in a smaller type before it is exported, or its graph changed after.

fp16, bf16: convolutions and matrix products in that type; norms, softmax and the time embedding stay float32. `casting`
does it to a PyTorch network, `lowering` to a graph. int8, fp8: `quantize_int8` and `to_fp8` put QuantizeLinear and
DequantizeLinear around the inputs of every Conv, MatMul and Gemm of the float32 graph. The boundary and the update of
the step graph are float32 in all of them. Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from densepure_rt.errors import CheckFailed
from densepure_rt.export.models.onnx_graph import PRODUCT_OPS, checked, nodes_within, products, scopes
from densepure_rt.export.models.pair import Trained
from densepure_rt.optional import optional
from densepure_rt.runtime.device import CLASSIFY_INPUTS, STEP_INPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.noise import first_state, image_key, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.onnx_device import open_session, run_session
from densepure_rt.runtime.reverse import RunStep, walk_graph
from densepure_rt.runtime.schedule import Chain

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20, "int8-cpu": 20, "fp8": 22}  # 20: TensorRT 10.3 (JetPack 6)
CAST = ("fp16", "bf16")
QUANTIZED = ("int8", "int8-cpu", "fp8")
CPU_ONLY = ("int8-cpu",)
# Of 2000 labels at sigma 0.5, one step, of an earlier default model: 33 changed with it and with percentile, 221 with
# entropy, which is not offered.
METHOD = "minmax"
COMPUTE_TYPES = {
    "fp32": "FLOAT",
    "fp16": "FLOAT16",
    "bf16": "BFLOAT16",
    "int8": "INT8",
    "int8-cpu": "UINT8 x INT8",
    "fp8": "FLOAT8E4M3FN",
}  # what a product's operands are, by ONNX's names

SIGMAS, STEPS = (0.25, 0.5, 1.0), (1, 2, 10)  # the noise levels of the paper; one-shot, the default and the paper's b
CALIBRATION_SECRET = b"densepure-rt calibration"  # public: nothing is certified with it
INT8_MAX, FP8_MAX = 127, 448  # the largest of S8 in symmetric use; of FLOAT8E4M3FN (ONNX, "Float stored in 8 bits")

TIME_EMBEDDING = ("*time_proj", "*time_embed*", "*time_mlp", "*map_noise")  # diffusers, guided-diffusion, others, EDM
PREPROCESSING = "preprocess"  # the module of a classifier that prepares its pixels


@dataclass(frozen=True)
class Feeds:
    """The inputs of the two graphs along real chains, one dictionary per batch."""

    step: list[dict[str, Floats]]
    classify: list[dict[str, Floats]]


def calibration_feeds(step: bytes, model: Trained, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Feeds:
    """Real (x_t, t) pairs: whole chains of the float32 step graph, from images that no certificate is about.

    pixels: uint8 [n, C, H, W]. The images are dealt out to the chains of every noise level and number of steps, each
    walked to its end; the classifier is fed where they end. Noise is keyed for the purpose "calibrate".
    """
    session = open_session(step, "the float32 step graph", STEP_INPUTS, STEP_OUTPUTS)
    chains = [model.chain(sigma, steps) for sigma in SIGMAS for steps in STEPS]
    feeds = Feeds([], [])
    for place, chain in enumerate(chains):
        if len(images := pixels[place :: len(chains)]):
            fed, given = zip(*_walk(partial(run_session, session, STEP_OUTPUTS), chain, images), strict=True)
            feeds.step.extend(fed)
            feeds.classify.append({CLASSIFY_INPUTS[0]: given[-1][0]})
    return feeds


def _walk(
    run: RunStep, chain: Chain, images: np.ndarray[Any, np.dtype[np.uint8]]
) -> Iterator[tuple[dict[str, Floats], Sequence[Floats]]]:
    """Take one sample of each image down the chain by the step graph, under the noise of its own key."""
    law = smoothing_law(chain.sigma)
    keys = [image_key(CALIBRATION_SECRET, "calibrate", chain.sigma, image) for image in images]
    levels = [image + smoothing_noise(law, key, 0, image.shape) for image, key in zip(images, keys, strict=True)]

    def draw(step: int) -> Floats:
        return np.stack([vote_noise(key, 0, 0, step, images.shape[1:]) for key in keys])

    return walk_graph(run, chain, first_state(np.stack(levels), chain.scale), draw)


class _Reader:
    """A reader of one batch, as onnxruntime's calibrators ask for it."""

    def __init__(self, feed: Mapping[str, Floats]) -> None:
        self.feeds = [feed]

    def get_next(self) -> Mapping[str, Floats] | None:
        return self.feeds.pop() if self.feeds else None


def quantize_int8(
    content: bytes,
    feeds: Sequence[Mapping[str, Floats]],
    exclude: Sequence[str] = (),
    cpu: bool = False,
    method: str = METHOD,
) -> bytes:
    """`content`, a float32 model, with static QDQ around Conv, MatMul and Gemm, by onnxruntime's own quantizer.

    feeds: what ranges are measured on, a batch each. exclude: names of nodes to leave alone. Weights are S8, one scale
    an output channel; biases stay float32. Activations are S8 with zero point 0 in front of each product, as TensorRT
    asks; or, with `cpu`, U8 with a zero point, behind it too, which is what onnxruntime's CPU kernels are fused from.
    method: of finding ranges, "minmax" or "percentile" (99.999).
    """
    with optional("a quantized precision", "ml_dtypes", 'run "pip install ml_dtypes"'):  # with onnx before 1.19
        from onnxruntime.quantization import CalibrationMethod, QuantType, create_calibrator
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

    methods = {
        "minmax": (CalibrationMethod.MinMax, {}),
        "percentile": (CalibrationMethod.Percentile, {"num_bins": 2048, "percentile": 99.999, "symmetric": not cpu}),
    }
    chosen, options = methods[method]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # the calibrators print
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        augmented = str(Path(folder) / "augmented.onnx")
        calibrator = create_calibrator(
            path, list(PRODUCT_OPS), augmented, calibrate_method=chosen, extra_options=options
        )
        for feed in feeds:  # one at a time: they keep what they are given
            calibrator.collect_data(_Reader(feed))
        ranges = calibrator.compute_data()
    quantizer = QDQQuantizer(
        save_and_reload_model_with_shape_infer(onnx.load_model_from_string(content)),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if cpu else QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=list(exclude),
        op_types_to_quantize=list(PRODUCT_OPS),
        extra_options={
            "ActivationSymmetric": not cpu,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": [] if cpu else list(PRODUCT_OPS),
        },
    )
    quantizer.quantize_model()
    _keep_the_rest_float32(quantizer.model.model, cpu)
    quantizer.model.topological_sort()
    del quantizer.model.model.metadata_props[:]
    return checked(quantizer.model.model)


def _keep_the_rest_float32(model: onnx.ModelProto, cpu: bool) -> None:
    """Take the quantized values back from all that is no product: onnxruntime gives them to every reader of a tensor.

    The update would read a quantized state else, and residual sums a quantized term. With `cpu` what a product gives
    stays quantized within the network, but neither for the update nor as an output of the graph.
    """
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    producer = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    idle: list[onnx.NodeProto] = []
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        (dequantize,) = readers[quantize.output[0]]
        exact, rounded = quantize.input[0], dequantize.output[0]
        left = 0
        for reader in readers.get(rounded, []):
            given = exact in producer and producer[exact].op_type in PRODUCT_OPS
            if reader.op_type in PRODUCT_OPS or (cpu and given and scopes(reader)):
                left += 1
            else:
                _rename(reader.input, rounded, exact)
        if rounded in outputs:  # the exact value takes the output's name
            for node in (producer[exact], *readers[exact], *readers.get(rounded, [])):
                _rename(node.output, exact, rounded)
                _rename(node.input, exact, rounded)
            dequantize.output[0] = f"{rounded}_DequantizeLinear_Output"
        if rounded in outputs or not left:
            idle += [quantize, dequantize]
    for node in idle:
        graph.node.remove(node)


def _rename(names: Any, old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new


def to_fp8(content: bytes, feeds: Sequence[Mapping[str, Floats]], exclude: Sequence[str] = ()) -> bytes:
    """`content`, a float32 model of opset 19 or later, with static QDQ in FLOAT8E4M3FN around Conv, MatMul and Gemm.

    It is the S8 graph with its scales stretched from 127 to 448 and its weights rounded anew from the float32 ones.
    """
    model = onnx.load_model_from_string(quantize_int8(content, feeds, exclude, method="minmax"))
    floats = {tensor.name: tensor for tensor in onnx.load_model_from_string(content).graph.initializer}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scales: dict[str, Floats] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, scale, zero = node.input
        if scale not in scales:
            scales[scale] = onnx.numpy_helper.to_array(tensors[scale]) * np.float32(INT8_MAX / FP8_MAX)
            tensors[scale].CopyFrom(onnx.numpy_helper.from_array(scales[scale], scale))
            _to_float8(tensors[zero], np.zeros(tensors[zero].dims, np.float32))
        if value in tensors and tensors[value].data_type == onnx.TensorProto.INT8:
            weight = onnx.numpy_helper.to_array(floats[value.removesuffix("_quantized")])
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            shape = np.where(np.arange(weight.ndim) == axis % weight.ndim, scales[scale].size, 1)
            _to_float8(tensors[value], np.divide(weight, scales[scale].reshape(shape), dtype=np.float32))
    del model.graph.value_info[:]
    return checked(model)


def _to_float8(tensor: onnx.TensorProto, values: Floats) -> None:
    import ml_dtypes  # older versions of onnx do without it

    rounded = values.clip(-FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    kind = onnx.TensorProto.FLOAT8E4M3FN
    tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, values.shape, rounded.tobytes(), raw=True))


def check_types(content: bytes, precision: str, exempt: Iterable[str] = ()) -> None:
    """Raise CheckFailed unless every product with weights, outside the `exempt` modules, computes in `precision`."""
    allowed = set(nodes_within(content, exempt))
    for product in products(content):
        if product.weighted and product.kind != COMPUTE_TYPES[precision] and product.node.name not in allowed:
            raise CheckFailed(
                f"{precision} was asked, but {product.node.op_type} {product.node.name} "
                f"({(scopes(product.node) or ['no module'])[-1]}) computes in {product.kind}: nothing was published"
            )
