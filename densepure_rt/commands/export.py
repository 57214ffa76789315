"""The commands of the build machine, which know the PyTorch models: options in, one call, one printed result."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from densepure_rt.commands.console import in_options, needs_pytorch, say, stderr, stdout
from densepure_rt.commands.groups import with_options
from densepure_rt.commands.options import Json
from densepure_rt.commands.parity import PARITY_SAMPLES, SMALLEST
from densepure_rt.commands.values import number, words
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.model_options import ModelOptions, Options
from densepure_rt.optional import optional
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.text import plural

if TYPE_CHECKING:
    from densepure_rt.export.convert.build_options import BuildOptions
    from densepure_rt.export.convert.parity import Exported
    from densepure_rt.export.models.check_images import Images
    from densepure_rt.export.models.pair import Pair
    from densepure_rt.runtime.bundle import Denoising, Flavour

of_checks, of_plans = (partial(typer.Option, rich_help_panel=panel) for panel in ("Checks", "Plans"))


@dataclass(frozen=True)
class CheckOptions(Options):
    """The options that change ONNX engines, and what they are checked on."""

    keep_fp32: Annotated[
        list[str] | None,
        of_checks("--keep-fp32", help="Keep the modules with these names in float32. A shell pattern; repeatable."),
    ] = None
    images: Annotated[
        Path | None,
        of_checks(help="Images to compare on. Default: the shipped ones if they fit the model, else made-up ones."),
    ] = None
    calibration_images: Annotated[Path | None, of_checks(help="Training images to calibrate int8 and fp8 on.")] = None
    parity_images: Annotated[
        int | None, of_checks(help="Number of images whose labels are compared with float32. Default: 20.")
    ] = None
    parity_samples: Annotated[int, of_checks(help="Noisy copies of each image whose labels are compared.")] = (
        PARITY_SAMPLES
    )
    strict: Annotated[
        bool,
        of_checks(
            "--strict", help="Write nothing if the UNet denoises better under another declaration than the given one."
        ),
    ] = False

    def images_of(self, models: Pair) -> Images:
        """Open what these models are checked on, and calibrated on."""
        from densepure_rt.export.models.check_images import check_images

        counts = self.parity_images, self.parity_samples
        return check_images(models, self.images, self.calibration_images, *counts, say)


@dataclass(frozen=True)
class PlanOptions(Options):
    """The options of building plans."""

    compute_capability: Annotated[
        str | None, of_plans(help="tensorrt-rtx: compute capabilities to build for. Default: 8.6,8.9,12.0.")
    ] = None
    workspace: Annotated[int | None, of_plans(help="MiB of GPU memory that a layer may use.")] = None
    builder_level: Annotated[
        int | None, of_plans(help="TensorRT's optimisation level: 0 builds fast, 5 builds the fastest plan.")
    ] = None
    tf32: Annotated[bool, of_plans("--tf32", help="Allow TensorFloat-32 in float32 products.")] = False
    timing_cache: Annotated[
        Path | None, of_plans(help="tensorrt: file that keeps kernel timings. Default: timing.cache beside the plans.")
    ] = None
    timing_cache_strict: Annotated[
        bool, of_plans("--timing-cache-strict", help="tensorrt: fail if the timing cache lacks a timing.")
    ] = False
    hw_compat: Annotated[
        str | None, of_plans(help="tensorrt: GPUs that the plan also runs on: ampere-plus or same-compute-capability.")
    ] = None
    version_compatible: Annotated[
        bool,
        of_plans(
            "--version-compatible",
            help="tensorrt: build plans that also run on this version's lean runtime, loaded by later versions.",
        ),
    ] = False
    max_aux_streams: Annotated[int | None, of_plans(help="tensorrt: maximum number of auxiliary CUDA streams.")] = None
    tiling_optimization_level: Annotated[
        int | None, of_plans(help="tensorrt: tiling optimisation level, from 0 (none) to 3 (full search).")
    ] = None
    avg_timing: Annotated[int | None, of_plans(help="tensorrt: number of timings to average per kernel.")] = None
    use_dla_core: Annotated[int | None, of_plans(help="tensorrt on a Jetson: DLA core to run on.")] = None
    allow_gpu_fallback: Annotated[
        bool,
        of_plans("--allow-gpu-fallback", help="With --use-dla-core: run layers that the DLA cannot run on the GPU."),
    ] = False
    allow_weight_streaming: Annotated[
        bool, of_plans("--allow-weight-streaming", help="Refused, because such plans cannot run in a CUDA graph.")
    ] = False

    def build_options(self, batches: tuple[int, ...]) -> BuildOptions:
        from densepure_rt.export.convert.build_options import BuildOptions

        return BuildOptions(
            batches=batches,
            compute_capabilities=tuple(self.compute_capability.split(",")) if self.compute_capability else (),
            workspace=self.workspace,
            level=self.builder_level,
            tf32=self.tf32,
            timing_cache=self.timing_cache,
            timing_cache_strict=self.timing_cache_strict,
            hardware=self.hw_compat,
            version_compatible=self.version_compatible,
            max_aux_streams=self.max_aux_streams,
            tiling_optimization_level=self.tiling_optimization_level,
            avg_timing=self.avg_timing,
            use_dla_core=self.use_dla_core,
            allow_gpu_fallback=self.allow_gpu_fallback,
            allow_weight_streaming=self.allow_weight_streaming,
        )


@with_options
def export(
    models: ModelOptions,
    checks: CheckOptions,
    plans: PlanOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the bundle. Default: a folder named after the model (ddpm for --unet ddpm/, mymodel "
            "for mymodel:unet), the folder of --engine, engines for the shipped model, or models for triton."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="onnx, tensorrt or tensorrt-rtx, or several separated by commas: plans are built from the ONNX "
            "engines in --out, else from the shipped ones. triton: package the bundle of --engine as a model "
            "repository."
        ),
    ] = "onnx",
    engine: Annotated[
        Path | None,
        typer.Option(
            help="Start from this bundle instead of PyTorch models. onnx: write its float32 engines in each "
            "--precision, without PyTorch. tensorrt: build its plans. triton: package it; default: the "
            "shipped bundle."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, int8, int8-cpu or fp8, or several separated by commas, each a bundle of its "
            "own. Default: fp32; for plans of the shipped model fp16."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace a bundle of another model, or a Triton model repository including your edits."
        ),
    ] = False,
    batch: Annotated[
        str | None,
        of_plans(
            help="Batch sizes separated by commas, each a fixed profile. Default: 64. triton: the batch size of "
            "every call."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a UNet and a classifier from PyTorch to ONNX engines, checked against PyTorch, and build TensorRT plans.

    Without options it is the model that ships. ONNX engines need densepure-rt\\[export], but those of --engine do not;
    plans need densepure-rt\\[tensorrt] or densepure-rt\\[tensorrt-rtx], and a model repository of Triton none of them.
    """
    from densepure_rt.runtime.bundle import PLAN_SUFFIXES

    request = Request(
        models,
        targets=words(target, "--target", ("onnx", *sorted(PLAN_SUFFIXES), "triton")),
        precisions=[kind.strip() for kind in precision.split(",")] if precision else [],
        out=out,
        force=force,
        engine=engine,
        batch=batch,
        quiet=as_json,
        checks=checks,
        plans=plans,
    )
    report = exported(request)
    if as_json:
        print(json.dumps(report, default=str))


