"""A bundle as a model repository of NVIDIA's Triton Inference Server: engines as they are, two models before them.

    unet/1/model.onnx         and its sidecar; a plan is model.plan, weights beside a graph keep their name
    classifier/1/model.onnx   and its sidecar
    predict/1/model.py        the loop, the votes and the rules of this package, which must be installed in
    certify/1/model.py        Triton's Python environment; they call the engines by BLS

Each has a config.pbtxt; those of predict and certify hold sigma, votes, alpha and the hashes of the engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from densepure_rt import files
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.rounding import exact
from densepure_rt.runtime.bundle import (
    UNKNOWN,
    Bundle,
    FileRef,
    Sidecar,
    sha256_of,
    sidecar_path,
    to_json,
    verified_engine,
)
from densepure_rt.runtime.device import CLASSIFY_INPUTS, CLASSIFY_OUTPUTS, MAX_BATCH, STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.onnxruntime_api import refuse_unrunnable
from densepure_rt.runtime.open_device import default_batch
from densepure_rt.runtime.schedule import Coefficients
from densepure_rt.runtime.triton_device import CLASSIFY_MODEL, STEP_MODEL, VERSION
from densepure_rt.serving.models import outputs_of, pixels_of
from densepure_rt.serving.service import ModelName
from densepure_rt.serving.triton_model import MODEL_NAMES
from densepure_rt.smoothing.settings import PREDICT_N, Settings

MODELS = (STEP_MODEL, CLASSIFY_MODEL, *MODEL_NAMES)
CPU_CALLERS = 2  # instances of each engine on a CPU, one thread each, and callers; raise all to the cores there are
GPU_CALLERS = 2  # callers of one instance: one batch runs while the next is made
CONFIG, OLD_CONFIG = "config.pbtxt", "config.pbtxt.old"
PYTHON_MODEL = '''"""Needs densepure-rt in the Python environment of this server; its parameters are in config.pbtxt."""

from densepure_rt.triton_model import TritonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def export_repository(bundle: Bundle, out: Path, batch: int | None = None, force: bool = False) -> list[Path]:
    """Write the four models of a bundle into the model repository `out`; their folders, in the order of MODELS.

    batch: items in every call of an engine, else what suits it. Other models in `out` stay as they are. Nothing in
    `out` changes until all four are written. force: a configuration of `predict` or `certify` that was another one
    stays beside the new one, as config.pbtxt.old.

    Raises UsageError for a bundle or a batch that Triton cannot take, or when one of the four is there and not `force`;
    CheckFailed when a file is not what its sidecar promises; EnvironmentFault when `out` cannot be written.
    """
    refuse_untakeable(bundle)
    items = chosen_batch(bundle, batch)
    if not force and (there := [name for name in MODELS if os.path.lexists(out / name)]):
        raise UsageError(
            f"{out} already has {', '.join(there)}: choose another `out`, or replace these models with `force`"
        )
    with published(out) as folder:
        classifier = write_engine(folder / CLASSIFY_MODEL, bundle.classifier_path, bundle.classifier)
        unet = dataclasses.replace(bundle.unet, classifier=classifier)
        engine = write_engine(folder / STEP_MODEL, bundle.unet_path, unet)
        callers = CPU_CALLERS if bundle.unet.plan is None else GPU_CALLERS
        shared = shared_parameters(engine, classifier, items, callers)
        classes = len(bundle.classifier.class_names)
        write(folder / STEP_MODEL / CONFIG, engine_config(STEP_MODEL, bundle.unet, classes, items))
        write(folder / CLASSIFY_MODEL / CONFIG, engine_config(CLASSIFY_MODEL, bundle.classifier, classes, items))
        for name in MODEL_NAMES:
            new = model_config(name, bundle, shared).encode()
            write(folder / name / CONFIG, new)
            if (old := old_config(out / name, new)) is not None:
                write(folder / name / OLD_CONFIG, old)
            write(folder / name / str(VERSION) / "model.py", PYTHON_MODEL)
    return [out / name for name in MODELS]


def old_config(model: Path, new: bytes) -> bytes | None:
    """Return a model folder's configuration that is not the new one, such as an edited one, or the one it keeps."""
    for name in (CONFIG, OLD_CONFIG):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if (found := files.content(model / name, "sidecar")) != new:
                return found
    return None


