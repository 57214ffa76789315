"""`densepure-rt certify`: certify images, forecast the cost first, and go on where a run was stopped."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from densepure_rt import signals
from densepure_rt.commands.config import write_config
from densepure_rt.commands.console import print_attacks, ranged, rows, stderr, stdout, track
from densepure_rt.commands.from_run import to_keep
from densepure_rt.commands.groups import with_options
from densepure_rt.commands.image_options import ImageOptions
from densepure_rt.commands.options import (
    CERTIFICATES,
    IMAGES,
    ClusterOptions,
    EngineOptions,
    OutputOptions,
    RunMessageOptions,
    RunOptions,
    SecretOptions,
)
from densepure_rt.commands.values import seconds_of
from densepure_rt.errors import CheckFailed, UsageError, raise_interrupt
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.rounding import exact, floored_share, raised
from densepure_rt.text import duration, numbered, plural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from densepure_rt.images.datasets import ImageSet, LabelledImage
    from densepure_rt.runs.falsify import Proposals
    from densepure_rt.runs.records import Summary
    from densepure_rt.runs.shards import Shard
    from densepure_rt.runtime.bundle import Bundle
    from densepure_rt.smoothing.certificate import Abstention, Certificate
    from densepure_rt.smoothing.classifier import SmoothedClassifier
    from densepure_rt.smoothing.forecast import Forecast
    from densepure_rt.smoothing.settings import Settings

PROPOSALS = 2  # of gradients, to an attack
# What the forecast says of a device, of all that its manifest does.
SHOWN = ("provider", "onnxruntime", "tensorrt", "processor", "gpu", "driver_release", "threads", "batch", "workers")


@with_options
def certify(
    source: ImageOptions,
    asked: RunOptions,
    engines: EngineOptions,
    noise: SecretOptions,
    output: OutputOptions,
    elsewhere: ClusterOptions,
    messages: RunMessageOptions,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time limit per image, such as 30s, 5min or 1h. When it is up, the answer is the best radius so far.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None,
    run_budget: Annotated[
        str | None,
        typer.Option(
            help="Time limit of this call, such as 2h. A resumed run gets it again.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None,
    falsify: Annotated[
        float | None,
        typer.Option(
            help="Attack the certificates afterwards, inside their radii, with this share of the samples, such as "
            "0.05. Exit code 1 if one is broken. Attacks by gradients need PyTorch and the shipped model.",
            rich_help_panel=CERTIFICATES,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Certify a part of the images: 2/8 takes every eighth one, from the second on. All shards need "
            "the same options and the same --key or --seed, and each its own --out. `merge` joins them into "
            "one run.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
) -> None:
    """Certify images: find a label and the l2 radius within which the smoothed classifier keeps it."""
    from densepure_rt.runs.certify import RunRequest, certify_images, unwatched
    from densepure_rt.runs.falsify import check_share, no_proposals
    from densepure_rt.runs.shards import Shard
    from densepure_rt.smoothing.forecast import forecast
    from densepure_rt.smoothing.settings import Budget

    if falsify is not None:
        check_share(falsify)
    elsewhere.check()
    if elsewhere.cluster is not None and falsify is not None:
        raise UsageError("--falsify needs an engine here: run it once more without --cluster when all is certified")
    messages.set_up()
    seconds = Budget(seconds_of(budget, "--budget"), seconds_of(run_budget, "--run-budget"))
    settings = asked.settings()
    output.check()
    kept = source.kept() | to_keep(asked.given, settings)
    if output.save_config is not None:
        write_config(output.save_config, kept)
    part = None if shard is None else Shard.parsed(shard)
    if part is not None:
        refuse_half_a_shard(part, output, falsify)
    secret = None if output.dry_run else noise.secret(output.out)
    if part is not None and secret is None and not output.dry_run:
        raise UsageError(f"--shard {part} needs the secret that all shards share: name one file for all of them, --key")
    with elsewhere.open(engines, secret) as smoothed:
        folder = output.out or Path("runs") / datetime.datetime.now().strftime("certify-%Y%m%d-%H%M%S")
        images = source.open(smoothed)
        request = RunRequest(images, settings, folder, noise.seed, seconds, part, falsify, kept)
        expected = forecast(smoothed, settings, len(request.mine), request.images.labelled)
        if not messages.quiet:
            print_forecast(smoothed, request.images, settings, expected, part)
        if output.dry_run:
            if output.as_json:
                print(json.dumps(dataclasses.asdict(expected)))
            return
        proposals = no_proposals if falsify is None else gradient_proposals(smoothed.bundle, settings)
        summary, attacks = certify_images(smoothed, request, proposals, unwatched if messages.quiet else track)
        print_summary(summary, request.images.labelled, folder, output.as_json)
        print_ending(summary, folder, request.images.names)
        if falsify is not None:
            print_attacks(attacks, request.images.names)


def refuse_half_a_shard(shard: Shard, output: OutputOptions, falsify: float | None) -> None:
    """Raise UsageError for a shard that is kept nowhere, or that would be attacked by itself."""
    if output.out is None and not output.dry_run:
        raise UsageError(f"--shard {shard} needs a folder of its own, to go on in after a stop: name it with --out")
    if falsify is not None:
        raise UsageError(f"--falsify attacks a whole run, not shard {shard}: ask for it once more when all are merged")


def print_ending(summary: Summary, folder: Path, names: Mapping[int, str]) -> None:
    """Say which images are missing, and why. Raises typer.Exit where some failed, or the run was interrupted.

    names: by the images' idx.
    """
    if summary.failed:
        which = ", ".join(numbered(idx, names.get(idx)) for idx in summary.failed)
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


def counted(value: float) -> str:
    return f"{value:,.0f}"


def notes_on(images: ImageSet) -> dict[str, str]:
    """Name what was left out of the images' source, and how many grey images were repeated to colour."""
    repeated = f"{plural(images.repeated, 'grey image')} repeated to three channels" if images.repeated else ""
    how = images.prepared
    done = [f"fit {how.fit}"] * (how.fit is not None) + [f"converted, on {how.background}"] * how.convert
    prepared = f"{', '.join(done)}, by Pillow: radii are in these pixels" if done else ""
    notes = {"grey": repeated, "prepared": prepared, "left out": "; ".join(map(str, images.left_out))}
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