@dataclass(frozen=True)
class Request:
    """A request to `export`. batch: as typed, for plans several. quiet: print nothing of what is made.

    precisions: empty for those that suit what is to be made.
    """

    models: ModelOptions
    targets: Sequence[str]
    precisions: Sequence[str]
    out: Path | None
    force: bool
    quiet: bool
    engine: Path | None
    batch: str | None
    checks: CheckOptions
    plans: PlanOptions

    def refuse_unused(self) -> None:
        """Raise UsageError for options that mean nothing for what is to be made."""
        unused = list(map(in_options, [*self.models.given().values(), *self.checks.given().values()]))
        if "triton" in self.targets:
            unused += [f"--target {kind}" for kind in self.targets if kind != "triton"]
            unused += ["--precision"] if self.precisions else []
            unused += map(in_options, self.plans.given().values())
            if unused:
                raise UsageError(
                    f"{', '.join(unused)}: --target triton packages the bundle of --engine as it is; make it first"
                )
            return
        of_pytorch = [*map(in_options, self.models.given().values()), *(["--strict"] if self.checks.strict else [])]
        if self.engine is not None and of_pytorch:
            raise UsageError(
                f"{', '.join(of_pytorch)}: these are of PyTorch models, and --engine {self.engine} is a bundle: give "
                f"one"
            )
        if "onnx" not in self.targets and unused:
            raise UsageError(f"{', '.join(unused)}: these change the ONNX engines; add onnx to --target")


def exported(request: Request) -> dict[str, Any]:
    """Make what was asked for; what was made, by target."""
    from densepure_rt.runtime.bundle import PLAN_SUFFIXES

    request.refuse_unused()
    if "triton" in request.targets:
        return {"triton": export_triton(request, request.out or Path("models"))}
    out = request.out or folder_of(request.models, request.engine)
    report: dict[str, Any] = {}
    if "onnx" in request.targets:
        report["onnx"] = export_onnx(request, out) if request.engine is None else lower(request.engine, request, out)
    return report | {
        flavour: export_plans(request, flavour, out) for flavour in PLAN_SUFFIXES if flavour in request.targets
    }


