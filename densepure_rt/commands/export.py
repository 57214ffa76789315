"""The commands of the build machine, which know the PyTorch models: options in, one call, one printed result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from densepure_rt.commands.console import in_options, needs_pytorch, say, stderr, stdout
from densepure_rt.commands.options import Json, number, with_models, words
from densepure_rt.commands.parity import PARITY_SAMPLES, SMALLEST
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.optional import optional
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.text import plural

if TYPE_CHECKING:
    from densepure_rt.export.convert.parity import Exported
    from densepure_rt.runtime.bundle import Denoising

CHECKS, PLANS = "Checks", "Plans"  # the panels of --help


@with_models
def export(
    models: ModelOptions,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the bundle; default: engines, and models with triton.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="onnx, tensorrt, tensorrt-rtx, or several with commas. Plans are built from the ONNX engines in "
            "--out, else from those that ship. triton, alone: the bundle of --engine as a model repository."
        ),
    ] = "onnx",
    engine: Annotated[
        Path | None,
        typer.Option(
            help="A bundle in place of PyTorch models. onnx: its float32 engines in each --precision, without PyTorch; "
            "tensorrt: plans of it; triton: it is packaged, ONNX files or plans; default: the one that ships."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, int8, int8-cpu or fp8; several with commas, a bundle each. Default: fp32; plans of "
            "the model that ships: fp16."
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option("--keep-fp32", help="Keep the modules of these names float32; a shell pattern, repeatable."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace a bundle of another model, or models of Triton and what was edited in them."
        ),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Images to compare on; default: the shipped ones if they are the model's, else made up.",
            rich_help_panel=CHECKS,
        ),
    ] = None,
    calibration_images: Annotated[
        Path | None,
        typer.Option(help="Training images, which int8 and fp8 are calibrated on.", rich_help_panel=CHECKS),
    ] = None,
    parity_images: Annotated[
        int | None,
        typer.Option(help="Images whose labels are compared with float32; default: 20.", rich_help_panel=CHECKS),
    ] = None,
    parity_samples: Annotated[
        int, typer.Option(help="Noisy copies of each of them.", rich_help_panel=CHECKS)
    ] = PARITY_SAMPLES,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Publish nothing where the UNet denoises better otherwise than as declared.",
            rich_help_panel=CHECKS,
        ),
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes with commas, a fixed profile each; default: 64. triton: that of every call.",
            rich_help_panel=PLANS,
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(help="tensorrt-rtx: the GPUs to build for; default: 8.6,8.9,12.0.", rich_help_panel=PLANS),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(help="MiB of GPU memory that a layer may use.", rich_help_panel=PLANS)
    ] = None,
    builder_level: Annotated[
        int | None, typer.Option(help="0 builds fast, 5 builds the fastest plan.", rich_help_panel=PLANS)
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Allow TensorFloat-32 in float32 products.", rich_help_panel=PLANS)
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="tensorrt: keep kernel timings in this file.", rich_help_panel=PLANS)
    ] = None,
    timing_cache_strict: Annotated[
        bool,
        typer.Option(
            "--timing-cache-strict", help="tensorrt: fail where the cache lacks a timing.", rich_help_panel=PLANS
        ),
    ] = False,
    hw_compat: Annotated[
        str | None, typer.Option(help="tensorrt: ampere-plus or same-compute-capability.", rich_help_panel=PLANS)
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="tensorrt: run on later versions of the same major.", rich_help_panel=PLANS
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a UNet and a classifier from PyTorch to ONNX engines, checked against PyTorch, and build TensorRT plans.

    Without options it is the model that ships. ONNX engines need densepure-rt\\[export], but those of --engine do not;
    plans need densepure-rt\\[tensorrt] or densepure-rt\\[tensorrt-rtx], and a model repository of Triton none of them.
    """
    from densepure_rt.runtime.bundle import PLAN_SUFFIXES

    targets = words(target, "--target", ("onnx", *sorted(PLAN_SUFFIXES), "triton"))
    kinds = [kind.strip() for kind in precision.split(",")] if precision else []
    report: dict[str, Any] = {}
    checks = {
        "--keep-fp32": keep_fp32,
        "--images": images,
        "--calibration-images": calibration_images,
        "--parity-images": parity_images,
        "--parity-samples": parity_samples != PARITY_SAMPLES,
        "--strict": strict,
    }
    unused = [*map(in_options, models.given().values()), *(name for name, value in checks.items() if value)]
    if "triton" in targets:
        of_plans = {
            "--precision": kinds,
            "--compute-capability": compute_capability,
            "--workspace": workspace,
            "--builder-level": builder_level,
            "--tf32": tf32,
            "--timing-cache": timing_cache,
            "--timing-cache-strict": timing_cache_strict,
            "--hw-compat": hw_compat,
            "--version-compatible": version_compatible,
        }
        unused += [f"--target {kind}" for kind in targets if kind != "triton"]
        unused += [name for name, value in of_plans.items() if value]
        if unused:
            raise UsageError(
                f"{', '.join(unused)}: --target triton packages the bundle of --engine as it is; make it first"
            )
        export_triton(engine, out or Path("models"), batch, force, as_json)
        return
    if engine is not None and (said := [*map(in_options, models.given().values()), *(["--strict"] if strict else [])]):
        raise UsageError(f"{', '.join(said)}: these are of PyTorch models, and --engine {engine} is a bundle: give one")
    if "onnx" not in targets and unused:
        raise UsageError(f"{', '.join(unused)}: these change the ONNX engines; add onnx to --target")
    out = out or Path("engines")
    if "onnx" in targets:
        on = (images, calibration_images, parity_images, parity_samples)
        if engine is not None:
            report["onnx"] = lower(engine, out, force, as_json, kinds, keep_fp32 or (), on)
        else:
            report["onnx"] = export_onnx(models, out, force, as_json, kinds or ["fp32"], keep_fp32 or (), *on, strict)
    for flavour in PLAN_SUFFIXES:
        if flavour in targets:
            with optional("building plans", "onnx", f"run \"pip install 'densepure-rt[{flavour}]'\""):
                from densepure_rt.export.convert.to_tensorrt import BuildOptions, build_plans, source_bundle
            options = BuildOptions(
                batches=tuple(number(word, "--batch") for word in (batch or "64").split(",")),
                compute_capabilities=tuple(compute_capability.split(",")) if compute_capability else (),
                workspace=workspace,
                level=builder_level,
                tf32=tf32,
                timing_cache=timing_cache,
                timing_cache_strict=timing_cache_strict,
                hardware=hw_compat,
                version_compatible=version_compatible,
            )
            report[flavour] = []
            asked: list[str | None] = [*kinds] or (["fp32"] if "onnx" in targets else [None])
            for kind in asked:
                bundle = source_bundle(
                    out, kind, None if "onnx" in targets else engine, lambda line: say(in_options(line))
                )
                plans = build_plans(bundle, out, flavour, options, force, say)
                report[flavour] += [str(plan) for plan in plans]
                if not as_json:
                    stdout.print(f"wrote {plans[0]} and {plans[1]}, each with its sidecar")
    if as_json:
        print(json.dumps(report, default=str))


