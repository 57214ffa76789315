"""Precision lives in the graph: the network in a smaller type before it is exported, or quantized after.

fp16, bf16: `cast` gives the same module with its convolutions and matrix products in that type; norms, softmax and the
time embedding stay float32. int8, fp8: `quantize` puts QuantizeLinear and DequantizeLinear around the inputs of every
Conv, MatMul and Gemm of the float32 graph. The boundary and the update of the step graph are float32 in all of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.onnx_graph import PRODUCT_OPS, checked, nodes_within, products, scopes
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.device import CLASSIFY_INPUTS, STEP_INPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.noise import first_state, image_key, smoothing_law, smoothing_noise, vote_noise
from densepure_rt.runtime.onnx_device import open_session, run_session
from densepure_rt.runtime.reverse import RunStep, walk_graph
from densepure_rt.runtime.schedule import Chain

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20, "int8-cpu": 20, "fp8": 22}  # 20: TensorRT 10.3 (JetPack 6)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
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

NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
NORM_FUNCTIONS = {
    F.batch_norm,
    F.instance_norm,
    F.group_norm,
    F.layer_norm,
    F.rms_norm,
    F.local_response_norm,
    F.normalize,
}
FLOAT32_FUNCTIONS = NORM_FUNCTIONS | {
    torch.batch_norm,
    torch.instance_norm,
    torch.group_norm,
    torch.layer_norm,
    F.softmax,
    F.log_softmax,
    torch.softmax,
    torch.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
    F.multi_head_attention_forward,
}
PRODUCTS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.mm,
    Tensor.baddbmm,
    torch.cat,
    torch.stack,
}
CONVERSIONS = {Tensor.to, Tensor.type, Tensor.half, Tensor.bfloat16, Tensor.type_as}


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every floating tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {name: _map(item, change) for name, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Policy(TorchFunctionMode):
    """Which type each function computes in, whatever type its arguments come in.

    Products: the smaller type, as soon as one argument has it. Norms and softmax: float32, their result in the type of
    what came in. A network's own conversions to the smaller type do nothing: where precision falls is decided here.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func in FLOAT32_FUNCTIONS:
            came = args[0].dtype
            result = func(*_map(args, Tensor.float), **_map(kwargs, Tensor.float))
            return result if came != self.dtype else _map(result, lambda x: x.to(came))
        if func in PRODUCTS and any(x.dtype == self.dtype for x in _tensors((args, kwargs))):
            return func(*_map(args, self.lowered), **_map(kwargs, self.lowered))
        result = func(*args, **kwargs)
        if func in CONVERSIONS and args[0].is_floating_point() and result.dtype == self.dtype:
            return args[0]
        return result

    def lowered(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Products in the smaller type around a softmax in float32; what is more than plain attention, all float32."""
        if self.dtype not in (query.dtype, key.dtype, value.dtype):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None or is_causal or enable_gqa or dropout_p:
            mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            found = F.scaled_dot_product_attention(
                query.float(),
                key.float(),
                value.float(),
                mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            return self.lowered(found)
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = self.lowered(query * root) @ self.lowered(key * root).transpose(-2, -1)
        return self.lowered(scores.float().softmax(-1)) @ self.lowered(value)


class Lowered(nn.Module):
    """A network whose convolutions and matrix products run in `dtype`; arguments and results are float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, *args: Tensor) -> Tensor:
        with _Policy(self.dtype):
            output: Tensor = self.network(*args)
        return output.float()


def matching(network: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The modules whose name matches one of the shell patterns, in the network's own naming, * crossing dots."""
    patterns = list(patterns)
    return [name for name, _ in network.named_modules() if name and any(fnmatchcase(name, p) for p in patterns)]


def cast(network: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of `network`, in evaluation mode, that computes in `dtype` and takes and gives float32.

    What stays float32: norms, softmax, the modules that TIME_EMBEDDING names, and those that match a pattern of `keep`,
    each with all below it. Their output is float32 too, up to the next convolution or matrix product.

    Raises UsageError when a pattern matches no module.
    """
    for pattern in keep:
        if not matching(network, [pattern]):
            raise UsageError(f"`keep` {pattern} matches no module: the names are like {names_like(network)}")
    network = copy.deepcopy(network).eval()
    roots = matching(network, (*TIME_EMBEDDING, *keep))
    kept = {m for name in roots for m in network.get_submodule(name).modules()}
    kept |= {m for m in network.modules() if isinstance(m, NORMS)}
    for module in network.modules():
        if module not in kept:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
    for name in roots:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: (_map(args, Tensor.float), _map(kwargs, Tensor.float)), with_kwargs=True
        )
    return Lowered(network, dtype).eval()


def names_like(network: nn.Module, count: int = 6) -> str:
    names = [
        name for name, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    return ", ".join(names[:: max(1, len(names) // count)][:count]) or "(none)"


@dataclass(frozen=True)
class Feeds:
    """What the two graphs are fed along real chains, one dictionary a batch."""

    step: list[dict[str, Floats]]
    classify: list[dict[str, Floats]]


def calibration_feeds(step: bytes, model: DiffusionModel, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Feeds:
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
    """One batch, as onnxruntime's calibrators ask for it."""

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
