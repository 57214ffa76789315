"""The bundle: engine files, and beside each a JSON sidecar that says what it is and what its bytes hash to.

The sidecar of `unet.onnx` is `unet.onnx.json`. A step engine names the classifier that it was exported with. A sidecar
proves integrity, not origin: who can write both files is not stopped; `--engine-sha256` pins one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from densepure_rt import files
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.runtime import gpu
from densepure_rt.runtime.schedule import Schedule, ScheduleName, TimestepRule, Variance
from densepure_rt.runtime.transport import transfer_fault

SCHEMA_VERSION = 1
PIXEL_RANGE = (-1.0, 1.0)  # what the runtime feeds
MAX_STEPS = 1_000_000  # of a schedule; published ones have 1000 or 4000
Kind = Literal["step", "classify"]
# What a network gives: the noise (Ho et al. 2020), v (Salimans & Ho 2022) or the clean image; the clean image, but from
# x / signal and sigma / signal (Karras et al. 2022; Song et al. 2023); or there is no network: pixels pass as they are.
Prediction = Literal["epsilon", "v", "x0", "denoiser", "none"]
Flavour = Literal["tensorrt", "tensorrt-rtx"]
ONNX_SUFFIX = ".onnx"
PLAN_SUFFIXES: dict[Flavour, str] = {"tensorrt-rtx": ".rtx.plan", "tensorrt": ".plan"}  # the longer first
DATA_KEY = "densepure_rt.data"  # under which a graph's own metadata says which weights it reads: `data_mark`
RTX_MAGIC = b"vtrt"  # the first bytes of every plan of tensorrt-rtx 1.7
UNKNOWN = "unknown"  # the version of a plan that has no sidecar
# Fields of a sidecar that may be absent.
OPTIONAL = ("plan", "data", "accuracy", "preprocessing", "attention", "denoising")
T = TypeVar("T")


@dataclass(frozen=True)
class FileRef:
    """A file by name, in the folder of the sidecar that names it, and by the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What a TensorRT plan was built from, by what and for which GPUs.

    flavour, version: the library; a plan runs on that flavour and version alone. batches: the batch sizes that it
    takes, one fixed profile each, in this order. compute_capabilities: such as "8.6". gpu: the one that it was built
    on, or None. onnx: what it was built from. types: element types that its convolutions and matrix products multiply,
    with their number. recipe: the options of the build, named as those of `densepure-rt export` with underscores.
    """

    flavour: Flavour
    version: str
    batches: tuple[int, ...]
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    onnx: FileRef
    types: Mapping[str, int]
    recipe: Mapping[str, str]


@dataclass(frozen=True)
class Accuracy:
    """How far an ONNX file was from float32 PyTorch when it was exported.

    by: what evaluated it. relative_l2: the worst of so many comparisons of its outputs. labels: how many labels of its
    bundle were compared, on equal noise, and labels_differ: how many were not PyTorch's; both 0 where none were.
    """

    by: str
    comparisons: int
    relative_l2: float
    labels: int
    labels_differ: int


Verdict = Literal["as declared", "doubted", "not judged"]


@dataclass(frozen=True)
class Denoising:
    """How well a network denoised in one step when it was exported, as it was declared and otherwise.

    images: how many; made_up: whether they are no real ones. error, shrinkage, other_error: mean squared errors against
    the clean images in [-1, 1], by sigma: as declared, of the best affine estimate, and of the declaration that came
    next to it or before it. other: that declaration, as options; instead_of: what they replace. Both are empty where
    no other was tried.
    """

    verdict: Verdict
    images: int
    made_up: bool
    error: Mapping[str, float]
    shrinkage: Mapping[str, float]
    other: str = ""
    instead_of: str = ""
    other_error: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sidecar:
    """What an engine file is.

    image: [channels, height, width]. pixel_range: of the pixels that the engine works on. plan: None for an ONNX file.
    data: the file of weights beside a graph that is too large to hold them; the graph names its hash too, so that the
    graph's own hash binds both. accuracy: of the ONNX file, which a plan was built from.
    """

    kind: Kind
    file: FileRef
    image: tuple[int, int, int]
    pixel_range: tuple[float, float]
    precision: str
    opset: int
    weights_sha256: str
    versions: Mapping[str, str]
    plan: Plan | None = field(default=None, kw_only=True)
    data: FileRef | None = field(default=None, kw_only=True)
    accuracy: Accuracy | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class StepSidecar(Sidecar):
    """A step graph: how its network was noised, what it predicts, and the classifier that belongs to it.

    prediction: what the network's output is; the graph turns it into x0 itself. clip: of x0, or None. timestep_rule:
    how a run finds the timestep of its sigma, unless it is told otherwise. attention: how it is split, in words, where
    its weights do not tell. denoising: what the check at export found.
    """

    schedule: Schedule
    variance: Variance
    prediction: Prediction
    clip: tuple[float, float] | None
    classifier: FileRef
    timestep_rule: TimestepRule = field(default="nearest", kw_only=True)
    attention: str | None = field(default=None, kw_only=True)
    denoising: Denoising | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ClassifierSidecar(Sidecar):
    """A classifier. preprocessing: what its graph does to pixels before its network sees them, for who reads it."""

    class_names: tuple[str, ...]
    preprocessing: Mapping[str, Any] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Bundle:
    """A step engine and a classifier whose sidecars fit together.

    sidecars: SHA-256 of the two sidecars' files; None for a plan that is taken for what its name says.
    """

    unet: StepSidecar
    classifier: ClassifierSidecar
    unet_path: Path
    classifier_path: Path
    sidecars: tuple[str | None, str | None] = (None, None)


def data_mark(data: FileRef) -> str:
    """What a graph's metadata says of its file of weights: hash and name, so that the graph's own hash binds both."""
    return f"{data.sha256} {data.name}"


def sidecar_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def plan_path(engine: Path, flavour: Flavour) -> Path:
    """unet.onnx -> unet.plan, or unet.rtx.plan: plans of the two flavours may lie side by side."""
    return engine.with_name(engine.name.removesuffix(ONNX_SUFFIX) + PLAN_SUFFIXES[flavour])


def onnx_path(plan: Path) -> tuple[Path, Flavour]:
    """The ONNX file that a plan of this name would be built from, and the plan's flavour by its name."""
    flavour: Flavour = "tensorrt-rtx" if plan.name.endswith(PLAN_SUFFIXES["tensorrt-rtx"]) else "tensorrt"
    return plan.with_name(plan.name.removesuffix(PLAN_SUFFIXES[flavour]) + ONNX_SUFFIX), flavour