def folder_of(models: ModelOptions, engine: Path | None = None) -> Path:
    """Return the folder for a bundle that names none: after the UNet or, without one of your own, the classifier.

    `engines`, which a checkout tracks, is for the weights that ship alone. engine: what is made of it lies beside it.
    """
    if engine is not None:
        return engine if engine.is_dir() else engine.parent
    if models.weights is not None:
        return Path(models.weights.resolve().name)
    spec = models.classifier if models.unet in (None, "none") else models.unet
    if spec is None:
        return Path("engines")
    if os.path.exists(spec):
        path = Path(spec).resolve()
        return Path(path.name if path.is_dir() else path.stem)
    package, _, name = spec.partition(":")
    return Path(Path(name).name if package == "timm" else package.rpartition(".")[2])


def export_plans(request: Request, flavour: Flavour, out: Path) -> list[str]:
    """Build plans of each precision from the bundle that was named, or one in `out`, or that ships; what was written.

    Of ONNX engines that were made just now, those in `out` are taken.
    """
    with optional("building plans", "onnx", f"run \"pip install 'densepure-rt[{flavour}]'\""):
        from densepure_rt.export.convert.to_tensorrt import build_plans, source_bundle
    batches = tuple(number(word, "--batch") for word in (request.batch or "64").split(","))
    options, written = request.plans.build_options(batches), list[str]()
    made = "onnx" in request.targets
    kinds: Sequence[str | None] = request.precisions or (["fp32"] if made else [None])
    for kind in kinds:
        bundle = source_bundle(out, kind, None if made else request.engine, lambda line: say(in_options(line)))
        plans = build_plans(bundle, out, flavour, options, request.force, say)
        written += map(str, plans)
        if not request.quiet:
            stdout.print(f"wrote {plans[0]} and {plans[1]}, each with its sidecar")
    return written


def export_triton(request: Request, out: Path) -> list[str]:
    """Package a bundle as a model repository of Triton; the folders that were written."""
    from densepure_rt.export.convert.to_triton import CONFIG, OLD_CONFIG, export_repository
    from densepure_rt.runtime.bundle import open_bundle, shipped_engine

    batch = request.batch
    if batch is not None and "," in batch:
        raise UsageError(f"--batch {batch}: one batch with triton, that of every call of the engines")
    bundle = open_bundle(request.engine or shipped_engine())
    folders = export_repository(bundle, out, None if batch is None else number(batch, "--batch"), request.force)
    if kept := [folder / OLD_CONFIG for folder in folders if (folder / OLD_CONFIG).exists()]:
        stderr.print(
            f"the {CONFIG} that was there is another one, and kept in {' and '.join(map(str, kept))}: set again what "
            f"you had edited in it, but not the hashes"
        )
    if not request.quiet:
        stdout.print(f"wrote {', '.join(folder.name for folder in folders)} to {out}, a model repository of Triton")
        stdout.print(
            f"sigma, votes, alpha and the key file are in {out}/predict/config.pbtxt and {out}/certify/config.pbtxt"
        )
        stdout.print("densepure-rt must be installed in the Python of the server: see docs/deploy.md")
    return [str(folder) for folder in folders]


def export_onnx(request: Request, out: Path) -> dict[str, Any]:
    """Export each precision; what was found, by precision.

    Raises CheckFailed before anything is exported where the denoising check doubts a declaration and --strict was
    asked for; else it warns.
    """
    with needs_pytorch("export"):
        from densepure_rt.export.compare.denoising import judge
        from densepure_rt.export.convert.precision import OPSETS, QUANTIZED
        from densepure_rt.export.convert.to_onnx import export_bundle
        from densepure_rt.export.models.sources import open_models
    asked, precisions = request.checks, request.precisions or ["fp32"]
    words(",".join(precisions), "--precision", tuple(OPSETS))
    models = open_models(request.models)
    checks = asked.images_of(models)
    for kind in precisions:
        if kind in QUANTIZED and checks.calibration is None:  # before any is exported
            raise UsageError(
                f"--precision {kind} is calibrated on training images: give them with --calibration-images"
            )
    if models.unet.prediction != "none":
        say("denoising noisy images")
    denoising = judge(models.unet, checks.parity if checks.denoising is None else checks.denoising, checks.made_up)
    doubted = doubt(denoising) if denoising is not None and denoising.verdict == "doubted" else None
    if doubted and asked.strict:
        raise CheckFailed(f"{doubted}. Nothing was published; without --strict it is exported all the same")
    report = {}
    for kind in dict.fromkeys(precisions):
        done = export_bundle(models, out, checks, request.force, say, kind, asked.keep_fp32 or (), denoising)
        report[kind] = dataclasses.asdict(done)
        if not request.quiet:
            print_exported(done)
    if denoising is not None and not request.quiet:
        print_denoising(denoising)
    if doubted:
        stderr.print(f"warning: {doubted}")
    return report


