"""An ONNX file as a classifier: read, checked, its batch set free, and put behind a graph of preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx.inliner
import onnx.version_converter
import onnxruntime
import torch
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.onnx_graph import nodes_of
from densepure_rt.export.programs import first_line
from densepure_rt.runtime.bundle import sha256_of
from densepure_rt.runtime.device import CLASSIFY_OUTPUTS

LARGEST_ONNX = (1 << 31) - 1  # bytes of one protobuf message
ONNX_ROUNDING = 1e-4  # of the largest logit, between batch sizes of one file in float32


class OnnxNetwork(nn.Module):
    """An ONNX classifier, run by ONNX Runtime on the CPU: for comparing with, PyTorch cannot trace it.

    Raises CheckFailed where ONNX Runtime does not take the model.
    """

    def __init__(self, model: onnx.ModelProto, name: str = "the ONNX classifier") -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no base
            raise CheckFailed(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {name} ({first_line(error)}): export it in float32 "
                f"and for an older opset"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: x.detach().numpy()})
        return torch.from_numpy(logits)


def read_onnx(path: Path) -> tuple[onnx.ModelProto, str]:
    """A classifier as an ONNX model of standard operators, external weights in it, and its `onnx_sha256`.

    Raises UsageError or CheckFailed.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        digest = onnx_sha256(path)
        model = onnx.load(path)
        after = onnx_sha256(path)
    except OSError as error:
        raise UsageError(f"cannot read the classifier {path} ({error.strerror or error})") from error
    except Exception as error:  # what the readers raise on a damaged file is not a closed list
        raise CheckFailed(f"{path} is not a sound ONNX file ({first_line(error)}): export it again") from error
    if digest != after:
        raise CheckFailed(f"{path} or its weights changed while they were read: try again once they are whole")
    if left := [tensor.name for tensor in tensors_of(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]:
        raise CheckFailed(f"{path} keeps {left[0]!r} in another file, where onnx does not read it: save it in one file")
    if model.ByteSize() > LARGEST_ONNX:
        raise UsageError(f"{path} with its weights is over 2 GB, which no single ONNX file holds: export it in fp16")
    return prepared(model, path.name), digest


def prepared(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A copy whose local functions are inlined and whose weights are no inputs.

    Raises CheckFailed for custom operators.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    strange = sorted({node.domain for node in nodes_of(ours.graph)} - {"", "ai.onnx"})
    if strange:
        ops = sorted({node.op_type for node in nodes_of(ours.graph) if node.domain in strange})
        raise CheckFailed(
            f"{name} uses {', '.join(ops)} of {', '.join(strange)}: only ONNX's own operators run everywhere; export "
            f"it without these"
        )
    versions = [entry.version for entry in ours.opset_import if entry.domain in ("", "ai.onnx")]
    del ours.opset_import[:]
    ours.opset_import.append(onnx.helper.make_opsetid("", versions[0]))
    constants = {tensor.name for tensor in ours.graph.initializer}
    inputs = [value for value in ours.graph.input if value.name not in constants]
    del ours.graph.input[:]
    ours.graph.input.extend(inputs)
    for proto in (ours, ours.graph):
        del proto.metadata_props[:]
        proto.ClearField("doc_string")
    for node in nodes_of(ours.graph):
        node.ClearField("doc_string")  # older exporters of PyTorch leave the paths of sources there
        del node.metadata_props[:]
    return ours


def only_input(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    inputs, outputs = model.graph.input, model.graph.output
    if len(inputs) != 1 or len(outputs) != 1:
        found = f"{[value.name for value in inputs]} -> {[value.name for value in outputs]}"
        raise UsageError(f"{name} is {found}: a classifier has one image as input and logits as its only output")
    for value in (inputs[0], outputs[0]):
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
            raise UsageError(f"{name}: {value.name!r} is {kind}: export it with float32 inputs and outputs")
    only: onnx.ValueInfoProto = inputs[0]
    return only


def free_batch(model: onnx.ModelProto, batch: str = "batch") -> onnx.ModelProto:
    """A copy whose first dimension, in and out, is the symbol `batch`. Recorded shapes in between are dropped."""
    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    del ours.graph.value_info[:]
    for value in (*ours.graph.input, *ours.graph.output):
        if value.type.tensor_type.HasField("shape") and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = batch
    return ours


def refuse_fixed_batch(model: onnx.ModelProto, shape: tuple[int, ...], name: str) -> None:
    """Raise UsageError unless a model of a fixed batch, [B, C, H, W], computes the same with its batch set free."""
    size = shape[0]
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (size + 1, *shape[1:])).astype(np.float32))
    fixed = OnnxNetwork(model, name)
    try:
        expected = torch.cat((fixed(x[:size]), fixed(x[1:])[-1:]))
    except Exception as error:  # ONNX Runtime's errors share no base
        raise CheckFailed(f"ONNX Runtime cannot run {name} ({first_line(error)}): export it again") from error
    try:
        found = OnnxNetwork(free_batch(model), name)(x)
        same = found.shape == expected.shape and bool(
            (found - expected).abs().max() <= ONNX_ROUNDING * expected.abs().max()
        )
    except Exception:  # with its batch set free it does not run at all: some shape within is fixed
        same = False
    if not same:
        raise UsageError(
            f"{name} is made for batches of {size} alone: export it with a free batch dimension "
            f'(dynamic_axes={{"input": {{0: "batch"}}}}, or dynamic_shapes with dynamo=True)'
        )


def tensors_of(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor within a message of ONNX: weights, those of graphs within, and attributes of nodes."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from tensors_of(inner)


def onnx_sha256(path: Path) -> str:
    """The SHA-256 of an ONNX file, or of it and the files of its external weights, wherever in it they are named."""
    model = onnx.load(path, load_external_data=False)
    outside = [tensor for tensor in tensors_of(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    names = sorted({entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"})
    if not names:
        return sha256_of(path)
    if strays := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"its weights are in {strays[0]}, outside its folder")
    digests = [sha256_of(file) for file in (path, *(path.parent / name for name in names))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def merged_onnx(preprocess: onnx.ModelProto, classifier: onnx.ModelProto) -> onnx.ModelProto:
    """One graph of two: pixels -> what the classifier takes -> its output, named "logits", in the later opset of both.

    preprocess: one input, whose name and batch symbol stay, and one output. Raises CheckFailed where the older of the
    two cannot be brought to the opset of the other, or they do not fit.
    """
    name = "the ONNX classifier"
    first, second = prepared(preprocess, "preprocessing"), prepared(classifier, name)
    only_input(second, name)
    batch = first.graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    opset = max(model.opset_import[0].version for model in (first, second))
    first, second = (_at_opset(free_batch(model, batch), opset) for model in (first, second))
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    first = onnx.compose.add_prefix(first, "preprocess/", rename_inputs=False)
    second = onnx.compose.add_prefix(second, "classifier/")
    try:
        merged = onnx.compose.merge_models(first, second, [(first.graph.output[0].name, second.graph.input[0].name)])
        del merged.opset_import[1:]  # one entry came from each
        graph = merged.graph
        graph.node.append(onnx.helper.make_node("Identity", [graph.output[0].name], CLASSIFY_OUTPUTS, name="logits"))
        graph.output[0].name = CLASSIFY_OUTPUTS[0]
        del graph.value_info[:]
        merged = onnx.shape_inference.infer_shapes(merged, strict_mode=True)
        onnx.checker.check_model(merged, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise CheckFailed(f"{name} does not fit behind its preprocessing ({first_line(error)})") from error
    merged.producer_name = merged.producer_version = ""
    return merged


def _at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    found = model.opset_import[0].version
    if found == opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # onnx raises RuntimeError and its own ConvertError
        raise CheckFailed(
            f"an ONNX graph of opset {found} cannot be brought to opset {opset} ({first_line(error)}): export it with "
            f"opset_version={opset}"
        ) from error