def sha256_of(path: Path) -> str:
    return files.sha256_of(path, "model")


def to_json(sidecar: Sidecar) -> str:
    fields = {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(sidecar)
    for name in OPTIONAL:
        if name in fields and fields[name] is None:
            del fields[name]
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


class _Fields:
    """The fields of a JSON object, each read once with its type checked; errors name the file and the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckFailed(f"{where} should be a JSON object, found {type(value).__name__}: export the bundle again")
        self.values: dict[str, Any] = value
        self.where = where

    def __call__(self, name: str, kind: type[T]) -> T:
        value = self.values.get(name)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            found = "nothing" if name not in self.values else repr(value)[:60]
            raise CheckFailed(
                f"{self.where}: {name!r} should be a {kind.__name__}, found {found}: export the bundle again"
            )
        try:
            return kind(value)  # type: ignore[call-arg]  # an int where a float is meant
        except OverflowError:
            raise CheckFailed(f"{self.where}: {name!r} is beyond any float: export the bundle again") from None

    def choice(self, name: str, allowed: tuple[str, ...]) -> Any:
        value = self(name, str)
        if value not in allowed:
            raise CheckFailed(f"{self.where}: {name!r} is {value!r}, this version knows {', '.join(allowed)}")
        return value

    def numbers(self, name: str, kind: type[T], count: int) -> Any:
        items = self.items(name, kind)
        if len(items) != count:
            raise CheckFailed(f"{self.where}: {name!r} should hold {count} numbers, found {len(items)}")
        return items

    def items(self, name: str, kind: type[T]) -> tuple[T, ...]:
        entries = _Fields({str(i): item for i, item in enumerate(self(name, list))}, f"{self.where}: {name!r}")
        return tuple(entries(index, kind) for index in entries.values)

    def mapping(self, name: str, kind: type[T]) -> dict[str, T]:
        entries = self.object(name)
        return {key: entries(key, kind) for key in entries.values}

    def object(self, name: str) -> _Fields:
        return _Fields(self.values.get(name), f"{self.where}: {name!r}")

    def optional(self, name: str, read: Callable[[_Fields], T]) -> T | None:
        return None if self.values.get(name) is None else read(self.object(name))


def _file_ref(fields: _Fields) -> FileRef:
    name, digest = fields("name", str), fields("sha256", str)
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckFailed(f"{fields.where} names {name!r}: a bundle's files lie in one folder")
    return FileRef(name, digest)


def _schedule(fields: _Fields) -> Schedule:
    schedule = Schedule(
        name=fields.choice("name", get_args(ScheduleName)),
        steps=fields("steps", int),
        beta_start=fields("beta_start", float),
        beta_end=fields("beta_end", float),
        timestep_scale=fields("timestep_scale", float),
    )
    if not (
        1 <= schedule.steps <= MAX_STEPS
        and 0 < schedule.beta_start <= schedule.beta_end < 1
        and 0 < schedule.timestep_scale < math.inf
    ):
        raise CheckFailed(f"{fields.where} is not a noise schedule ({schedule}): export the bundle again")
    return schedule


def _plan(fields: _Fields) -> Plan:
    plan = Plan(
        flavour=fields.choice("flavour", get_args(Flavour)),
        version=fields("version", str),
        batches=fields.items("batches", int),
        compute_capabilities=fields.items("compute_capabilities", str),
        gpu=None if fields.values.get("gpu") is None else fields("gpu", str),
        onnx=_file_ref(fields.object("onnx")),
        types=fields.mapping("types", int),
        recipe=fields.mapping("recipe", str),
    )
    if not plan.batches or min(plan.batches) < 1:
        raise CheckFailed(f"{fields.where}: 'batches' is {list(plan.batches)}: build the plan again")
    return plan


def _accuracy(fields: _Fields) -> Accuracy:
    return Accuracy(
        by=fields("by", str),
        comparisons=fields("comparisons", int),
        relative_l2=fields("relative_l2", float),
        labels=fields("labels", int),
        labels_differ=fields("labels_differ", int),
    )


def _denoising(fields: _Fields) -> Denoising:
    return Denoising(
        verdict=fields.choice("verdict", get_args(Verdict)),
        images=fields("images", int),
        made_up=fields("made_up", bool),
        error=fields.mapping("error", float),
        shrinkage=fields.mapping("shrinkage", float),
        other=fields("other", str),
        instead_of=fields("instead_of", str),
        other_error=fields.mapping("other_error", float),
    )


def read_sidecar(engine: Path) -> StepSidecar | ClassifierSidecar:
    """The sidecar of an engine file, checked field by field. Nothing of the engine itself is read.

    Raises UsageError when it is missing, CheckFailed when it is not what this version writes.
    """
    path = sidecar_path(engine)
    try:
        text = files.text(path, "sidecar")
    except OSError as error:
        raise UsageError(
            f"cannot read {path}, the sidecar of {engine.name} ({error.strerror}): copy it along with the engine, "
            f'or make a bundle with "densepure-rt export"'
        ) from error
    except UnicodeDecodeError as error:
        raise CheckFailed(f"{path} is not a text file: copy it again, or export the bundle again") from error
    try:
        fields = _Fields(json.loads(text), str(path))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of thousands of digits
        raise CheckFailed(f"{path} is not valid JSON ({error}): copy it again, or export the bundle again") from error
    if (version := fields("schema_version", int)) != SCHEMA_VERSION:
        raise CheckFailed(
            f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}: export the bundle again"
        )
    common: dict[str, Any] = {
        "kind": fields.choice("kind", get_args(Kind)),
        "file": _file_ref(fields.object("file")),
        "image": fields.numbers("image", int, 3),
        "pixel_range": fields.numbers("pixel_range", float, 2),
        "precision": fields("precision", str),
        "opset": fields("opset", int),
        "weights_sha256": fields("weights_sha256", str),
        "versions": fields.mapping("versions", str),
        "plan": fields.optional("plan", _plan),
        "data": fields.optional("data", _file_ref),
        "accuracy": fields.optional("accuracy", _accuracy),
    }
    if common["pixel_range"] != PIXEL_RANGE:
        raise CheckFailed(
            f"{path}: 'pixel_range' is {common['pixel_range']}, this version feeds {PIXEL_RANGE}: export it again"
        )
    if min(common["image"]) < 1:
        raise CheckFailed(f"{path}: 'image' is {common['image']}: export the bundle again")
    if common["kind"] == "classify":
        names = fields("class_names", list)
        if len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise CheckFailed(f"{path}: 'class_names' should be two names or more: export the bundle again")
        return ClassifierSidecar(
            **common,
            class_names=tuple(names),
            preprocessing=fields.optional("preprocessing", lambda found: found.values),
        )
    return StepSidecar(
        **common,
        schedule=_schedule(fields.object("schedule")),
        variance=fields.choice("variance", get_args(Variance)),
        prediction=fields.choice("prediction", get_args(Prediction)),
        clip=None if fields.values.get("clip") is None else fields.numbers("clip", float, 2),
        classifier=_file_ref(fields.object("classifier")),
        timestep_rule=fields.choice("timestep_rule", get_args(TimestepRule)),
        attention=None if fields.values.get("attention") is None else fields("attention", str),
        denoising=fields.optional("denoising", _denoising),
    )


def build_command(engine: Path, flavour: Flavour, sidecar: Sidecar | None, options: Iterable[str] = ()) -> str:
    """The command that builds the plan of this bundle on this machine."""
    words = ["densepure-rt export --target", flavour, "--out", str(engine.parent)]
    if sidecar is not None and sidecar.precision != "fp32":
        words += ["--precision", sidecar.precision]
    words += options
    if flavour == "tensorrt-rtx":
        with contextlib.suppress(EnvironmentFault):  # no GPU: it is built ahead of time, for one elsewhere
            words += ["--compute-capability", gpu.find().compute_capability]
    return " ".join(words)


def rebuild_command(engine: Path, sidecar: Sidecar) -> str:
    """The command that builds a plan again on this machine, with the options of its recipe."""
    assert sidecar.plan is not None
    options = ["--batch", ",".join(map(str, sidecar.plan.batches))] if sidecar.plan.batches else []
    for name, value in sidecar.plan.recipe.items():
        if value != "false":  # "true" is a flag
            options += ["--" + name.replace("_", "-")] + ([] if value == "true" else [value])
    return build_command(engine, sidecar.plan.flavour, sidecar, options)


def trusted_sidecar(plan: Path) -> StepSidecar | ClassifierSidecar:
    """What a plan without a sidecar is, if it is what its name says: all but the plan from the ONNX file's sidecar.

    The plan's hash is taken as found, so nothing vouches for its bytes.
    """
    onnx, flavour = onnx_path(plan)
    sidecar = read_sidecar(onnx)
    with files.opened(plan, "model") as file:
        if file.read(len(RTX_MAGIC)) == RTX_MAGIC:
            flavour = "tensorrt-rtx"
    built = Plan(flavour, UNKNOWN, (), (), None, sidecar.file, {}, {})
    ours = dataclasses.replace(sidecar, file=FileRef(plan.name, sha256_of(plan)), plan=built)
    if isinstance(ours, StepSidecar):
        classifier = plan_path(plan.with_name(ours.classifier.name), onnx_path(plan)[1])
        digest = sha256_of(classifier) if os.path.isfile(classifier) else ours.classifier.sha256
        ours = dataclasses.replace(ours, classifier=FileRef(classifier.name, digest))
    return ours


def verified_bytes(path: Path, expected_sha256: str) -> bytes:
    """The bytes of an engine file, if they are the ones that were promised.

    The very bytes that were hashed are handed on, so nothing can be swapped between the check and the use.
    """
    try:
        content = files.content(path, "model")
    except OSError as error:
        raise UsageError(
            f'cannot read {path} ({error.strerror}): give --engine an existing file, or run "densepure-rt export"'
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected_sha256:
        if fault := transfer_fault(path):
            raise CheckFailed(f"{path} is no engine: {fault}")
        raise CheckFailed(
            f"{path} has SHA-256 {found[:16]}..., its sidecar or --engine-sha256 says {expected_sha256[:16]}...: "
            f"the file is damaged or is another engine; copy it again, or export the bundle again"
        )
    return content


def verified_engine(path: Path, sidecar: Sidecar) -> bytes:
    """The bytes of an engine file, found to be what its sidecar promises, as is the file of weights beside it.

    Raises UsageError when one cannot be read, CheckFailed when one is another.
    """
    if sidecar.data is not None:
        data = path.with_name(sidecar.data.name)
        try:
            found = sha256_of(data)
        except OSError as error:
            raise UsageError(
                f"cannot read {data}, the weights of {path.name} ({error.strerror}): copy it along with the engine"
            ) from error
        if found != sidecar.data.sha256:
            if fault := transfer_fault(data):
                raise CheckFailed(f"{data} holds no weights: {fault}")
            raise CheckFailed(
                f"{data} has SHA-256 {found[:16]}..., its sidecar says {sidecar.data.sha256[:16]}...: the file is "
                f"damaged or belongs to another engine; copy it again, or export the bundle again"
            )
    return verified_bytes(path, sidecar.file.sha256)


def open_bundle(
    engine: Path, classifier: Path | None = None, engine_sha256: str | None = None, trust: bool = False
) -> Bundle:
    """The sidecars of a step engine and of its classifier (else `classifier`), found to fit together.

    trust: take plans without sidecars for what their names say. Raises UsageError or CheckFailed; the engines
    themselves are not read yet, unless to be trusted.
    """

    def sidecar_of(path: Path) -> StepSidecar | ClassifierSidecar:
        if trust and path.name.endswith(PLAN_SUFFIXES["tensorrt"]) and not sidecar_path(path).exists():
            return trusted_sidecar(path)
        return read_sidecar(path)

    if not os.path.isfile(engine):  # unlike Path.exists, it takes any name for an answer
        raise UsageError(missing_engine(engine))
    unet = sidecar_of(engine)
    if not isinstance(unet, StepSidecar):
        raise UsageError(f"{engine} is a classifier: give it as --classifier, and a step engine as --engine")
    if engine_sha256 is not None and engine_sha256.lower() != unet.file.sha256:
        raise CheckFailed(
            f"--engine-sha256 pins {engine_sha256[:16]}..., the sidecar of {engine} says {unet.file.sha256[:16]}..."
        )
    path = classifier or engine.with_name(unet.classifier.name)
    if classifier is None and path.name == engine.name:  # as in a model repository of Triton
        raise UsageError(
            f"the classifier of {engine} has the name of that file itself, and lies in another folder: name it with "
            f"--classifier"
        )
    if not os.path.isfile(path):
        raise UsageError(f"no classifier at {path}: copy it beside {engine.name}, or name one with --classifier")
    labels = sidecar_of(path)
    if not isinstance(labels, ClassifierSidecar):
        raise UsageError(f"{path} is a step engine, not a classifier")
    if classifier is None and labels.file.sha256 != unet.classifier.sha256:
        raise CheckFailed(
            f"{engine} was exported with another classifier than the {path.name} beside it: "
            f"name it with --classifier if it is meant, or export the bundle again"
        )
    if labels.image != unet.image:
        raise UsageError(
            f"{engine.name} takes images {list(unet.image)}, {path.name} takes {list(labels.image)}: "
            f"they cannot work together"
        )
    if flavour_of(unet) != flavour_of(labels):
        raise UsageError(
            f"{engine.name} is for {flavour_of(unet)}, {path.name} for {flavour_of(labels)}: one device runs both, so "
            f"name a classifier of the same kind with --classifier"
        )
    return Bundle(unet, labels, engine, path, (written_sha256(engine), written_sha256(path)))


def written_sha256(engine: Path) -> str | None:
    """Of its sidecar's file, where there is one."""
    return sha256_of(sidecar_path(engine)) if sidecar_path(engine).exists() else None


def flavour_of(sidecar: Sidecar) -> str:
    """What runs an engine: ONNX Runtime, or a flavour of TensorRT."""
    return sidecar.plan.flavour if sidecar.plan else "onnxruntime"


def missing_engine(engine: Path) -> str:
    if engine.name.endswith(PLAN_SUFFIXES["tensorrt"]):
        onnx, flavour = onnx_path(engine)
        if os.path.isfile(onnx):
            try:
                sidecar = read_sidecar(onnx)
            except (CheckFailed, UsageError):
                sidecar = None
            command = build_command(engine, flavour, sidecar)
            return f'no plan at {engine}, but {onnx.name} is there to build it from: run "{command}"'
    return f'no engine at {engine}: make one with "densepure-rt export", or leave --engine out'
