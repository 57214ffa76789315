"""A float32 ONNX graph in fp16 or bf16: what `casting` does to a PyTorch network, done to its graph. Needs no PyTorch.

Every float tensor gets one of two types, node by node, by the rules of `casting`: products in the smaller type as soon
as one operand has it or is a weight; norms, softmax and other sums over many values in float32, given back in the type
of what came in; all else in the type that it is given, float32 where it is given both. The time embedding, a
classifier's preprocessing and what is outside the network are islands: float32 whatever comes in. Casts stand where
the type changes.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.defs import OpSchema

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.export.convert.precision import OPSETS, PREPROCESSING, TIME_EMBEDDING
from densepure_rt.export.models.onnx_graph import SCOPES, described, scopes
from densepure_rt.runtime.device import Floats

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TYPE_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}  # in the schemas of operators
PRODUCTS = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum"}
FLOAT32 = {
    *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LRN"),
    *("LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "Softmax", "LogSoftmax"),
    # Of norms that are written out, and of means.
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceProd"),
    *("GlobalAveragePool", "Pow", "Exp", "Log", "Sqrt"),
}
# What may follow a norm and is still part of it: its shape restored, its scale and shift by weights.
AFFINE = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Mul", "Add", "Sub", "Div"}
ANY_TYPE = {"Shape", "Size"}  # what takes a tensor of any type, since it looks at none of its values
SMALL = 1 << 12  # bytes of a weight that inference of shapes may ask for


def lowered(model: onnx.ModelProto, kind: str, keep: Sequence[str] = ()) -> onnx.ModelProto:
    """Return a float32 graph of standard operators in `kind`, its inputs and outputs in float32.

    keep: shell patterns of module names that stay float32 as well. Weights that lie in another file must be loaded.

    Raises CheckFailed for weights beyond what `kind` holds, UsageError for graphs within the graph, or operators that
    are others in the opset that knows `kind`, EnvironmentFault for bf16 where onnx is too old.
    """
    return _Lowering(model, kind, keep).run()


class _Operands(NamedTuple):
    """The float operands of a node that are of one type, and what type that may be. places: among its inputs."""

    schema: OpSchema
    places: list[int]
    names: list[str]
    type: str


class _Lowering:
    """A graph being lowered. smaller: tensors of the smaller type; given_back: float32, wanted in the smaller type."""

    def __init__(self, model: onnx.ModelProto, kind: str, keep: Sequence[str]) -> None:
        self.kind, self.islands = kind, (*TIME_EMBEDDING, PREPROCESSING, *keep)
        self.dtype = helper.tensor_dtype_to_np_dtype(TYPES[kind])
        if self.dtype.itemsize != 2:  # before onnx 1.19 float32 stands for bfloat16
            raise EnvironmentFault(f"onnx {onnx.__version__} cannot write {kind}: run \"pip install -U 'onnx>=1.19'\"")
        self.model, self.weights = without_weights(model)
        raise_opset(self.model, OPSETS[kind])
        self.floats = float_tensors(self.model, self.weights)
        self.smaller: set[str] = set()
        self.given_back: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.copies: dict[tuple[str, bool], str] = {}  # of (tensor, whether in the smaller type)
        self.rounded: dict[str, TensorProto] = {}  # weights in the smaller type, by the name of the float32 one

    def run(self) -> onnx.ModelProto:
        graph = self.model.graph
        for node in graph.node:
            self.lower(node)
        for value in graph.output:
            if value.name in self.smaller:
                self.restore(value.name)
        read = {name for node in self.nodes for name in node.input}
        free = {tensor.name: name for name, tensor in self.rounded.items() if name not in read}
        self.rename(free)  # the float32 weight has no reader left
        for tensor in self.rounded.values():
            tensor.name = free.get(tensor.name, tensor.name)
        del graph.node[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in read)
        graph.initializer.extend(self.rounded.values())
        for value in graph.value_info:
            if value.name in self.smaller:
                value.type.tensor_type.elem_type = TYPES[self.kind]
        return self.model

    def lower(self, node: NodeProto) -> None:
        """Add a node in the type that it computes in, behind casts of its operands."""
        operands, names = self.operands(node), list(node.input)
        small = self.is_smaller(node, operands)
        for place, name in enumerate(names):
            if name in self.floats and node.op_type not in ANY_TYPE:
                names[place] = self.cast(name, small and place in operands.places, node)
        gives_back = not small and self.gives_back(node, operands) and any(map(self.is_wanted, operands.names))
        for place, name in enumerate(node.output):
            if name in self.floats and small and _formal(operands.schema.outputs, place) == operands.type:
                self.smaller.add(name)
            elif name in self.floats and gives_back:
                self.given_back.add(name)
        added = NodeProto()
        added.CopyFrom(node)
        added.input[:] = names
        self.nodes.append(added)

    def operands(self, node: NodeProto) -> _Operands:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise UsageError(
                f"{described(node)} holds a graph of its own, which cannot be lowered: export the network without it, "
                f"or from PyTorch with `precision` {self.kind}"
            )
        try:
            schema = onnx.defs.get_schema(node.op_type, self.model.opset_import[0].version, node.domain)
        except onnx.defs.SchemaError as error:
            raise CheckFailed(
                f"{described(node)} is no operator of ONNX {onnx.__version__}: only those can be lowered"
            ) from error
        generic = {constraint.type_param_str for constraint in schema.type_constraints}
        kinds = {i: _formal(schema.inputs, i) for i, name in enumerate(node.input) if name in self.floats}
        main = next((kind for kind in kinds.values() if kind in generic), "")
        places = [i for i, kind in kinds.items() if kind == main]
        return _Operands(schema, places, [node.input[i] for i in places], main)

    def is_smaller(self, node: NodeProto, operands: _Operands) -> bool:
        """Say whether a node computes in the smaller type."""
        wanted = [self.is_wanted(name) for name in operands.names]
        known = any(
            constraint.type_param_str == operands.type and TYPE_NAMES[self.kind] in constraint.allowed_type_strs
            for constraint in operands.schema.type_constraints
        )
        if not known or self.is_island(node) or self.gives_back(node, operands):
            return False
        if node.op_type in PRODUCTS:
            return any(wanted) or any(name in self.weights for name in operands.names)
        if node.op_type == "Concat":
            return any(wanted)
        others = [name for name, is_wanted in zip(operands.names, wanted, strict=True) if not is_wanted]
        return any(wanted) and all(name in self.weights and self.fits(name) for name in others)

    def is_wanted(self, name: str) -> bool:
        return name in self.smaller or name in self.given_back

    def gives_back(self, node: NodeProto, operands: _Operands) -> bool:
        """Say whether a node is a norm or the end of one: float32, but its result in the type of what came in."""
        affine = any(name in self.given_back for name in operands.names) and all(
            name in self.given_back or name in self.weights for name in operands.names
        )
        return not self.is_island(node) and (node.op_type in FLOAT32 or (node.op_type in AFFINE and affine))

    def is_island(self, node: NodeProto) -> bool:
        inside = any(fnmatchcase(name, pattern) for name in scopes(node) for pattern in self.islands)
        return inside or node.name.startswith(f"{PREPROCESSING}/") or is_outside(node)

    def cast(self, name: str, small: bool, reader: NodeProto) -> str:
        """Return the tensor in the type that is asked for: itself, a weight that is rounded, or a cast, added here."""
        if small == (name in self.smaller):
            return name
        if (name, small) not in self.copies:
            copy = self.copies[name, small] = f"{name}.{self.kind if small else 'fp32'}"
            if copy in self.floats:
                raise CheckFailed(f"the graph holds a tensor {copy} already: export it again")
            if name in self.weights:
                self.rounded[name] = self.round(name, copy, reader)
            else:
                kind = TYPES[self.kind] if small else TensorProto.FLOAT
                self.nodes.append(helper.make_node("Cast", [name], [copy], f"{copy}_cast", to=kind))
                self.nodes[-1].metadata_props.extend(reader.metadata_props)
        return self.copies[name, small]

    def round(self, name: str, copy: str, reader: NodeProto) -> TensorProto:
        if not self.fits(name):
            raise CheckFailed(
                f"weight {name} of {described(reader)} is beyond what {self.kind} holds: keep that part in float32 "
                f"with `keep` '{(scopes(reader) or ['MODULE'])[-1]}'"
            )
        return numpy_helper.from_array(self.values(name).astype(self.dtype), copy)

    def fits(self, name: str) -> bool:
        """Say whether no value of a weight becomes infinite in the smaller type."""
        with np.errstate(over="ignore"):
            rounded = self.values(name).astype(self.dtype).astype(np.float32)
        return bool((np.isfinite(rounded) | ~np.isfinite(self.values(name))).all())

    def values(self, name: str) -> Floats:
        return numpy_helper.to_array(self.weights[name])

    def restore(self, name: str) -> None:
        """Let an output of the graph be float32 under its own name."""
        inner = f"{name}.{self.kind}"
        self.rename({name: inner})
        self.nodes.append(helper.make_node("Cast", [inner], [name], f"{name}_cast", to=TensorProto.FLOAT))

    def rename(self, names: dict[str, str]) -> None:
        for node in self.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]


def _formal(formals: Sequence[OpSchema.FormalParameter], place: int) -> str:
    """Return the type of a parameter; the last may stand for many."""
    return str(formals[min(place, len(formals) - 1)].type_str)


def is_outside(node: NodeProto) -> bool:
    """Say whether a node is the step graph's own, outside its network."""
    recorded = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
    return recorded is not None and len(ast.literal_eval(recorded)) <= 2  # the graph's name, and the node's


