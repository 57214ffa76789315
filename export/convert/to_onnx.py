"""The graphs as ONNX files with their sidecars, checked against PyTorch before they are published.

This module is long because tracing, checking and writing a graph share what they know of it.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import nn

from densepure_rt._version import __version__
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.convert import casting, parity, precision
from densepure_rt.export.convert.casting import DTYPES
from densepure_rt.export.convert.parity import Exported, comparable
from densepure_rt.export.convert.precision import OPSETS, PREPROCESSING, QUANTIZED, TIME_EMBEDDING
from densepure_rt.export.convert.publish import (
    LARGE,
    Publication,
    data_path,
    data_ref,
    file_names,
    refuse_replacement,
)
from densepure_rt.export.convert.step_graph import ClassifyGraph, StepGraph
from densepure_rt.export.models import source_check
from densepure_rt.export.models.check_images import Images
from densepure_rt.export.models.classifiers import ClassifierModel, Preprocessed
from densepure_rt.export.models.onnx_classifiers import OnnxNetwork, merged_onnx
from densepure_rt.export.models.onnx_graph import SCOPES, checked, nodes_within, opset_of, refuse_for_tensorrt, types_of
from densepure_rt.export.models.programs import first_line
from densepure_rt.export.models.reference import TorchReference
from densepure_rt.export.models.source_check import as_function
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.bundle import (
    DATA_KEY,
    PIXEL_RANGE,
    Accuracy,
    ClassifierSidecar,
    Denoising,
    FileRef,
    StepSidecar,
    data_mark,
    sha256_of,
)
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, MAX_BATCH, STEP_INPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.machine import installed_versions
from densepure_rt.runtime.noise import first_state

TRACE_BATCH = 2  # 1 would be taken for a constant
NEEDED = "may not branch on values, and must take any batch"  # a network that is to be exported


def to_onnx(
    graph: nn.Module,
    example: Sequence[torch.Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int = OPSETS["fp32"],
    path: Path | None = None,
) -> bytes:
    """`graph` as a checked ONNX model with a free batch dimension.

    path: where it is to lie. Weights of more than LARGE bytes are written into a file beside it, whose hash the model
    names; nothing but they is written there.

    Raises UsageError for what torch cannot export, CheckFailed for a graph that is not sound.
    """
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is not there
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside the exporter itself
        try:
            program = torch.onnx.export(
                graph.eval(),
                tuple(example),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple({0: batch} for _ in example),
                verbose=False,
            )
        except Exception as error:  # the exporter's own say little: what they come from says what is wrong
            raise UsageError(
                f"torch cannot export the network to ONNX ({first_line(error.__cause__ or error)}): it {NEEDED}"
            ) from error
    assert program is not None  # it is None only for the TorchScript exporter
    for value in program.model.graph.inputs:
        if value.shape is not None and isinstance(value.shape[0], int):  # the exporter's last resort says nothing
            raise UsageError(f"torch can export the network for batches of {value.shape[0]} alone: it {NEEDED}")
    if path is None or weight_bytes(graph) <= LARGE:
        return checked(without_traces(program.model_proto))
    data = data_path(path)
    onnx_ir.save(program.model, path, external_data=data.name)
    model = without_traces(onnx.load(str(path), load_external_data=False))
    onnx.helper.set_model_props(model, {DATA_KEY: data_mark(FileRef(data.name, sha256_of(data)))})
    return checked(model, path)


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without what the exporter notes of the machine that it ran on; the modules behind nodes stay."""
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == SCOPES]  # the rest holds source paths
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:], model.functions[:]
    return model


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def step_onnx(model: DiffusionModel, opset: int = OPSETS["fp32"], path: Path | None = None) -> bytes:
    """The step graph of a diffusion network; see `to_onnx`."""
    graph = StepGraph(model.network, model.clip, model.learned_variance, model.prediction)
    # Three tensors, not one three times: the exporter would take them for a single input.
    mean, std, noise = (torch.zeros(TRACE_BATCH, *model.image) for _ in range(3))
    example = (mean, std, noise, torch.zeros(TRACE_BATCH), torch.ones(TRACE_BATCH, 6))
    return to_onnx(graph, example, STEP_INPUTS, STEP_OUTPUTS, opset, path)


