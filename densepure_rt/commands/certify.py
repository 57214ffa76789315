"""`densepure-rt certify`: certify images, forecast the cost first, and go on where a run was stopped."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from densepure_rt import logs, signals
from densepure_rt.commands.console import be_quiet, in_options, print_attacks, rows, stderr, stdout, track
from densepure_rt.commands.options import (
    Alpha,
    BatchSize,
    ClassifierFile,
    Engine,
    EngineHash,
    Images,
    Json,
    Key,
    Max,
    ProviderName,
    Rule,
    Seed,
    Sigma,
    Skip,
    Steps,
    Threads,
    Trust,
    Votes,
    folder_of,
    make_settings,
    none_as,
    open_classifier,
    open_image_set,
    radii_of,
    say_precision,
    seconds_of,
    secret_of,
    was_typed,
)
from densepure_rt.errors import CheckFailed, UsageError, raise_interrupt
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.optional import optional
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.text import duration, plural

if TYPE_CHECKING:
    from densepure_rt.images.datasets import ImageSet
    from densepure_rt.runs.records import Summary
    from densepure_rt.runs.shards import Shard
    from densepure_rt.smoothing.certificate import Abstention
    from densepure_rt.smoothing.classifier import SmoothedClassifier
    from densepure_rt.smoothing.forecast import Forecast, Range
    from densepure_rt.smoothing.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from densepure_rt.images.datasets import LabelledImage
    from densepure_rt.runs.falsify import Proposals
    from densepure_rt.runtime.bundle import Bundle
    from densepure_rt.smoothing.certificate import Certificate
    from densepure_rt.smoothing.settings import Settings

PROPOSALS = 2  # of gradients, to an attack
# What the forecast says of a device, of all that its manifest does.
SHOWN = ("provider", "onnxruntime", "tensorrt", "processor", "gpu", "driver_release", "threads", "batch", "workers")


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
    from densepure_rt.runs.certify import certify_images
    from densepure_rt.runs.falsify import check_share, no_proposals
    from densepure_rt.runs.shards import Shard
    from densepure_rt.smoothing.forecast import forecast
    from densepure_rt.smoothing.settings import RULES, Budget

    if falsify is not None:
        check_share(falsify)
    if cluster is None and (workers, group) != (None, None):
        raise UsageError("--workers and --group are of --cluster: name one, such as --cluster ray")
    if cluster is not None and falsify is not None:
        raise UsageError("--falsify needs an engine here: run it once more without --cluster when all is certified")
    be_quiet(quiet)
    logs.set_up(verbose, log_json, in_options)
    seconds = Budget(seconds_of(budget, "--budget"), seconds_of(run_budget, "--run-budget"))
    asked: dict[str, Any] = {"method": method, "radii": radii_of(radii, radii_sigma, sigma), "radius_loss": radius_loss}
    asked |= {"sigma": sigma, "steps": steps, "votes": votes, "n0": n0, "n": n, "alpha": alpha}
    settings = make_settings(context, preset, **asked, timestep_rule=timestep_rule)
    if RULES[settings.method].anytime and was_typed(context, "n0") and preset is None:
        raise UsageError(f"--n0 is of --method fixed alone, and {method} was asked for: leave it out")
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
        summary, attacks = certify_images(
            smoothed, chosen, settings, expected, folder, seed, seconds, falsify, proposals, part, track
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
    from densepure_rt.keys import seeded_secret

    with optional("--cluster", "Ray", "run \"pip install 'densepure-rt[cluster]'\""):
        from densepure_rt.cluster import ray_workers as ray_cluster
    say_precision(engine, provider)
    engine, classifier = (None if path is None else path.absolute() for path in (engine, classifier))
    recipe = ray_cluster.Recipe(engine, classifier, batch, none_as(1, threads), provider, sha256, trust)
    key = secret if seed is None else seeded_secret(seed)
    return ray_cluster.open_on_cluster(cluster, recipe, workers, group, key)


def ranged(found: Range, show: Callable[[float], str]) -> str:
    """Show what is expected, and how little or much it can be."""
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


def gradient_proposals(bundle: Bundle, settings: Settings) -> Proposals:
    """Propose to an attack by gradients through PyTorch; nothing without it, or of other models than the shipped."""
    from densepure_rt.runs.falsify import no_proposals

    try:
        from densepure_rt.export.compare.eot_pgd import eot_pgd
        from densepure_rt.export.models.sources import open_models, refuse_other_models
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