def export_triton(engine: Path | None, out: Path, batch: str | None, force: bool, as_json: bool) -> None:
    """Package a bundle as a model repository of Triton."""
    from densepure_rt.export.convert.to_triton import CONFIG, OLD_CONFIG, export_repository
    from densepure_rt.runtime.bundle import open_bundle, shipped_engine

    if batch is not None and "," in batch:
        raise UsageError(f"--batch {batch}: one batch with triton, that of every call of the engines")
    bundle = open_bundle(engine or shipped_engine())
    folders = export_repository(bundle, out, None if batch is None else number(batch, "--batch"), force)
    if kept := [folder / OLD_CONFIG for folder in folders if (folder / OLD_CONFIG).exists()]:
        stderr.print(
            f"the {CONFIG} that was there is another one, and kept in {' and '.join(map(str, kept))}: set again what "
            f"you had edited in it, but not the hashes"
        )
    if as_json:
        print(json.dumps({"triton": [str(folder) for folder in folders]}))
        return
    stdout.print(f"wrote {', '.join(folder.name for folder in folders)} to {out}, a model repository of Triton")
    stdout.print(
        f"sigma, votes, alpha and the key file are in {out}/predict/config.pbtxt and {out}/certify/config.pbtxt"
    )
    stdout.print("densepure-rt must be installed in the Python of the server: see docs/deploy.md")


