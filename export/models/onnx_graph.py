"""What an ONNX graph says of itself: the modules behind its nodes, the types of its products, what TensorRT refuses.

Needs onnx and no PyTorch, so that plans can be built where PyTorch is not.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.runtime.bundle import DATA_KEY, FileRef, data_mark, sha256_of

PRODUCT_OPS = ("Conv", "MatMul", "Gemm")
SCOPES = "pkg.torch.onnx.name_scopes"  # the PyTorch exporter's record of the modules around a node
RANDOM_OPS = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
UNSIGNED = {onnx.TensorProto.UINT32: "uint32", onnx.TensorProto.UINT64: "uint64"}


def checked(model: onnx.ModelProto, path: Path | None = None) -> bytes:
    """A model as bytes, the same for the same model. Raises CheckFailed when onnx.checker finds it unsound.

    path: where it is to lie, if its weights are in a file beside it.
    """
    try:
        if path is None:
            onnx.checker.check_model(model, full_check=True)
        else:
            path.write_bytes(model.SerializeToString(deterministic=True))
            onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"onnx.checker refuses the graph that was written: {error}") from error
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def parsed_model(content: bytes, path: Path) -> onnx.ModelProto:
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's errors, whichever protobuf is installed
        raise CheckFailed(f"{path} is not an ONNX model ({error}): export it again") from error


def refuse_other_weights(model: onnx.ModelProto, path: Path) -> None:
    """Raise CheckFailed unless the files that a graph's weights lie in are those whose hash it names."""
    promised = next((entry.value for entry in model.metadata_props if entry.key == DATA_KEY), None)
    for name in {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if tensor.data_location == onnx.TensorProto.EXTERNAL and entry.key == "location"
    }:
        try:
            found = data_mark(FileRef(name, sha256_of(path.parent / name)))
        except OSError as error:
            raise UsageError(
                f"cannot read {name}, the weights of {path.name} ({error.strerror}): copy it along with the graph"
            ) from error
        if found != promised:
            raise CheckFailed(
                f"{path.name} names other weights than {name} beside it: copy both again, or export the bundle again"
            )


def opset_of(content: bytes) -> int:
    return int(onnx.load_model_from_string(content).opset_import[0].version)


def scopes(node: onnx.NodeProto) -> list[str]:
    """The modules that a node comes from, outermost first, named as in the network that was exported."""
    recorded = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        return [name.partition(".")[2] for name in ast.literal_eval(recorded)[:-1] if "." in name]
    except (SyntaxError, TypeError, ValueError):  # not written by the exporter
        return []


def nodes_within(content: bytes, patterns: Iterable[str]) -> list[str]:
    """The names of the products whose module, or one around it, matches one of the shell patterns."""
    patterns = list(patterns)
    return [
        node.name
        for node in onnx.load_model_from_string(content).graph.node
        if node.op_type in PRODUCT_OPS and any(fnmatchcase(name, p) for name in scopes(node) for p in patterns)
    ]


@dataclass(frozen=True)
class Product:
    """A Conv, MatMul or Gemm: the element types of its operands, behind DequantizeLinear those of what is stored."""

    node: onnx.NodeProto
    kind: str
    weighted: bool


def products(content: bytes) -> Iterator[Product]:
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content))
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    stored = {tensor.name for tensor in graph.initializer}
    origin = {node.output[0]: node for node in graph.node if node.op_type in ("DequantizeLinear", "QuantizeLinear")}

    def source(name: str) -> str:
        return origin[name].input[0] if name in origin and origin[name].op_type == "DequantizeLinear" else name

    def kind(name: str) -> str:
        found = source(name)
        if found in origin:  # a QuantizeLinear gives the type of its zero point
            found = origin[found].input[2]
        return str(onnx.TensorProto.DataType.Name(types.get(found, onnx.TensorProto.UNDEFINED)))

    for node in graph.node:
        if node.op_type in PRODUCT_OPS:
            kinds = list(dict.fromkeys(kind(name) for name in node.input[:2]))
            yield Product(node, " x ".join(kinds), any(source(name) in stored for name in node.input[:2]))


def types_of(content: bytes) -> dict[str, dict[str, int]]:
    """Count Conv, MatMul and Gemm by the element type of their operands: {"Conv": {"FLOAT16": 36}, ...}.

    Operands behind DequantizeLinear count as what is stored before it; two different types are "UINT8 x INT8".
    """
    counts: dict[str, Counter[str]] = {}
    for product in products(content):
        counts.setdefault(product.node.op_type, Counter())[product.kind] += 1
    return {op: dict(sorted(found.items())) for op, found in sorted(counts.items())}


def described(node: onnx.NodeProto) -> str:
    """An ONNX node and the PyTorch module that it comes from."""
    modules = scopes(node)
    return f"node {node.name} ({node.op_type})" + (f" of module {modules[-1]}" if modules else "")


def refuse_for_tensorrt(model: onnx.ModelProto, name: str) -> None:
    """Raise CheckFailed for a quantized graph that TensorRT would refuse, or quantize otherwise than it was calibrated.

    It takes S8 (or FLOAT8E4M3FN) with zero point 0, weights with a scale for each channel, and float biases.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, zero = tensors.get(node.input[0]), tensors.get(node.input[2]) if len(node.input) > 2 else None
        wrong = None
        if value is not None and value.data_type == onnx.TensorProto.INT32:
            wrong = "an int32 bias"
        elif zero is None or zero.data_type not in taken:
            wrong = f"{onnx.TensorProto.DataType.Name(zero.data_type) if zero is not None else 'UINT8'} values"
        elif np.asarray(onnx.numpy_helper.to_array(zero), np.float32).any():
            wrong = "a zero point other than 0"
        elif value is not None and len(value.dims) > 1 and not tensors[node.input[1]].dims:
            wrong = "weights with one scale for all channels"
        if wrong:
            raise CheckFailed(
                f"{name}: {node.op_type} {node.name} has {wrong}; TensorRT takes S8 with zero point 0, weights with a "
                f"scale for each channel and float biases: export it with `precision` int8"
            )


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs within it: the bodies of Loop, If and Scan."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def refuse_unbuildable(model: onnx.ModelProto, name: str) -> None:
    """Raise CheckFailed for what TensorRT would refuse in worse words, or would take and do wrongly."""
    for node in nodes_of(model.graph):
        if node.op_type in RANDOM_OPS:
            raise CheckFailed(
                f"{name}: {described(node)} draws random numbers, and TensorRT ignores its seed: noise must be "
                f"an input of the graph; export the model without it"
            )
        cast_to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
        if node.op_type == "Cast" and cast_to in UNSIGNED:
            raise CheckFailed(_unsigned(name, described(node), UNSIGNED[cast_to]))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if (kind := value.type.tensor_type.elem_type) in UNSIGNED:
            raise CheckFailed(_unsigned(name, f"tensor {value.name}", UNSIGNED[kind]))
    for tensor in model.graph.initializer:
        if tensor.data_type in UNSIGNED:
            raise CheckFailed(_unsigned(name, f"weight {tensor.name}", UNSIGNED[tensor.data_type]))


def _unsigned(name: str, what: str, kind: str) -> str:
    return f"{name}: {what} is {kind}, which TensorRT does not take: export the model with int64 in its place"