def classifier_onnx(model: ClassifierModel, opset: int = OPSETS["fp32"], path: Path | None = None) -> bytes:
    """The graph of a classifier; see `to_onnx`. One that is an ONNX file itself is put behind its preprocessing."""
    x = torch.zeros(TRACE_BATCH, *model.image)
    if model.graph is None:
        return to_onnx(ClassifyGraph(model.network), (x,), CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, opset, path)
    prepare = ClassifyGraph(model.network.get_submodule("preprocess"))
    preprocess = to_onnx(prepare, (x,), CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, opset)
    pixels = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    name = "the ONNX classifier" if model.onnx is None else str(model.onnx)
    return checked(merged_onnx(onnx.load_model_from_string(preprocess), model.graph, name, prepare(pixels).detach()))


def lowered(models: Models, kind: str, keep: Sequence[str]) -> Models:
    """The two models in the type of `kind`, as they are for any other precision.

    Raises UsageError for a pattern of `keep` that matches no module of either.
    """
    unet, classifier = models
    parts = unet.network, classifier.network
    for pattern in keep:
        if not any(casting.matching(part, [pattern]) for part in parts):
            raise UsageError(f"`keep` {pattern} matches no module: their names are like {casting.names_like(parts[0])}")
    if kind not in DTYPES:
        return models
    if classifier.onnx is not None:
        raise UsageError(
            f"`kind` {kind}: {classifier.onnx} is an ONNX file, whose precision is its own: give the classifier "
            f"in PyTorch, or export fp32 or int8"
        )
    first, second = (
        casting.cast(part, DTYPES[kind], [pattern for pattern in keep if casting.matching(part, [pattern])])
        for part in parts
    )
    return Models(dataclasses.replace(unet, network=first), dataclasses.replace(classifier, network=second))


def contents(
    models: Models,
    kind: str,
    keep: Sequence[str],
    images: Images,
    paths: tuple[Path | None, Path | None] = (None, None),
) -> tuple[bytes, bytes]:
    """The step graph and the classifier of an already lowered pair of models; quantized here where `kind` asks it.

    paths: where they are to lie; large weights are written beside them.
    """
    unet, classifier = models
    if kind not in QUANTIZED:
        return step_onnx(unet, OPSETS[kind], paths[0]), classifier_onnx(classifier, OPSETS[kind], paths[1])
    if images.calibration is None:
        raise UsageError(f"`kind` {kind} is calibrated on training images: give them with `calibration`")
    for module in (unet.network, classifier.network):
        if weight_bytes(module) > LARGE:
            raise UsageError(
                f"`kind` {kind}: the weights are {weight_bytes(module) / 2**30:.1f} GiB, and only graphs of up to "
                f"{LARGE / 2**30:.1f} GiB are quantized here: use fp16"
            )
    step, classify = step_onnx(unet, OPSETS[kind]), classifier_onnx(classifier, OPSETS[kind])
    keep = (*keep, PREPROCESSING)  # a resize is a matrix product, and no part of the network
    feeds = precision.calibration_feeds(step, unet, images.calibration)
    quantize = precision.to_fp8 if kind == "fp8" else partial(precision.quantize_int8, cpu=kind == "int8-cpu")
    pairs = ((step, feeds.step), (classify, feeds.classify))
    first, second = (quantize(content, fed, nodes_within(content, keep)) for content, fed in pairs)
    return first, second


def refuse_bad_weights(module: nn.Module, what: str) -> None:
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckFailed(f"the {what}'s weights hold NaN or Inf, first in {name}: export from a sound checkpoint")


def check_sources(models: Models, pixels: NDArray[np.uint8]) -> None:
    """Raise CheckFailed where a network is at fault itself, before an export of it is blamed; see `source_check`.

    pixels: uint8 [n, C, H, W]; one image alone is mirrored to be two.
    """
    unet, classifier = models
    pixels = np.concatenate((pixels, pixels[..., ::-1])) if len(pixels) == 1 else pixels
    if unet.prediction != "none":
        x, t = parity.first_inputs(unet, pixels)
        call = as_function(unet.network, float(t[0]))
        source_check.check_source(source_check.torch_source("the UNet in PyTorch", call, unet.network), x)
    seen = first_state(pixels.astype(np.int32), 1.0)
    network = classifier.network
    if isinstance(network, Preprocessed) and isinstance(network.classifier, OnnxNetwork):
        with torch.inference_mode():
            source_check.check_source(network.classifier.source(), network.preprocess(torch.from_numpy(seen)).numpy())
        return
    call = as_function(network)
    source_check.check_source(source_check.torch_source("the classifier in PyTorch", call, network), seen)