def refuse_untakeable(bundle: Bundle) -> None:
    """Raise UsageError for engines that Triton cannot run, or not rightly."""
    for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier)):
        plan = sidecar.plan
        if plan is None:
            refuse_unrunnable(path.name, sidecar.precision, "cpu")
        elif plan.flavour == "tensorrt-rtx":
            raise UsageError(
                f"{path.name} is a plan of tensorrt-rtx, which Triton does not run: build one with "
                f'"densepure-rt export --target tensorrt" on a GPU of the server, or give the ONNX engine'
            )
        elif plan.version == UNKNOWN:
            raise UsageError(f"{path.name} has no sidecar that vouches for it: build the plan again")


def chosen_batch(bundle: Bundle, batch: int | None) -> int:
    """The batch to call the engines with. Raises UsageError when plans were not built for it."""
    if batch is not None and not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"`batch` {batch}: it must be between 1 and {MAX_BATCH}")
    if bundle.unet.plan is None or bundle.classifier.plan is None:
        return default_batch(bundle.unet.image) if batch is None else batch
    held = sorted(set(bundle.unet.plan.batches) & set(bundle.classifier.plan.batches))
    if not held or batch not in (None, *held):
        raise UsageError(
            f"{bundle.unet_path.name} and {bundle.classifier_path.name} were built for batches of "
            f"{', '.join(map(str, held)) or 'no size in common'}, not {batch or 'one of both'}: build them again with "
            f"`batch`, or ask for one that they have"
        )
    return held[-1] if batch is None else batch


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A folder to write the models into: when the block ends well they appear in `out`, else none does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary:
            folder = Path(temporary)
            yield folder
            moves = []
            for name in MODELS:  # the engines first: the models that call them check their hashes
                if os.path.lexists(out / name):
                    moves.append((out / name, folder / f"{name}.replaced"))
                moves.append((folder / name, out / name))
            move_all(moves)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {out} ({error.strerror or error}): choose another folder with `out`"
        ) from error