def without_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, TensorProto]]:
    """Copy a graph without its float32 weights, and give these by name; constants among the nodes are weights too."""
    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    graph, source = bare.graph, model.graph
    graph.name = source.name
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    weights = {}
    for tensor in source.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            weights[tensor.name] = tensor
        else:
            graph.initializer.append(tensor)
    for node in source.node:
        constant = helper.get_node_attr_value(node, "value") if _is_constant(node) else None
        if isinstance(constant, TensorProto) and constant.data_type == TensorProto.FLOAT:
            weights[node.output[0]] = TensorProto()
            weights[node.output[0]].CopyFrom(constant)
            weights[node.output[0]].name = node.output[0]
        else:
            graph.node.append(node)
    graph.value_info.extend(value for value in source.value_info if value.name not in weights)
    return bare, weights


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and [attribute.name for attribute in node.attribute] == ["value"]


def float_tensors(bare: onnx.ModelProto, weights: dict[str, TensorProto]) -> set[str]:
    """Return the names of a graph's float32 tensors. bare: without these weights."""
    model = onnx.ModelProto()
    model.CopyFrom(bare)
    for name, tensor in weights.items():
        if tensor.ByteSize() < SMALL:
            model.graph.initializer.append(tensor)
        else:
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.dims))
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise CheckFailed(f"the graph is not sound ({error}): export it again") from error
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    unknown = [name for node in graph.node for name in node.output if name and not kinds.get(name)]
    if unknown:
        raise CheckFailed(f"the types of {', '.join(unknown[:3])} in the graph are not known: export it again")
    return {name for name, kind in kinds.items() if kind == TensorProto.FLOAT} | set(weights)


