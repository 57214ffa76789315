"""The command line: options in, one call, one printed result. Nothing is computed here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from densepure_rt import __version__, logs, signals
from densepure_rt.audit_commands import audit, replay, reveal
from densepure_rt.console import Json, Status, be_quiet, duration, plural, rows, stderr, stdout, track
from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.import_command import import_
from densepure_rt.model_commands import bench, export, gradient_proposals, parity
from densepure_rt.optional import optional
from densepure_rt.options import (
    Alpha,
    BatchSize,
    ClassifierFile,
    Engine,
    EngineHash,
    ProviderName,
    Rule,
    Seed,
    Sigma,
    Steps,
    Threads,
    Trust,
    Votes,
    folder_of,
    radii_of,
    seconds_of,
)
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.run_commands import compare, merge, print_attacks, report
from densepure_rt.runtime.native_calls import leaving_calls
from densepure_rt.serve_command import serve
from densepure_rt.text import printable

if TYPE_CHECKING:
    from densepure_rt.datasets import ImageSet
    from densepure_rt.forecast import Forecast, Range
    from densepure_rt.records import Abstention, Summary
    from densepure_rt.shards import Shard
    from densepure_rt.smoothing import Predicted, Settings, SmoothedClassifier

# What the forecast says of a device, of all that its manifest does.
SHOWN = ("provider", "onnxruntime", "tensorrt", "processor", "gpu", "driver_release", "threads", "batch", "workers")
READER_GONE = 141  # 128 + SIGPIPE, as of a program that the signal ends
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EPIPE, errno.EROFS)
SHIPPED_MAX = 25  # of the 500 shipped images, so that a plain `certify` ends within 10 minutes on 2 cores


class Commands(TyperGroup):
    """Ctrl-C, or a signal that means the same, ends anywhere in one line and the shell's exit code for it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stderr.print("stopped")
            raise typer.Exit(signals.exit_code()) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Certified-robust classification by diffusion purification and voting (DensePure), on ONNX engines.",
)

Images = Annotated[
    Path | None,
    typer.Option(
        help="One split: folder of class folders, folder with labels.csv (file,label), images, .npz (x, y), IDX or "
        "CIFAR-10 .bin; default: the shipped Fashion-MNIST test images."
    ),
]
Skip = Annotated[int, typer.Option(help="Take every SKIP-th image.")]
Max = Annotated[
    int | None, typer.Option("--max", help=f"How many images; default: all, {SHIPPED_MAX} of the shipped ones.")
]
Key = Annotated[
    Path | None,
    typer.Option(
        help="Regular file, no pipe, with the secret that keys all noise, made where there is none; not with --seed. "
        "To reveal one run makes public what all runs of its key file are keyed with."
    ),
]