def lower(engine: Path, request: Request, out: Path) -> dict[str, Any]:
    """Write a float32 bundle in other precisions, without PyTorch; what was found, by precision."""
    with optional("another precision", "ONNX Runtime and onnx", "run \"pip install 'densepure-rt[cpu]' onnx\""):
        from densepure_rt.export.convert.precision import OPSETS
        from densepure_rt.export.convert.to_precision import lower_bundle
    from densepure_rt.runtime.bundle import open_bundle

    known = [kind for kind in OPSETS if kind != "fp32"]
    if not request.precisions:
        raise UsageError(
            f"--engine {engine}: say in which --precision it is to be written ({', '.join(known)}), or with --target "
            f"triton or tensorrt what else is to be made of it"
        )
    words(",".join(request.precisions), "--precision", known)
    bundle, keep = open_bundle(engine), request.checks.keep_fp32 or ()
    checks, report = request.checks.images_of(bundle), {}
    for kind in dict.fromkeys(request.precisions):
        done = lower_bundle(bundle, out, kind, checks, keep, request.force, say)
        report[kind] = dataclasses.asdict(done)
        if not request.quiet:
            print_exported(done)
    return report


def doubt(found: Denoising) -> str:
    """Say which declarations of a UNet to doubt, with the errors at the sigma where they differ most."""
    sigma = max(found.other_error, key=lambda at: found.error[at] / max(found.other_error[at], SMALLEST))
    options = ", ".join(word for word in found.other.split() if word.startswith("--"))
    return (
        f"doubt {options} of the UNet: {found.other} gives {found.other_error[sigma]:.3g}, the declared "
        f"{found.instead_of} {found.error[sigma]:.3g}, linear shrinkage {found.shrinkage[sigma]:.3g} (mean squared "
        f"error after one step at sigma {sigma}, {pictures(found)}). Look up how it was trained, and export it again "
        f"with these options, or with a corrected scheduler_config.json where it is a diffusers folder"
    )


def pictures(found: Denoising) -> str:
    return plural(found.images, "made-up image" if found.made_up else "image")


def figures(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{error:.3g}" for error in errors.values())


def print_denoising(found: Denoising) -> None:
    stdout.print(
        f"denoising check: {found.verdict}; mean squared error {figures(found.error)} "
        f"at sigma {', '.join(found.error)} ({pictures(found)}, one step)"
    )
    stdout.print(f"  linear shrinkage: {figures(found.shrinkage)}")
    if found.verdict == "not judged":
        images = "made-up images (give --images)" if found.made_up else "images unlike those it was trained on"
        stdout.print(
            f"  nothing tried is clearly better than shrinkage: {images}, an untrained network, or something else is "
            f"declared wrong, such as --image-size, --diffusion-steps, --timestep-scale or heads"
        )
    elif found.other:
        at = "" if found.other_error.keys() == found.error.keys() else f" at sigma {', '.join(found.other_error)}"
        stdout.print(f"  {found.other}: {figures(found.other_error)}{at}")


def print_exported(done: Exported) -> None:
    stdout.print(f"{done.comparisons} comparisons with float32 {done.against}, worst:")
    for worst in (done.worst_step, done.worst_logits):
        stdout.print(
            f"  {worst.what}, batch {worst.batch}: relative L2 {raised(worst.relative_l2, figures=2)}, "
            f"max {raised(worst.max_abs, figures=2)}"
        )
    stdout.print(f"  evaluated by {done.by}")
    if (labels := done.labels) is not None:
        stdout.print(
            f"{labels.disagreements} of {labels.total} labels differ from float32 on equal noise (sigma "
            f"{labels.sigma:g}, one step, {plural(labels.images, 'image')}): fewer than "
            f"{raised(labels.upper, 2, percent=True)}"
        )
        for radius, one, other in zip(labels.radii, *labels.accuracy, strict=True):
            if one is not None and other is not None:
                stdout.print(
                    f"  certified at radius {exact(radius)}: {floored_share(other)}, float32 {floored_share(one)}"
                )
        stdout.print(f"  labelled by {labels.by}")
    stdout.print(f"wrote {done.unet} and {done.classifier}, each with its sidecar")
