"""A float32 bundle -> one in another precision, checked against it before it is published. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from densepure_rt._version import __version__
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.convert import parity, precision
from densepure_rt.export.convert.lowering import computed_in_float32, lowered
from densepure_rt.export.convert.parity import Difference, Exported
from densepure_rt.export.convert.precision import (
    CAST,
    CPU_ONLY,
    OPSETS,
    PREPROCESSING,
    QUANTIZED,
    STEPS,
    TIME_EMBEDDING,
)
from densepure_rt.export.convert.publish import LARGE, Publication, data_path, data_ref, file_names, refuse_replacement
from densepure_rt.export.models.check_images import Images
from densepure_rt.export.models.onnx_graph import (
    checked,
    described,
    nodes_within,
    opset_of,
    parsed_model,
    refuse_for_tensorrt,
    refuse_other_weights,
    scopes,
    types_of,
)
from densepure_rt.files import content as content_of
from densepure_rt.runtime.bundle import (
    DATA_KEY,
    Accuracy,
    Bundle,
    FileRef,
    Sidecar,
    data_mark,
    sha256_of,
    verified_engine,
)
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS, Floats
from densepure_rt.runtime.machine import installed_versions
from densepure_rt.runtime.onnx_device import new_session, run_session

ROUNDED = "ONNX Runtime on the CPU in float32, each result rounded to "  # and the precision
INPUTS, OUTPUTS = (STEP_INPUTS, CLASSIFY_INPUTS), (STEP_OUTPUTS, CLASSIFY_OUTPUTS)
Files = tuple[Path, Path]  # of the step graph and the classifier
S = TypeVar("S", bound=Sidecar)
ADVICE = "the precision is at fault: keep more in float32 with `keep`, or ask for another one"


def lower_bundle(
    bundle: Bundle,
    out: Path,
    kind: str,
    images: Images,
    keep: Sequence[str] = (),
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the engines of a float32 bundle in another precision into `out`, once they are found to agree with it.

    kind: one of `precision.OPSETS`, but fp32. images: what they are compared on, and calibrated on. keep: shell
    patterns of module names that stay float32. Nothing in `out` changes after an error.

    Raises CheckFailed on a mismatch or damaged engines, UsageError when `out` holds a bundle of another model or what
    is asked cannot be combined, EnvironmentFault when `out` cannot be written.
    """
    refuse_unlowerable(bundle, kind)
    names, sources, sidecars = (
        file_names(kind),
        (bundle.unet_path, bundle.classifier_path),
        (bundle.unet, bundle.classifier),
    )
    if not force:
        refuse_replacement(out, {name: sidecar.weights_sha256 for name, sidecar in zip(names, sidecars, strict=True)})
    models = [loaded(path, sidecar) for path, sidecar in zip(sources, sidecars, strict=True)]
    refuse_unmatched(models, keep)
    with Publication(out) as publication:
        say(f"writing {names[0]} and {names[1]}")
        pairs = zip(names, converted(models, bundle, kind, images, keep), strict=True)
        step_ref, classifier_ref = (written(publication, name, model, kind, keep) for name, model in pairs)
        files = publication.folder / names[0], publication.folder / names[1]
        say(f"comparing numbers with {sources[0].name} and {sources[1].name}")
        steps, logits = differences(bundle, files, kind, images.parity)
        worst = parity.check(steps, kind, sources[0].name, ADVICE), parity.check(logits, kind, sources[1].name, ADVICE)
        labels = compared_labels(bundle, files, kind, images, say)
        by, found = parity.evaluator(kind), (labels.total, labels.disagreements) if labels else (0, 0)

        def changed(sidecar: S, ref: FileRef, file: Path, count: int, worst: Difference) -> S:
            used = installed_versions("onnx", "onnxruntime") if kind in QUANTIZED else installed_versions("onnx")
            return dataclasses.replace(
                sidecar,
                file=ref,
                precision=kind,
                opset=opset_of(content_of(file, "model")),
                versions=dict(sidecar.versions) | {"densepure-rt": __version__} | used,
                data=data_ref(file),
                accuracy=Accuracy(by, count, worst.relative_l2, *found),
            )

        publication.add(changed(bundle.classifier, classifier_ref, files[1], len(logits), worst[1]))
        unet = dataclasses.replace(bundle.unet, classifier=classifier_ref)
        publication.add(changed(unet, step_ref, files[0], len(steps), worst[0]))
        types = {
            part: types_of(content_of(file, "model")) for part, file in zip(("unet", "classifier"), files, strict=True)
        }
        against = f"{sources[0].name} and {sources[1].name}"
        say("publishing")
    return Exported(out / names[0], out / names[1], kind, by, *worst, len(steps) + len(logits), types, labels, against)