def compared_with(models: Models) -> tuple[str, str]:
    """Name what the files of a bundle are compared with: both, and the classifier's alone."""
    unet, classifier = models
    of_classifier = "PyTorch" if classifier.onnx is None else classifier.onnx.name
    of_unet = "PyTorch" if unet.prediction != "none" else of_classifier
    return " and ".join(dict.fromkeys((of_unet, of_classifier))), of_classifier


def overflow(
    error: CheckFailed, precise: nn.Module, lowered: nn.Module, kind: str, inputs: tuple[Floats, ...]
) -> CheckFailed | None:
    """Find what gives NaN or Inf within a network, where that is why its file differs; else None.

    error: how the file differs. precise, lowered: the network in float32, and as it was exported. inputs: of both.
    """

    def run(module: nn.Module) -> bool:
        with torch.inference_mode():
            return bool(module(*map(torch.from_numpy, inputs)).isfinite().all())

    if not run(precise):
        place = source_check.first_overflow(source_check.torch_trace(lambda: run(precise), precise))
        where = f", first in {place}" if place else ""
        return CheckFailed(f"{error}, as the network itself does in float32{where}. Nothing was published")
    if kind not in DTYPES or run(lowered):
        return None
    inner = lowered.network if isinstance(lowered, casting.Lowered) else lowered
    found = source_check.first_overflow(source_check.torch_trace(lambda: run(lowered), inner))
    name = found.split()[1] if found else "MODULE"
    return CheckFailed(
        f"the network overflows in {kind}, which ends at {torch.finfo(DTYPES[kind]).max:,.0f}"
        f"{f', first in {found}' if found else ''}, and not in float32: keep that part in float32 with `keep` "
        f"'{name}' (again, if another is named then), or export bf16, which reaches as far. Nothing was published"
    )


@contextmanager
def naming_overflow(precise: nn.Module, lowered: nn.Module, kind: str, inputs: tuple[Floats, ...]) -> Iterator[None]:
    """Let a comparison that fails since a type is too small name the module; see `overflow` for the arguments."""
    try:
        yield
    except CheckFailed as error:
        seen = error.inputs if isinstance(error, parity.NotFinite) else inputs
        if (cause := overflow(error, precise, lowered, kind, seen)) is None:
            raise
        raise cause from error


