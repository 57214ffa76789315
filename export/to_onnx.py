"""The graphs as ONNX files with their sidecars, checked against PyTorch before they are published."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from densepure_rt import __version__
from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.export import parity
from densepure_rt.export.classifiers import ClassifierModel
from densepure_rt.export.step_graph import ClassifyGraph, StepGraph
from densepure_rt.export.unets import DiffusionModel
from densepure_rt.runtime.bundle import (
    PIXEL_RANGE,
    ClassifierSidecar,
    FileRef,
    Sidecar,
    StepSidecar,
    read_sidecar,
    sha256_of,
    sidecar_path,
    to_json,
)
from densepure_rt.runtime.device import MAX_BATCH, installed_versions
from densepure_rt.runtime.onnx_device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS

OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) reads
TRACE_BATCH = 2  # 1 would be taken for a constant
KEPT_METADATA = "pkg.torch.onnx.name_scopes"  # the PyTorch module behind a node; the rest holds source paths

UNET_FILE, CLASSIFIER_FILE = "unet.onnx", "classifier.onnx"


@dataclass(frozen=True)
class Exported:
    """Where the bundle is, and the worst difference from PyTorch that was found in it."""

    unet: Path
    classifier: Path
    worst_step: parity.Difference
    worst_logits: parity.Difference
    comparisons: int


def to_onnx(graph: nn.Module, example: Sequence[torch.Tensor], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """`graph` as a checked ONNX model of opset 20 with a free batch dimension."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is not there
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside the exporter itself
        program = torch.onnx.export(
            graph.eval(),
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in example),
            verbose=False,
        )
    assert program is not None  # it is None only for the TorchScript exporter
    model = program.model_proto
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == KEPT_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:], model.functions[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"the exporter wrote a graph that onnx.checker refuses: {error}") from error
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def step_onnx(model: DiffusionModel) -> bytes:
    graph = StepGraph(model.network, model.clip, model.variance == "learned_range")
    # Three tensors, not one three times: the exporter would take them for a single input.
    mean, std, noise = (torch.zeros(TRACE_BATCH, *model.image) for _ in range(3))
    example = (mean, std, noise, torch.zeros(TRACE_BATCH), torch.ones(TRACE_BATCH, 6))
    return to_onnx(graph, example, STEP_INPUTS, STEP_OUTPUTS)


def classifier_onnx(model: ClassifierModel) -> bytes:
    x = torch.zeros(TRACE_BATCH, *model.image)
    return to_onnx(ClassifyGraph(model.network), (x,), CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)


def refuse_bad_weights(module: nn.Module, what: str) -> None:
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckFailed(f"the {what}'s weights hold NaN or Inf, first in {name}: export from a sound checkpoint")


def refuse_replacement(out: Path, weights: dict[str, str]) -> None:
    """Raise UsageError when `out` holds a bundle of other weights."""
    for name, digest in weights.items():
        if not sidecar_path(out / name).exists():
            continue
        try:
            found = read_sidecar(out / name).weights_sha256
        except DensePureError:
            found = "unreadable"
        if found != digest:
            raise UsageError(
                f"{out / name} is a bundle of another model (weights {found[:16]}, not {digest[:16]}): "
                f"choose another --out, or replace it with --force"
            )


def write(folder: Path, content: bytes, sidecar: Callable[[FileRef], Sidecar], name: str) -> FileRef:
    (folder / name).write_bytes(content)
    ref = FileRef(name, sha256_of(folder / name))
    sidecar_path(folder / name).write_text(to_json(sidecar(ref)), encoding="utf-8")
    return ref


def export_bundle(
    unet: DiffusionModel,
    classifier: ClassifierModel,
    out: Path,
    pixels: NDArray[np.uint8],
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write `unet.onnx`, `classifier.onnx` and their sidecars into `out`, once they are found to equal PyTorch.

    pixels: real images [n, C, H, W] to compare on. Everything is written beside `out` first and moved there at the end:
    after an error in export or parity `out` is as it was.

    Raises CheckFailed on a mismatch or damaged weights, UsageError when `out` holds a bundle of another model,
    EnvironmentFault when it cannot be written.
    """
    refuse_bad_weights(unet.network, "UNet")
    refuse_bad_weights(classifier.network, "classifier")
    if not force:
        refuse_replacement(out, {UNET_FILE: unet.weights_sha256, CLASSIFIER_FILE: classifier.weights_sha256})
    versions = {"densepure-rt": __version__} | installed_versions("torch", "onnx", "onnxscript", "diffusers")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder_name:
            folder = Path(folder_name)
            say(f"writing {CLASSIFIER_FILE}")
            classifier_ref = write(
                folder,
                classifier_onnx(classifier),
                lambda ref: ClassifierSidecar(
                    "classify",
                    ref,
                    classifier.image,
                    PIXEL_RANGE,
                    "fp32",
                    OPSET,
                    classifier.weights_sha256,
                    versions,
                    classifier.class_names,
                ),
                CLASSIFIER_FILE,
            )
            say(f"writing {UNET_FILE}")
            write(
                folder,
                step_onnx(unet),
                lambda ref: StepSidecar(
                    "step",
                    ref,
                    unet.image,
                    PIXEL_RANGE,
                    "fp32",
                    OPSET,
                    unet.weights_sha256,
                    versions,
                    unet.schedule,
                    unet.variance,
                    unet.prediction,
                    unet.clip,
                    classifier_ref,
                ),
                UNET_FILE,
            )
            say("comparing with PyTorch")
            steps = list(parity.step_differences(folder / UNET_FILE, unet, pixels))
            logits = list(parity.classifier_differences(folder / CLASSIFIER_FILE, classifier, pixels))
            result = Exported(
                out / UNET_FILE,
                out / CLASSIFIER_FILE,
                parity.check(steps, "fp32"),
                parity.check(logits, "fp32"),
                len(steps) + len(logits),
            )
            for name in (CLASSIFIER_FILE, UNET_FILE):  # the step engine last: it names the classifier
                os.replace(folder / name, out / name)
                os.replace(sidecar_path(folder / name), sidecar_path(out / name))
    except OSError as error:
        raise EnvironmentFault(f"cannot write {out} ({error.strerror}): choose another folder with --out") from error
    return result
