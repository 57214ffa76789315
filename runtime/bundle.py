"""The bundle: engine files, and beside each a JSON sidecar that says what it is and what its bytes hash to.

The sidecar of `unet.onnx` is `unet.onnx.json`. A step engine names the classifier that it was exported with. A sidecar
proves integrity, not origin: who can write both files is not stopped; `--engine-sha256` pins one.

This module is long because the sidecar's fields and every check of them belong together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from densepure_rt import files
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.json_files import adapter, strict
from densepure_rt.runtime import gpu
from densepure_rt.runtime.schedule import Chain, Schedule, TimestepRule, Variance, make_chain
from densepure_rt.runtime.transport import transfer_fault
from densepure_rt.text import all_printable, printable

SCHEMA_VERSION = 1
PIXEL_RANGE = (-1.0, 1.0)  # what the runtime feeds
ON_GPU = "fp16"  # the precision of the model that ships where a GPU runs it, unless an engine is named
MAX_STEPS = 1_000_000  # of a schedule; published ones have 1000 or 4000
Kind = Literal["step", "classify"]
# What a network gives: the noise (Ho et al. 2020), v (Salimans & Ho 2022) or the clean image; the clean image, but from
# x / signal and sigma / signal (Karras et al. 2022; Song et al. 2023); or there is no network: pixels pass as they are.
Prediction = Literal["epsilon", "v", "x0", "denoiser", "none"]
Flavour = Literal["tensorrt", "tensorrt-rtx"]
ONNX_SUFFIX = ".onnx"
STEP_ENGINE = "unet.onnx"  # of a bundle in float32
PLAN_SUFFIXES: dict[Flavour, str] = {"tensorrt-rtx": ".rtx.plan", "tensorrt": ".plan"}  # the longer first
DATA_KEY = "densepure_rt.data"  # under which a graph's own metadata says which weights it reads: `data_mark`
# How a plan begins: a tag, the version of the format, the plan's size and, a byte each, the library's version. Source:
# printPlanVersion of trtexec, samples/common/sampleEngines.cpp of NVIDIA/TensorRT; where the size stands was read off
# plans of tensorrt-rtx 1.7.
HEADER = struct.Struct("<4sI8xQ4B")
TAGS: dict[bytes, Flavour] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
KNOWN_FORMAT = 0  # the one version of the format that has been seen
UNKNOWN = "unknown"  # the version of a plan that has no sidecar
# Fields of a sidecar that may be absent.
OPTIONAL = ("plan", "data", "accuracy", "preprocessing", "attention", "denoising")
Positive = Annotated[int, Field(ge=1)]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")]  # such as "8.6"
MAY_BE_ABSENT = Field(default=None)  # from a file that is read
T = TypeVar("T")


def _alone(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("should be a name without folders, since a bundle's files lie in one folder")
    return name


@dataclass(frozen=True)
class FileRef:
    """A file by name, in the folder of the sidecar that names it, and by the SHA-256 of its bytes."""

    name: Annotated[str, AfterValidator(_alone)]
    sha256: str


@dataclass(frozen=True)
class Plan:
    """The origin of a TensorRT plan: what it was built from, by what and for which GPUs.

    flavour, version: the library; a plan runs on that flavour and version alone, or where it is `version_compatible`
    on that version's lean library, beside a later one. batches: the batch sizes that it
    takes, one fixed profile each, in this order. compute_capabilities: such as "8.6". gpu: the one that it was built
    on, or None. onnx: what it was built from. types: element types that its convolutions and matrix products multiply,
    with their number. recipe: the options of the build, named as those of `densepure-rt export` with underscores.
    """

    flavour: Flavour
    version: str
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)]  # of one that is read
    compute_capabilities: tuple[Capability, ...]
    gpu: Annotated[str | None, MAY_BE_ABSENT]
    onnx: FileRef
    types: Mapping[str, int]
    recipe: Mapping[str, str]

    @property
    def version_compatible(self) -> bool:
        return self.recipe.get("version_compatible") == "true"

    @property
    def dla_core(self) -> int | None:
        """Tell which DLA core of a Jetson runs the layers that it can, None where the GPU runs all."""
        core = self.recipe.get("use_dla_core", "")
        return int(core) if re.fullmatch(r"[0-9]{1,2}", core) else None


@dataclass(frozen=True)
class Accuracy:
    """The distance of an ONNX file from its float32 source when it was made: PyTorch, or a float32 bundle.

    by: what evaluated it. relative_l2: the worst of so many comparisons of its outputs. labels: how many labels of its
    bundle were compared, on equal noise, and labels_differ: how many were not the source's; both 0 where none were.
    """

    by: str
    comparisons: int
    relative_l2: float
    labels: int
    labels_differ: int


Verdict = Literal["as declared", "doubted", "not judged"]


@dataclass(frozen=True)
class Denoising:
    """The result of the denoising check at export: one step, as declared and under the alternatives.

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
    """The description of an engine file.

    image: [channels, height, width]. pixel_range: of the pixels that the engine works on. plan: None for an ONNX file.
    data: the file of weights beside a graph that is too large to hold them; the graph names its hash too, so that the
    graph's own hash binds both. accuracy: of the ONNX file, which a plan was built from.
    """

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)  # fields of later versions are passed over
    kind: Kind
    file: FileRef
    image: tuple[Positive, Positive, Positive]
    pixel_range: tuple[float, float]
    precision: str
    opset: int
    weights_sha256: str
    versions: Mapping[str, str]
    plan: Plan | None = field(default=None, kw_only=True)
    data: FileRef | None = field(default=None, kw_only=True)
    accuracy: Accuracy | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class _Versioned:
    __pydantic_config__ = ConfigDict(strict=True)
    schema_version: int


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
    clip: Annotated[tuple[float, float] | None, MAY_BE_ABSENT]
    classifier: FileRef
    timestep_rule: TimestepRule = field(default="nearest", kw_only=True)
    attention: str | None = field(default=None, kw_only=True)
    denoising: Denoising | None = field(default=None, kw_only=True)

    def chain(self, sigma: float, steps: int, rule: TimestepRule | None = None) -> Chain:
        """Make the chain of so many steps from smoothing noise `sigma`. rule: None for the network's own."""
        return make_chain(self.schedule, self.variance, sigma, steps, rule or self.timestep_rule)