def export_onnx(
    models: ModelOptions,
    out: Path,
    force: bool,
    quiet: bool,
    precisions: Sequence[str],
    keep: Sequence[str],
    images: Path | None,
    calibration: Path | None,
    parity_images: int | None,
    parity_samples: int,
    strict: bool,
) -> dict[str, Any]:
    """Export each precision; what was found, by precision.

    strict: raise CheckFailed before anything is exported where the denoising check doubts a declaration; else warn.
    """
    with needs_pytorch("export"):
        from densepure_rt.export.compare.denoising import judge
        from densepure_rt.export.convert.precision import OPSETS, QUANTIZED
        from densepure_rt.export.convert.to_onnx import export_bundle
        from densepure_rt.export.models.check_images import check_images
        from densepure_rt.export.models.sources import open_models
    words(",".join(precisions), "--precision", tuple(OPSETS))
    unet, classifier = open_models(models)
    checks = check_images(unet, classifier, images, calibration, parity_images, parity_samples, say)
    for kind in precisions:
        if kind in QUANTIZED and checks.calibration is None:  # before any is exported
            raise UsageError(
                f"--precision {kind} is calibrated on training images: give them with --calibration-images"
            )
    if unet.prediction != "none":
        say("denoising noisy images")
    denoising = judge(unet, checks.parity if checks.denoising is None else checks.denoising, checks.made_up)
    doubted = doubt(denoising) if denoising is not None and denoising.verdict == "doubted" else None
    if doubted and strict:
        raise CheckFailed(f"{doubted}. Nothing was published; without --strict it is exported all the same")
    report = {}
    for kind in dict.fromkeys(precisions):
        done = export_bundle(unet, classifier, out, checks, force, say, kind, keep, denoising)
        report[kind] = dataclasses.asdict(done)
        if not quiet:
            print_exported(done)
    if denoising is not None and not quiet:
        print_denoising(denoising)
    if doubted:
        stderr.print(f"warning: {doubted}")
    return report


def lower(
    engine: Path,
    out: Path,
    force: bool,
    quiet: bool,
    precisions: Sequence[str],
    keep: Sequence[str],
    on: tuple[Path | None, Path | None, int | None, int],
) -> dict[str, Any]:
    """Write a float32 bundle in other precisions, without PyTorch; what was found, by precision.

    on: the images, those for calibration, how many labels are compared on, and noisy copies of each.
    """
    with optional("another precision", "ONNX Runtime and onnx", "run \"pip install 'densepure-rt[cpu]' onnx\""):
        from densepure_rt.export.convert.precision import OPSETS
        from densepure_rt.export.convert.to_precision import lower_bundle
        from densepure_rt.export.models.check_images import check_images
    from densepure_rt.runtime.bundle import open_bundle

    known = [kind for kind in OPSETS if kind != "fp32"]
    if not precisions:
        raise UsageError(
            f"--engine {engine}: say in which --precision it is to be written ({', '.join(known)}), or with --target "
            f"triton or tensorrt what else is to be made of it"
        )
    words(",".join(precisions), "--precision", known)
    bundle = open_bundle(engine)
    checks = check_images(bundle.unet, bundle.classifier, *on, say)
    report = {}
    for kind in dict.fromkeys(precisions):
        done = lower_bundle(bundle, out, kind, checks, keep, force, say)
        report[kind] = dataclasses.asdict(done)
        if not quiet:
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