def refuse_unlowerable(bundle: Bundle, kind: str) -> None:
    """Raise UsageError unless the bundle is float32 ONNX files, and `kind` another precision."""
    known = [name for name in OPSETS if name != "fp32"]
    if kind not in known:
        raise UsageError(f"`precision` {kind}: a float32 bundle is written anew in {', '.join(known)}")
    for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier)):
        if sidecar.plan is not None or sidecar.precision != "fp32":
            what = "a plan" if sidecar.plan is not None else f"{sidecar.precision} already"
            raise UsageError(f"{path.name} is {what}: give the float32 ONNX engine that it was made from")


def loaded(path: Path, sidecar: Sidecar) -> onnx.ModelProto:
    """Read the graph that a sidecar promises, with the weights beside it."""
    model = parsed_model(verified_engine(path, sidecar), path)
    refuse_other_weights(model, path)
    if sidecar.data is not None:
        onnx.load_external_data_for_model(model, str(path.parent))
    del model.metadata_props[:]  # which named those weights
    return model


def refuse_unmatched(models: Sequence[onnx.ModelProto], keep: Sequence[str]) -> None:
    """Raise UsageError for a pattern that matches no module of either graph."""
    names = list(dict.fromkeys(name for model in models for node in model.graph.node for name in scopes(node)))
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            like = ", ".join(names[:: max(1, len(names) // 6)][:6]) or "(the graphs name none)"
            raise UsageError(f"`keep` {pattern} matches no module: their names are like {like}")


def converted(
    models: Sequence[onnx.ModelProto], bundle: Bundle, kind: str, images: Images, keep: Sequence[str]
) -> Iterator[onnx.ModelProto]:
    """Yield the step graph and the classifier in another precision."""
    if kind in CAST:
        yield from (lowered(model, kind, keep) for model in models)
        return
    if images.calibration is None:
        raise UsageError(f"`precision` {kind} is calibrated on training images: give them with `calibration`")
    if bundle.unet.data is not None or bundle.classifier.data is not None:
        raise UsageError(f"`precision` {kind}: graphs with their weights beside them are not quantized here: use fp16")
    step, classify = (checked(model) for model in models)
    feeds = precision.calibration_feeds(step, bundle.unet, images.calibration)
    quantize = precision.to_fp8 if kind == "fp8" else partial(precision.quantize_int8, cpu=kind == "int8-cpu")
    for content, fed in ((step, feeds.step), (classify, feeds.classify)):
        yield onnx.load_model_from_string(quantize(content, fed, nodes_within(content, (*keep, PREPROCESSING))))


def written(publication: Publication, name: str, model: onnx.ModelProto, kind: str, keep: Sequence[str]) -> FileRef:
    """Write a graph, found to be sound and in its precision; large weights beside it."""
    path = publication.folder / name
    if model.ByteSize() <= LARGE:
        content = checked(model)
        ref = publication.write(name, content)
    else:
        data = data_path(path)
        with publication.writing():
            onnx.save_model(model, str(path), save_as_external_data=True, location=data.name)
            graph = onnx.load_model(str(path), load_external_data=False)
            if data.exists():  # small tensors stay in the graph
                onnx.helper.set_model_props(graph, {DATA_KEY: data_mark(FileRef(data.name, sha256_of(data)))})
            content = checked(graph, path)
        ref = FileRef(name, sha256_of(path))
    if any(scopes(node) for node in model.graph.node):  # else it was an ONNX file, and nothing says what is what
        precision.check_types(content, kind, (*keep, PREPROCESSING, *(TIME_EMBEDDING if kind in CAST else ())))
    if kind in QUANTIZED and kind not in CPU_ONLY:
        refuse_for_tensorrt(onnx.load_model_from_string(content), name)
    return ref


def rounding(file: Path) -> onnx.ModelProto:
    return computed_in_float32(onnx.load_model(str(file)))


def rounded_runs(files: Files) -> tuple[parity.Run, parity.Run]:
    """Return functions that evaluate the two graphs of a smaller type as a GPU would."""
    step, classify = (
        parity.runner(rounding(file).SerializeToString(), file.name, inputs, outputs, "fp32")
        for file, inputs, outputs in zip(files, INPUTS, OUTPUTS, strict=True)
    )
    return step, classify


def differences(
    bundle: Bundle, files: Files, kind: str, pixels: NDArray[np.uint8]
) -> tuple[list[Difference], list[Difference]]:
    """Compare the numbers of two files with those of the float32 bundle, and find what would overflow on a GPU."""
    size = sum(path.stat().st_size for path in (bundle.unet_path, data_path(bundle.unet_path)) if path.exists())
    reference = parity.EngineReference(parity.step_runner(bundle.unet_path, "fp32"), bundle.unet)
    classify = parity.classify_runner(bundle.classifier_path, "fp32")

    def compare(
        pixels: NDArray[np.uint8], counts: Sequence[int], runs: Sequence[parity.Run | None]
    ) -> tuple[list[Difference], list[Difference]]:
        with naming_overflow(files[0], kind, reference.run):
            steps = list(parity.step_differences(files[0], reference, pixels, kind, counts, runs[0]))
        with naming_overflow(files[1], kind, classify):
            logits = list(parity.classifier_differences(files[1], parity.logits_of(classify), pixels, kind, runs[1]))
        return steps, logits

    if kind == "fp16" and not any(data_path(file).exists() for file in files):
        compare(pixels[:2], STEPS[:1], rounded_runs(files))
    return compare(*parity.comparable(pixels, kind, size), (None, None))


@contextmanager
def naming_overflow(file: Path, kind: str, source: parity.Run) -> Iterator[None]:
    """Let a file that gives NaN or Inf where its float32 source does not be told by the first node that does."""
    try:
        yield
    except parity.NotFinite as error:
        if not all(np.isfinite(value).all() for value in source(error.feed)):
            raise CheckFailed(f"{error}, as the float32 engine itself does. Nothing was published") from error
        model = rounding(file) if kind in CAST else onnx.load_model(str(file))
        node = first_not_finite(model, error.feed)
        what, module = (described(node), (scopes(node) or ["MODULE"])[-1]) if node else ("no node alone", "MODULE")
        raise CheckFailed(
            f"{error}, first in {what}, and the float32 engine does not: keep that part in float32 with `keep` "
            f"'{module}' (again, if another is named then). Nothing was published"
        ) from error


def first_not_finite(model: onnx.ModelProto, feed: Mapping[str, Floats]) -> onnx.NodeProto | None:
    """Find the first node of a graph that gives NaN or Inf for these inputs."""
    model = onnx.shape_inference.infer_shapes(model)
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    known = {value.name for value in model.graph.output}
    inner = [v for v in model.graph.value_info if v.type.tensor_type.elem_type in floating and v.name not in known]
    model.graph.output.extend(inner)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = new_session(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in inner]
    found = dict(zip(names, run_session(session, names, feed), strict=True))
    broken = {name for name, value in found.items() if not np.isfinite(value).all()}
    return next((node for node in model.graph.node if broken.intersection(node.output)), None)


def compared_labels(
    bundle: Bundle, files: Files, kind: str, images: Images, say: Callable[[str], None]
) -> parity.LabelParity | None:
    """Compare the labels of two files with those of the float32 bundle, on equal noise."""
    if not (images.labelled and images.samples):
        return None
    say(f"comparing labels with {bundle.unet_path.name} and {bundle.classifier_path.name}")
    if kind in CAST:
        step, classify = rounded_runs(files)
        second, by = (
            parity.labeller(lambda *state: step(parity.fed(*state)), parity.logits_of(classify)),
            ROUNDED + kind,
        )
    else:
        second, by = parity.file_labels(*files, kind), parity.evaluator(kind)
    first = parity.file_labels(bundle.unet_path, bundle.classifier_path, "fp32")
    found = parity.compare_labels((first, second), by, bundle, images.labelled, images.samples)
    parity.check_labels(found, kind)
    return found
