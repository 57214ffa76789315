"""What an engine file is, read from its sidecar and checked against its bytes; with the onnx package, its graph too."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from densepure_rt.errors import CheckFailed, UsageError, raise_interrupt
from densepure_rt.files import content
from densepure_rt.runtime.bundle import (
    OPTIONAL,
    ClassifierSidecar,
    StepSidecar,
    engine_file,
    read_sidecar,
    sha256_of,
    shipped_engine,
)
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.schedule import Coefficients
from densepure_rt.runtime.tensorrt_api import layers_of
from densepure_rt.text import printable


def inspection(path: Path, layers: bool = False) -> dict[str, Any]:
    """The sidecar's fields, and under "check" whether the SHA-256 of the file, and of its weights, are those it names.

    path: an engine file, its sidecar, or the folder of a bundle, whose step engine is meant. "graph" is there when the
    onnx package is installed and the hash is right.
    layers: say under "layers" what TensorRT made of each layer of a plan, which it tells on the plan's own GPU alone.
    """
    engine = engine_file(path.with_name(path.name.removesuffix(".json")) if path.suffix == ".json" else path)
    if not os.path.isfile(engine):  # unlike Path.exists, it takes any name for an answer
        raise UsageError(
            f"no file at {engine}: give an engine, its sidecar or the folder of a bundle, such as {shipped_engine()}, "
            f'which ships, or make one with "densepure-rt export"'
        )
    sidecar = read_sidecar(engine)
    try:
        found = sha256_of(engine)
        weights = sha256_of(engine.with_name(sidecar.data.name)) if sidecar.data else None
    except OSError as error:
        raise UsageError(f"cannot read {error.filename or engine} ({error.strerror})") from error
    matches = found == sidecar.file.sha256 and (sidecar.data is None or weights == sidecar.data.sha256)
    report = {
        name: value for name, value in dataclasses.asdict(sidecar).items() if name not in OPTIONAL or value is not None
    }
    if sidecar.plan is not None:  # a plan opens on its own GPU only, but what it takes and gives is fixed by what it is
        report["plan"]["tensors"] = plan_tensors(sidecar)
    report["check"] = {"sha256": found, "matches": matches, "bytes": engine.stat().st_size}
    if weights is not None:
        report["check"]["data_sha256"] = weights
    if matches and sidecar.plan is None and (graph := onnx_graph(engine)):
        report["graph"] = graph
    if layers and matches:
        if sidecar.plan is None:
            raise UsageError(f"`layers`: {engine} is no plan, and what it computes is in its graph; leave it out")
        report["layers"] = layers_of(engine, sidecar)
    return report


def layer_rows(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Type, outputs, name and kernel of each layer, as far as the plan holds them; after a row of titles.

    TensorRT 10 tells an output's type and format in one word, 11 in two.
    """
    found = [("type", "outputs", "layer", "kernel")]
    for layer in layers:
        outputs = []
        for output in layer.get("Outputs") or ():
            kinds = (output.get(name) for name in ("Format/Datatype", "DataType", "Format"))
            shape = "x".join(map(str, output.get("Dimensions") or ()))
            outputs.append(" ".join(str(word) for word in (*kinds, shape) if word))
        words = (layer.get("LayerType"), ", ".join(outputs), layer.get("Name"), layer.get("TacticName"))
        found.append(tuple(printable(str(word or "-")) for word in words))  # type: ignore[arg-type]  # four words, as mypy cannot count
    return found


def plan_tensors(sidecar: StepSidecar | ClassifierSidecar) -> list[str]:
    """Inputs and outputs of a plan, all float32, for any of its batches."""
    image = ", ".join(map(str, sidecar.image))
    if isinstance(sidecar, ClassifierSidecar):
        shapes = {"mean": image, "logits": str(len(sidecar.class_names))}
        return [f"{name}: float32 [batch, {shapes[name]}]" for name in (*CLASSIFY_INPUTS, *CLASSIFY_OUTPUTS)]
    shapes = {"t": "", "finite": "", "coef": f", {len(Coefficients._fields)}"}
    return [f"{name}: float32 [batch{shapes.get(name, ', ' + image)}]" for name in (*STEP_INPUTS, *STEP_OUTPUTS)]


def onnx_graph(engine: Path) -> dict[str, Any] | None:
    """Inputs, outputs and node counts of an ONNX file, or None without the onnx package."""
    try:
        import onnx
    except Exception as error:  # not there, or broken: what it would add is not needed
        raise_interrupt(error)
        return None
    try:
        model = onnx.load_model_from_string(content(engine, "model"))
    except Exception as error:  # protobuf's errors, whichever protobuf is installed
        raise CheckFailed(
            f"{engine} is the file that its sidecar names, but not an ONNX model ({error}): export it again"
        ) from error

    def described(value: Any) -> str:
        tensor = value.type.tensor_type
        shape = ", ".join(str(d.dim_value or d.dim_param or "?") for d in tensor.shape.dim)
        return (
            f"{printable(value.name)}: {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{printable(shape)}]"
        )

    operators: dict[str, int] = {}
    for node in model.graph.node:
        kind = printable(node.op_type)
        operators[kind] = operators.get(kind, 0) + 1
    return {
        "inputs": [described(value) for value in model.graph.input],
        "outputs": [described(value) for value in model.graph.output],
        "nodes": len(model.graph.node),
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
    }


def flattened(report: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested report as dotted names and printable values."""
    rows: list[tuple[str, str]] = []
    for name, value in report.items():
        if isinstance(value, dict):
            rows += flattened(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return rows