def export_bundle(
    models: Models,
    out: Path,
    images: Images | NDArray[np.uint8],
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    kind: str = "fp32",
    keep: Sequence[str] = (),
    denoising: Denoising | None = None,
) -> Exported:
    """Write the engines of one precision and their sidecars into `out`, once they are found to agree with PyTorch.

    images: see `Images`; an array [n, C, H, W] is for comparisons alone. kind: one of `precision.OPSETS`. keep: shell
    patterns of module names that stay float32. denoising: what `denoising.judge` found, for the sidecar. Everything is
    written beside `out` first and moved there at the end: after an error in export or parity `out` is as it was.

    Raises CheckFailed on a mismatch or damaged weights, UsageError when `out` holds a bundle of another model or what
    is asked cannot be combined, EnvironmentFault when `out` cannot be written.
    """
    images, (unet, classifier) = images if isinstance(images, Images) else Images(images), models
    if kind not in OPSETS:
        raise UsageError(f"`kind` {kind} is not known: {', '.join(OPSETS)}")
    if keep and kind == "fp32":
        raise UsageError("`keep` does nothing with `kind` fp32: leave it out, or ask for another precision")
    for module, what in ((unet.network, "UNet"), (classifier.network, "classifier")):
        refuse_bad_weights(module.eval(), what)
    pixels, counts = comparable(images.parity, kind, weight_bytes(unet.network))
    against, of_classifier = compared_with(models)
    for note in (*unet.notes, *classifier.notes):
        say(note)
    check_sources(models, pixels)
    unet_file, classifier_file = file_names(kind)
    if not force:
        refuse_replacement(out, {unet_file: unet.weights_sha256, classifier_file: classifier.weights_sha256})
    versions = installed_versions("torch", "onnx", "onnxscript", "diffusers", "onnxruntime")
    if kind not in QUANTIZED:
        versions.pop("onnxruntime", None)  # it had no part in the file
    versions = {"densepure-rt": __version__} | versions
    smaller = lowered(models, kind, keep)
    with Publication(out) as publication:
        say(f"exporting {unet_file} and {classifier_file}")
        files = publication.folder / unet_file, publication.folder / classifier_file
        with publication.writing():  # large weights
            step, classify = contents(smaller, kind, keep, images, files)
        exempt = (*TIME_EMBEDDING, *keep) if kind in DTYPES else (*keep, PREPROCESSING)
        for name, content in ((unet_file, step), (classifier_file, classify)):
            if name == unet_file or classifier.onnx is None:  # an ONNX file's precision is its own
                precision.check_types(content, kind, exempt)
            if kind in QUANTIZED and kind not in precision.CPU_ONLY:
                refuse_for_tensorrt(onnx.load_model_from_string(content), name)
        classifier_ref, unet_ref = (
            publication.write(name, content) for name, content in ((classifier_file, classify), (unet_file, step))
        )
        say(f"comparing numbers with {against}")
        fed = parity.first_inputs(unet, pixels), (first_state(pixels.astype(np.int32), 1.0),)
        with naming_overflow(unet.network, smaller.unet.network, kind, fed[0]):
            steps = list(parity.step_differences(files[0], TorchReference(unet), pixels, kind, counts))
            worst_step = parity.check(steps, kind)
        with naming_overflow(classifier.network, smaller.classifier.network, kind, fed[1]):
            logits = list(parity.classifier_differences(files[1], as_function(classifier.network), pixels, kind))
            worst_logits = parity.check(logits, kind, of_classifier)
        if kind != "fp32":
            say(f"comparing labels with {against}")
        labels = _compared_labels(models, smaller, files, kind, images)
        by, compared = parity.evaluator(kind), (labels.total, labels.disagreements) if labels else (0, 0)
        publication.add(
            ClassifierSidecar(
                "classify",
                classifier_ref,
                classifier.image,
                PIXEL_RANGE,
                kind,
                opset_of(classify),
                classifier.weights_sha256,
                versions,
                classifier.class_names,
                preprocessing=dataclasses.asdict(classifier.preprocessing) if classifier.preprocessing else None,
                data=data_ref(files[1]),
                accuracy=Accuracy(by, len(logits), worst_logits.relative_l2, *compared),
            )
        )
        publication.add(
            StepSidecar(
                "step",
                unet_ref,
                unet.image,
                PIXEL_RANGE,
                kind,
                OPSETS[kind],
                unet.weights_sha256,
                versions,
                unet.schedule,
                unet.variance,
                unet.prediction,
                unet.clip,
                classifier_ref,
                data=data_ref(files[0]),
                accuracy=Accuracy(by, len(steps), worst_step.relative_l2, *compared),
                timestep_rule=unet.timestep_rule,
                attention=unet.attention,
                denoising=denoising,
            )
        )
        say("publishing")
        return Exported(
            out / unet_file,
            out / classifier_file,
            kind,
            by,
            worst_step,
            worst_logits,
            len(steps) + len(logits),
            {"unet": types_of(step), "classifier": types_of(classify)},
            labels,
            against,
            denoising,
        )


def _compared_labels(
    models: Models, smaller: Models, files: tuple[Path, Path], kind: str, images: Images
) -> parity.LabelParity | None:
    """The labels of the files, or for bf16 of the modules that they were made from, against float32 PyTorch."""
    if kind == "fp32" or not (images.labelled and images.samples):
        return None
    if kind == "bf16":
        second, by = torch_labels(smaller), "PyTorch in bfloat16, not the files"
    else:
        second, by = parity.file_labels(*files, kind), parity.evaluator(kind)
    found = parity.compare_labels((torch_labels(models), second), by, models, images.labelled, images.samples)
    parity.check_labels(found, kind)
    return found


def torch_labels(models: Models) -> parity.Labeller:
    return parity.labeller(TorchReference(models.unet).step, as_function(models.classifier.network))
