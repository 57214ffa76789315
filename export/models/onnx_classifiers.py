"""An ONNX file as a classifier: run for comparing with, its batch set free, and put behind a graph of preprocessing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import onnx
import onnx.compose
import onnx.version_converter
import onnxruntime
import torch
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.onnx_files import prepared, raise_ir_version, tensors_of
from densepure_rt.export.models.onnx_graph import nodes_of
from densepure_rt.export.models.programs import first_line
from densepure_rt.export.models.source_check import (
    DYNAMIC_QUANTIZATION,
    ONNX_MOVES,
    SAME,
    Part,
    Source,
    as_function,
    distance,
    first_difference,
    refuse_not_finite,
    refuse_unrepeatable,
)
from densepure_rt.rounding import raised
from densepure_rt.runtime.device import CLASSIFY_OUTPUTS, Floats
from densepure_rt.runtime.onnx_device import new_session, run_session

ONNX_ROUNDING = 1e-4  # of the largest logit, between batch sizes of one file in float32
OLDEST_OPSET = 7  # that ONNX Runtime has kernels of (docs/OperatorKernels.md)
NEWEST_OPSET = re.compile(r"official support for domain ai\.onnx is till opset (\d+)")
NO_KERNEL = re.compile(r"implementation for (\w+)\(\d+\) node")
RESIZE_DECLARED = 11  # the first opset in which a Resize says how it places its pixels


class OnnxNetwork(nn.Module):
    """An ONNX classifier, run by ONNX Runtime on the CPU: for comparing with, PyTorch cannot trace it.

    Raises CheckFailed where ONNX Runtime does not take the model.
    """

    def __init__(self, model: onnx.ModelProto, name: str = "the ONNX classifier") -> None:
        super().__init__()
        self.model, self.name = model, name
        try:
            self.session = _session(model)
        except Exception as error:  # ONNX Runtime's errors share no base
            raise CheckFailed(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {name} ({first_line(error)}): "
                f"{_runnable(model, str(error))}"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = run_session(self.session, None, {self.session.get_inputs()[0].name: x.detach().numpy()})
        return torch.from_numpy(logits)

    def source(self) -> Source:
        """Present the network to `source_check`."""
        dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in nodes_of(self.model.graph))
        moves = ONNX_MOVES | ({"batch": DYNAMIC_QUANTIZATION} if dynamic else {})
        return Source(self.name, as_function(self), self.trace, moves)

    def trace(self, x: Floats) -> Iterator[Part]:
        """Yield what every node gives, in order; nothing is fused, so digits may differ from `forward`'s."""
        session, places = self._tracing
        found = run_session(session, list(places), {session.get_inputs()[0].name: x})
        for place, value in zip(places.values(), found, strict=True):
            yield Part(place, [], np.asarray(value, np.float32))

    @cached_property
    def _tracing(self) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
        """Open a session that gives every float and 8-bit tensor, with the node of each. A new one would draw anew."""
        every = onnx.shape_inference.infer_shapes(self.model)
        kinds = {
            value.name: value.type.tensor_type.elem_type for value in (*every.graph.value_info, *every.graph.output)
        }
        places = {
            name: f"node {node.name or name} ({node.op_type})"
            for node in every.graph.node
            for name in node.output
            if kinds.get(name) in (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        }
        del every.graph.output[:]
        every.graph.output.extend(onnx.ValueInfoProto(name=name) for name in places)
        return _session(every, optimised=False), places


def _session(model: onnx.ModelProto, optimised: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return new_session(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _runnable(model: onnx.ModelProto, error: str) -> str:
    """Say what to do about a model that ONNX Runtime does not take, by its error."""
    opset = model.opset_import[0].version
    if opset < OLDEST_OPSET:
        return f"it is of opset {opset}, and {OLDEST_OPSET} is the oldest that is run; export it again for opset 17"
    if newest := NEWEST_OPSET.search(error):
        return f"export it for opset {newest[1]} or older, this is {opset}"
    low = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
    kinds = {tensor.data_type for tensor in tensors_of(model)} | {
        attribute.i for node in nodes_of(model.graph) for attribute in node.attribute if attribute.name == "to"
    }
    if found := [name for kind, name in low.items() if kind in kinds]:
        return f"export it in float32, {found[0]} has too few kernels on a CPU"
    if kernel := NO_KERNEL.search(error):
        return f"export it without {kernel[1]}, which has no kernel on a CPU in that type, or for another opset"
    return "export it again, with operators that ONNX Runtime runs on a CPU"


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


def refuse_other_input(value: onnx.ValueInfoProto, shape: tuple[int, int, int], name: str) -> None:
    """Raise UsageError unless an input takes batches of images [C, H, W] as preprocessing makes them."""
    if not value.type.tensor_type.HasField("shape"):
        raise UsageError(f"{name} does not say what shape {value.name!r} has: export it with [batch, C, H, W]")
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if len(dims) == 4 and all(found in (0, fed) for found, fed in zip(dims[1:], shape, strict=True)):
        return
    found = f"{name} takes {[dim or 'any' for dim in dims]} as {value.name!r}, preprocessing makes {['any', *shape]}"
    if len(dims) == 3 and sum(dim in (0, fed) for dim, fed in zip(dims, shape, strict=True)) == 3:
        raise UsageError(f"{found}: export it with a batch dimension in front")
    if len(dims) != 4:
        raise UsageError(
            f"{found}: it takes no images and is no image classifier by itself; export the whole model, from pixels to "
            f"logits, with what comes before this part in it"
        )
    if dims[3] in (1, 3) and dims[1] not in (1, 3):
        raise UsageError(
            f"{found}: its channels come last, and channels come first here; transpose its input where it is exported "
            f"(tf2onnx: --inputs-as-nchw {value.name}; elsewhere a Transpose with perm 0, 2, 3, 1 in front)"
        )
    if dims[1] not in (0, shape[0]):
        raise UsageError(f"{found}: declare the channels that it takes with `channel_order` RGB, BGR or grey")
    height, width = (dim or fed for dim, fed in zip(dims[2:], shape[1:], strict=True))
    raise UsageError(f"{found}: declare `resize` {height}x{width}")


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
        refuse_not_finite(fixed.source(), x[:size].numpy())
        refuse_unrepeatable(fixed.source(), x[:size].numpy())  # another session may repeat what this one drew
        expected = torch.cat((fixed(x[:size]), fixed(x[1:])[-1:]))
    except CheckFailed:
        raise
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


def merged_onnx(
    preprocess: onnx.ModelProto, classifier: onnx.ModelProto, name: str = "the ONNX classifier", x: Tensor | None = None
) -> onnx.ModelProto:
    """Merge two graphs into one: pixels -> the classifier's input -> its output, "logits", in the later opset of both.

    preprocess: one input, whose name and batch symbol stay, and one output. name: the classifier's, for messages. x:
    what it is fed, to find that a change of opset changes no numbers. Raises CheckFailed where it does, where the older
    of the two cannot be brought to the opset of the other, or where they do not fit.
    """
    first, second = prepared(preprocess, "preprocessing"), prepared(classifier, name)
    only_input(second, name)
    batch = first.graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    opset = max(model.opset_import[0].version for model in (first, second))
    first, original = free_batch(first, batch), free_batch(second, batch)
    first, second = at_opset(first, opset, "the preprocessing"), at_opset(original, opset, name)
    if x is not None and second is not original:
        refuse_converted(original, second, x.numpy(), name)
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
        raise_ir_version(merged)
        merged = onnx.shape_inference.infer_shapes(merged, strict_mode=True)
        onnx.checker.check_model(merged, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise CheckFailed(f"{name} does not fit behind its preprocessing ({first_line(error)})") from error
    merged.producer_name = merged.producer_version = ""
    return merged


def at_opset(model: onnx.ModelProto, opset: int, name: str) -> onnx.ModelProto:
    """Bring a model to a later opset by onnx's own converter, or return it as it is. Raises CheckFailed."""
    found = model.opset_import[0].version
    if found == opset:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # onnx raises RuntimeError and its own ConvertError
        raise CheckFailed(
            f"{name} is of opset {found} and cannot be brought to opset {opset} ({first_line(error)}): export it with "
            f"opset_version={opset}"
        ) from error
    if found < RESIZE_DECLARED <= opset:
        _declare_resizes(converted)
    raise_ir_version(converted)
    return converted


def _declare_resizes(model: onnx.ModelProto) -> None:
    """Let every Resize mean what it meant before opset 11, which onnx's converter (1.23) does not write down.

    Pixels were asymmetric; to the nearest was down where an image grows, and up where it shrinks (ONNX Runtime,
    core/providers/cpu/tensor/upsamplebase.h, `simple`).
    """
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    known |= {
        node.output[0]: node.attribute[0].t
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for node in nodes_of(model.graph):
        if node.op_type == "Resize" and all(entry.name != "coordinate_transformation_mode" for entry in node.attribute):
            scales = known.get(node.input[2]) if len(node.input) > 2 else None
            shrinks = scales is not None and bool((onnx.numpy_helper.to_array(scales) < 1).any())
            node.attribute.extend(
                [
                    onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"),
                    onnx.helper.make_attribute("nearest_mode", "ceil" if shrinks else "floor"),
                ]
            )


def refuse_converted(original: onnx.ModelProto, converted: onnx.ModelProto, x: Floats, name: str) -> None:
    """Raise CheckFailed, naming the node, where a model gives other numbers in its new opset. x: what it is fed."""
    before, after = OnnxNetwork(original, name), OnnxNetwork(converted, name)
    gap = distance(before.source().call(x), after.source().call(x))
    if gap <= SAME:
        return
    place = first_difference(before.trace(x), after.trace(x))
    old, new = (model.opset_import[0].version for model in (original, converted))
    raise CheckFailed(
        f"onnx {onnx.__version__} changes what {name} computes when it brings it from opset {old} to {new} (relative "
        f"L2 {raised(gap, figures=2)}){f', first in {place}' if place else ''}: export it with opset_version={new} "
        f"from where it was made. Nothing was published"
    )
