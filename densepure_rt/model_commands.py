"""The commands of the build machine, which know the PyTorch models: options in, one call, one printed result."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Table

from densepure_rt.benchmark_tables import print_benchmark
from densepure_rt.console import Json, Status, plural, stderr, stdout, track
from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError, raise_interrupt
from densepure_rt.model_options import ModelOptions, with_models
from densepure_rt.optional import optional
from densepure_rt.options import ProviderName
from densepure_rt.procedure_tables import draw_procedures, print_procedures
from densepure_rt.rounding import exact, floored, floored_share, raised

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from densepure_rt.certification import Certificate
    from densepure_rt.datasets import LabelledImage
    from densepure_rt.export.agreement import Agreement
    from densepure_rt.export.to_onnx import Exported
    from densepure_rt.falsify_run import Proposals
    from densepure_rt.runtime.bundle import Bundle, Denoising
    from densepure_rt.smoothing import Settings

EngineFile = Annotated[
    Path | None, typer.Option("--engine", help="Step engine, ONNX file or plan; default: the one that ships.")
]
COMPARED = 5  # images, by `parity`, unless told
CERTIFIED = 10  # images, by `bench --procedure`, unless told
PROPOSALS = 2  # of gradients, to an attack
CHECKS, PLANS, TRITON = "Checks", "Plans", "Triton"  # the panels of --help
STEP, PROCEDURE = "A reverse step", "Whole certifications"
PARITY_SAMPLES = 20
SMALLEST = 1e-12  # error that a ratio is taken to
T = TypeVar("T")


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
            help="triton: step engine, ONNX file or plan; default: the one that ships.", rich_help_panel=TRITON
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8, int8-cpu or fp8; several with commas, a bundle each.")
    ] = "fp32",
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

    Without options it is the model that ships. ONNX engines need densepure-rt\\[export], plans densepure-rt\\[tensorrt]
    or densepure-rt\\[tensorrt-rtx], and a model repository of Triton none of them.
    """
    from densepure_rt.runtime.bundle import PLAN_SUFFIXES

    targets = words(target, "--target", ("onnx", *sorted(PLAN_SUFFIXES), "triton"))
    kinds = [kind.strip() for kind in precision.split(",")]
    report: dict[str, Any] = {}
    checks = {
        "--keep-fp32": keep_fp32,
        "--images": images,
        "--calibration-images": calibration_images,
        "--parity-images": parity_images,
        "--parity-samples": parity_samples != PARITY_SAMPLES,
        "--strict": strict,
    }
    unused = [*models.given().values(), *(name for name, value in checks.items() if value)]
    if "triton" in targets:
        of_plans = {
            "--precision": kinds != ["fp32"],
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
    if engine is not None:
        raise UsageError(f"--engine {engine} is what --target triton packages, and {target} was asked for")
    if "onnx" not in targets and unused:
        raise UsageError(f"{', '.join(unused)}: these change the ONNX engines; add onnx to --target")
    out = out or Path("engines")
    if "onnx" in targets:
        on = (images, calibration_images, parity_images, parity_samples)
        report["onnx"] = export_onnx(models, out, force, as_json, kinds, keep_fp32 or (), *on, strict)
    for flavour in PLAN_SUFFIXES:
        if flavour in targets:
            with optional("building plans", "onnx", f"run \"pip install 'densepure-rt[{flavour}]'\""):
                from densepure_rt.export.to_tensorrt import BuildOptions, build_plans, source_bundle
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
            for kind in kinds:
                bundle = source_bundle(out, kind)
                plans = build_plans(bundle, out, flavour, options, force, say)
                report[flavour] += [str(plan) for plan in plans]
                if not as_json:
                    stdout.print(f"wrote {plans[0]} and {plans[1]}, each with its sidecar")
    if as_json:
        print(json.dumps(report, default=str))


def export_triton(engine: Path | None, out: Path, batch: str | None, force: bool, as_json: bool) -> None:
    """Package a bundle as a model repository of Triton."""
    from densepure_rt.export.to_triton import CONFIG, OLD_CONFIG, export_repository
    from densepure_rt.runtime.bundle import open_bundle
    from densepure_rt.smoothing import shipped_engine

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
        from densepure_rt.export.denoising import judge
        from densepure_rt.export.precision import OPSETS, QUANTIZED
        from densepure_rt.export.sources import check_images, open_models
        from densepure_rt.export.to_onnx import export_bundle
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


def needs_pytorch(command: str) -> AbstractContextManager[None]:
    """For the imports of a command that needs the extra `export`."""
    return optional(command, "PyTorch and what goes with it", "run \"pip install 'densepure-rt[cpu,export]'\"")


def say(line: str) -> None:
    stderr.print(f"{line} ...")


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


@with_models
def parity(
    models: ModelOptions,
    engine: EngineFile = None,
    images: Annotated[
        Path | None, typer.Option(help="Images of the engine's size; default: the shipped ones, or made up.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--max", help="How many images; default: 5, or what there is.")] = None,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the smoothing noise, in [0, 1] units.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Reverse steps (b).")] = 2,
    votes: Annotated[int, typer.Option(help="Votes a noise sample (K).")] = 5,
    n: Annotated[int, typer.Option(help="Samples of each image.")] = 50,
    alpha: Annotated[float, typer.Option(help="Probability, at most, that an image gets a wrong certificate.")] = 0.001,
    batch: Annotated[int | None, typer.Option(help="Items a call of the engine.")] = None,
    threads: Annotated[int | None, typer.Option(help="Callers of the engine; default: one for each core.")] = None,
    provider: ProviderName = "cpu",
    trust: Annotated[bool, typer.Option("--trust", help="Take a plan without a sidecar.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for parity.json and parity.png.")] = None,
    as_json: Json = False,
) -> None:
    """Compare an engine with PyTorch on the same noise: steps, chains, labels, votes and certificates.

    Exit code 1 when they differ by more than the engine's precision may lose. The noise is public, so the radii are
    valid only for images chosen without regard to it. The picture needs densepure-rt\\[report].
    """
    with needs_pytorch("parity"):
        from densepure_rt.export.agreement import agree, draw, failures
        from densepure_rt.export.sources import comparison_images, open_models
    from densepure_rt.smoothing import Settings, load

    settings = Settings(sigma, steps, votes, n=n, alpha=alpha)
    if out is not None:
        make_folder(out)  # first: what follows may take long
    unet, classifier = open_models(models)
    chosen = comparison_images(unet, classifier, images, limit, say, COMPARED)
    with load(engine, batch=batch, threads=threads, provider=provider, trust=trust) as smoothed:
        found = agree(smoothed, unet, classifier, track(chosen, len(chosen), Status()), settings)
    failed = failures(found)
    report = finite({name: value for name, value in dataclasses.asdict(found).items() if name != "shown"})
    report["failures"] = failed
    if as_json:
        print(json.dumps(report))
    else:
        print_agreement(found)
    if out is not None:
        write_report(out, "parity", report, lambda path: draw(found, path))
    for line in failed:
        stderr.print(f"error: {line}")
    if failed:
        raise typer.Exit(CheckFailed.exit_code)


def finite(value: Any) -> Any:
    """A report as JSON can hold it: null for what is NaN or infinite."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error


def write_report(out: Path, name: str, report: dict[str, Any], draw: Callable[[Path], None]) -> None:
    try:
        (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw(out / f"{name}.png")
    except EnvironmentFault as fault:  # no matplotlib: the numbers are written all the same
        stderr.print(f"the picture was left out: {fault}")
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(out: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"cannot write {out} ({error.strerror}): choose another folder with --out")


def print_agreement(found: Agreement) -> None:
    table = Table(title=f"{found.engine} ({found.precision}) against PyTorch", title_justify="left", box=None)
    for column in ("level", "relative L2", "largest", "differ", "of", "fewer than"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for gap in found.steps:
        at = f"timestep {gap.timestep}" if gap.timestep is not None else f"noise {gap.noise:.3g}"
        table.add_row(f"step {gap.step + 1}, {at}", raised(gap.relative_l2, figures=2), raised(gap.max_abs, figures=2))
    table.add_row("whole chain", raised(found.chain_relative_l2, figures=2), raised(found.chain_max_abs, figures=2))
    for name, share in (("labels", found.labels), ("votes", found.votes)):
        table.add_row(name, "", "", f"{share.differ:,}", f"{share.total:,}", raised(share.upper, 2, percent=True))
    stdout.print(table)
    table = Table(title="radii on the same samples", title_justify="left", box=None)
    for column in ("idx", "class", "PyTorch", "engine", "transferred", "eta"):
        table.add_column(column, justify="right")
    for row in found.certificates:
        radii = ("abstains" if r is None else floored(r) for r in (row.torch, row.engine, row.transferred))
        table.add_row(str(row.idx), str(row.predict), *radii, raised(row.eta, figures=2))
    stdout.print(table)
    stdout.print("the noise is public: a transferred radius is valid only for images chosen without regard to it")


@with_models
def bench(
    models: ModelOptions,
    engine: EngineFile = None,
    images: Annotated[
        Path | None, typer.Option(help="Images of the engine's size; default: the shipped ones, or made up.")
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the noise, in [0, 1] units; default: 0.5, with --procedure 0.25, which is the "
            "radius too."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Items a call; default: as certify runs the engine.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores for each route; default: all.")] = None,
    provider: ProviderName = "cpu",
    rounds: Annotated[
        int | None, typer.Option(help="Calls of each route, in turns; default: 20.", rich_help_panel=STEP)
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Time torch.compile too, which takes a minute to start; default: yes.",
            rich_help_panel=STEP,
        ),
    ] = None,
    procedure: Annotated[
        bool,
        typer.Option(
            "--procedure",
            help="Compare whole certifications: the published procedure in PyTorch, run small and priced at n = "
            "100,000, with ours, run for real, which can take minutes an image.",
            rich_help_panel=PROCEDURE,
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option("--max", help="How many images; default: 10, or what there is.", rich_help_panel=PROCEDURE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Reverse steps (b) of both; default: 10.", rich_help_panel=PROCEDURE)
    ] = None,
    votes: Annotated[
        int | None, typer.Option(help="Votes a noise sample (K) of both; default: 40.", rich_help_panel=PROCEDURE)
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(help="Samples of an image that ours takes at most; default: 10000.", rich_help_panel=PROCEDURE),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Public seed of both; default: 0.", rich_help_panel=PROCEDURE)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for procedure.json and procedure.png.", rich_help_panel=PROCEDURE)
    ] = None,
    as_json: Json = False,
) -> None:
    """Time an engine against PyTorch in one run: a reverse step by stages, or with --procedure whole certifications.

    Speed is a ratio in one run on one machine; with other work on the cores, --threads 1 is the steadier. The picture
    needs densepure-rt\\[report].
    """
    from densepure_rt.smoothing import provider_of

    shared = {"sigma": sigma, "batch": batch, "threads": threads, "provider": provider_of(provider)}
    of_step = {"rounds": rounds, "compile": compiled}
    of_procedure = {"steps": steps, "votes": votes, "n": n, "seed": seed}
    if procedure:
        refuse_given(of_step, "a single step, which --procedure does not time: leave them out")
        bench_procedure(models, engine, images, limit, given(shared | of_procedure), out, as_json)
    else:
        refuse_given({"max": limit, **of_procedure, "out": out}, "--procedure: add it, or leave them out")
        bench_step(models, engine, images, given(shared | of_step), as_json)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were typed; what is not is left to the defaults of what they are for."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_given(options: dict[str, Any], owner: str) -> None:
    """Raise UsageError for options that were typed where they mean nothing."""
    if typed := [("--no-" if value is False else "--") + name for name, value in given(options).items()]:
        raise UsageError(f"{', '.join(typed)}: only for {owner}")


def bench_step(
    models: ModelOptions, engine: Path | None, images: Path | None, options: dict[str, Any], as_json: bool
) -> None:
    """Time a reverse step. options: of `densepure_rt.export.bench.bench`."""
    with needs_pytorch("bench"):
        from densepure_rt.export.bench import bench as measure
        from densepure_rt.export.sources import comparison_images, open_models
    import numpy as np

    from densepure_rt.runtime.bundle import open_bundle
    from densepure_rt.smoothing import shipped_engine

    unet, classifier = open_models(models)
    pixels = np.stack([image.pixels for image in comparison_images(unet, classifier, images, None, say)])
    found = measure(unet, classifier, open_bundle(engine or shipped_engine()), pixels, say=say, **options)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print_benchmark(found)


def bench_procedure(
    models: ModelOptions,
    engine: Path | None,
    images: Path | None,
    limit: int | None,
    options: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare whole certifications. options: of `densepure_rt.export.procedure.compare`."""
    with needs_pytorch("bench"):
        from densepure_rt.export.procedure import compare
        from densepure_rt.export.sources import comparison_images, open_models
    from densepure_rt.runtime.bundle import open_bundle
    from densepure_rt.smoothing import shipped_engine

    if out is not None:
        make_folder(out)  # first: what follows may take long
    unet, classifier = open_models(models)
    chosen = comparison_images(unet, classifier, images, limit, say, CERTIFIED)
    found = compare(
        unet, classifier, open_bundle(engine or shipped_engine()), chosen, say=say, watch=watched, **options
    )
    report = finite(dataclasses.asdict(found))
    if as_json:
        print(json.dumps(report))
    else:
        print_procedures(found)
    if out is not None:
        write_report(out, "procedure", report, lambda path: draw_procedures(found, path))


def watched(work: Iterable[T], total: int) -> Iterable[T]:
    return track(work, total, Status())


def words(value: str, option: str, known: Sequence[str]) -> list[str]:
    """A comma list, each word known."""
    found = [word.strip() for word in value.split(",")]
    for word in found:
        if word not in known:
            raise UsageError(f"{option} {word} is not known: {', '.join(known)}")
    return found


def number(word: str, option: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{option} takes whole numbers with commas between, found {word!r}") from None


def gradient_proposals(bundle: Bundle, settings: Settings) -> Proposals:
    """What gradients through PyTorch propose to an attack: none without it, or of other models than the shipped."""
    from densepure_rt.falsify_run import no_proposals

    try:
        from densepure_rt.export.eot_pgd import eot_pgd
        from densepure_rt.export.sources import open_models, refuse_other_models
    except Exception as error:  # PyTorch is not there, or fails when it is imported: the other attacks need none of it
        raise_interrupt(error)
        return no_proposals
    unet, classifier = open_models(ModelOptions())
    try:
        refuse_other_models(unet, classifier, bundle)
    except UsageError:
        return no_proposals

    def proposals(image: LabelledImage, certificate: Certificate) -> Iterator[NDArray[np.uint8]]:
        if certificate.predict is None or not certificate.radius:
            return iter(())
        endless = eot_pgd(unet, classifier, image.pixels, certificate.predict, certificate.radius, settings, image.idx)
        return islice(endless, PROPOSALS)

    return proposals