@dataclass(frozen=True)
class ClassifierSidecar(Sidecar):
    """A classifier. preprocessing: what its graph does to pixels before its network sees them, for who reads it."""

    class_names: Annotated[tuple[str, ...], Field(min_length=2)]
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
    """Return a graph's metadata on its file of weights: hash and name, so that the graph's own hash binds both."""
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


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version of TensorRT: (10, 14, 1, 48) of "10.14.1.48.post1", none of "unknown"."""
    found = re.match(r"\d+(\.\d+){0,3}", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def same_release(one: str, other: str) -> bool:
    """Compare two versions in the numbers that both have: a Jetson's "10.3.0" is "10.3.0.30" without its build."""
    return all(a == b for a, b in zip(release(one), release(other), strict=False))


def maker(content: bytes) -> tuple[Flavour, str] | None:
    """Read off a plan's first bytes which flavour and version built it; None of what is no plan."""
    if len(content) < HEADER.size or content[:4] not in TAGS:
        return None
    tag, form, _, *version = HEADER.unpack_from(content)
    return TAGS[tag], ".".join(map(str, version)) if form == KNOWN_FORMAT else UNKNOWN


def refuse_damaged_plan(name: str, plan: Plan, content: bytes) -> None:
    """Raise CheckFailed for bytes that are no plan, not a whole one, or another than `plan` says.

    A hash tells as much, but not of a plan that is trusted without one, and not when a sidecar lies.
    """
    found = maker(content)
    if found is None:
        raise CheckFailed(f"{name} is no plan of TensorRT, it begins with {content[:4]!r}: build the plan again")
    flavour, version = found
    size = HEADER.unpack_from(content)[2]
    if flavour == "tensorrt-rtx" and version != UNKNOWN and size != len(content):
        raise CheckFailed(f"{name} has {len(content)} bytes of the {size} that it should: copy it again")
    known = UNKNOWN not in (version, plan.version)
    if flavour != plan.flavour or (known and release(version)[:3] != release(plan.version)[:3]):
        raise CheckFailed(
            f"{name} was built by {flavour} {version}, its sidecar says {plan.flavour} {plan.version}: build the plan "
            f"again"
        )