@app.callback(invoke_without_command=True)
def densepure_rt(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        stdout.print(__version__)
        raise typer.Exit


@app.command()
def certify(
    context: typer.Context,
    engine: Engine = None,
    classifier: ClassifierFile = None,
    images: Images = None,
    sigma: Sigma = 0.5,
    steps: Steps = 2,
    votes: Votes = 5,
    method: Annotated[
        str,
        typer.Option(
            help="sequential: stop as soon as it is clear which of --radii hold. radius: stop near the largest radius. "
            "fixed: Cohen et al. 2019, n0 and n samples an image. With the first two, the label of an image that has "
            "one is the class that is asked about: it must not come from a run with the same secret."
        ),
    ] = "sequential",
    radii: Annotated[
        str | None, typer.Option(help="sequential: l2 radii with commas, in [0, 1] pixel units; default: 0 and sigma.")
    ] = None,
    radii_sigma: Annotated[str | None, typer.Option(help="The same in multiples of sigma, such as 0,0.5,1.")] = None,
    radius_loss: Annotated[
        float | None,
        typer.Option(help="radius: the share of the radius to give up for stopping early; default: 0.05."),
    ] = None,
    n: Annotated[
        int, typer.Option(help="Samples an image: at most; fixed: those that bound its probability.")
    ] = 10_000,
    n0: Annotated[int, typer.Option(help="fixed: samples that select the class, before the n.")] = 100,
    alpha: Alpha = 0.001,
    timestep_rule: Rule = None,
    preset: Annotated[
        str | None, typer.Option(help="paper: --steps 10 --votes 40 --n0 100 --n 100000, as published.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time an image may take, such as 30s, 5min or 1h: then its best radius so far is its answer."
        ),
    ] = None,
    run_budget: Annotated[
        str | None, typer.Option(help="Time that this call may take, such as 2h; a run that goes on has it anew.")
    ] = None,
    falsify: Annotated[
        float | None,
        typer.Option(
            help="Share of the samples, such as 0.05, to attack the certificates with afterwards, inside their radii; "
            "exit code 1 when one is broken. By gradients too, of the shipped model where PyTorch is here."
        ),
    ] = None,
    batch: BatchSize = None,
    threads: Threads = None,
    provider: ProviderName = "cpu",
    skip: Skip = 1,
    limit: Max = None,
    seed: Seed = None,
    key: Key = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Certify a part of the images, such as 2/8: every eighth one, from the second on. All shards take the "
            "same options and the same --key or --seed, and each its own --out; `merge` makes one run of them."
        ),
    ] = None,
    engine_sha256: EngineHash = None,
    trust: Trust = False,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=folder_of,
            metavar="PATH",
            help="Folder for the results; a run that is there goes on. Default: runs/certify-TIME, new.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="ray: on this machine's cores, or on the cluster of RAY_ADDRESS; ray://HOST:PORT: on that cluster. A "
            "worker a GPU, or for each --threads CPUs (1), opens --engine on its own machine; no result depends on it."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="cluster: how many; default: as many as there is room for.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="cluster: of machines of several kinds, those whose hash begins so; default: the most."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, which happens anyway: for scripts that say so."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results, warnings and errors alone.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what comes of each image.")] = False,
    log_json: Annotated[
        Path | None, typer.Option("--log-json", help="Append what happens to this file, a JSON object a line.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost and the reach, certify nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Certify images: for each, a label and the l2 radius within which the smoothed classifier keeps to it."""
    from densepure_rt import certify_run, logs
    from densepure_rt.falsify_run import check_share, no_proposals
    from densepure_rt.forecast import forecast
    from densepure_rt.shards import Shard
    from densepure_rt.smoothing import Budget

    if falsify is not None:
        check_share(falsify)
    if method != "fixed" and was_typed(context, "n0") and preset is None:
        raise UsageError(f"--n0 is of --method fixed alone, and {method} was asked for: leave it out")
    if cluster is None and (workers, group) != (None, None):
        raise UsageError("--workers and --group are of --cluster: name one, such as --cluster ray")
    if cluster is not None and falsify is not None:
        raise UsageError("--falsify needs an engine here: run it once more without --cluster when all is certified")
    be_quiet(quiet)
    logs.set_up(verbose, log_json)
    seconds = Budget(seconds_of(budget, "--budget"), seconds_of(run_budget, "--run-budget"))
    asked: dict[str, Any] = {"method": method, "radii": radii_of(radii, radii_sigma, sigma), "radius_loss": radius_loss}
    asked |= {"sigma": sigma, "steps": steps, "votes": votes, "n0": n0, "n": n, "alpha": alpha}
    settings = make_settings(context, preset, **asked, timestep_rule=timestep_rule)
    if resume and out is None:
        raise UsageError("--resume goes on with a run: name its folder with --out")
    part = None if shard is None else Shard.parsed(shard)
    if part is not None and out is None and not dry_run:
        raise UsageError(f"--shard {part} needs a folder of its own, to go on in after a stop: name it with --out")
    if part is not None and falsify is not None:
        raise UsageError(f"--falsify attacks a whole run, not shard {part}: ask for it once more when all are merged")
    secret = None if dry_run else secret_of(seed, key, out)
    if part is not None and seed is None and secret is None and not dry_run:
        raise UsageError(f"--shard {part} needs the secret that all shards share: name one file for all of them, --key")
    opened = (engine, classifier, batch, threads, provider, engine_sha256, trust, seed, secret)
    smoothed = open_classifier(*opened) if cluster is None else open_on_cluster(cluster, workers, group, *opened)
    with smoothed:
        chosen = open_image_set(images, smoothed, skip, limit)
        mine = chosen if part is None else part.select(chosen)
        expected = forecast(smoothed, settings, len(mine), chosen.labelled)
        if not quiet:
            print_forecast(smoothed, chosen, settings, expected, part)
        if dry_run:
            if as_json:
                print(json.dumps(dataclasses.asdict(expected)))
            return
        folder = out or Path("runs") / datetime.datetime.now().strftime("certify-%Y%m%d-%H%M%S")
        proposals = gradient_proposals(smoothed.bundle, settings) if falsify is not None else no_proposals
        summary, attacks = certify_run.run(
            smoothed, chosen, settings, expected, folder, seed, seconds, falsify, proposals, part
        )
        print_summary(summary, chosen.labelled, folder, as_json)
        if summary.failed:
            which = ", ".join(map(str, summary.failed))
            stderr.print(
                f"error: {plural(len(summary.failed), 'image')} failed: {which}; {summary.done} of {summary.asked} are "
                f"kept in {folder}, and the same command tries the others again"
            )
        elif summary.done < summary.asked:
            why = "stopped" if summary.interrupted else "the time was up"
            stderr.print(f"{why} after {summary.done} of {summary.asked} images; what is done is kept in {folder}")
        if summary.interrupted:
            raise typer.Exit(signals.exit_code())
        if summary.failed:
            raise typer.Exit(CheckFailed.exit_code)
        if falsify is not None:
            print_attacks(attacks)


@app.command()
def predict(
    context: typer.Context,
    images: Images = None,
    engine: Engine = None,
    classifier: ClassifierFile = None,
    sigma: Sigma = 0.5,
    steps: Steps = 2,
    votes: Votes = 5,
    n: Annotated[int, typer.Option(help="Noise samples an image at most; 13 that agree are enough.")] = 1000,
    alpha: Alpha = 0.001,
    timestep_rule: Rule = None,
    batch: BatchSize = None,
    threads: Threads = None,
    provider: ProviderName = "cpu",
    skip: Skip = 1,
    limit: Max = None,
    seed: Seed = None,
    key: Key = None,
    engine_sha256: EngineHash = None,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Label images with the smoothed classifier, or abstain (-1). Without --seed every call draws new noise.

    An image is sampled until one class has more than half of all votes but for probability alpha, or n are taken.
    """
    logs.set_up(verbose=False, file=None)
    settings = make_settings(
        context, sigma=sigma, steps=steps, votes=votes, n=n, alpha=alpha, timestep_rule=timestep_rule
    )
    secret = secret_of(seed, key)
    with open_classifier(engine, classifier, batch, threads, provider, engine_sha256, trust, seed, secret) as smoothed:
        chosen = open_image_set(images, smoothed, skip, limit)
        if notes := notes_on(chosen):
            rows(stderr, notes.items())
        if not as_json:
            print("idx\tlabel\tpredict\tcorrect\tname\tvotes\terror_bound")
        for found in track(smoothed.predict_each(chosen, settings), len(chosen), Status()):
            print_prediction(found, smoothed.class_names, as_json)


app.command()(serve)
app.command()(export)
app.command()(parity)
app.command()(bench)
app.command()(report)
app.command()(compare)
app.command()(merge)
app.command()(audit)
app.command()(replay)
app.command()(reveal)
app.command("import")(import_)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An engine file or its sidecar.")],
    as_json: Json = False,
) -> None:
    """Show what an engine is, and check its hash. Exit code 1 when the file is not what its sidecar says."""
    from densepure_rt.inspection import inspect as look

    report = look(file)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        rows(stdout, flattened(report))
    if not report["check"]["matches"]:
        stderr.print("error: the file's SHA-256 is not the one in its sidecar: it is damaged or another engine")
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what is missing for what, and the next command."""
    from densepure_rt.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        for finding in diagnosis.findings:
            style = {"ok": "green", "missing": "yellow", "broken": "red"}[finding.state]
            stdout.print(Text(f"{finding.state:<8}", style) + f"{finding.what:<16} {finding.found}")
        print(f"next: {diagnosis.next_command}")
    if not diagnosis.healthy:
        raise typer.Exit(EnvironmentFault.exit_code)


def make_settings(context: typer.Context, preset: str | None = None, **values: Any) -> Settings:
    """The settings that the options ask for. A preset gives way to options that were typed."""
    from densepure_rt.smoothing import PAPER, Settings

    if preset not in (None, "paper"):
        raise UsageError(f"--preset {preset} is not known: paper is the only one")
    if preset == "paper":
        said = {name: value for name, value in values.items() if was_typed(context, name)}
        values = said | ({} if values.get("radii") is None else {"radii": values["radii"]})  # of two options
        settings = dataclasses.replace(PAPER, **values)
    else:
        settings = Settings(**values)
    if settings.effective.votes < settings.votes:
        stderr.print(f"with --steps {settings.steps} nothing is random after the smoothing noise: votes set to 1")
    return settings


def secret_of(seed: int | None, key: Path | None, out: Path | None = None) -> bytes | None:
    """What the noise is keyed with, where there is no public seed; None for a new secret."""
    from densepure_rt.run_folder import agreed_secret

    if seed is not None and key is not None:
        raise UsageError("--seed and --key are two ways to say what keys the noise: give one")
    return agreed_secret(out, key) if seed is None else None


def was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def open_classifier(
    engine: Path | None,
    classifier: Path | None,
    batch: int | None,
    threads: int | None,
    provider: str,
    sha256: str | None,
    trust: bool,
    seed: int | None,
    secret: bytes | None = None,
) -> SmoothedClassifier:
    """secret: where there is no public seed; None for a new one."""
    from densepure_rt.smoothing import load, seeded_secret

    return load(
        engine,
        classifier,
        secret=secret if seed is None else seeded_secret(seed),
        batch=batch,
        threads=threads,
        provider=provider,
        engine_sha256=sha256,
        trust=trust,
    )


def open_on_cluster(
    cluster: str,
    workers: int | None,
    group: str | None,
    engine: Path | None,
    classifier: Path | None,
    batch: int | None,
    threads: int | None,
    provider: str,
    sha256: str | None,
    trust: bool,
    seed: int | None,
    secret: bytes | None,
) -> SmoothedClassifier:
    """As `open_classifier`, its samples drawn by workers elsewhere; paths are those of the workers' machines."""
    from densepure_rt.smoothing import seeded_secret

    with optional("--cluster", "Ray", "run \"pip install 'densepure-rt[cluster]'\""):
        from densepure_rt import cluster as ray_cluster
    engine, classifier = (None if path is None else path.absolute() for path in (engine, classifier))
    recipe = ray_cluster.Recipe(engine, classifier, batch, none_as(1, threads), provider, sha256, trust)
    key = secret if seed is None else seeded_secret(seed)
    return ray_cluster.open_on_cluster(cluster, recipe, workers, group, key)


def open_image_set(path: Path | None, smoothed: SmoothedClassifier, skip: int, limit: int | None) -> ImageSet:
    from densepure_rt.datasets import open_images

    limit = SHIPPED_MAX if path is None and limit is None else limit
    return open_images(path, smoothed.bundle.unet.image, smoothed.class_names).select(skip, limit)


def none_as(default: int, value: int | None) -> int:
    return default if value is None else value


def ranged(found: Range, show: Callable[[float], str]) -> str:
    """What is expected, and how little or much it can be."""
    least, expected, most = (show(value) for value in found)
    return least if least == most else f"about {expected} ({least} to {most})"


def counted(value: float) -> str:
    return f"{value:,.0f}"


def notes_on(images: ImageSet) -> dict[str, str]:
    """Name what was left out of the images' source, and how many grey images were repeated to colour."""
    repeated = f"{plural(images.repeated, 'grey image')} repeated to three channels" if images.repeated else ""
    notes = {"grey": repeated, "left out": "; ".join(map(str, images.left_out))}
    return {name: note for name, note in notes.items() if note}


def print_forecast(
    smoothed: SmoothedClassifier, images: ImageSet, settings: Settings, expected: Forecast, shard: Shard | None = None
) -> None:
    device = smoothed.sampler.describe()
    sigma, unet = settings.sigma, smoothed.bundle.unet
    timesteps = ", ".join(str(t) for t in smoothed.chain(settings).timesteps) or "none"
    rule = settings.timestep_rule or unet.timestep_rule
    timesteps += "" if rule == "nearest" else f" ({rule}'s rule)"
    lines = {
        "device": ", ".join(
            f"{device[name]}" if name == "provider" else f"{name} {device[name]}" for name in SHOWN if name in device
        ),
        "arithmetic": f"fingerprint {str(device['fingerprint'])[:16]}, "
        + (
            "another batch gave the same"
            if device["independent_of_batch"]
            else f"of batches of {device['batch']} alone"
        ),
        "engine": f"{smoothed.bundle.unet_path}, {unet.precision}, sha256 {unet.file.sha256[:16]}",
        "images": f"{expected.images} of {images.name}" + (f", shard {shard} of {len(images)}" if shard else ""),
        **notes_on(images),
        "noise": f"sigma {sigma:g} in [0, 1] pixel units ({2 * sigma:g} in the network's [-1, 1])",
        "steps": f"{settings.steps}, timesteps {timesteps}; {plural(settings.effective.votes, 'vote')} a sample",
        "method": settings.method,
        "samples": f"{ranged(expected.samples, counted)} an image",
        "UNet calls": f"{ranged(expected.unet_calls, counted)} an image",
        "time": ranged(expected.seconds, duration),
        "reach": f"no radius beyond {raised(expected.reach)} can be certified with n = {settings.n}",
    }
    if expected.radii:
        lines["radii"] = ", ".join(
            f"{exact(radius)} skipped: beyond reach"
            if agreeing is None
            else f"{exact(radius)} from {counted(agreeing)} samples"
            for radius, agreeing in expected.radii
        )
    rows(stderr, lines.items())


def abstentions(reasons: Mapping[Abstention, int]) -> str:
    words: Mapping[Abstention, str] = {
        "gave up": "given up as futile",
        "at n": "undecided after all n samples",
        "out of reach": "with no radius within reach",
        "out of time": "out of time",
    }
    each = ", ".join(f"{reasons[reason]} {said}" for reason, said in words.items() if reasons.get(reason))
    return f"{sum(reasons.values())} abstained" + (f" ({each})" if each else "")


def print_prediction(found: Predicted, names: Sequence[str], as_json: bool) -> None:
    image, label = found.image, found.label
    if as_json:
        votes = {name: int(count) for name, count in zip(names, found.votes, strict=True) if count}
        line = {"idx": image.idx, "label": image.label, "predict": label, "error_bound": found.error_bound}
        print(json.dumps(line | {"n": found.n, "votes": votes}), flush=True)
        return
    columns = (
        image.idx,
        none_as(-1, image.label),
        none_as(-1, label),
        int(label is not None and label == image.label),
        "abstain" if label is None else names[label],
        f"{found.votes.max()}/{found.n}",
        "-" if found.error_bound is None else raised(found.error_bound, figures=2),
    )
    print(*columns, sep="\t", flush=True)


def print_summary(summary: Summary, labelled: bool, folder: Path, as_json: bool) -> None:
    if as_json:
        shares = dict(zip(map(exact, summary.radii), summary.accuracy, strict=True))
        accuracy = shares if labelled else None
        print(json.dumps(dataclasses.asdict(summary) | {"accuracy": accuracy, "out": str(folder)}))
        return
    if labelled:
        table = Table(title=f"certified accuracy of {plural(summary.done, 'image')}", title_justify="left", box=None)
        table.add_column("radius")
        for radius in summary.radii:
            table.add_column(exact(radius), justify="right")
        cells = ("-" if share is None else floored_share(share) for share in summary.accuracy)
        table.add_row("certified", *cells)
        stdout.print(table)
    stdout.print(f"{abstentions(summary.reasons)}; {summary.samples:,.0f} samples an image; results in {folder}")


def flattened(report: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested report as dotted names and printable values."""
    rows: list[tuple[str, str]] = []
    for name, value in report.items():
        if isinstance(value, dict):
            rows += flattened(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return rows


def in_options(error: DensePureError) -> str:
    """Return an error's message, with the parameter that it begins with as the option of that name."""
    parameter, message = getattr(error, "parameter", None), str(error)
    if parameter is None or not message.startswith(f"{parameter} "):
        return message
    return f"--{parameter.replace('_', '-')}{message.removeprefix(parameter)}"


@leaving_calls
def main() -> None:
    """Run the command line: any error, also of output that cannot be written, is one message and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal knows fewer characters
    if sys.stderr is None:  # closed by whoever started it: print would take stdout instead
        sys.stderr = io.TextIOWrapper(io.FileIO(os.devnull, "w"))
    code = ended()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        code = code or not_written(error)
    sys.exit(code or (EnvironmentFault.exit_code if logs.lost() else 0))


def ended() -> int:
    """Run the command. Returns its exit code, and says of an error what it is."""
    out = sys.stdout
    try:
        with signals.asking_to_end():
            app()
    except KeyboardInterrupt:  # between a command's end and ours
        tell("stopped")
        return signals.exit_code()
    except SystemExit as exit:
        if sys.stdout is not out:  # click puts another in its place when who reads it is gone
            return READER_GONE
        if exit.code and signals.asked():  # click makes 1 of an interrupt that comes before or after a command
            return signals.exit_code()
        return int(exit.code or 0)
    except DensePureError as error:
        tell("stopped" if signals.swallowed() else printable(f"error: {in_options(error)}", keep="\n"))
        return signals.exit_code() if signals.asked() else error.exit_code
    except MemoryError:
        tell("error: this does not fit into memory: ask for a smaller --batch")
        return EnvironmentFault.exit_code
    except OSError as error:
        if error.errno in UNWRITTEN:
            return not_written(error)
        where = "" if error.filename is None else f"{error.filename}: "
        tell(printable(f"error: {where}{error.strerror or error}"))
        return EnvironmentFault.exit_code
    except Exception:  # compiled code makes errors of many kinds of an interrupt: any other is a fault of ours
        if not signals.asked():
            raise
        tell("stopped")
        return signals.exit_code()
    return 0


def not_written(error: OSError) -> int:
    """Say that output could not be written, unless its reader is gone: `| head` has had enough."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):  # of a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit stays quiet
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    where = error.filename or "the output"
    tell(printable(f"error: cannot write {where} ({error.strerror}): what was done before it is kept"))
    return EnvironmentFault.exit_code


def tell(message: str) -> None:
    """Print on stderr, if that takes it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