def raise_opset(model: onnx.ModelProto, opset: int) -> None:
    """Bring a graph to a later opset in which its operators are the same ones, but for the types that they take."""
    found = model.opset_import[0].version
    for node in model.graph.node if found < opset else ():
        old, new = (onnx.defs.get_schema(node.op_type, version, node.domain) for version in (found, opset))
        if _meaning(old) != _meaning(new):
            raise UsageError(
                f"{described(node)} is another operator in opset {opset} than in the graph's, {found}: export it from "
                f"PyTorch with the `precision` that is asked for"
            )
    model.opset_import[0].version = max(found, opset)


def _meaning(schema: OpSchema) -> tuple[list[str], list[str], list[str]]:
    return [p.name for p in schema.inputs], [p.name for p in schema.outputs], sorted(schema.attributes)


def computed_in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph of a smaller type with every node in float32, its results rounded to that type.

    It is what a GPU gives, which sums products in float32. onnxruntime's CPU (1.32) has few kernels of fp16 and none of
    bf16: it computes neighbouring nodes in float32, and what overflows between them does not show.
    """
    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    small = {name: kind for name, kind in kinds.items() if kind in TYPES.values()}
    del ours.graph.node[:]
    for node in model.graph.node:
        taken = {
            name: f"{name}.{node.output[0]}.taken" for name in node.input if name in small and node.op_type != "Cast"
        }
        given = {name: f"{name}.given" for name in node.output if name in small and node.op_type != "Cast"}
        for name, copy in taken.items():
            ours.graph.node.append(helper.make_node("Cast", [name], [copy], f"{copy}_cast", to=TensorProto.FLOAT))
        computed = ours.graph.node.add()
        computed.CopyFrom(node)
        computed.input[:] = [taken.get(name, name) for name in node.input]
        computed.output[:] = [given.get(name, name) for name in node.output]
        for name, copy in given.items():
            ours.graph.node.append(helper.make_node("Cast", [copy], [name], f"{name}_rounded", to=small[name]))
            ours.graph.node[-1].metadata_props.extend(node.metadata_props)
    return ours