def to_json(sidecar: Sidecar) -> str:
    fields = {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(sidecar)
    for name in OPTIONAL:
        if name in fields and fields[name] is None:
            del fields[name]
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _read_as(kind: type[T], values: Any, path: Path) -> T:
    """Return a value of JSON as this type. Raises CheckFailed, which names the file, the field and what was found."""
    try:
        return adapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        again = "build the plan" if first["loc"][:1] == ("plan",) else "export the bundle"
        raise CheckFailed(f"{_place(path, first['loc'])} {_fault(first)}: {again} again") from None


def _place(path: Path, names: tuple[int | str, ...]) -> str:
    return ": ".join((str(path), *(repr(str(name)) for name in names)))


def _fault(error: ErrorDetails) -> str:
    found = repr(error["input"])[:60]
    if error["type"] == "missing":
        return "should be there, found nothing"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        known = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        return f"is {found}, this version knows {known}"
    says = error["msg"].partition("should ")[2]
    return f"should {says}, found {found}" if says else error["msg"]


def _absent(
    written: Mapping[str, Any], found: Mapping[str, Any], names: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the fields that a file lacks although their value is not None: no default stands in for its writer."""
    for name, value in written.items():
        if name not in found:
            yield from () if value is None else ((*names, name),)
        elif isinstance(value, Mapping):
            yield from _absent(value, found[name], (*names, name))


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
        values = all_printable(strict(text))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of thousands of digits
        raise CheckFailed(f"{path} is not valid JSON ({error}): copy it again, or export the bundle again") from error
    if (version := _read_as(_Versioned, values, path).schema_version) != SCHEMA_VERSION:
        raise CheckFailed(
            f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}: export the bundle again"
        )
    is_step = values.get("kind") == "step"
    sidecar = _read_as(StepSidecar, values, path) if is_step else _read_as(ClassifierSidecar, values, path)
    for names in _absent(dataclasses.asdict(sidecar), values):
        raise CheckFailed(f"{_place(path, names)} should be there, found nothing: export the bundle again")
    if sidecar.pixel_range != PIXEL_RANGE:
        raise CheckFailed(
            f"{path}: 'pixel_range' is {sidecar.pixel_range}, this version feeds {PIXEL_RANGE}: export it again"
        )
    if isinstance(sidecar, StepSidecar) and not _noises(sidecar.schedule):
        raise CheckFailed(f"{path}: 'schedule' is not a noise schedule ({sidecar.schedule}): export the bundle again")
    return sidecar


def _noises(schedule: Schedule) -> bool:
    return (
        1 <= schedule.steps <= MAX_STEPS
        and 0 < schedule.beta_start <= schedule.beta_end < 1
        and 0 < schedule.timestep_scale < math.inf
    )


def build_command(engine: Path, flavour: Flavour, sidecar: Sidecar | None, options: Iterable[str] = ()) -> str:
    """The command that builds the plan of this bundle on this machine."""
    words = ["densepure-rt export --target", flavour, "--out", str(engine.parent)]
    if sidecar is not None:
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
    """Make the sidecar of a plan that has none, taking its name's word: the rest is the ONNX file's sidecar.

    The plan's hash is taken as found, so nothing vouches for its bytes.
    """
    onnx, flavour = onnx_path(plan)
    sidecar = read_sidecar(onnx)
    with files.opened(plan, "model") as file:
        flavour, version = maker(file.read(HEADER.size)) or (flavour, UNKNOWN)
    built = Plan(flavour, version, (), (), None, sidecar.file, {}, {})
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
            f'cannot read {path} ({error.strerror}): give `engine` an existing file, or run "densepure-rt export"'
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected_sha256:
        if fault := transfer_fault(path):
            raise CheckFailed(f"{path} is no engine: {fault}")
        raise CheckFailed(
            f"{path} has SHA-256 {found[:16]}..., its sidecar says {expected_sha256[:16]}...: "
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


def read_class_names(path: Path, count: int) -> tuple[str, ...]:
    """Return the names of so many classes, one a line of a file. Raises UsageError for another number of them."""
    try:
        lines = files.text(path, "table").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the class names in {path} ({error})") from error
    names = tuple(printable(line.strip()) for line in lines if line.strip())
    if len(names) != count:
        raise UsageError(f"{path} names {len(names)} classes, the classifier has {count}: one name a line, in order")
    return names


def open_bundle(
    engine: Path, classifier: Path | None = None, engine_sha256: str | None = None, trust: bool = False
) -> Bundle:
    """The sidecars of a step engine and of its classifier (else `classifier`), found to fit together.

    engine: its file, or the folder of its bundle; see `engine_file`. trust: take plans without sidecars for what their
    names say. Raises UsageError or CheckFailed; the engines themselves are not read yet, unless to be trusted.
    """

    def sidecar_of(path: Path) -> StepSidecar | ClassifierSidecar:
        if trust and path.name.endswith(PLAN_SUFFIXES["tensorrt"]) and not sidecar_path(path).exists():
            return trusted_sidecar(path)
        return read_sidecar(path)

    engine = engine_file(engine)
    if not os.path.isfile(engine):  # unlike Path.exists, it takes any name for an answer
        raise UsageError(missing_engine(engine))
    unet = sidecar_of(engine)
    if not isinstance(unet, StepSidecar):
        raise UsageError(f"{engine} is a classifier: give it as `classifier`, and a step engine as `engine`")
    if engine_sha256 is not None and engine_sha256.lower() != unet.file.sha256:
        raise CheckFailed(
            f"`engine_sha256` pins {engine_sha256[:16]}..., the sidecar of {engine} says {unet.file.sha256[:16]}..."
        )
    path = classifier or engine.with_name(unet.classifier.name)
    if classifier is None and path.name == engine.name:  # as in a model repository of Triton
        raise UsageError(
            f"the classifier of {engine} has the name of that file itself, and lies in another folder: name it with "
            f"`classifier`"
        )
    if not os.path.isfile(path):
        raise UsageError(f"no classifier at {path}: copy it beside {engine.name}, or name one with `classifier`")
    labels = sidecar_of(path)
    if not isinstance(labels, ClassifierSidecar):
        raise UsageError(f"{path} is a step engine, not a classifier")
    if classifier is None and labels.file.sha256 != unet.classifier.sha256:
        raise CheckFailed(
            f"{engine} was exported with another classifier than the {path.name} beside it: "
            f"name it with `classifier` if it is meant, or export the bundle again"
        )
    if labels.image != unet.image:
        raise UsageError(
            f"{engine.name} takes images {list(unet.image)}, {path.name} takes {list(labels.image)}: "
            f"they cannot work together"
        )
    if flavour_of(unet) != flavour_of(labels):
        raise UsageError(
            f"{engine.name} is for {flavour_of(unet)}, {path.name} for {flavour_of(labels)}: one device runs both, so "
            f"name a classifier of the same kind with `classifier`"
        )
    return Bundle(unet, labels, engine, path, (written_sha256(engine), written_sha256(path)))


def written_sha256(engine: Path) -> str | None:
    """Hash its sidecar's file, where there is one."""
    return sha256_of(sidecar_path(engine)) if sidecar_path(engine).exists() else None


def flavour_of(sidecar: Sidecar) -> str:
    """Return what runs an engine: ONNX Runtime, or a flavour of TensorRT."""
    return sidecar.plan.flavour if sidecar.plan else "onnxruntime"


def engine_file(path: Path) -> Path:
    """Return the step engine that a path means: of the folder of a bundle unet.onnx, or the only one; else the path.

    Raises UsageError for a folder that holds none, or several and no unet.onnx.
    """
    if not os.path.isdir(path):
        return path
    suffixes = (ONNX_SUFFIX, *PLAN_SUFFIXES.values())
    try:
        found = sorted(name for name in os.listdir(path) if name.startswith("unet.") and name.endswith(suffixes))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): name the file of a step engine") from error
    if STEP_ENGINE in found:
        return path / STEP_ENGINE
    if len(found) == 1:
        return path / found[0]
    if found:
        raise UsageError(f"{path} holds several step engines, {', '.join(found)}: name the file of one")
    raise UsageError(f'{path} holds no step engine, such as {STEP_ENGINE}: make a bundle with "densepure-rt export"')


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
    return f'no engine at {engine}: make one with "densepure-rt export", or leave `engine` out'


def shipped_engine(on_gpu: bool = False) -> Path:
    """The step engine that comes with the package: on a GPU that of ON_GPU, else the float32 one."""
    name = f"unet.{ON_GPU}.onnx" if on_gpu else "unet.onnx"
    return Path(str(resources.files("densepure_rt"))) / "engines" / name


def shipped_engine_of(sha256: str) -> Path:
    """The shipped step engine that hashes to this, else the float32 one."""
    known = (shipped_engine(on_gpu) for on_gpu in (False, True))
    return next((path for path in known if read_sidecar(path).file.sha256 == sha256), shipped_engine())


def is_shipped(bundle: Bundle) -> bool:
    """Say whether a bundle is of the model that ships, in whichever precision."""
    shipped = open_bundle(shipped_engine())
    return [side.weights_sha256 for side in (bundle.unet, bundle.classifier)] == [
        side.weights_sha256 for side in (shipped.unet, shipped.classifier)
    ]