def move_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each, in their order, or none: where one fails, those before it go back, and its OSError is raised."""
    with contextlib.ExitStack() as back:
        for source, target in moves:
            source.rename(target)
            back.callback(target.rename, source)
        back.pop_all()


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_engine(folder: Path, path: Path, sidecar: Sidecar) -> FileRef:
    """An engine as Triton looks for it, its weights and its sidecar: what was hashed is what is written."""
    ref = FileRef(engine_name(sidecar), sidecar.file.sha256)
    write(folder / str(VERSION) / ref.name, verified_engine(path, sidecar))
    if sidecar.data is not None:  # the graph knows its weights by name
        copy = folder / str(VERSION) / sidecar.data.name
        shutil.copyfile(path.with_name(sidecar.data.name), copy)
        if sha256_of(copy) != sidecar.data.sha256:
            raise CheckFailed(f"{path.with_name(sidecar.data.name)} changed while it was copied: export it again")
    write(sidecar_path(folder / str(VERSION) / ref.name), to_json(dataclasses.replace(sidecar, file=ref)))
    return ref


def engine_name(sidecar: Sidecar) -> str:
    return "model.onnx" if sidecar.plan is None else "model.plan"


def engine_config(model: str, sidecar: Sidecar, classes: int, batch: int) -> str:
    """The configuration of an engine. Its first dimension is the batch, which nobody but the caller puts together."""
    image = [-1, *sidecar.image]
    dims = {"t": [-1], "coef": [-1, len(Coefficients._fields)], "finite": [-1], "logits": [-1, classes]}
    of_step = model == STEP_MODEL
    inputs, outputs = (STEP_INPUTS, STEP_OUTPUTS) if of_step else (CLASSIFY_INPUTS, CLASSIFY_OUTPUTS)
    if sidecar.plan is None:
        runs = [
            'platform: "onnxruntime_onnx"',
            'backend: "onnxruntime"',
            "# On a GPU: kind KIND_GPU, gpus [ 0 ] and count 1. Never on GPUs of two kinds: they are two classifiers.",
            f"instance_group [ {{ kind: KIND_CPU count: {CPU_CALLERS} }} ]",
            parameter("intra_op_thread_count", "1", "an instance is one thread"),
            parameter("inter_op_thread_count", "1"),
        ]
    else:
        profile = f' profile: [ "{sidecar.plan.batches.index(batch)}" ]' if len(sidecar.plan.batches) > 1 else ""
        runs = [
            f"# Built by TensorRT {sidecar.plan.version!r} on {sidecar.plan.gpu!r}; runs on that version alone.",
            'platform: "tensorrt_plan"',
            'backend: "tensorrt"',
            f"instance_group [ {{ kind: KIND_GPU count: 1 gpus: [ 0 ]{profile} }} ]",
        ]
    return config(
        model,
        [tensor(name, "FP32", dims.get(name, image)) for name in inputs],
        [tensor(name, "FP32", dims.get(name, image)) for name in outputs],
        runs,
    )


def model_config(model: ModelName, bundle: Bundle, shared: Sequence[str]) -> str:
    """The configuration of `predict` or `certify`; its parameters are read by `densepure_rt.serving.triton_model`."""
    settings = Settings() if bundle.unet.prediction != "none" else Settings(steps=0, votes=1)
    own = [
        parameter("sigma", exact(settings.sigma), "std of the smoothing noise in [0, 1] pixel units"),
        parameter("steps", f"{settings.steps}", "reverse steps"),
        parameter("votes", f"{settings.votes}", "votes a sample"),
        parameter("n", f"{PREDICT_N if model == 'predict' else settings.n}", "samples an image, at most"),
        parameter("alpha", exact(settings.alpha), "probability, at most, that an image gets a wrong answer"),
    ]
    if model == "certify":
        own += [
            parameter("method", settings.method, "sequential, or radius: how large it is"),
            parameter("radii", "", "that sequential decides, with commas; empty: 0 and sigma"),
        ]
    pixels, outputs = pixels_of(bundle.unet.image), outputs_of(len(bundle.classifier.class_names))[model]
    return config(
        model,
        [tensor(pixels.name, pixels.datatype, pixels.shape)],
        [tensor(output.name, output.datatype, output.shape) for output in outputs],
        ['backend: "python"', "instance_group [ { kind: KIND_CPU count: 1 } ]", *own, *shared],
    )


def shared_parameters(engine: FileRef, classifier: FileRef, batch: int, callers: int) -> list[str]:
    """Return the parameters of predict and certify on the engines and the key of their noise."""
    return [
        parameter("batch", f"{batch}", "items in every call of an engine"),
        parameter("callers", f"{callers}", "calls at the same time; a CPU wants as many as the engines have instances"),
        parameter("deadline_ms", "30000", "time of a request that names none: then what is known so far"),
        parameter("max_deadline_ms", "300000", "that a request may name, at most"),
        parameter(
            "key_file", "", "absolute path of the noise's secret, made where there is none; empty: new per start"
        ),
        parameter("engine", f"{STEP_MODEL}/{VERSION}/{engine.name}", "in this repository, a local folder"),
        parameter("engine_sha256", engine.sha256),
        parameter("classifier", f"{CLASSIFY_MODEL}/{VERSION}/{classifier.name}"),
        parameter("classifier_sha256", classifier.sha256),
    ]


def config(model: str, inputs: Sequence[str], outputs: Sequence[str], rest: Sequence[str]) -> str:
    """A config.pbtxt: protobuf's text format of Triton's ModelConfig."""
    lines = [
        f'name: "{model}"',
        "max_batch_size: 0  # Triton puts no requests together: the batches are made by whoever calls the engines",
        f"version_policy: {{ specific: {{ versions: [ {VERSION} ] }} }}",
        "response_cache { enable: false }  # an answer depends on the deadline and on the key, which are no inputs",
        "input [\n" + ",\n".join(inputs) + "\n]",
        "output [\n" + ",\n".join(outputs) + "\n]",
        *rest,
    ]
    return "\n".join(lines) + "\n"


def tensor(name: str, datatype: str, dims: Sequence[int]) -> str:
    known_as = "STRING" if datatype == "BYTES" else datatype  # the protocol's name and Triton's differ
    return f'  {{ name: "{name}" data_type: TYPE_{known_as} dims: [ {", ".join(map(str, dims))} ] }}'


def parameter(name: str, value: str, comment: str = "") -> str:
    line = f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}'
    return f"{line}  # {comment}" if comment else line
